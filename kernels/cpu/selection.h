#pragma once
// Choosing the largest elements of a row of logits without sorting it.

#include <cstdint>

#include "kernels/cpu/isa.h"

namespace godwit {

// A prefix of the row in descending order, ties by lower index: the elements whose key is above
// `key`, and the first `num_ties` of those that have it.
struct Prefix {
  uint32_t key = 0;
  int64_t num_ties = 0;
};

// Orders as the floats do, with -0 = +0. x is no NaN.
uint32_t OrderKey(float x);

// The shortest prefix of x[0..n) that has `count` elements; n >= count >= 1.
Prefix LargestPrefix(const IsaTable& isa, const float* x, int64_t n, int64_t count);

// The shortest prefix, of at least one element, whose weights sum to `target` or more. Elements of
// equal x have equal weight. All of them where rounding leaves the whole sum below the target.
Prefix WeightedPrefix(const IsaTable& isa, const float* x, const float* weights, int64_t n,
                      double target);

// x[i] <- -inf outside the prefix.
void KeepPrefix(const IsaTable& isa, const Prefix& prefix, float* x, int64_t n);

struct LogSoftmax {
  float max = 0;
  double log_sum = 0;  // log sum_j exp(x[j] - max)
  bool bad = false;    // a NaN or +inf is among x

  float At(float x) const { return static_cast<float>(static_cast<double>(x) - max - log_sum); }
};
LogSoftmax ComputeLogSoftmax(const IsaTable& isa, const float* x, int64_t n);

// The `count` largest of x and their log-probabilities, descending, ties by lower index; min(count,
// n) are written.
void TopLogprobs(const IsaTable& isa, const LogSoftmax& softmax, const float* x, int64_t n,
                 int64_t count, int32_t* ids, float* logprobs);

}  // namespace godwit
