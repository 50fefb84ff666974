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

// Elements [d, d + kColumns) of a head of q or k, rotated: Rotated() without branches, so that all
// loads, of several calls too, are on their way together.
template <typename Act, int kColumns>
__device__ inline void LoadRotated(const PagedAttentionArgs& args, const TensorView& x,
                                   int64_t token, int64_t head, int d, float (&y)[kColumns]) {
  const Act* values = Row<const Act>(x, token) + head * args.head_dim;
  const int pairs = args.cos.data != nullptr ? static_cast<int>(args.cos.shape[1]) : 0;
  const bool half_split = args.pair_layout == PairLayout::kHalfSplit;
  const float* cosines = Row<const float>(args.cos, token);
  const float* sines = Row<const float>(args.sin, token);
  float cos[kColumns], sin[kColumns];
  Act a[kColumns], b[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int column = d + c;
    const bool rotates = column < 2 * pairs;
    const int pair = half_split ? (column >= pairs ? column - pairs : column) : column / 2;
    const int first = half_split ? pair : 2 * pair, second = half_split ? pair + pairs : first + 1;
    const auto* anything = reinterpret_cast<const float*>(args.rows);
    a[c] = values[rotates ? first : column];
    b[c] = values[rotates ? second : column];
    cos[c] = *(rotates ? cosines + pair : anything);
    sin[c] = *(rotates ? sines + pair : anything);
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int column = d + c;
    const bool second = half_split ? column >= pairs : column % 2 == 1;
    const float p = Load(&a[c]), q = Load(&b[c]);
    const float rotated = second ? q * cos[c] + p * sin[c] : p * cos[c] - q * sin[c];
    y[c] = column < 2 * pairs ? rotated : p;
  }
}

// Where a position's key (part 0) or value (part 1) of a kv head lies.
template <typename Act, typename RowOrRange>
__device__ inline Act* CacheRow(const PagedAttentionArgs& args, const RowOrRange& row,
                                int64_t position, int part, int64_t kv_head) {
  const int64_t block = args.block_tables[row.block_table + position / kPagedBlock];
  return Row<Act>(args.blocks, block) +
         ((part * int64_t{args.num_kv_heads} + kv_head) * kPagedBlock + position % kPagedBlock) *
             args.head_dim;
}

}  // namespace godwit::cuda
