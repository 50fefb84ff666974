// A prefix is found by bisection over the ordered bit patterns of floats: a pass counts (or weighs)
// the elements at or above a threshold, 16 at a time, until few are left between the two ends;
// those are sorted. About 12 passes of 4 us for 65,536 logits, whatever the distribution; a
// histogram of digits takes 10 times as long, because logits crowd in a few buckets.

#include "kernels/cpu/selection.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "kernels/cpu/vector_ops.h"

namespace godwit {
namespace {

constexpr int64_t kMaxSorted = 256;  // elements left to sort

// The float that OrderKey maps to `key`.
float OfKey(uint32_t key) {
  return std::bit_cast<float>((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

// Weight 1 for every element where `weights` is null.
Prefix FindPrefix(const IsaTable& isa, const float* x, const float* weights, int64_t n,
                  double target) {
  CountAtLeastArgs at_least = {.x = x, .weights = weights, .n = n};
  auto sum_from = [&](uint32_t key) {
    at_least.threshold = OfKey(key);
    isa.count_at_least(at_least);
    return at_least.sum;
  };
  // The elements with keys >= low reach the target, those with keys >= high do not.
  uint32_t low = OrderKey(-INFINITY);
  uint32_t high = OrderKey(INFINITY);
  int64_t count_low = n;
  int64_t count_high = 0;
  double sum_high = 0;
  while (high - low > 1 && count_low - count_high > kMaxSorted) {
    const uint32_t middle = low + (high - low) / 2;
    const double sum = sum_from(middle);
    (sum >= target ? low : high) = middle;
    (sum >= target ? count_low : count_high) = at_least.count;
    if (sum < target) sum_high = sum;
  }
  if (count_low - count_high > kMaxSorted) {
    // high = low + 1: all in between are equal, and so are their weights.
    const float value = OfKey(low);
    const double each =
        weights == nullptr ? 1.0 : static_cast<double>(weights[std::find(x, x + n, value) - x]);
    const double ties = static_cast<double>(count_low - count_high);
    const double needed = each > 0 ? std::ceil((target - sum_high) / each) : ties;
    return {low, static_cast<int64_t>(std::clamp(needed, 1.0, ties))};
  }
  int32_t between[kMaxSorted];
  int64_t num_between = 0;
  for (int64_t i = 0; i < n && num_between < count_low - count_high; ++i) {
    const uint32_t key = OrderKey(x[i]);
    if (key >= low && key < high) between[num_between++] = static_cast<int32_t>(i);
  }
  std::sort(between, between + num_between,
            [x](int32_t a, int32_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); });
  // Where even all of them stay below the target (a rounding), the last of the row is the end.
  Prefix prefix = {low, n};
  for (int64_t i = 0; i < num_between; ++i) {
    const uint32_t key = OrderKey(x[between[i]]);
    prefix.num_ties = i > 0 && key == prefix.key ? prefix.num_ties + 1 : 1;
    prefix.key = key;
    sum_high += weights == nullptr ? 1.0 : static_cast<double>(weights[between[i]]);
    if (sum_high >= target) break;
  }
  return prefix;
}

}  // namespace

uint32_t OrderKey(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

Prefix LargestPrefix(const IsaTable& isa, const float* x, int64_t n, int64_t count) {
  return FindPrefix(isa, x, nullptr, n, static_cast<double>(count));
}

Prefix WeightedPrefix(const IsaTable& isa, const float* x, const float* weights, int64_t n,
                      double target) {
  return FindPrefix(isa, x, weights, n, target);
}

void KeepPrefix(const IsaTable& isa, const Prefix& prefix, float* x, int64_t n) {
  const float last = OfKey(prefix.key);
  isa.keep_at_least({.x = x, .by = x, .n = n, .threshold = last});
  int64_t ties_left = prefix.num_ties;
  for (int64_t i = 0; i < n; ++i) {
    if (x[i] == last && ties_left-- <= 0) x[i] = -INFINITY;
  }
}

LogSoftmax ComputeLogSoftmax(const IsaTable& isa, const float* x, int64_t n) {
  ScanLogitsArgs scan = {.x = x, .n = n};
  isa.scan_logits(scan);
  // All banned: every log-probability is -inf.
  if (scan.bad || scan.max == -INFINITY) return {0, 0, scan.bad};
  SumExpArgs sum = {.x = x, .n = n, .max = scan.max};
  isa.sum_exp(sum);
  return {scan.max, std::log(sum.sum), false};
}

void TopLogprobs(const IsaTable& isa, const LogSoftmax& softmax, const float* x, int64_t n,
                 int64_t count, int32_t* ids, float* logprobs) {
  count = std::min(count, n);
  if (count == 0) return;
  const Prefix prefix = LargestPrefix(isa, x, n, count);
  int64_t ties_left = prefix.num_ties;
  int64_t taken = 0;
  for (int64_t i = 0; i < n && taken < count; ++i) {
    const uint32_t key = OrderKey(x[i]);
    if (key < prefix.key || (key == prefix.key && ties_left-- <= 0)) continue;
    ids[taken++] = static_cast<int32_t>(i);
  }
  std::sort(ids, ids + taken,
            [x](int32_t a, int32_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); });
  for (int64_t i = 0; i < taken; ++i) logprobs[i] = softmax.At(x[ids[i]]);
}

}  // namespace godwit
