#pragma once
// A row of logits and what is drawn from it, by the blocks of a cluster. The row is read from
// memory once: on Hopper 8 blocks hold it in shared memory (up to 48 Ki logits a block), where all
// passes over it run; what does not fit lies in scratch and is read through the caches. A block has
// whole groups of 4 ids, which share one Philox counter.
//
//   greedy        one pass, one exchange among the blocks
//   Gumbel        + a pass with the hardware's logarithms, whose error is far below kMargin; only
//                 what comes that close to the largest is computed exactly, so that the draw is
//                 that of GumbelOfWord
//   top_k, top_p  + a search: a pass counts (or weighs) what is at or above 3 thresholds, until
//                 kMaxCandidates ids are left between two of them, which are sorted; no histogram,
//                 because logits crowd in a few bins
//
// All sums have an order fixed by the vocabulary alone, so that a draw does not depend on the
// batch; every kernel that draws does it here, so that a token does not depend on which one.

#include <cooperative_groups.h>

#include <cmath>

#include "kernels/base/philox.h"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/launch.h"

namespace godwit::cuda {

inline constexpr int kRowThreads = 256;
inline constexpr int kRowWarps = kRowThreads / kWarp;
inline constexpr int kMaxCluster = 8;
inline constexpr int kNumThresholds = 3;
inline constexpr int kMaxCandidates = 128;
inline constexpr int kLoadsInFlight = 4;
inline constexpr float kMargin = 1e-3f;
inline constexpr uint64_t kBadKey = ~uint64_t{0};  // of a row with a NaN or +inf
static_assert(kMaxCandidates == 4 * kWarp && kMaxCandidates <= kRowThreads);

// Orders as the floats do, with -0 = +0.
__device__ inline uint32_t OrderKey(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float OfOrderKey(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Greater key: greater value, or the same value and a lower id. 0 is less than any.
__device__ inline uint64_t KeyOf(float value, uint32_t id) {
  return uint64_t{OrderKey(value)} << 32 | ~id;
}
__device__ inline int32_t IdOf(uint64_t key) {
  return static_cast<int32_t>(~static_cast<uint32_t>(key));
}
__device__ inline float ValueOf(uint64_t key) {
  return OfOrderKey(static_cast<uint32_t>(key >> 32));
}

struct RowTotals {
  uint32_t count[kNumThresholds];
  float sum[kNumThresholds];  // of a thread or a warp
};

struct RowMessage {
  uint64_t key;
  double sum[kNumThresholds];
  uint32_t count[kNumThresholds];
};

struct RowShared {
  RowMessage received[2][kMaxCluster];
  RowTotals warp_totals[kRowWarps];
  uint64_t warp_keys[kRowWarps];
  float warp_max[kRowWarps];
  uint64_t candidates[kMaxCandidates];  // of block 0, written by all
  uint64_t sorted[kMaxCandidates];      // of block 0
  uint32_t num_candidates;              // of block 0
};

// The blocks that share a row. All threads call each function; results are the same in all of them.
template <int kCluster>
class RowTeam {
 public:
  __device__ explicit RowTeam(RowShared& shared) : shared_(shared) {
    if (threadIdx.x == 0) shared.num_candidates = 0;
#if __CUDA_ARCH__ >= 900
    if constexpr (kCluster > 1) cooperative_groups::this_cluster().barrier_arrive();
#endif
  }

  // Once, before the first exchange: every block has started, and may be written to.
  __device__ static void WaitForStart() {
#if __CUDA_ARCH__ >= 900
    if constexpr (kCluster > 1) return cooperative_groups::this_cluster().barrier_wait();
#endif
    __syncthreads();
  }

  __device__ static int rank() { return static_cast<int>(blockIdx.x % kCluster); }

  // Memory of a block lies at the same place in each.
  template <typename T>
  __device__ static T* Of(T* mine, int rank) {
#if __CUDA_ARCH__ >= 900
    if constexpr (kCluster > 1)
      return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
#endif
    return mine;
  }
  __device__ static void Sync() {
#if __CUDA_ARCH__ >= 900
    if constexpr (kCluster > 1) return cooperative_groups::this_cluster().sync();
#endif
    __syncthreads();
  }

  __device__ uint64_t MaxKey(uint64_t key) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const uint64_t other = __shfl_xor_sync(0xffffffffu, key, offset);
      key = other > key ? other : key;
    }
    if (threadIdx.x % kWarp == 0) shared_.warp_keys[threadIdx.x / kWarp] = key;
    __syncthreads();
    if (threadIdx.x < kCluster) {
      for (int warp = 0; warp < kRowWarps; ++warp) key = max(key, shared_.warp_keys[warp]);
      Of(&shared_.received[parity_][rank()], threadIdx.x)->key = key;
    }
    Sync();
    key = 0;
    for (int from = 0; from < kCluster; ++from) key = max(key, shared_.received[parity_][from].key);
    parity_ ^= 1;
    return key;
  }

  // Sums over all threads.
  __device__ RowMessage Add(const RowTotals& totals) {
    RowTotals& mine = shared_.warp_totals[threadIdx.x / kWarp];
    for (int i = 0; i < kNumThresholds; ++i) {
      const uint32_t count = __reduce_add_sync(0xffffffffu, totals.count[i]);
      const float sum = WarpSum(totals.sum[i]);
      if (threadIdx.x % kWarp == 0) mine.count[i] = count, mine.sum[i] = sum;
    }
    __syncthreads();
    if (threadIdx.x < kCluster) {
      RowMessage message = {};
#pragma unroll 2
      for (int warp = 0; warp < kRowWarps; ++warp) AddTo(message, shared_.warp_totals[warp]);
      *Of(&shared_.received[parity_][rank()], threadIdx.x) = message;
    }
    Sync();
    RowMessage result = {};
#pragma unroll 2
    for (int from = 0; from < kCluster; ++from) AddTo(result, shared_.received[parity_][from]);
    parity_ ^= 1;
    return result;
  }

 private:
  template <typename From>
  __device__ static void AddTo(RowMessage& to, const From& from) {
    for (int i = 0; i < kNumThresholds; ++i) to.count[i] += from.count[i], to.sum[i] += from.sum[i];
  }

  RowShared& shared_;
  int parity_ = 0;  // a block may be one exchange ahead of another
};

// The part of a row that a block has.
struct RowPart {
  float4* values;
  int64_t first_id;
  int num_groups;
  int vocab_size;
};

__device__ inline float& Element(float4& x, int i) { return (&x.x)[i]; }

template <int kCluster>
class RowOps {
 public:
  __device__ RowOps(RowShared& shared, const RowPart& part)
      : shared_(shared), team_(shared), part_(part) {}

  __device__ RowTeam<kCluster>& team() { return team_; }
  __device__ uint32_t vocab_size() const { return static_cast<uint32_t>(part_.vocab_size); }
  // The one thread of the team that writes what there is one of.
  __device__ bool writes() const { return RowTeam<kCluster>::rank() == 0 && threadIdx.x == 0; }

  // Reads the row, the first time or again. The largest key of all, or kBadKey. Ids beyond the
  // vocabulary have -inf.
  template <bool kFirst>
  __device__ uint64_t Load(const float* logits) {
    const bool aligned = reinterpret_cast<uintptr_t>(logits) % sizeof(float4) == 0;
    float largest = -INFINITY;
    uint32_t id_of_largest = 0;
    bool any = false, bad = false;
    for (int first = static_cast<int>(threadIdx.x); first < part_.num_groups;
         first += kLoadsInFlight * kRowThreads) {
      float4 x[kLoadsInFlight];
#pragma unroll
      for (int i = 0; i < kLoadsInFlight; ++i) {
        const int group = first + i * kRowThreads;
        if (group < part_.num_groups) x[i] = LoadGroup(logits, group, aligned);
      }
#pragma unroll
      for (int i = 0; i < kLoadsInFlight; ++i) {
        const int group = first + i * kRowThreads;
        if (group >= part_.num_groups) break;
        part_.values[group] = x[i];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float value = Element(x[i], e);
          bad |= !(value < INFINITY);
          if (value > largest || !any) largest = value, id_of_largest = Id(group, e);
          any = true;
        }
      }
    }
    if (kFirst) team_.WaitForStart();
    const uint64_t key = any ? KeyOf(largest, id_of_largest) : 0;
    return team_.MaxKey(bad ? kBadKey : key);
  }

  // Bias and penalties; the largest key.
  __device__ uint64_t Adjust(const SampleRow& row, const uint32_t* counts) {
    __syncthreads();
    for (int32_t i = threadIdx.x; i < row.num_biases; i += kRowThreads) {
      const int64_t index = row.biases[i].token_id - part_.first_id;
      if (index >= 0 && index < 4 * int64_t{part_.num_groups}) {
        atomicAdd(reinterpret_cast<float*>(part_.values) + index, row.biases[i].bias);
      }
    }
    __syncthreads();
    uint64_t best = 0;
    ForEach([&](float& value, uint32_t id) {
      if (counts != nullptr && id < static_cast<uint32_t>(part_.vocab_size))
        value = Penalised(row, counts[id], value);
      best = max(best, KeyOf(value, id));
    });
    return team_.MaxKey(best);
  }

  // The largest key below `limit`; 0: there is none, and its value is no number.
  __device__ uint64_t LargestBelow(uint64_t limit) {
    uint64_t best = 0;
    ForEach([&](float value, uint32_t id) {
      const uint64_t key = KeyOf(value, id);
      if (key < limit) best = max(best, key);
    });
    return team_.MaxKey(best);
  }

  // value <- (value - max) / temperature.
  __device__ void Temper(float max, float temperature) {
    ForEach([&](float& value, uint32_t) { value = (value - max) / temperature; });
  }

  // value <- -inf where top_k, top_p or min_p do not keep it. The largest is 0.
  __device__ void Filter(const SampleRow& row) {
    const uint32_t high = OrderKey(0.0f) + 1;
    if (row.top_k > 0 && row.top_k < part_.vocab_size) Keep(SelectKey<false>(row.top_k, high));
    if (row.top_p < 1) {
      RowTotals all = {};
      ForEach([&](float value, uint32_t) { all.sum[0] += Weight(value); });
      Keep(SelectKey<true>(static_cast<double>(row.top_p) * team_.Add(all).sum[0], high));
    }
    if (row.min_p <= 0) return;
    const float least = fminf(row.min_p, 1.0f);
    ForEach([&](float& value, uint32_t) { value = expf(value) < least ? -INFINITY : value; });
  }

  // The largest key of value + Gumbel variate of `position`, over what is kept; 0: nothing is.
  __device__ uint64_t Draw(const SampleRow& row, int64_t position) {
    float best = -INFINITY;
    int best_group = -1;
    bool ambiguous = false;
#pragma unroll 1
    for (int group = static_cast<int>(threadIdx.x); group < part_.num_groups;
         group += kRowThreads) {
      float4 x = part_.values[group];
      if (fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)) == -INFINITY) continue;
      const PhiloxWords words = Words(row, position, group);
      float largest = -INFINITY;
#pragma unroll
      for (int e = 0; e < 4; ++e)
        largest = fmaxf(largest, Element(x, e) + ApproximateGumbel(words.word[e]));
      if (largest < best - kMargin) continue;
      ambiguous = best_group >= 0 && largest <= best + kMargin;
      if (largest > best || best_group < 0) best = largest, best_group = group;
    }
    const float limit = BlockMaxOf(best) - kMargin;
    uint64_t key = 0;
    if (best_group >= 0 && best >= limit) {
#pragma unroll 1
      for (int group = ambiguous ? static_cast<int>(threadIdx.x) : best_group;
           group < part_.num_groups; group += kRowThreads) {
        key = max(key, ExactKey(row, position, group));
        if (!ambiguous) break;
      }
    }
    return team_.MaxKey(key);
  }

  // Sum of exp(values), in double.
  __device__ double SumExp() {
    RowTotals totals = {};
    ForEach([&](float value, uint32_t) { totals.sum[0] += expf(value); });
    return team_.Add(totals).sum[0];
  }

  // Largest probability and entropy of softmax(values), whose largest is `max`.
  __device__ void WriteCertainty(float max, float* certainty) {
    if (max == -INFINITY) {
      if (writes()) certainty[0] = 1, certainty[1] = 0;
      return;
    }
    RowTotals totals = {};
    ForEach([&](float value, uint32_t) {
      const float weight = expf(value - max);
      totals.sum[0] += weight;
      if (weight > 0) totals.sum[1] += weight * (value - max);
    });
    const RowMessage all = team_.Add(totals);
    if (!writes()) return;
    certainty[0] = static_cast<float>(1 / all.sum[0]);
    certainty[1] = static_cast<float>(log(all.sum[0]) - all.sum[1] / all.sum[0]);
  }

  // Of one id.
  __device__ float ValueAt(int32_t id) {
    const int64_t index = id - part_.first_id;
    const int64_t group = index / 4;
    uint64_t key = 0;
    if (index >= 0 && group < part_.num_groups && group % kRowThreads == threadIdx.x) {
      key = KeyOf(Element(part_.values[group], static_cast<int>(index % 4)),
                  static_cast<uint32_t>(id));
    }
    return ValueOf(team_.MaxKey(key));
  }

  // log of the sum of exp(values), whose largest is `max`, in double; 0 for a row of -inf.
  __device__ double LogSumExp(float max) {
    if (max == -INFINITY) return 0;
    RowTotals totals = {};
    ForEach([&](float value, uint32_t) { totals.sum[0] += expf(value - max); });
    return max + log(team_.Add(totals).sum[0]);
  }

  // The `count` largest of the vocabulary, and their logarithms of probability.
  __device__ void WriteTop(float max, double log_sum, int64_t count, int32_t* ids,
                           float* logprobs) {
    count = min(count, int64_t{part_.vocab_size});
    uint64_t limit = kBadKey;
    for (int64_t first = 0; first < count; first += kMaxCandidates) {
      const int64_t end = min(first + kMaxCandidates, count);
      const uint64_t least = SelectKey<false>(static_cast<double>(end), OrderKey(max) + 1);
      team_.Sync();
      const int num_sorted = GatherSorted(least, limit);
      if (team_.rank() == 0 && static_cast<int>(threadIdx.x) < num_sorted) {
        const uint64_t key = shared_.sorted[threadIdx.x];
        ids[first + threadIdx.x] = IdOf(key);
        logprobs[first + threadIdx.x] = static_cast<float>(ValueOf(key) - log_sum);
      }
      limit = least;
      team_.Sync();
    }
  }

  // visit(value, id), which may change the value; also ids beyond the vocabulary, in the last
  // groups.
  template <typename Visit>
  __device__ void ForEach(const Visit& visit) {
#pragma unroll 1
    for (int group = static_cast<int>(threadIdx.x); group < part_.num_groups;
         group += kRowThreads) {
      float4 x = part_.values[group];
#pragma unroll
      for (int e = 0; e < 4; ++e) visit(Element(x, e), Id(group, e));
      part_.values[group] = x;
    }
  }

 private:
  __device__ uint32_t Id(int group, int e) const {
    return static_cast<uint32_t>(part_.first_id) + 4u * static_cast<uint32_t>(group) +
           static_cast<uint32_t>(e);
  }

  __device__ float4 LoadGroup(const float* logits, int group, bool aligned) const {
    const int64_t id = Id(group, 0);
    if (aligned && id + 4 <= part_.vocab_size)
      return __ldcs(reinterpret_cast<const float4*>(logits + id));
    float4 x;
#pragma unroll
    for (int e = 0; e < 4; ++e)
      Element(x, e) = id + e < part_.vocab_size ? __ldcs(logits + id + e) : -INFINITY;
    return x;
  }

  __device__ static float Penalised(const SampleRow& row, uint32_t count, float logit) {
    if (count == 0) return logit;
    logit = logit > 0 ? logit / row.repetition_penalty : logit * row.repetition_penalty;
    const uint32_t in_output = count & ~kPromptBit;
    if (in_output == 0) return logit;
    return logit - (row.presence_penalty + row.frequency_penalty * static_cast<float>(in_output));
  }

  __device__ static float Weight(float value) { return __expf(value); }

  __device__ void Keep(uint64_t least) {
    ForEach(
        [&](float& value, uint32_t id) { value = KeyOf(value, id) < least ? -INFINITY : value; });
  }

  // Of what `visit` says of each element: (value, id, totals).
  template <typename Visit>
  __device__ RowMessage Count(const Visit& visit) {
    RowTotals totals = {};
#pragma unroll 1
    for (int group = static_cast<int>(threadIdx.x); group < part_.num_groups;
         group += kRowThreads) {
      float4 x = part_.values[group];
#pragma unroll
      for (int e = 0; e < 4; ++e) visit(Element(x, e), Id(group, e), totals);
    }
    return team_.Add(totals);
  }

  // The key of the element at which the weights (or, without, the number) of elements, added from
  // the largest key down, reach `target`; of at least one. All order keys are below `high`.
  template <bool kWeighted>
  __device__ uint64_t SelectKey(double target, uint32_t high) {
    uint32_t low = OrderKey(-INFINITY);
    uint32_t count_low = UINT32_MAX, count_high = 0;
    double sum_high = 0;
    bool first_pass = true;
    while (high - low > 1 && count_low - count_high > kMaxCandidates) {
      uint32_t key[kNumThresholds];
      float threshold[kNumThresholds];
      for (int i = 0; i < kNumThresholds; ++i) {
        // Logits lie within a few units of the largest: that saves two or three passes.
        const float near = OfOrderKey(high - 1) - static_cast<float>(32 >> 2 * i);
        key[i] = first_pass ? min(max(OrderKey(near), low), high - 1)
                            : low + static_cast<uint32_t>(uint64_t{high - low} *
                                                          static_cast<uint32_t>(i + 1) /
                                                          (kNumThresholds + 1));
        threshold[i] = OfOrderKey(key[i]);
      }
      first_pass = false;
      const RowMessage found = Count([&](float value, uint32_t, RowTotals& totals) {
        const float weight = kWeighted ? Weight(value) : 1.0f;
#pragma unroll
        for (int i = 0; i < kNumThresholds; ++i) {
          if (value >= threshold[i]) {
            ++totals.count[i];
            if (kWeighted) totals.sum[i] += weight;
          }
        }
      });
      for (int i = kNumThresholds - 1; i >= 0; --i) {
        const double sum = kWeighted ? found.sum[i] : static_cast<double>(found.count[i]);
        if (sum >= target) {
          low = key[i], count_low = found.count[i];
          break;
        }
        high = key[i], count_high = found.count[i], sum_high = sum;
      }
    }
    if (count_low - count_high > kMaxCandidates) {
      const float value = OfOrderKey(low);  // of all that are left
      const double each = kWeighted ? static_cast<double>(Weight(value)) : 1.0;
      const double ties = count_low - count_high;
      const double needed =
          each > 0 ? fmin(fmax(ceil((target - sum_high) / each), 1.0), ties) : ties;
      return KeyOf(value, IdOfTie(value, static_cast<uint32_t>(needed)));
    }
    const int num_sorted = GatherSorted(uint64_t{low} << 32, uint64_t{high} << 32);
    return team_.MaxKey(team_.rank() == 0 && threadIdx.x < kWarp
                            ? KeyAt<kWeighted>(target - sum_high, num_sorted)
                            : 0);
  }

  // The id of the `number`-th element of this value.
  __device__ uint32_t IdOfTie(float value, uint32_t number) {
    uint32_t low = 0, high = 4u * (static_cast<uint32_t>(part_.vocab_size) / 4 +
                                   1);  // ids below low are too few
    while (high - low > 1) {
      uint32_t end[kNumThresholds];
      for (int i = 0; i < kNumThresholds; ++i) {
        end[i] = low + static_cast<uint32_t>(uint64_t{high - low} * static_cast<uint32_t>(i + 1) /
                                             (kNumThresholds + 1));
      }
      const RowMessage found = Count([&](float x, uint32_t id, RowTotals& totals) {
#pragma unroll
        for (int i = 0; i < kNumThresholds; ++i) totals.count[i] += x == value && id < end[i];
      });
      for (int i = 0; i < kNumThresholds; ++i) {
        if (found.count[i] >= number) {
          high = end[i];
          break;
        }
        low = end[i];
      }
    }
    return low;
  }

  // Puts the keys in [low, high), at most kMaxCandidates, in descending order into `sorted` of
  // block 0, which gets their number.
  __device__ int GatherSorted(uint64_t low, uint64_t high) {
#pragma unroll 1
    for (int group = static_cast<int>(threadIdx.x); group < part_.num_groups;
         group += kRowThreads) {
      float4 x = part_.values[group];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const uint64_t key = KeyOf(Element(x, e), Id(group, e));
        if (key < low || key >= high) continue;
        const uint32_t slot = atomicAdd(team_.Of(&shared_.num_candidates, 0), 1u);
        if (slot < kMaxCandidates) *team_.Of(&shared_.candidates[slot], 0) = key;
      }
    }
    team_.Sync();
    if (team_.rank() != 0) return 0;
    const int count =
        static_cast<int>(min(shared_.num_candidates, static_cast<uint32_t>(kMaxCandidates)));
    if (static_cast<int>(threadIdx.x) < count) {
      const uint64_t key = shared_.candidates[threadIdx.x];
      int place = 0;
      for (int i = 0; i < count; ++i) place += shared_.candidates[i] > key;
      shared_.sorted[place] = key;
    }
    __syncthreads();
    if (threadIdx.x == 0) shared_.num_candidates = 0;
    return count;
  }

  // By a warp: the sorted key at which the weights reach `target`, else the last.
  template <bool kWeighted>
  __device__ uint64_t KeyAt(double target, int num_sorted) {
    const int lane = static_cast<int>(threadIdx.x);
    constexpr int kEach = kMaxCandidates / kWarp;
    double sums[kEach], total = 0;
    for (int i = 0; i < kEach; ++i) {
      const int place = lane * kEach + i;
      if (place < num_sorted)
        total += kWeighted ? static_cast<double>(Weight(ValueOf(shared_.sorted[place]))) : 1.0;
      sums[i] = total;
    }
    double before = total;
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const double other = __shfl_up_sync(0xffffffffu, before, offset);
      if (lane >= offset) before += other;
    }
    before -= total;
    int place = num_sorted - 1;
    for (int i = kEach - 1; i >= 0; --i) {
      if (lane * kEach + i < num_sorted && before + sums[i] >= target)
        place = min(place, lane * kEach + i);
    }
    place = __reduce_min_sync(0xffffffffu, place);
    return place < 0 ? 0 : shared_.sorted[place];
  }

  // A thread of the block has the largest.
  __device__ float BlockMaxOf(float x) { return BlockMax<kRowThreads>(x, shared_.warp_max); }

  __device__ PhiloxWords Words(const SampleRow& row, int64_t position, int group) const {
    return SampleWords(row.seed, Id(group, 0) / 4, row.output_index, position);
  }

  // GumbelOfWord within 2^-15.
  __device__ static float ApproximateGumbel(uint32_t x) {
    constexpr float kLn2 = 0.69314718f;
    const bool upper = x >= 0x80000000u;
    const float distance = (static_cast<float>(upper ? ~x : x) + 0.5f) * 2.3283064365386963e-10f;
    float exponential = -kLn2 * __log2f(upper ? 1 - distance : distance);
    // Next to 1 the logarithm of the rounded argument is off; the series to d^3.
    if (upper && distance < 0.015625f)
      exponential = distance * fmaf(distance, fmaf(distance, 0.33333333f, 0.5f), 1.0f);
    return -kLn2 * __log2f(exponential);
  }

  __device__ uint64_t ExactKey(const SampleRow& row, int64_t position, int group) const {
    float4 x = part_.values[group];
    const PhiloxWords words = Words(row, position, group);
    uint64_t key = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (Element(x, e) != -INFINITY)
        key = max(key, KeyOf(Element(x, e) + GumbelOfWord(words.word[e]), Id(group, e)));
    }
    return key;
  }

  RowShared& shared_;
  RowTeam<kCluster> team_;
  const RowPart part_;
};

// How rows are divided: the same for every row of a vocabulary.
struct RowLayout {
  int cluster = 1;
  int groups_per_block = 0;
  bool resident = false;  // in shared memory

  int64_t shared_bytes() const {
    return resident ? int64_t{groups_per_block} * static_cast<int64_t>(sizeof(float4)) : 0;
  }
  int64_t scratch_bytes(int64_t num_rows) const {
    return resident ? 0
                    : num_rows * cluster * groups_per_block * static_cast<int64_t>(sizeof(float4));
  }
};

// The row of the team that this block belongs to. Dynamic shared memory holds its part, or scratch
// does.
template <int kCluster>
__device__ RowPart PartOfBlock(const RowLayout& layout, int64_t vocab_size, float4* shared_values,
                               float4* scratch) {
  const int64_t num_groups = (vocab_size + 3) / 4;
  const int64_t first = int64_t{blockIdx.x % kCluster} * layout.groups_per_block;
  RowPart part;
  part.values =
      layout.resident ? shared_values : scratch + int64_t{blockIdx.x} * layout.groups_per_block;
  part.first_id = 4 * first;
  part.num_groups =
      static_cast<int>(max(min(int64_t{layout.groups_per_block}, num_groups - first), int64_t{0}));
  part.vocab_size = static_cast<int>(vocab_size);
  return part;
}

__device__ inline bool HasPenalties(const SampleRow& row) {
  return row.repetition_penalty != 1 || row.presence_penalty != 0 || row.frequency_penalty != 0;
}

// What a token is drawn from: the id of `largest`, or the row's values, which are then logarithms
// of weights relative to the largest, -inf where top_k, top_p or min_p do not keep them.
struct DrawPlan {
  uint64_t largest = 0;  // after bias and penalties
  float raw_max = 0;     // the largest logit
  bool is_argmax = true;
  bool changed = false;  // the values are no longer the logits
};

// Of a row that Load has read, whose result was `largest` and not kBadKey. counts: of the row's
// slot, or null. margin and certainty: receive what SampleArgs says, or null.
template <int kCluster>
__device__ DrawPlan PrepareDraw(RowOps<kCluster>& ops, const SampleRow& row, uint64_t largest,
                                const uint32_t* counts, float* margin = nullptr,
                                float* certainty = nullptr) {
  DrawPlan plan = {.largest = largest, .raw_max = ValueOf(largest)};
  const bool penalised = counts != nullptr && HasPenalties(row);
  plan.changed = penalised || row.num_biases > 0;
  if (plan.changed) plan.largest = ops.Adjust(row, penalised ? counts : nullptr);
  if (margin != nullptr) {
    const float distance = ValueOf(plan.largest) - ValueOf(ops.LargestBelow(plan.largest));
    if (ops.writes()) *margin = isfinite(distance) ? distance : 0;
  }
  if (certainty != nullptr) ops.WriteCertainty(ValueOf(plan.largest), certainty);
  if (row.temperature == 0 || ValueOf(plan.largest) == -INFINITY) return plan;
  ops.Temper(ValueOf(plan.largest), row.temperature);
  ops.Filter(row);
  plan.is_argmax = false;
  plan.changed = true;
  return plan;
}

// By the Gumbel noise of `position`.
template <int kCluster>
__device__ int32_t DrawToken(RowOps<kCluster>& ops, const SampleRow& row, const DrawPlan& plan,
                             int64_t position) {
  if (plan.is_argmax) return IdOf(plan.largest);
  const uint64_t drawn = ops.Draw(row, position);
  return IdOf(drawn != 0 ? drawn : plan.largest);
}

// The distribution of a plan, normalised: of a value and its id.
class Probabilities {
 public:
  template <int kCluster>
  __device__ Probabilities(RowOps<kCluster>& ops, const DrawPlan& plan)
      : argmax_(plan.is_argmax ? IdOf(plan.largest) : -1),
        scale_(plan.is_argmax ? 0 : static_cast<float>(1 / ops.SumExp())) {}

  __device__ float operator()(float value, uint32_t id) const {
    if (argmax_ < 0) return expf(value) * scale_;
    return id == static_cast<uint32_t>(argmax_) ? 1.0f : 0.0f;
  }

 private:
  int32_t argmax_;
  float scale_;
};

// Log-probabilities of the drawn token and of the likeliest ones, as the row asks for. Afterwards
// the values are the logits, or as they were.
template <int kCluster, typename Args>
__device__ void WriteLogprobs(RowOps<kCluster>& ops, const Args& args, const SampleRow& row,
                              const DrawPlan& plan, int32_t token, int64_t output) {
  if (row.num_logprobs < 0) return;
  const float* logits = Row<const float>(args.logits, row.logit_row);
  if (plan.changed) ops.template Load<false>(logits);
  const double log_sum = ops.LogSumExp(plan.raw_max);
  if (ops.writes())
    *Row<float>(args.logprobs, output) = static_cast<float>(logits[token] - log_sum);
  if (row.num_logprobs == 0) return;
  ops.WriteTop(plan.raw_max, log_sum, row.num_logprobs, Row<int32_t>(args.top_ids, output),
               Row<float>(args.top_logprobs, output));
}

inline RowLayout LayoutOf(int64_t vocab_size, int compute_capability) {
  int device = 0, most_shared = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  RowLayout layout;
  layout.cluster = compute_capability >= 90 ? kMaxCluster : 1;
  layout.groups_per_block = static_cast<int>(DivideUp(DivideUp(vocab_size, 4), layout.cluster));
  layout.resident = int64_t{layout.groups_per_block} * static_cast<int64_t>(sizeof(float4)) <=
                    most_shared - static_cast<int64_t>(sizeof(RowShared));
  return layout;
}

template <typename Args>
cudaError_t LaunchRows(void (*kernel)(Args, RowLayout, float4*), const Args& args,
                       const RowLayout& layout, int64_t num_rows, Context& context) {
  void* scratch = nullptr;
  if (const int64_t num_bytes = layout.scratch_bytes(num_rows); num_bytes > 0) {
    if (const cudaError_t error = context.scratch.Reserve(num_bytes, &scratch);
        error != cudaSuccess)
      return error;
  }
  const auto shared_bytes = static_cast<int>(layout.shared_bytes());
  const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (allowed != cudaSuccess) return allowed;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(layout.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<unsigned>(num_rows * layout.cluster);
  config.blockDim = kRowThreads;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = context.stream;
  config.attrs = attributes;
  config.numAttrs = layout.cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, args, layout, static_cast<float4*>(scratch));
}

}  // namespace godwit::cuda
