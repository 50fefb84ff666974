#include "engine/sampling_params.h"

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace godwit {
namespace {

constexpr int64_t kVocab = 1000;

TEST(SamplingParamsTest, DefaultsAndLimitsAreValid) {
  EXPECT_TRUE(ValidateSampling({}, kVocab).ok());
  SamplingParams sampling = {.temperature = 100,
                             .top_k = std::numeric_limits<int32_t>::max(),
                             .top_p = 1e-6f,
                             .min_p = 1,
                             .repetition_penalty = 100,
                             .presence_penalty = -2,
                             .frequency_penalty = 2,
                             .num_logprobs = kMaxTopLogprobs,
                             .min_tokens = int64_t{1} << 40};
  for (int32_t id = 0; id < 1000; ++id)
    sampling.logit_bias.push_back({id, id % 2 == 0 ? 100.0f : -100.0f});
  sampling.end_token_ids.assign(kMaxEndTokenIds, 999);
  EXPECT_TRUE(ValidateSampling(sampling, kVocab).ok());
}

struct Rejection {
  const char* words;  // in the message: field, value, limit
  std::function<void(SamplingParams&)> change;
};

TEST(SamplingParamsTest, RejectionsNameFieldValueAndLimit) {
  const float nan = std::nanf(""), inf = std::numeric_limits<float>::infinity();
  const std::vector<Rejection> rejections = {
      {"temperature -0.5 not in [0, 100]", [](auto& s) { s.temperature = -0.5f; }},
      {"temperature 101 not in", [](auto& s) { s.temperature = 101; }},
      {"temperature nan not in", [=](auto& s) { s.temperature = nan; }},
      {"temperature inf not in", [=](auto& s) { s.temperature = inf; }},
      {"top_k -1 not in", [](auto& s) { s.top_k = -1; }},
      {"top_p 0 not in (0, 1]", [](auto& s) { s.top_p = 0; }},
      {"top_p 1.5 not in", [](auto& s) { s.top_p = 1.5f; }},
      {"top_p nan", [=](auto& s) { s.top_p = nan; }},
      {"min_p -1 not in [0, 1]", [](auto& s) { s.min_p = -1; }},
      {"min_p 2 not in", [](auto& s) { s.min_p = 2; }},
      {"repetition_penalty 0 not in (0, 100]", [](auto& s) { s.repetition_penalty = 0; }},
      {"repetition_penalty nan", [=](auto& s) { s.repetition_penalty = nan; }},
      {"presence_penalty 3 not in [-2, 2]", [](auto& s) { s.presence_penalty = 3; }},
      {"frequency_penalty -3 not in [-2, 2]", [](auto& s) { s.frequency_penalty = -3; }},
      {"logit_bias token id 1000 not in [0, 1000)",
       [](auto& s) {
         s.logit_bias = {{1000, 1}};
       }},
      {"logit_bias token id -1",
       [](auto& s) {
         s.logit_bias = {{-1, 1}};
       }},
      {"logit_bias of token id 5 101 not in [-100, 100]",
       [](auto& s) {
         s.logit_bias = {{5, 101}};
       }},
      {"logit_bias of token id 5 -inf",
       [=](auto& s) {
         s.logit_bias = {{5, -inf}};
       }},
      {"logit_bias names token id 5 twice",
       [](auto& s) {
         s.logit_bias = {{5, 1}, {6, 1}, {5, 2}};
       }},
      {"logit_bias has 1025 entries, the limit is 1024",
       [](auto& s) { s.logit_bias.resize(1025); }},
      {"num_logprobs 21 not in [-1, 20]", [](auto& s) { s.num_logprobs = 21; }},
      {"num_logprobs -2 not in", [](auto& s) { s.num_logprobs = -2; }},
      {"min_tokens -1 not >= 0", [](auto& s) { s.min_tokens = -1; }},
      {"end_token_ids token id 1000", [](auto& s) { s.end_token_ids = {1000}; }},
      {"end_token_ids has 129 entries", [](auto& s) { s.end_token_ids.resize(129); }},
  };
  for (const Rejection& rejection : rejections) {
    SamplingParams sampling;
    rejection.change(sampling);
    const absl::Status status = ValidateSampling(sampling, kVocab);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << rejection.words;
    EXPECT_THAT(std::string(status.message()), testing::HasSubstr(rejection.words));
  }
}

TEST(SamplingParamsTest, NoMoreLogprobsThanTheVocabularyHas) {
  EXPECT_TRUE(ValidateSampling({.num_logprobs = 7}, 7).ok());
  EXPECT_FALSE(ValidateSampling({.num_logprobs = 8}, 7).ok());
}

}  // namespace
}  // namespace godwit
