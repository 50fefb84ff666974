#pragma once
// Arguments of the vector kernels under lightning attention, paged attention and sampling
// (IsaTable). Pointers to f32 rows need no alignment. "Padded" rows are zero up to a multiple of
// kRowPad, so that dot products over them have no tail.

#include <cstdint>

namespace godwit {

inline constexpr int kRowPad = 16;  // the widest vector, in f32
[[gnu::always_inline]] inline constexpr int64_t PadRow(int64_t n) {
  return (n + kRowPad - 1) / kRowPad * kRowPad;
}

// c[r][n] = row_scale[r] * (c0 + sum_{i < depth[r]} a[r][i] b[i][n]), c0 = c[r][n] if accumulate,
// else 0; i ascending, fused. An element's bits depend on nothing but its own a row, b column and
// depth.
struct TileProductArgs {
  const float* a = nullptr;
  int64_t a_stride = 0;
  const float* b = nullptr;
  int64_t b_stride = 0;
  float* c = nullptr;
  int64_t c_stride = 0;
  int rows = 0;
  int columns = 0;
  const int32_t* depth = nullptr;    // [rows]
  const float* row_scale = nullptr;  // [rows], or null: 1
  bool accumulate = false;
};

// to[d][n] = s + (dS - epsilon s), s = from[d][n], dS = sum_{j < num_tokens} k[j][d] v[j][n], j
// ascending from zero, fused.
struct FoldStateArgs {
  const float* k = nullptr;  // rows already multiplied by lambda^(num_tokens - 1 - j)
  int64_t k_stride = 0;
  const float* v = nullptr;
  int64_t v_stride = 0;
  int num_tokens = 0;
  float epsilon = 0;
  const float* from = nullptr;
  int64_t from_stride = 0;
  float* to = nullptr;  // may be `from`
  int64_t to_stride = 0;
  int64_t num_rows = 0;  // d_k
  int columns = 0;
};

// scores[j] = weights[j] * (q . k_j), j in [0, num_keys); q and k padded rows.
struct DotRowsArgs {
  const float* q = nullptr;
  const float* k = nullptr;
  int64_t k_stride = 0;
  int64_t length = 0;  // of a row, a multiple of kRowPad
  int num_keys = 0;
  const float* weights = nullptr;
  float* scores = nullptr;
};

// y[r] = round(scale * lrpe(activation(x[r]))), padded. With cos and sin, y = [x cos, x sin] of
// width 2 n.
struct FormHeadArgs {
  const void* x = nullptr;  // [rows, n], bf16 or f32
  int64_t x_stride = 0;     // elements
  bool is_bf16 = false;
  bool silu = false;
  bool round_bf16 = false;
  int64_t rows = 0;
  int64_t n = 0;
  const float* cos = nullptr;  // [rows, n] or null
  const float* sin = nullptr;
  int64_t angle_stride = 0;
  float scale = 1;
  float* y = nullptr;
  int64_t y_stride = 0;
};

// cos and sin of position * frequency[i], the product reduced mod 2 pi in double, within 2 units of
// the last place of 1.
struct SinCosArgs {
  double position = 0;
  const double* frequency = nullptr;  // one of the two
  const float* frequency_f32 = nullptr;
  int64_t n = 0;
  float* cos = nullptr;
  float* sin = nullptr;
};

// y[r][0..columns) = x[r][0..columns) as f32.
struct WidenRowsArgs {
  const void* x = nullptr;
  bool is_bf16 = false;
  int64_t x_stride = 0;  // elements
  int64_t rows = 0;
  int64_t columns = 0;
  float* y = nullptr;
  int64_t y_stride = 0;
};

// y[r][i] = scale[r] * x[r][i].
struct ScaleRowsArgs {
  const float* x = nullptr;
  int64_t stride = 0;  // of x and y
  int64_t rows = 0;
  int64_t columns = 0;  // a multiple of kRowPad
  const float* scale = nullptr;
  float* y = nullptr;
};

// x[r][i] *= weights[i - r] for i <= r; what lies beyond the diagonal, up to a multiple of kRowPad,
// is left undefined.
struct ScaleTriangleArgs {
  float* x = nullptr;
  int64_t stride = 0;
  int64_t rows = 0;
  const float* weights = nullptr;  // may be read from weights[1 - rows] to weights[kRowPad]
};

// y[i][r] = x[r][i], r < rows, i < columns.
struct TransposeArgs {
  const float* x = nullptr;
  int64_t x_stride = 0;
  int64_t rows = 0;
  int64_t columns = 0;
  float* y = nullptr;
  int64_t y_stride = 0;
};

// max = max_j x[j]; x[j] <- exp(x[j] - max); sum = sum of them in one fixed order. n >= 1.
struct SoftmaxRangeArgs {
  float* x = nullptr;
  int64_t n = 0;
  float max = 0;
  float sum = 0;
};

// The largest element, and whether any is NaN or +inf. n >= 1.
struct ScanLogitsArgs {
  const float* x = nullptr;
  int64_t n = 0;
  float max = 0;
  bool bad = false;
};

// sum_j exp(x[j] - max), in double; with y: y[j] = exp(x[j] - max).
struct SumExpArgs {
  const float* x = nullptr;
  int64_t n = 0;
  float max = 0;
  float* y = nullptr;
  double sum = 0;
};

// The number of x[i] >= threshold, and the sum of their weights in double (of ones where weights is
// null).
struct CountAtLeastArgs {
  const float* x = nullptr;
  const float* weights = nullptr;
  int64_t n = 0;
  float threshold = 0;
  int64_t count = 0;
  double sum = 0;
};

// x[i] <- by[i] >= threshold ? x[i] : -inf.
struct KeepAtLeastArgs {
  float* x = nullptr;
  const float* by = nullptr;  // may be x
  int64_t n = 0;
  float threshold = 0;
};

// x[i] <- (x[i] - max) / temperature.
struct TemperArgs {
  float* x = nullptr;
  int64_t n = 0;
  float max = 0;
  float temperature = 1;
};

// The index of the largest x[i] + gumbel(i), lowest index of equals; gumbel as SampleRow says. x[i]
// = -inf is never drawn unless all are.
struct GumbelArgmaxArgs {
  const float* x = nullptr;
  int64_t n = 0;
  uint64_t seed = 0;
  uint32_t counter[3] = {0, 0, 0};  // words 1..3 of the counter
  int64_t index = 0;
};

}  // namespace godwit
