#include "engine/offline.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/engine_driver.h"

namespace godwit {
namespace {

using testing::HasSubstr;

class OfflineTest : public testing::TestWithParam<TinyFamily> {
 protected:
  OfflineTest() : model_({.family = GetParam()}), engine_(MakeEngine(model_, Options())) {}

  static EngineOptions Options() {
    return {
        .dtype = DType::kF32, .max_sequences = 1, .max_tokens_per_step = 512, .kv_bytes = 4 << 20};
  }

  std::vector<int32_t> Prompt(int64_t count) const {
    return RandomTokens(9, count, model_.options().vocab_size);
  }

  OfflineGenerateResult Generate(const std::vector<int32_t>& prompt,
                                 const OfflineGenerateOptions& options) {
    auto result = GenerateOffline(*engine_, prompt, options);
    EXPECT_TRUE(result.ok()) << result.status();
    return *std::move(result);
  }

  static std::vector<int32_t> Ids(const OfflineGenerateResult& result) {
    std::vector<int32_t> ids;
    for (const SampledToken& token : result.tokens) ids.push_back(token.token_id);
    return ids;
  }

  std::vector<float> Logits(const std::vector<int32_t>& ids, int64_t chunk) {
    std::vector<float> logits(ids.size() * static_cast<size_t>(model_.options().vocab_size));
    const auto result = ScoreOffline(*engine_, ids, chunk, logits.data());
    EXPECT_TRUE(result.ok()) << result.status();
    return logits;
  }

  TinyModel model_;
  std::unique_ptr<Engine> engine_;
};

TEST_P(OfflineTest, GeneratesWhatTheEngineDrawsStepByStep) {
  const std::vector<int32_t> prompt = Prompt(100);
  int64_t num_called = 0;
  const OfflineGenerateResult result = Generate(
      prompt,
      {.seed = 5, .max_tokens = 20, .ignore_eos = true, .on_token = [&](const SampledToken&) {
         ++num_called;
       }});
  EXPECT_EQ(result.tokens.size(), 20u);
  EXPECT_EQ(num_called, 20);
  EXPECT_FALSE(result.ended_by_eos);
  EXPECT_GT(result.prefill_seconds, 0);
  EXPECT_GT(result.decode_seconds, 0);
  EXPECT_EQ(Ids(result),
            Drive(*engine_, 1, {{.prompt = prompt, .seed = 5, .max_tokens = 20}})[0].ids());
  EXPECT_EQ(engine_->caches().free_slots(), 1) << "the lease is given back";
}

TEST_P(OfflineTest, EndsAtEosWithoutReturningIt) {
  const int32_t eos = engine_->card().config.eos_token_ids.at(0);
  OfflineGenerateOptions options = {.max_tokens = 10};
  options.sampling.logit_bias = {{eos, 100}};
  options.sampling.temperature = 0;
  OfflineGenerateResult result = Generate(Prompt(10), options);
  EXPECT_TRUE(result.ended_by_eos);
  EXPECT_TRUE(result.tokens.empty());
  options.sampling.min_tokens = 4;
  EXPECT_EQ(Generate(Prompt(10), options).tokens.size(), 4u);
  options.ignore_eos = true;
  EXPECT_THAT(Ids(Generate(Prompt(10), options)), testing::Each(eos));
}

TEST_P(OfflineTest, ChunksAtMultiplesOfPGiveTheSameBits) {
  const std::vector<int32_t> prompt = Prompt(300);
  const std::vector<float> expected = Logits(prompt, 0);
  for (const int64_t chunk : {64, 128, 256}) {
    const std::vector<float> logits = Logits(prompt, chunk);
    EXPECT_EQ(std::memcmp(logits.data(), expected.data(), logits.size() * sizeof(float)), 0)
        << chunk;
  }
}

TEST_P(OfflineTest, ChunksOfAnySizeAgree) {
  const std::vector<int32_t> prompt = Prompt(200);
  const std::vector<float> expected = Logits(prompt, 0);
  double square_sum = 0;
  for (const float logit : expected) square_sum += double{logit} * logit;
  const double rms = std::sqrt(square_sum / static_cast<double>(expected.size()));
  for (const int64_t chunk : {1, 7, 16, 17, 63, 100, 199}) {
    const std::vector<float> logits = Logits(prompt, chunk);
    double most = 0;
    for (size_t index = 0; index < logits.size(); ++index) {
      most = std::max(most, std::abs(double{logits[index]} - expected[index]));
    }
    // f32 sums of at most 200 terms in another order, through three layers.
    EXPECT_LT(most / rms, 1e-4) << chunk;
  }
}

TEST_P(OfflineTest, PerplexityFollowsFromTheLogits) {
  const std::vector<int32_t> ids = Prompt(150);
  const std::vector<float> logits = Logits(ids, 0);
  const auto vocab = static_cast<size_t>(model_.options().vocab_size);
  double total = 0;
  for (size_t row = 0; row + 1 < ids.size(); ++row) {
    double sum = 0;
    for (size_t id = 0; id < vocab; ++id) sum += std::exp(double{logits[row * vocab + id]});
    total += logits[row * vocab + static_cast<size_t>(ids[row + 1])] - std::log(sum);
  }
  for (const int64_t chunk : {int64_t{0}, int64_t{50}}) {
    const auto result = ScoreOffline(*engine_, ids, chunk, nullptr);
    ASSERT_TRUE(result.ok());
    EXPECT_NEAR(result->total_logprob, total, 1e-4 * std::abs(total));
    EXPECT_NEAR(result->perplexity, std::exp(-total / 149), 1e-3 * result->perplexity);
  }
  EXPECT_EQ(ScoreOffline(*engine_, {{5}}, 0, nullptr)->perplexity, 1)
      << "one token predicts nothing";
}

TEST_P(OfflineTest, RejectionsNameValueAndLimit) {
  const auto expect = [&](const std::vector<int32_t>& prompt, const OfflineGenerateOptions& options,
                          const char* words) {
    const absl::Status status = GenerateOffline(*engine_, prompt, options).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << words;
    EXPECT_THAT(std::string(status.message()), HasSubstr(words));
  };
  expect({}, {}, "the prompt is empty");
  expect({1, 320}, {}, "token id 320 at index 1 not in [0, 320)");
  expect({1, -1}, {}, "token id -1");
  expect({1}, {.max_tokens = 0}, "max_tokens 0 not >= 1");
  expect({1}, {.max_tokens = std::numeric_limits<int64_t>::max()}, "exceed the context");
  expect({1}, {.chunk = 513}, "chunk 513 not in [0, 512]");
  expect({1}, {.chunk = -1}, "chunk -1");
  OfflineGenerateOptions hot;
  hot.sampling.temperature = -1;
  expect({1}, hot, "temperature -1");
  EXPECT_EQ(ScoreOffline(*engine_, {}, 0, nullptr).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(engine_->caches().free_slots(), 1);
}

INSTANTIATE_TEST_SUITE_P(Families, OfflineTest,
                         testing::Values(TinyFamily::kTransnormer, TinyFamily::kLlama),
                         [](const auto& info) {
                           return info.param == TinyFamily::kTransnormer ? "Transnormer" : "Llama";
                         });

}  // namespace
}  // namespace godwit
