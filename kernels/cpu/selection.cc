// A prefix is found by the digits of its last key, from the top: one histogram pass over the row finds the digit where the
// running sum crosses the target, the next pass looks at the elements that share the digits found so far. Three passes,
// whatever the distribution, and the sums are formed in index order: the result is one fixed function of the row.

#include "kernels/cpu/selection.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "kernels/cpu/vector_ops.h"

namespace godwit {
namespace {

// Digits of a key, from the top: 11 + 11 + 10 bits.
constexpr int kDigits = 3;
constexpr int kDigitShift[kDigits] = {21, 10, 0};
constexpr uint32_t kDigitMask[kDigits] = {0x7ff, 0x7ff, 0x3ff};
constexpr int kBuckets = 1 << 11;

// Weight 1 for every element where `weights` is null.
Prefix FindPrefix(const float* x, const float* weights, int64_t n, double target) {
  double sums[kBuckets];
  int32_t counts[kBuckets];
  double before = 0;  // the sum of the elements above the digits found so far
  uint32_t found = 0;
  uint32_t found_mask = 0;
  int64_t ties = 0;
  double tie_sum = 0;
  for (int digit = 0; digit < kDigits; ++digit) {
    std::fill_n(sums, kBuckets, 0.0);
    std::fill_n(counts, kBuckets, 0);
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = OrderKey(x[i]);
      if ((key & found_mask) != found) continue;
      const uint32_t bucket = (key >> kDigitShift[digit]) & kDigitMask[digit];
      sums[bucket] += weights == nullptr ? 1.0 : static_cast<double>(weights[i]);
      ++counts[bucket];
    }
    int chosen = -1;
    for (int bucket = static_cast<int>(kDigitMask[digit]); bucket >= 0; --bucket) {
      if (counts[bucket] == 0) continue;
      if (chosen >= 0) before += sums[chosen];
      chosen = bucket;
      if (before + sums[bucket] >= target) break;
    }
    found |= static_cast<uint32_t>(chosen) << kDigitShift[digit];
    found_mask |= kDigitMask[digit] << kDigitShift[digit];
    ties = counts[chosen];
    tie_sum = sums[chosen];
  }
  const double each = tie_sum / static_cast<double>(ties);
  const double needed = each > 0 ? std::ceil((target - before) / each) : static_cast<double>(ties);
  return {found, static_cast<int64_t>(std::clamp(needed, 1.0, static_cast<double>(ties)))};
}

}  // namespace

uint32_t OrderKey(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

Prefix LargestPrefix(const float* x, int64_t n, int64_t count) {
  return FindPrefix(x, nullptr, n, static_cast<double>(count));
}

Prefix WeightedPrefix(const float* x, const float* weights, int64_t n, double target) {
  return FindPrefix(x, weights, n, target);
}

void KeepPrefix(const Prefix& prefix, float* x, int64_t n) {
  int64_t ties_left = prefix.num_ties;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = OrderKey(x[i]);
    if (key > prefix.key) continue;
    if (key == prefix.key && ties_left > 0) {
      --ties_left;
      continue;
    }
    x[i] = -INFINITY;
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

void TopLogprobs(const LogSoftmax& softmax, const float* x, int64_t n, int64_t count, int32_t* ids,
                 float* logprobs) {
  count = std::min(count, n);
  if (count == 0) return;
  const Prefix prefix = LargestPrefix(x, n, count);
  int64_t ties_left = prefix.num_ties;
  int64_t taken = 0;
  for (int64_t i = 0; i < n && taken < count; ++i) {
    const uint32_t key = OrderKey(x[i]);
    if (key < prefix.key || (key == prefix.key && ties_left-- <= 0)) continue;
    ids[taken++] = static_cast<int32_t>(i);
  }
  std::sort(ids, ids + taken, [x](int32_t a, int32_t b) {
    return x[a] > x[b] || (x[a] == x[b] && a < b);
  });
  for (int64_t i = 0; i < taken; ++i) logprobs[i] = softmax.At(x[ids[i]]);
}

}  // namespace godwit
