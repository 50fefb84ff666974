#pragma once
// Shared by the kernels of paged attention.

#include "kernels/cuda/device.cuh"

namespace godwit::cuda {

// Element d of a head of q or k, rotated.
template <typename Act>
__device__ inline float Rotated(const PagedAttentionArgs& args, const TensorView& x, int64_t token,
                                int64_t head, int d) {
  const Act* values = Row<const Act>(x, token) + head * args.head_dim;
  const int pairs = args.cos.data != nullptr ? static_cast<int>(args.cos.shape[1]) : 0;
  if (d >= 2 * pairs) return Load(values + d);
  const bool half_split = args.pair_layout == PairLayout::kHalfSplit;
  const int pair = half_split ? (d >= pairs ? d - pairs : d) : d / 2;
  const bool second = half_split ? d >= pairs : d % 2 == 1;
  const float a = Load(values + (half_split ? pair : 2 * pair));
  const float b = Load(values + (half_split ? pair + pairs : 2 * pair + 1));
  const float cos = Row<const float>(args.cos, token)[pair],
              sin = Row<const float>(args.sin, token)[pair];
  return second ? b * cos + a * sin : a * cos - b * sin;
}

// Where a position's key (part 0) or value (part 1) of a kv head lies.
template <typename Act>
__device__ inline Act* CacheRow(const PagedAttentionArgs& args, const StepRow& row,
                                int64_t position, int part, int64_t kv_head) {
  const int64_t block = args.block_tables[row.block_table + position / kPagedBlock];
  return Row<Act>(args.blocks, block) +
         ((part * int64_t{args.num_kv_heads} + kv_head) * kPagedBlock + position % kPagedBlock) *
             args.head_dim;
}

}  // namespace godwit::cuda
