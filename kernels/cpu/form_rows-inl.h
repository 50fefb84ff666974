// The input of a product, row by row: out = round( gate * norm(x) ), and x / sqrt(mean(x^2) +
// epsilon) * factor in f32. Bytes per row: x read twice (the second time from the first-level
// cache), gate and the result once.

#include <cstdint>

#include "kernels/cpu/product_args.h"

namespace godwit {
namespace {

// Four sums side by side hide the latency of the fused multiply-add; the order does not depend on
// anything but k.
template <typename X>
inline float SumOfSquares(const X* x, int64_t k) {
  VecF sum[4] = {Zero(), Zero(), Zero(), Zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= k; i += 4 * kLanes) {
    for (int s = 0; s < 4; ++s) {
      const VecF v = LoadAct(x + i + s * kLanes);
      sum[s] = Fma(v, v, sum[s]);
    }
  }
  for (; i < k; i += kLanes) {
    const VecF v = k - i >= kLanes ? LoadAct(x + i) : LoadActPartial(x + i, k - i);
    sum[0] = Fma(v, v, sum[0]);
  }
  return ReduceAdd(Add(Add(sum[0], sum[1]), Add(sum[2], sum[3])));
}

// Rounded to BF16 and stored as BF16 (uint16_t) or, where the product wants widened rows, as f32;
// or plain f32.
enum class RowFormat { kF32, kBF16, kBF16Widened };

template <RowFormat kFormat>
inline void StoreFormed(void* row, int64_t i, VecF x) {
  if constexpr (kFormat == RowFormat::kF32) Store(static_cast<float*>(row) + i, x);
  if constexpr (kFormat == RowFormat::kBF16) StoreBF16(static_cast<uint16_t*>(row) + i, x);
  if constexpr (kFormat == RowFormat::kBF16Widened)
    Store(static_cast<float*>(row) + i, RoundToBF16(x));
}

template <RowFormat kFormat, typename X, typename G>
inline void FormRow(const FormRowsArgs& args, const X* x, const G* gate, void* out) {
  const bool norm = args.norm == NormKind::kRms;
  VecF scale = Set1(1.0f);
  if (norm) {
    const float mean = SumOfSquares(x, args.k) / static_cast<float>(args.k);
    scale = Set1(1.0f / __builtin_sqrtf(mean + args.epsilon));
  }
  const VecF offset = Set1(args.weight_offset);
  // k_padded is a multiple of the widest vector, and lanes beyond k load as zero.
  for (int64_t i = 0; i < args.k_padded; i += kLanes) {
    const int64_t count = args.k - i;
    const bool whole = count >= kLanes;
    VecF y = whole ? LoadAct(x + i) : count > 0 ? LoadActPartial(x + i, count) : Zero();
    if (norm) {
      y = Mul(y, scale);
      if (args.norm_weight != nullptr && count > 0) {
        const VecF weight =
            whole ? Load(args.norm_weight + i) : LoadPartial(args.norm_weight + i, count);
        y = Mul(y, Add(offset, weight));
      }
    }
    if (gate != nullptr && count > 0)
      y = Mul(whole ? LoadAct(gate + i) : LoadActPartial(gate + i, count), y);
    StoreFormed<kFormat>(out, i, y);
  }
}

template <RowFormat kFormat, typename X, typename G>
inline void FormRowsOf(const FormRowsArgs& args) {
  for (int64_t row = 0; row < args.num_rows; ++row) {
    const G* const gate =
        args.gate == nullptr ? nullptr : static_cast<const G*>(args.gate) + row * args.gate_stride;
    FormRow<kFormat>(args, static_cast<const X*>(args.x) + row * args.x_stride, gate,
                     static_cast<char*>(args.out) + row * args.out_stride_bytes);
  }
}

template <RowFormat kFormat>
void FormRows(const FormRowsArgs& args) {
  if (args.x_is_f32) {
    args.gate_is_f32 ? FormRowsOf<kFormat, float, float>(args)
                     : FormRowsOf<kFormat, float, uint16_t>(args);
  } else {
    args.gate_is_f32 ? FormRowsOf<kFormat, uint16_t, float>(args)
                     : FormRowsOf<kFormat, uint16_t, uint16_t>(args);
  }
}

}  // namespace
}  // namespace godwit
