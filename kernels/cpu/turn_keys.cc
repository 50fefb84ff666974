#include "kernels/cpu/turn_keys.h"

#include <cstdint>
#include <cstring>

#include "kernels/base/bf16.h"
#include "kernels/cpu/vector_ops.h"
#include "kernels/validate.h"

namespace godwit {
namespace {

float Load(const float* x) { return *x; }
float Load(const BF16* x) { return ToF32(*x); }
void Store(float* x, float value) { *x = value; }
void Store(BF16* x, float value) { *x = ToBF16(value); }

// The keys of one head, already copied to `keys`: [head_dim, kPagedBlock], as paged_attention.cc
// keeps them.
template <typename T>
void TurnHead(const TurnKeysArgs& args, const float* cos, const float* sin, T* keys) {
  const bool half_split = args.pair_layout == PairLayout::kHalfSplit;
  for (int64_t i = 0; i < args.num_freqs; ++i) {
    T* const first = keys + (half_split ? i : 2 * i) * kPagedBlock;
    T* const second = first + (half_split ? args.num_freqs : 1) * kPagedBlock;
    for (int lane = 0; lane < kPagedBlock; ++lane) {
      const float a = Load(first + lane), b = Load(second + lane);
      Store(first + lane, a * cos[i] - b * sin[i]);
      Store(second + lane, b * cos[i] + a * sin[i]);
    }
  }
}

template <typename T>
void Turn(CpuContext& context, const TurnKeysArgs& args, const BlockTurn& turn) {
  const int64_t width = int64_t{kPagedBlock} * args.head_dim;
  T* const from = static_cast<T*>(args.blocks.data) + turn.from_block * args.blocks.row_stride;
  T* const to = static_cast<T*>(args.blocks.data) + turn.to_block * args.blocks.row_stride;
  std::memcpy(to, from, static_cast<size_t>(2 * args.num_kv_heads * width) * sizeof(T));
  float cos[kMaxHeadDim / 2], sin[kMaxHeadDim / 2];
  context.isa.sin_cos({.position = static_cast<double>(turn.delta),
                       .frequency = args.tables + int64_t{turn.table_id} * (args.num_freqs + 1),
                       .n = args.num_freqs,
                       .cos = cos,
                       .sin = sin});
  for (int32_t head = 0; head < args.num_kv_heads; ++head) {
    TurnHead(args, cos, sin, to + head * width);
  }
}

}  // namespace

OpStatus CpuTurnKeys(CpuContext& context, const TurnKeysArgs& args) {
  context.pool.ForEach(args.num_turns, [&](int64_t index) {
    const BlockTurn& turn = args.turns[index];
    args.blocks.dtype == DType::kBF16 ? Turn<BF16>(context, args, turn)
                                      : Turn<float>(context, args, turn);
  });
  return {};
}

}  // namespace godwit
