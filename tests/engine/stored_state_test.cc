// A state that was saved to host memory and loaded into another slot continues with the bits of the
// sequence that was never interrupted, wherever it stands in its window (docs/architecture.md
// section 3.2), and does so any number of times.

#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/engine/engine_driver.h"

namespace godwit {
namespace {

constexpr int64_t kStoreBytes = 64 << 20;

using Case =
    std::tuple<TinyFamily, DType, bool, std::string>;  // with a draft model; on which device

class StoredStateTest : public testing::TestWithParam<Case> {
 protected:
  StoredStateTest()
      : model_({.family = std::get<0>(GetParam())}),
        draft_({.family = std::get<0>(GetParam()), .seed = 7, .num_layers = 2}) {}

  void SetUp() override {
    const absl::Status device = OpenDevice(std::get<3>(GetParam())).status();
    if (!device.ok()) GTEST_SKIP() << device.message();
  }

  bool with_draft() const { return std::get<2>(GetParam()); }

  std::unique_ptr<Engine> Make(int steps_in_flight = 1) const {
    return MakeDeterministicEngine(model_,
                                   {.draft_folder = with_draft() ? draft_.folder() : "",
                                    .dtype = std::get<1>(GetParam()),
                                    .max_sequences = 24,
                                    .max_tokens_per_step = 4096,
                                    .kv_bytes = 8 << 20,
                                    .store_bytes = kStoreBytes,
                                    .max_steps_in_flight = steps_in_flight},
                                   std::get<3>(GetParam()));
  }

  DriverRequest Request(uint64_t seed, int64_t prompt_length, int64_t max_tokens) const {
    DriverRequest request = RandomRequest(model_, seed, prompt_length, max_tokens);
    if (with_draft()) request.draft_tokens = {4, 0, 7};
    return request;
  }

  TinyModel model_, draft_;
};

TEST_P(StoredStateTest, SavedAndLoadedEqualsUninterrupted) {
  for (const int steps_in_flight : {1, 2}) {
    std::vector<DriverRequest> requests;
    for (const int64_t position : {1, 15, 16, 17, 31, 48, 63, 64, 65, 128, 130}) {
      // Read as a prompt up to the position, or the last tokens before it decoded.
      for (const int64_t num_drawn : {1, 9}) {
        if (position < num_drawn) continue;
        requests.push_back(Request(static_cast<uint64_t>(position + num_drawn),
                                   position - num_drawn + 1, num_drawn + 30));
        requests.back().swap_after = num_drawn;
        requests.back().swap_by_store = true;
      }
    }
    std::vector<DriverRequest> whole = requests;
    for (DriverRequest& request : whole) request.swap_after = -1;
    const std::vector<DriverOutput> expected =
        Drive(*Make(steps_in_flight), steps_in_flight, whole);
    const auto engine = Make(steps_in_flight);
    const std::vector<DriverOutput> actual = Drive(*engine, steps_in_flight, requests);
    for (size_t index = 0; index < requests.size(); ++index) {
      SCOPED_TRACE(testing::Message() << index << " with " << steps_in_flight << " in flight");
      EXPECT_TRUE(actual[index].SameBits(expected[index]));
      if (!with_draft()) continue;
      EXPECT_GT(actual[index].num_drafts, 10);
    }
    EXPECT_EQ(engine->caches().free_store_bytes(), kStoreBytes);
  }
}

TEST_P(StoredStateTest, OneStateServesManySequences) {
  const auto engine = Make();
  const std::vector<int32_t> prompt = RandomTokens(5, 128, model_.options().vocab_size);
  const auto vocab = static_cast<size_t>(model_.options().vocab_size);
  CacheManager& caches = engine->caches();
  const auto read = [&](CacheLease& lease, std::span<const int32_t> token_ids, float* logits) {
    const int64_t position = lease.fresh() ? 0 : lease.position();
    const BatchRow row = {.token_ids = token_ids,
                          .first_position = position,
                          .confirmed_position = position,
                          .prompt_length = 1000,
                          .lease = &lease,
                          .max_draft_tokens = with_draft() ? 1 : 0,
                          .logits = logits};
    ASSERT_TRUE(engine->Collect(*engine->Submit(std::span(&row, 1))).ok());
  };
  StoredState stored;
  std::vector<float> expected(3 * vocab);
  const std::vector<int32_t> question = {4, 5, 6};
  {
    CacheLease lease = *caches.Reserve(200);
    read(lease, prompt, nullptr);
    auto saved = caches.Save(lease, 128);
    ASSERT_TRUE(saved.ok());
    ASSERT_TRUE(engine->Copy(std::span(&saved->copy, 1)).ok());
    stored = std::move(saved->state);
    EXPECT_EQ(stored.num_bytes(), caches.StateBytes(128));
    read(lease, question, expected.data());  // the lease kept what it had
  }
  for (int turn = 0; turn < 3; ++turn) {
    CacheLease other = *caches.Reserve(40);
    read(other, RandomTokens(90 + static_cast<uint64_t>(turn), 33, 300), nullptr);
    CacheLease lease = *caches.Reserve(150);
    const CacheCopy copy = caches.Load(stored, lease);
    ASSERT_TRUE(engine->Copy(std::span(&copy, 1)).ok());
    EXPECT_EQ(lease.position(), 128);
    std::vector<float> logits(3 * vocab);
    read(lease, question, logits.data());
    EXPECT_EQ(std::memcmp(logits.data(), expected.data(), logits.size() * sizeof(float)), 0);
  }
  stored.Release();
  EXPECT_EQ(caches.free_store_bytes(), kStoreBytes);
}

// A state that went further than the text, by drafts or by a step that was in flight at its end, is
// cut: bases, rows, counts and the draft's bookkeeping are those of the text.
TEST_P(StoredStateTest, CutToAnEarlierTokenEqualsNeverFurther) {
  const SamplingParams sampling = {.temperature = 0.8f,
                                   .repetition_penalty = 1.1f,
                                   .presence_penalty = 0.3f,
                                   .frequency_penalty = 0.9f,
                                   .num_logprobs = 5};
  const auto decode = [&](Engine& engine, CacheLease& lease, std::span<const int32_t> prompt,
                          int64_t num_tokens, int num_drafts) {
    std::vector<SampledToken> tokens;
    const RowOutput output = {.lease = &lease, .sampling = &sampling, .seed = 5};
    while (std::ssize(tokens) < num_tokens) {
      const bool reads = tokens.empty() && !prompt.empty();
      const BatchRow row = {.token_ids = reads ? prompt : std::span<const int32_t>(),
                            .confirmed_position = lease.position(),
                            .prompt_length = 30,
                            .lease = &lease,
                            .outputs = std::span(&output, 1),
                            .max_draft_tokens = reads && with_draft() ? 1 : num_drafts};
      const auto result = engine.Collect(*engine.Submit(std::span(&row, 1)));
      EXPECT_TRUE(result.ok());
      tokens.insert(tokens.end(), result->rows[0].outputs[0].begin(),
                    result->rows[0].outputs[0].end());
    }
    return tokens;
  };
  for (int64_t kept = 1; kept <= 24; ++kept) {
    const std::vector<int32_t> prompt = RandomTokens(77, 30, model_.options().vocab_size);
    const auto engine = Make();
    CacheLease whole = *engine->caches().Reserve(200);
    const std::vector<SampledToken> expected = decode(*engine, whole, prompt, 60, 0);
    CacheLease lease = *engine->caches().Reserve(200);
    // One plain step too far, or a round of drafts.
    const std::vector<SampledToken> drawn =
        decode(*engine, lease, prompt, kept + (with_draft() ? 0 : 1), with_draft() ? 6 : 0);
    std::vector<int32_t> dropped;
    for (size_t token = static_cast<size_t>(kept); token < drawn.size(); ++token) {
      dropped.push_back(drawn[token].token_id);
    }
    const int32_t last = drawn[static_cast<size_t>(kept) - 1].token_id;
    const CacheCopy trim = engine->caches().Trim(lease, 30 + kept - 1, last, dropped);
    ASSERT_TRUE(engine->Copy(std::span(&trim, 1)).ok());
    CacheLease next = *engine->caches().Reserve(200);
    const CacheCopy fork = engine->caches().Fork(lease, next);
    ASSERT_TRUE(engine->Copy(std::span(&fork, 1)).ok());
    const std::vector<SampledToken> rest =
        decode(*engine, next, {}, 60 - kept, with_draft() ? 3 : 0);
    for (size_t token = static_cast<size_t>(kept); token < expected.size(); ++token) {
      const SampledToken& got = rest[token - static_cast<size_t>(kept)];
      ASSERT_EQ(got.token_id, expected[token].token_id) << "kept " << kept << " token " << token;
      ASSERT_EQ(got.logprob, expected[token].logprob) << "kept " << kept << " token " << token;
    }
  }
}

std::string CaseName(const testing::TestParamInfo<Case>& info) {
  return std::string(std::get<0>(info.param) == TinyFamily::kTransnormer ? "Transnormer"
                                                                         : "Llama") +
         (std::get<1>(info.param) == DType::kF32 ? "F32" : "BF16") +
         (std::get<2>(info.param) ? "WithDraft" : "") + std::get<3>(info.param);
}

INSTANTIATE_TEST_SUITE_P(Cpu, StoredStateTest,
                         testing::Combine(testing::Values(TinyFamily::kTransnormer,
                                                          TinyFamily::kLlama),
                                          testing::Values(DType::kF32, DType::kBF16),
                                          testing::Bool(), testing::Values("cpu")),
                         CaseName);
INSTANTIATE_TEST_SUITE_P(
    Gpu, StoredStateTest,
    testing::Combine(testing::Values(TinyFamily::kTransnormer, TinyFamily::kLlama),
                     testing::Values(DType::kBF16), testing::Bool(), testing::Values("cuda")),
    CaseName);

}  // namespace
}  // namespace godwit
