// Causal softmax attention over paged KV, any shape. Two launches: rotate and store the step's keys
// and values; then one block per (token, query head) goes over its keys in fixed ranges of
// kAttentionSplit and merges them in ascending order, so that the bits of a token depend on its
// keys alone. A warp computes a score, a thread a column of the output.

#include <algorithm>
#include <cfloat>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/paged.cuh"

namespace godwit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaxHeadDim = 1024;
constexpr int kColumnsPerThread = kMaxHeadDim / kThreads;

struct Range {
  int32_t first_row = 0;
  int32_t num_rows = 0;
  int64_t first_token = 0;
  int64_t num_tokens = 0;
};

// A padded step has tokens of no row.
__device__ bool HasToken(const StepRow& row, int64_t token) {
  return token >= row.first_token && token < row.first_token + int64_t{row.num_tokens};
}

template <typename Act>
__global__ void __launch_bounds__(kThreads) WriteCacheKernel(PagedAttentionArgs args, Range range) {
  const int64_t token = range.first_token + blockIdx.x, kv_head = blockIdx.y;
  const StepRow& row = RowOfToken(args.rows + range.first_row, range.num_rows, token);
  if (!HasToken(row, token)) return;
  const int64_t position = row.position + token - row.first_token;
  Act* key = CacheRow<Act>(args, row, position, 0, kv_head);
  Act* value = CacheRow<Act>(args, row, position, 1, kv_head);
  for (int d = threadIdx.x; d < args.head_dim; d += kThreads) {
    Store(key + d, Rotated<Act>(args, args.k, token, kv_head, d));
    value[d] = Row<const Act>(args.v, token)[kv_head * args.head_dim + d];
  }
}

template <typename Act>
__global__ void __launch_bounds__(kThreads) AttendKernel(PagedAttentionArgs args, Range range) {
  __shared__ float q[kMaxHeadDim];
  __shared__ float scores[kAttentionSplit];
  __shared__ float shared[kWarps];
  const int64_t token = range.first_token + blockIdx.x, head = blockIdx.y;
  const int64_t kv_head = head / (args.num_heads / args.num_kv_heads);
  const StepRow& row = RowOfToken(args.rows + range.first_row, range.num_rows, token);
  if (!HasToken(row, token)) return;
  const int64_t num_keys = row.position + token - row.first_token + 1;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int d = threadIdx.x; d < args.head_dim; d += kThreads)
    q[d] = Rotated<Act>(args, args.q, token, head, d);
  __syncthreads();

  float max = -FLT_MAX, total = 0, o[kColumnsPerThread] = {};
  for (int64_t first = 0; first < num_keys; first += kAttentionSplit) {
    const int count = static_cast<int>(min(int64_t{kAttentionSplit}, num_keys - first));
    for (int j = warp; j < count; j += kWarps) {
      const Act* key = CacheRow<Act>(args, row, first + j, 0, kv_head);
      float sum = 0;
      for (int d = lane; d < args.head_dim; d += kWarp) sum = fmaf(q[d], Load(key + d), sum);
      sum = WarpSum(sum);
      if (lane == 0) scores[j] = sum * args.scale;
    }
    __syncthreads();
    float split_max = -FLT_MAX, split_total = 0;
    for (int j = threadIdx.x; j < count; j += kThreads) split_max = fmaxf(split_max, scores[j]);
    split_max = BlockMax<kThreads>(split_max, shared);
    for (int j = threadIdx.x; j < count; j += kThreads) {
      scores[j] = expf(scores[j] - split_max);
      split_total += scores[j];
    }
    split_total = BlockSum<kThreads>(split_total, shared);  // its barriers also publish the scores
    const float new_max = fmaxf(max, split_max);
    const float keep = expf(max - new_max), add = expf(split_max - new_max);
    total = total * keep + split_total * add;
#pragma unroll
    for (int c = 0; c < kColumnsPerThread; ++c) {
      const int d = threadIdx.x + c * kThreads;
      if (d >= args.head_dim) break;
      float sum = 0;
      for (int j = 0; j < count; ++j) {
        sum = fmaf(scores[j], Load(CacheRow<Act>(args, row, first + j, 1, kv_head) + d), sum);
      }
      o[c] = o[c] * keep + sum * add;
    }
    max = new_max;
    __syncthreads();
  }
#pragma unroll
  for (int c = 0; c < kColumnsPerThread; ++c) {
    const int d = threadIdx.x + c * kThreads;
    if (d < args.head_dim) StoreAny(args.o, token, head * args.head_dim + d, o[c] / total);
  }
}

template <typename Act>
cudaError_t Launch(const PagedAttentionArgs& args, const Range& range, cudaStream_t stream) {
  const auto num_tokens = static_cast<unsigned>(range.num_tokens);
  WriteCacheKernel<Act>
      <<<dim3(num_tokens, static_cast<unsigned>(args.num_kv_heads)), kThreads, 0, stream>>>(args,
                                                                                            range);
  AttendKernel<Act>
      <<<dim3(num_tokens, static_cast<unsigned>(args.num_heads)), kThreads, 0, stream>>>(args,
                                                                                         range);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchPagedPlain(const PagedAttentionArgs& args, int32_t first_row, int32_t num_rows,
                             int64_t first_token, int64_t num_tokens, cudaStream_t stream) {
  if (num_rows == 0 || num_tokens == 0) return cudaSuccess;
  const Range range = {first_row, num_rows, first_token, num_tokens};
  return args.q.dtype == DType::kBF16 ? Launch<Bf16>(args, range, stream)
                                      : Launch<float>(args, range, stream);
}

int64_t PagedScratchBytes(const BackendLimits& limits) {
  return std::max(PagedDecodeScratchBytes(limits), PagedPrefillScratchBytes(limits));
}

}  // namespace godwit::cuda
