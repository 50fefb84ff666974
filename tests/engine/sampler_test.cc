#include "engine/sampler.h"

#include <cmath>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace godwit {
namespace {

std::vector<std::pair<int32_t, float>> Biases(const SamplingParams& sampling,
                                              int64_t output_index) {
  std::vector<TokenBias> biases;
  AppendBiases(sampling, output_index, biases);
  std::vector<std::pair<int32_t, float>> pairs;
  for (const TokenBias& bias : biases) pairs.emplace_back(bias.token_id, bias.bias);
  return pairs;
}

TEST(AppendBiasesTest, BansEndTokensUntilMinTokensAreThere) {
  const SamplingParams sampling = {
      .logit_bias = {{5, 1.5f}}, .min_tokens = 2, .end_token_ids = {2, 9, 2}};
  using testing::ElementsAre;
  using testing::Pair;
  EXPECT_THAT(Biases(sampling, 0),
              ElementsAre(Pair(5, 1.5f), Pair(2, -INFINITY), Pair(9, -INFINITY)));
  EXPECT_THAT(Biases(sampling, 1),
              ElementsAre(Pair(5, 1.5f), Pair(2, -INFINITY), Pair(9, -INFINITY)));
  EXPECT_THAT(Biases(sampling, 2), ElementsAre(Pair(5, 1.5f)));
}

TEST(AppendBiasesTest, ABanReplacesABiasOfTheSameToken) {
  const SamplingParams sampling = {.logit_bias = {{2, 50}}, .min_tokens = 1, .end_token_ids = {2}};
  EXPECT_THAT(Biases(sampling, 0), testing::ElementsAre(testing::Pair(2, -INFINITY)));
  EXPECT_THAT(Biases(sampling, 1), testing::ElementsAre(testing::Pair(2, 50)));
}

// Each draw has its own, whatever the draws before it banned.
TEST(AppendBiasesTest, ABanInOneDrawDoesNotServeTheNext) {
  const SamplingParams sampling = {.min_tokens = 1, .end_token_ids = {2}};
  std::vector<TokenBias> biases = {{2, -INFINITY}};  // of the draw before
  AppendBiases(sampling, 0, biases);
  EXPECT_EQ(biases.size(), 2u);
}

TEST(StepOutputsTest, ScoreTopsAreDenseInsideABlockOfLogits) {
  EXPECT_EQ(StepOutputs::ScoreTop(0, 0, 3), 0);
  EXPECT_EQ(StepOutputs::ScoreTop(0, 1, 3), 3);
  EXPECT_EQ(StepOutputs::ScoreTop(0, 63, 3), 189);
  EXPECT_EQ(StepOutputs::ScoreTop(0, 64, 3), 64 * kMaxTopLogprobs);
  EXPECT_EQ(StepOutputs::ScoreTop(10, 65, 3), 74 * kMaxTopLogprobs + 3);
}

}  // namespace
}  // namespace godwit
