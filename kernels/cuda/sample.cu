// Sampling and scoring: one block a row, a few passes over the vocabulary, no sort. top_k and top_p
// look for the least key to keep by radix selection: a key orders ids by value, ties by lower id,
// and the weights of top_p are integers, so that no sum depends on the order of atomics.

#include <cmath>

#include "kernels/base/philox.h"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/launch.h"

namespace godwit::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRadixBits = 8;
constexpr int kBins = 1 << kRadixBits;
constexpr float kWeightOne =
    1099511627776.0f;  // 2^40: a vocabulary of 2^24 cannot overflow 64 bits

// Greater key: greater value, or the same value and a lower id. -0 counts as 0.
__device__ uint64_t KeyOf(float value, int32_t id) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t{ordered} << 32 | ~static_cast<uint32_t>(id);
}
__device__ int32_t IdOf(uint64_t key) { return static_cast<int32_t>(~static_cast<uint32_t>(key)); }

struct Shared {
  uint64_t keys[kWarps];
  double sums[kWarps];
  unsigned long long bins[kBins];
  uint64_t selected;
  uint64_t target;
  int bad;
};

__device__ uint64_t BlockMaxKey(uint64_t key, Shared& shared) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const uint64_t other = __shfl_xor_sync(0xffffffffu, key, offset);
    key = other > key ? other : key;
  }
  if (threadIdx.x % kWarp == 0) shared.keys[threadIdx.x / kWarp] = key;
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) key = shared.keys[warp] > key ? shared.keys[warp] : key;
  __syncthreads();
  return key;
}

// The largest key below `limit`; 0 when there is none.
__device__ uint64_t LargestBelow(const float* values, int64_t vocab_size, uint64_t limit,
                                 Shared& shared) {
  uint64_t best = 0;
  for (int64_t id = threadIdx.x; id < vocab_size; id += kThreads) {
    const uint64_t key = KeyOf(values[id], static_cast<int32_t>(id));
    if (key < limit && key > best) best = key;
  }
  return BlockMaxKey(best, shared);
}

// The key of the element at which the weights of keys >= least, added from the largest key down,
// reach `target` >= 1.
template <typename Weight>
__device__ uint64_t SelectKey(const float* values, int64_t vocab_size, uint64_t least,
                              uint64_t target, const Weight& weight, Shared& shared) {
  uint64_t prefix = 0;
  for (int shift = 64 - kRadixBits; shift >= 0; shift -= kRadixBits) {
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) shared.bins[bin] = 0;
    __syncthreads();
    for (int64_t id = threadIdx.x; id < vocab_size; id += kThreads) {
      const uint64_t key = KeyOf(values[id], static_cast<int32_t>(id));
      const bool inside = shift + kRadixBits == 64 || (key >> (shift + kRadixBits)) == prefix;
      if (key >= least && inside)
        atomicAdd(&shared.bins[(key >> shift) % kBins], weight(values[id]));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int bin = kBins - 1;
      for (; bin > 0 && shared.bins[bin] < target; --bin) target -= shared.bins[bin];
      shared.selected = prefix << kRadixBits | static_cast<uint64_t>(bin);
      shared.target = target;
    }
    __syncthreads();
    prefix = shared.selected;
    target = shared.target;
    __syncthreads();
  }
  return prefix;
}

__device__ unsigned long long IntegerWeight(float scaled) {
  return static_cast<unsigned long long>(expf(scaled) * kWeightOne);
}

// log of the sum of exp(values), in double; 0 for a row of -inf.
__device__ double LogSumExp(const float* values, int64_t vocab_size, Shared& shared) {
  const uint64_t largest = LargestBelow(values, vocab_size, ~uint64_t{0}, shared);
  const float max = values[IdOf(largest)];
  if (isinf(max)) return 0;
  double sum = 0;
  for (int64_t id = threadIdx.x; id < vocab_size; id += kThreads) sum += expf(values[id] - max);
  return max + log(BlockSum<kThreads>(sum, shared.sums));
}

__device__ void WriteTop(const float* logits, int64_t vocab_size, int64_t count, double log_sum,
                         int32_t* ids, float* logprobs, Shared& shared) {
  uint64_t limit = ~uint64_t{0};
  for (int64_t i = 0; i < min(count, vocab_size); ++i) {
    limit = LargestBelow(logits, vocab_size, limit, shared);
    if (threadIdx.x == 0) {
      ids[i] = IdOf(limit);
      logprobs[i] = static_cast<float>(logits[IdOf(limit)] - log_sum);
    }
  }
}

// Copies logits to `adjusted` with bias and penalties; true when a logit is NaN or +inf.
__device__ bool Adjust(const SampleArgs& args, const SampleRow& row, const float* logits,
                       float* adjusted, Shared& shared) {
  if (threadIdx.x == 0) shared.bad = 0;
  __syncthreads();
  const int64_t vocab_size = args.logits.shape[1];
  for (int64_t id = threadIdx.x; id < vocab_size; id += kThreads) {
    if (isnan(logits[id]) || logits[id] == INFINITY) shared.bad = 1;
    adjusted[id] = logits[id];
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < row.num_biases; i += kThreads) {
    adjusted[row.biases[i].token_id] += row.biases[i].bias;
  }
  __syncthreads();
  const uint32_t* counts =
      args.counts.data != nullptr ? Row<const uint32_t>(args.counts, row.slot) : nullptr;
  for (int64_t id = threadIdx.x; counts != nullptr && id < vocab_size; id += kThreads) {
    const uint32_t count = counts[id];
    if (count == 0) continue;
    float logit = adjusted[id];
    logit = logit > 0 ? logit / row.repetition_penalty : logit * row.repetition_penalty;
    if (const uint32_t in_output = count & ~kPromptBit; in_output != 0) {
      logit -= row.presence_penalty + row.frequency_penalty * static_cast<float>(in_output);
    }
    adjusted[id] = logit;
  }
  __syncthreads();
  return shared.bad != 0;
}

// The least key that top_k and top_p keep, of values that are logits over temperature with the
// largest at 0.
__device__ uint64_t LeastKept(const SampleRow& row, const float* scaled, int64_t vocab_size,
                              Shared& shared) {
  uint64_t least = 0;
  if (row.top_k > 0 && row.top_k < vocab_size) {
    least = SelectKey(
        scaled, vocab_size, 0, static_cast<uint64_t>(row.top_k), [](float) { return 1ull; },
        shared);
  }
  if (row.top_p >= 1) return least;
  if (threadIdx.x == 0) shared.bins[0] = 0;
  __syncthreads();
  unsigned long long sum = 0;
  for (int64_t id = threadIdx.x; id < vocab_size; id += kThreads) {
    if (KeyOf(scaled[id], static_cast<int32_t>(id)) >= least) sum += IntegerWeight(scaled[id]);
  }
  atomicAdd(&shared.bins[0], sum);
  __syncthreads();
  const double total = static_cast<double>(shared.bins[0]);
  __syncthreads();
  const auto target =
      static_cast<uint64_t>(fmax(1.0, ceil(static_cast<double>(row.top_p) * total)));
  return SelectKey(
      scaled, vocab_size, least, target, [](float x) { return IntegerWeight(x); }, shared);
}

__device__ int32_t Draw(const SampleRow& row, float* adjusted, int64_t vocab_size, Shared& shared) {
  const int32_t largest = IdOf(LargestBelow(adjusted, vocab_size, ~uint64_t{0}, shared));
  const float max = adjusted[largest];
  if (row.temperature == 0 || isinf(max)) return largest;
  __syncthreads();
  for (int64_t id = threadIdx.x; id < vocab_size; id += kThreads) {
    adjusted[id] = (adjusted[id] - max) / row.temperature;
  }
  __syncthreads();
  const uint64_t least = LeastKept(row, adjusted, vocab_size, shared);
  const float least_weight = fminf(row.min_p, 1.0f);
  uint64_t best = 0;
  for (int64_t id = threadIdx.x; id < vocab_size; id += kThreads) {
    const float value = adjusted[id];
    if (KeyOf(value, static_cast<int32_t>(id)) < least || expf(value) < least_weight ||
        isinf(value))
      continue;
    const PhiloxWords words =
        SampleWords(row.seed, static_cast<uint32_t>(id) / 4, row.output_index, row.position);
    const uint64_t key = KeyOf(value + GumbelOfWord(words.word[id % 4]), static_cast<int32_t>(id));
    best = key > best ? key : best;
  }
  best = BlockMaxKey(best, shared);
  return best == 0 ? largest : IdOf(best);
}

__global__ void __launch_bounds__(kThreads) SampleKernel(SampleArgs args, float* scratch) {
  __shared__ Shared shared;
  const int64_t index = blockIdx.x;
  const SampleRow& row = args.rows[index];
  if (row.slot < 0) return;
  const int64_t vocab_size = args.logits.shape[1];
  const float* logits = Row<const float>(args.logits, row.logit_row);
  float* adjusted = scratch + index * vocab_size;
  if (Adjust(args, row, logits, adjusted, shared)) {
    if (threadIdx.x == 0) *Row<int32_t>(args.tokens, index) = -1;
    return;
  }
  const int32_t token = Draw(row, adjusted, vocab_size, shared);
  if (threadIdx.x == 0) {
    *Row<int32_t>(args.tokens, index) = token;
    if (args.counts.data != nullptr) ++Row<uint32_t>(args.counts, row.slot)[token];
  }
  if (row.num_logprobs < 0) return;
  const double log_sum = LogSumExp(logits, vocab_size, shared);
  if (threadIdx.x == 0)
    *Row<float>(args.logprobs, index) = static_cast<float>(logits[token] - log_sum);
  if (row.num_logprobs == 0) return;
  WriteTop(logits, vocab_size, row.num_logprobs, log_sum, Row<int32_t>(args.top_ids, index),
           Row<float>(args.top_logprobs, index), shared);
}

__global__ void __launch_bounds__(kThreads) ScoreKernel(ScoreTokensArgs args) {
  __shared__ Shared shared;
  const int64_t index = blockIdx.x;
  const int64_t vocab_size = args.logits.shape[1];
  const float* logits = Row<const float>(args.logits, index);
  if (threadIdx.x == 0) shared.bad = 0;
  __syncthreads();
  for (int64_t id = threadIdx.x; id < vocab_size; id += kThreads) {
    if (isnan(logits[id]) || logits[id] == INFINITY) shared.bad = 1;
  }
  __syncthreads();
  if (shared.bad != 0) {
    if (threadIdx.x == 0) *Row<float>(args.logprobs, index) = NAN;
    return;
  }
  const double log_sum = LogSumExp(logits, vocab_size, shared);
  const int32_t target = *Row<const int32_t>(args.targets, index);
  if (threadIdx.x == 0) {
    *Row<float>(args.logprobs, index) =
        target < 0 ? 0 : static_cast<float>(logits[target] - log_sum);
  }
  if (args.num_top == 0) return;
  WriteTop(logits, vocab_size, args.num_top, log_sum, Row<int32_t>(args.top_ids, index),
           Row<float>(args.top_logprobs, index), shared);
}

}  // namespace

cudaError_t LaunchSample(const SampleArgs& args, Context& context) {
  if (args.num_rows == 0) return cudaSuccess;
  void* adjusted = nullptr;
  const int64_t num_bytes =
      args.num_rows * args.logits.shape[1] * static_cast<int64_t>(sizeof(float));
  if (const cudaError_t error = context.scratch.Reserve(num_bytes, &adjusted); error != cudaSuccess)
    return error;
  SampleKernel<<<static_cast<unsigned>(args.num_rows), kThreads, 0, context.stream>>>(
      args, static_cast<float*>(adjusted));
  return cudaGetLastError();
}

cudaError_t LaunchScoreTokens(const ScoreTokensArgs& args, Context& context) {
  if (args.logits.rows() == 0) return cudaSuccess;
  ScoreKernel<<<static_cast<unsigned>(args.logits.rows()), kThreads, 0, context.stream>>>(args);
  return cudaGetLastError();
}

int64_t SampleScratchBytes(const BackendLimits& limits) {
  return limits.max_draws * limits.vocab_size * static_cast<int64_t>(sizeof(float));
}

}  // namespace godwit::cuda
