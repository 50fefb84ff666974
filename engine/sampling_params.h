#pragma once
// How the tokens of one request are drawn. Semantics and order: SampleRow in kernels/ops.h.

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "kernels/ops.h"

namespace godwit {

struct SamplingParams {
  float temperature = 1;          // [0, 100]; 0 = greedy
  int32_t top_k = 0;              // >= 0; 0 = all
  float top_p = 1;                // (0, 1]
  float min_p = 0;                // [0, 1]
  float repetition_penalty = 1;   // (0, 100]
  float presence_penalty = 0;     // [-2, 2]
  float frequency_penalty = 0;    // [-2, 2]
  std::vector<TokenBias> logit_bias;        // at most kMaxLogitBiases; ids unique and < vocab; bias in [-100, 100]
  int32_t num_logprobs = -1;      // -1: none; 0..kMaxTopLogprobs: also that many of the most likely
  int64_t min_tokens = 0;         // before that many output tokens, end_token_ids cannot be drawn
  std::vector<int32_t> end_token_ids;       // EOS and stop ids that min_tokens holds back
};

inline constexpr int kMaxLogitBiases = 1024;
inline constexpr int kMaxTopLogprobs = 20;
inline constexpr int kMaxStopTokenIds = 64;
inline constexpr int kMaxEndTokenIds = 2 * kMaxStopTokenIds;  // stop ids and the model's EOS ids

// INVALID_ARGUMENT naming field, value and limit.
absl::Status ValidateSampling(const SamplingParams& sampling, int64_t vocab_size);

}  // namespace godwit
