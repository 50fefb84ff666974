// The kernels of vector_ops.h over the vectors of simd_<set>-inl.h; compiled once per instruction
// set.

#include <cstdint>

#include "kernels/cpu/vector_ops.h"

namespace godwit {
namespace {

// Rows x vectors of an accumulator tile; the last vector of a partial tile has `last` lanes.
template <int kRows, int kVectors, bool kPartial>
inline void ProductTile(const TileProductArgs& args, int row, int column, int last) {
  VecF acc[kRows][kVectors];
  float* const c = args.c + row * args.c_stride + column;
  auto load = [&](const float* p, int v) {
    return kPartial && v == kVectors - 1 ? LoadPartial(p + v * kLanes, last) : Load(p + v * kLanes);
  };
  int32_t common = args.depth[row];
  for (int r = 0; r < kRows; ++r) {
    common = args.depth[row + r] < common ? args.depth[row + r] : common;
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = args.accumulate ? load(c + r * args.c_stride, v) : Zero();
    }
  }
  const float* const a = args.a + row * args.a_stride;
  const float* b = args.b + column;
  for (int32_t i = 0; i < common; ++i, b += args.b_stride) {
    VecF b_row[kVectors];
    for (int v = 0; v < kVectors; ++v) b_row[v] = load(b, v);
    for (int r = 0; r < kRows; ++r) {
      const VecF a_element = Set1(a[r * args.a_stride + i]);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Fma(a_element, b_row[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    // What a row has beyond the shortest of its tile: the terms of no row depend on its neighbours.
    const float* b_rest = b;
    for (int32_t i = common; i < args.depth[row + r]; ++i, b_rest += args.b_stride) {
      const VecF a_element = Set1(a[r * args.a_stride + i]);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Fma(a_element, load(b_rest, v), acc[r][v]);
    }
    const VecF scale = Set1(args.row_scale == nullptr ? 1.0f : args.row_scale[row + r]);
    for (int v = 0; v < kVectors; ++v) {
      float* const out = c + r * args.c_stride + v * kLanes;
      if (kPartial && v == kVectors - 1) {
        StorePartial(out, Mul(acc[r][v], scale), last);
      } else {
        Store(out, Mul(acc[r][v], scale));
      }
    }
  }
}

// All columns of kRows rows, in tiles of kVectors vectors, then halves of it, then the partial
// vector.
template <int kRows, int kVectors>
inline void ProductRows(const TileProductArgs& args, int row, int column) {
  for (; column + kVectors * kLanes <= args.columns; column += kVectors * kLanes) {
    ProductTile<kRows, kVectors, false>(args, row, column, 0);
  }
  if constexpr (kVectors > 1) {
    ProductRows<kRows, kVectors / 2>(args, row, column);
  } else if (column < args.columns) {
    ProductTile<kRows, 1, true>(args, row, column, args.columns - column);
  }
}

void TileProduct(const TileProductArgs& args) {
  int row = 0;
  for (; row + 4 <= args.rows; row += 4) ProductRows<4, kTileVectors>(args, row, 0);
  if (row + 2 <= args.rows) {
    ProductRows<2, kTileVectors>(args, row, 0);
    row += 2;
  }
  if (row < args.rows) ProductRows<1, kOneRowVectors>(args, row, 0);
}

template <int kRows, int kVectors, bool kPartial>
inline void FoldTile(const FoldStateArgs& args, int64_t row, int column, int last) {
  VecF acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) acc[r][v] = Zero();
  }
  const float* k = args.k + row;
  const float* v_row = args.v + column;
  for (int j = 0; j < args.num_tokens; ++j, k += args.k_stride, v_row += args.v_stride) {
    VecF values[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      values[v] = kPartial ? LoadPartial(v_row + v * kLanes, last) : Load(v_row + v * kLanes);
    }
    for (int r = 0; r < kRows; ++r) {
      const VecF key = Set1(k[r]);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Fma(key, values[v], acc[r][v]);
    }
  }
  const VecF minus_epsilon = Set1(-args.epsilon);
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const float* const from = args.from + (row + r) * args.from_stride + column + v * kLanes;
      float* const to = args.to + (row + r) * args.to_stride + column + v * kLanes;
      const VecF s = kPartial ? LoadPartial(from, last) : Load(from);
      const VecF folded = Add(s, Fma(minus_epsilon, s, acc[r][v]));
      if (kPartial) {
        StorePartial(to, folded, last);
      } else {
        Store(to, folded);
      }
    }
  }
}

template <int kRows, int kVectors>
inline void FoldRows(const FoldStateArgs& args, int64_t row, int column) {
  for (; column + kVectors * kLanes <= args.columns; column += kVectors * kLanes) {
    FoldTile<kRows, kVectors, false>(args, row, column, 0);
  }
  if constexpr (kVectors > 1) {
    FoldRows<kRows, kVectors / 2>(args, row, column);
  } else if (column < args.columns) {
    FoldTile<kRows, 1, true>(args, row, column, args.columns - column);
  }
}

void FoldState(const FoldStateArgs& args) {
  int64_t row = 0;
  for (; row + 4 <= args.num_rows; row += 4) FoldRows<4, kTileVectors>(args, row, 0);
  for (; row < args.num_rows; ++row) FoldRows<1, kTileVectors>(args, row, 0);
}

// One chain of lanes per key, then one fixed tree: the score of a pair depends on nothing but the
// pair.
template <int kKeys>
inline void DotKeys(const DotRowsArgs& args, int key) {
  VecF acc[kKeys];
  for (int j = 0; j < kKeys; ++j) acc[j] = Zero();
  const float* const k = args.k + key * args.k_stride;
  for (int64_t i = 0; i < args.length; i += kLanes) {
    const VecF q = Load(args.q + i);
    for (int j = 0; j < kKeys; ++j) acc[j] = Fma(q, Load(k + j * args.k_stride + i), acc[j]);
  }
  for (int j = 0; j < kKeys; ++j) args.scores[key + j] = args.weights[key + j] * ReduceAdd(acc[j]);
}

void DotRows(const DotRowsArgs& args) {
  int key = 0;
  for (; key + 4 <= args.num_keys; key += 4) DotKeys<4>(args, key);
  for (; key < args.num_keys; ++key) DotKeys<1>(args, key);
}

inline VecF LoadElements(const void* x, bool is_bf16, int64_t offset, int64_t count) {
  if (is_bf16) {
    const uint16_t* const p = static_cast<const uint16_t*>(x) + offset;
    return count >= kLanes ? LoadBF16(p) : LoadBF16Partial(p, count);
  }
  const float* const p = static_cast<const float*>(x) + offset;
  return count >= kLanes ? Load(p) : LoadPartial(p, count);
}

inline void StoreElements(float* y, VecF x, int64_t count) {
  if (count >= kLanes) {
    Store(y, x);
  } else {
    StorePartial(y, x, count);
  }
}

inline VecF RoundThroughBF16(VecF x) {
  uint16_t bits[kLanes];
  StoreBF16(bits, x);
  return LoadBF16(bits);
}

// Rows of a fused projection lie a few KiB apart, where no hardware prefetcher follows: without
// this half of the time of forming a prompt's rows is spent waiting for them.
inline constexpr int64_t kPrefetchRows = 8;
inline void PrefetchRow(const void* x, bool is_bf16, int64_t offset, int64_t n) {
  const char* const p = static_cast<const char*>(x) + offset * (is_bf16 ? 2 : 4);
  for (int64_t byte = 0; byte < n * (is_bf16 ? 2 : 4); byte += 64) __builtin_prefetch(p + byte);
}

template <bool kSilu>
inline void FormHeadRow(const FormHeadArgs& args, int64_t row) {
  const bool lrpe = args.cos != nullptr;
  const VecF scale = Set1(args.scale);
  const float* const cos = args.cos + row * args.angle_stride;
  const float* const sin = args.sin + row * args.angle_stride;
  float* const to = args.y + row * args.y_stride;
  for (int64_t i = 0; i < args.n; i += kLanes) {
    const int64_t count = args.n - i;
    VecF x = LoadElements(args.x, args.is_bf16, row * args.x_stride + i, count);
    if constexpr (kSilu) x = Silu(x);
    x = Mul(x, scale);
    VecF y = lrpe ? Mul(x, LoadElements(cos, false, i, count)) : x;
    if (args.round_bf16) y = RoundThroughBF16(y);
    StoreElements(to + i, y, count);
    if (!lrpe) continue;
    y = Mul(x, LoadElements(sin, false, i, count));
    if (args.round_bf16) y = RoundThroughBF16(y);
    StoreElements(to + args.n + i, y, count);
  }
  const int64_t width = lrpe ? 2 * args.n : args.n;
  for (int64_t i = width; i < PadRow(width); ++i) to[i] = 0;
}

void FormHead(const FormHeadArgs& args) {
  for (int64_t row = 0; row < args.rows; ++row) {
    PrefetchRow(args.x, args.is_bf16, (row + kPrefetchRows) * args.x_stride, args.n);
    if (args.silu) {
      FormHeadRow<true>(args, row);
    } else {
      FormHeadRow<false>(args, row);
    }
  }
}

// Cephes sinf and cosf on |x| <= pi / 4, after the quadrant n is taken off in double: pi / 2 in two
// parts, the first of 33 bits, so that n times it is exact for n < 2^20 and off by 2^-53 of the
// product beyond.
inline void SinCosOne(double angle, float* cos_out, float* sin_out) {
  constexpr double kMagic =
      6755399441055744.0;  // 1.5 * 2^52: adding and subtracting it rounds to an integer
  const double n = (angle * 0.63661977236758134308 + kMagic) - kMagic;
  const double reduced = (angle - n * 1.57079632673412561417) - n * 6.07710050650619224932e-11;
  const double turns = (n * 0.25 + kMagic) - kMagic;
  const int quadrant = static_cast<int>(n - 4.0 * turns);  // in [-2, 2]
  const float x = static_cast<float>(reduced);
  const float z = x * x;
  const float sin_x =
      ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * x + x;
  const float cos_x =
      ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z -
      0.5f * z + 1.0f;
  const bool swapped = (quadrant & 1) != 0;
  const float s = swapped ? cos_x : sin_x;
  const float c = swapped ? sin_x : cos_x;
  *sin_out = (quadrant & 2) != 0 ? -s : s;
  *cos_out = ((quadrant + 1) & 2) != 0 ? -c : c;
}

void SinCos(const SinCosArgs& args) {
  if (args.frequency != nullptr) {
    for (int64_t i = 0; i < args.n; ++i) {
      SinCosOne(args.position * args.frequency[i], &args.cos[i], &args.sin[i]);
    }
    return;
  }
  for (int64_t i = 0; i < args.n; ++i) {
    SinCosOne(args.position * static_cast<double>(args.frequency_f32[i]), &args.cos[i],
              &args.sin[i]);
  }
}

template <bool kBF16>
inline void WidenWhole(const WidenRowsArgs& args) {
  for (int64_t r = 0; r < args.rows; ++r) {
    PrefetchRow(args.x, kBF16, (r + kPrefetchRows) * args.x_stride, args.columns);
    float* const y = args.y + r * args.y_stride;
    for (int64_t i = 0; i < args.columns; i += kLanes) {
      if constexpr (kBF16) {
        Store(y + i, LoadBF16(static_cast<const uint16_t*>(args.x) + r * args.x_stride + i));
      } else {
        Store(y + i, Load(static_cast<const float*>(args.x) + r * args.x_stride + i));
      }
    }
  }
}

void WidenRows(const WidenRowsArgs& args) {
  if (args.columns % kLanes == 0) {
    if (args.is_bf16) {
      WidenWhole<true>(args);
    } else {
      WidenWhole<false>(args);
    }
    return;
  }
  for (int64_t r = 0; r < args.rows; ++r) {
    for (int64_t i = 0; i < args.columns; i += kLanes) {
      const int64_t count = args.columns - i;
      StoreElements(args.y + r * args.y_stride + i,
                    LoadElements(args.x, args.is_bf16, r * args.x_stride + i, count), count);
    }
  }
}

void ScaleRows(const ScaleRowsArgs& args) {
  for (int64_t r = 0; r < args.rows; ++r) {
    const VecF scale = Set1(args.scale[r]);
    const int64_t row = r * args.stride;
    for (int64_t i = 0; i < args.columns; i += kLanes) {
      Store(args.y + row + i, Mul(scale, Load(args.x + row + i)));
    }
  }
}

void ScaleTriangle(const ScaleTriangleArgs& args) {
  for (int64_t r = 0; r < args.rows; ++r) {
    float* const x = args.x + r * args.stride;
    for (int64_t i = 0; i <= r; i += kLanes) {
      Store(x + i, Mul(Load(x + i), Load(args.weights + i - r)));
    }
  }
}

// Tiles of 4 x 4, whatever the set: 12 instructions for 16 elements, where one element at a time
// takes 32.
void Transpose(const TransposeArgs& args) {
  typedef float Quad __attribute__((vector_size(16)));
  auto load = [](const float* p) {
    Quad x;
    __builtin_memcpy(&x, p, sizeof(x));
    return x;
  };
  const int64_t whole_rows = args.rows & ~int64_t{3};
  const int64_t whole_columns = args.columns & ~int64_t{3};
  for (int64_t i = 0; i < whole_columns; i += 4) {
    for (int64_t r = 0; r < whole_rows; r += 4) {
      const float* const x = args.x + r * args.x_stride + i;
      const Quad a = load(x);
      const Quad b = load(x + args.x_stride);
      const Quad c = load(x + 2 * args.x_stride);
      const Quad d = load(x + 3 * args.x_stride);
      const Quad ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
      const Quad ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const Quad cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
      const Quad cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      const Quad columns[4] = {__builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5),
                               __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7),
                               __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5),
                               __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7)};
      for (int j = 0; j < 4; ++j) {
        __builtin_memcpy(args.y + (i + j) * args.y_stride + r, &columns[j], sizeof(Quad));
      }
    }
  }
  for (int64_t i = 0; i < args.columns; ++i) {
    for (int64_t r = i < whole_columns ? whole_rows : 0; r < args.rows; ++r) {
      args.y[i * args.y_stride + r] = args.x[r * args.x_stride + i];
    }
  }
}

inline float ReduceMax(VecF x) {
  float max = x[0];
  for (int lane = 1; lane < kLanes; ++lane) max = x[lane] > max ? x[lane] : max;
  return max;
}

// exp(x) for x <= 0, and 0 where exp would leave the normal numbers (-inf too). NaN stays.
inline VecF ExpToZero(VecF x) { return x < Set1(-87.0f) ? Zero() : Exp(x); }

void SoftmaxRange(SoftmaxRangeArgs& args) {
  float max = args.x[0];
  int64_t i = 0;
  if (args.n >= kLanes) {
    VecF max_lanes = Load(args.x);
    for (i = kLanes; i + kLanes <= args.n; i += kLanes)
      max_lanes = Max(max_lanes, Load(args.x + i));
    max = ReduceMax(max_lanes);
  }
  for (; i < args.n; ++i) max = args.x[i] > max ? args.x[i] : max;
  // A range that is all -inf (never so with finite keys) is shifted by 0: exp gives zeros, not NaN.
  const VecF shift = Set1(max < -3.0e38f ? 0.0f : max);
  VecF sum = Zero();
  for (i = 0; i + kLanes <= args.n; i += kLanes) {
    const VecF p = ExpToZero(Sub(Load(args.x + i), shift));
    Store(args.x + i, p);
    sum = Add(sum, p);
  }
  args.sum = ReduceAdd(sum);
  if (i < args.n) {
    float rest[kLanes] = {};
    const VecF p = ExpToZero(Sub(LoadPartial(args.x + i, args.n - i), shift));
    StorePartial(args.x + i, p, args.n - i);
    StorePartial(rest, p, args.n - i);
    args.sum += ReduceAdd(Load(rest));
  }
  args.max = max;
}

void ScanLogits(ScanLogitsArgs& args) {
  VecF max = Set1(args.x[0]);
  VecF bad = Zero();  // stays 0: x - x is NaN for NaN and the infinities
  const VecF lowest = Set1(-3.4028234e38f);
  for (int64_t i = 0; i < args.n; i += kLanes) {
    // Lanes beyond the end repeat the first element.
    VecF x = Set1(args.x[0]);
    if (args.n - i >= kLanes) {
      x = Load(args.x + i);
    } else {
      for (int64_t lane = 0; lane < args.n - i; ++lane) x[lane] = args.x[i + lane];
    }
    max = x > max ? x : max;
    const VecF finite = x < lowest ? Zero() : x;  // -inf is a banned token, no fault
    bad = Add(bad, Sub(finite, finite));
  }
  args.max = ReduceMax(max);
  args.bad = false;
  for (int lane = 0; lane < kLanes; ++lane) args.bad = args.bad || !(bad[lane] == 0.0f);
}

// Blocks of 16 vectors are summed in f32 lanes and added up in double: a relative error below
// 2^-19.
void SumExp(SumExpArgs& args) {
  const VecF shift = Set1(args.max);
  args.sum = 0;
  for (int64_t begin = 0; begin < args.n; begin += 16 * kLanes) {
    const int64_t end = begin + 16 * kLanes < args.n ? begin + 16 * kLanes : args.n;
    VecF sum = Zero();
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      const VecF p = ExpToZero(Sub(Load(args.x + i), shift));
      if (args.y != nullptr) Store(args.y + i, p);
      sum = Add(sum, p);
    }
    args.sum += static_cast<double>(ReduceAdd(sum));
    if (i == end) continue;
    float rest[kLanes] = {};
    StorePartial(rest, ExpToZero(Sub(LoadPartial(args.x + i, end - i), shift)), end - i);
    if (args.y != nullptr) StorePartial(args.y + i, Load(rest), end - i);
    args.sum += static_cast<double>(ReduceAdd(Load(rest)));
  }
}

// log(x) of a normal x > 0 (Cephes logf): within 2 units of the last place.
inline VecF Log(VecF x) {
  typedef int32_t LaneI __attribute__((vector_size(sizeof(VecF))));
  const LaneI bits = reinterpret_cast<LaneI>(x);
  // x = 2^e m, m in [sqrt(1/2), sqrt(2))
  const LaneI shifted = bits - 0x3f3504f3;
  const VecF e = __builtin_convertvector(shifted >> 23, VecF);
  const VecF m = Sub(reinterpret_cast<VecF>((shifted & 0x7fffff) + 0x3f3504f3), Set1(1.0f));
  const VecF z = Mul(m, m);
  VecF p = Set1(7.0376836292e-2f);
  p = Fma(p, m, Set1(-1.1514610310e-1f));
  p = Fma(p, m, Set1(1.1676998740e-1f));
  p = Fma(p, m, Set1(-1.2420140846e-1f));
  p = Fma(p, m, Set1(1.4249322787e-1f));
  p = Fma(p, m, Set1(-1.6668057665e-1f));
  p = Fma(p, m, Set1(2.0000714765e-1f));
  p = Fma(p, m, Set1(-2.4999993993e-1f));
  p = Fma(p, m, Set1(3.3333331174e-1f));
  VecF y = Mul(Mul(p, m), z);
  y = Fma(e, Set1(-2.12194440e-4f), y);
  y = Fma(z, Set1(-0.5f), y);
  return Fma(e, Set1(0.693359375f), Add(m, y));
}

// GumbelOfWord of philox.h for kLanes words.
inline VecF Gumbel(const uint32_t* words) {
  typedef int32_t LaneI __attribute__((vector_size(sizeof(VecF))));
  LaneI word;
  __builtin_memcpy(&word, words, sizeof(word));
  const LaneI upper = word < 0;  // all ones in the lanes where u > 1/2
  const VecF distance = Mul(Add(__builtin_convertvector(word ^ upper, VecF), Set1(0.5f)),
                            Set1(2.3283064365386963e-10f));
  const VecF one = Set1(1.0f);
  // log(1 - d) = log(u) + (1 - u - d) / u with u = 1 - d rounded; d itself below 1/2.
  const VecF u = Sub(one, distance);
  const VecF argument = upper ? u : distance;
  const VecF correction = upper ? Div(Sub(Sub(one, u), distance), u) : Zero();
  return Sub(Zero(), Log(Sub(Zero(), Add(Log(argument), correction))));
}

// The words of tokens [4 first, 4 first + 2 kLanes), in token order: kLanes / 2 counters of
// Philox4x32 (philox.h), one to a 64-bit lane. The upper halves hold what a product reads past,
// until the end.
inline void PhiloxBlock(const GumbelArgmaxArgs& args, uint32_t first, uint64_t* words) {
  constexpr int kCounters = kLanes / 2;
  const VecU64 zero = {};
  VecU64 c0 = zero + first;
  for (int lane = 0; lane < kCounters; ++lane) c0[lane] += static_cast<uint64_t>(lane);
  VecU64 c1 = zero + args.counter[0];
  VecU64 c2 = zero + args.counter[1];
  VecU64 c3 = zero + args.counter[2];
  const VecU64 multiplier0 = zero + 0xD2511F53u;
  const VecU64 multiplier1 = zero + 0xCD9E8D57u;
  uint32_t key0 = static_cast<uint32_t>(args.seed);
  uint32_t key1 = static_cast<uint32_t>(args.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const VecU64 product0 = MulLow32(multiplier0, c0);
    const VecU64 product1 = MulLow32(multiplier1, c2);
    c0 = (product1 >> 32) ^ c1 ^ key0;
    c1 = product1;
    c2 = (product0 >> 32) ^ c3 ^ key1;
    c3 = product0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const VecU64 low = (c0 & 0xffffffffu) | (c1 << 32);
  const VecU64 high = (c2 & 0xffffffffu) | (c3 << 32);
  for (int lane = 0; lane < kCounters; ++lane) {
    words[2 * lane] = low[lane];
    words[2 * lane + 1] = high[lane];
  }
}

void CountAtLeast(CountAtLeastArgs& args) {
  typedef int32_t LaneI __attribute__((vector_size(sizeof(VecF))));
  typedef double LaneD __attribute__((vector_size(2 * sizeof(VecF))));
  const VecF threshold = Set1(args.threshold);
  LaneI count = {};
  LaneD sum = {};
  int64_t i = 0;
  for (; i + kLanes <= args.n; i += kLanes) {
    const LaneI kept = Load(args.x + i) >= threshold;
    count -= kept;
    if (args.weights == nullptr) continue;
    sum += __builtin_convertvector(kept ? Load(args.weights + i) : Zero(), LaneD);
  }
  args.count = 0;
  args.sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    args.count += count[lane];
    args.sum += sum[lane];
  }
  for (; i < args.n; ++i) {
    if (!(args.x[i] >= args.threshold)) continue;
    ++args.count;
    if (args.weights != nullptr) args.sum += static_cast<double>(args.weights[i]);
  }
  if (args.weights == nullptr) args.sum = static_cast<double>(args.count);
}

void KeepAtLeast(const KeepAtLeastArgs& args) {
  const VecF threshold = Set1(args.threshold);
  const VecF banned = Set1(-__builtin_inff());
  int64_t i = 0;
  for (; i + kLanes <= args.n; i += kLanes) {
    Store(args.x + i, Load(args.by + i) >= threshold ? Load(args.x + i) : banned);
  }
  for (; i < args.n; ++i) {
    if (!(args.by[i] >= args.threshold)) args.x[i] = -__builtin_inff();
  }
}

void Temper(const TemperArgs& args) {
  const VecF max = Set1(args.max);
  const VecF temperature = Set1(args.temperature);
  for (int64_t i = 0; i < args.n; i += kLanes) {
    const int64_t count = args.n - i;
    const VecF x = LoadElements(args.x, false, i, count);
    StoreElements(args.x + i, Div(Sub(x, max), temperature), count);
  }
}

void GumbelArgmax(GumbelArgmaxArgs& args) {
  typedef int32_t LaneI __attribute__((vector_size(sizeof(VecF))));
  const VecF minus_infinity = Set1(-__builtin_inff());
  VecF best = minus_infinity;
  LaneI best_index = {};
  LaneI lane_index = {};
  for (int lane = 0; lane < kLanes; ++lane) lane_index[lane] = lane;
  for (int64_t begin = 0; begin < args.n; begin += 2 * kLanes) {
    uint64_t pairs[kLanes];
    PhiloxBlock(args, static_cast<uint32_t>(begin / 4), pairs);
    uint32_t words[2 * kLanes];
    __builtin_memcpy(words, pairs, sizeof(words));
    for (int64_t i = begin; i < begin + 2 * kLanes && i < args.n; i += kLanes) {
      VecF x = minus_infinity;
      if (args.n - i >= kLanes) {
        x = Load(args.x + i);
      } else {
        for (int64_t lane = 0; lane < args.n - i; ++lane) x[lane] = args.x[i + lane];
      }
      const VecF value = Add(x, Gumbel(words + (i - begin)));
      const LaneI index = lane_index + static_cast<int32_t>(i);
      best_index = value > best ? index : best_index;
      best = value > best ? value : best;
    }
  }
  args.index = best_index[0];
  float max = best[0];
  for (int lane = 1; lane < kLanes; ++lane) {
    if (best[lane] > max || (best[lane] == max && best_index[lane] < args.index)) {
      max = best[lane];
      args.index = best_index[lane];
    }
  }
}

}  // namespace
}  // namespace godwit
