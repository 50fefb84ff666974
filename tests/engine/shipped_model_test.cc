// The shipped models against the greedy continuations that the training code (PyTorch, f32) wrote
// beside them.

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/offline.h"
#include "kernels/cpu/cpu_backend.h"

namespace godwit {
namespace {

constexpr float kMargin = 0.05f;  // below it bf16 may choose the other token

class ShippedModelTest : public testing::TestWithParam<const char*> {
 protected:
  std::string Folder() const {
    const char* source = std::getenv("GODWIT_SOURCE_DIR");
    return std::string(source == nullptr ? "." : source) + "/models/" + GetParam();
  }

  std::vector<int32_t> Greedy(DType dtype, const std::vector<int32_t>& prompt, size_t count) {
    auto backend = CreateCpuBackend({});
    EXPECT_TRUE(backend.ok()) << backend.status();
    EngineOptions options;
    options.model_folder = Folder();
    options.dtype = dtype;
    options.max_sequences = 1;
    auto engine = Engine::Create(options, *std::move(backend));
    EXPECT_TRUE(engine.ok()) << engine.status();
    OfflineGenerateOptions generate;
    generate.sampling.temperature = 0;
    generate.max_tokens = static_cast<int64_t>(count);
    generate.ignore_eos = true;
    auto result = GenerateOffline(**engine, prompt, generate);
    EXPECT_TRUE(result.ok()) << result.status();
    std::vector<int32_t> ids;
    for (const SampledToken& token : result->tokens) ids.push_back(token.token_id);
    return ids;
  }
};

TEST_P(ShippedModelTest, ContinuesAsTheTrainingCodeDoes) {
  std::ifstream file(Folder() + "/golden.json");
  const nlohmann::json golden = nlohmann::json::parse(file, nullptr, /*allow_exceptions=*/false);
  ASSERT_TRUE(golden.contains("cases")) << Folder();
  for (const nlohmann::json& golden_case : golden["cases"]) {
    const auto prompt = golden_case["prompt_ids"].get<std::vector<int32_t>>();
    const auto expected = golden_case["greedy"].get<std::vector<int32_t>>();
    const auto margins = golden_case["margins"].get<std::vector<float>>();
    EXPECT_EQ(Greedy(DType::kF32, prompt, expected.size()), expected);
    const std::vector<int32_t> bf16 = Greedy(DType::kBF16, prompt, expected.size());
    for (size_t i = 0; i < expected.size() && margins[i] > kMargin; ++i) {
      EXPECT_EQ(bf16[i], expected[i]) << "output token " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Models, ShippedModelTest,
                         testing::Values("godwit-tale", "godwit-tale-draft"),
                         [](const auto& info) { return info.index == 0 ? "Target" : "Draft"; });

// The shipped pair: each prompt and seed with every policy gives the tokens of the target alone.
TEST(ShippedPairTest, SpeculationChangesNoToken) {
  const char* source = std::getenv("GODWIT_SOURCE_DIR");
  const std::string models = std::string(source == nullptr ? "." : source) + "/models/";
  const auto make = [&](const std::string& draft_folder) {
    auto engine = Engine::Create(
        {.model_folder = models + "godwit-tale", .draft_folder = draft_folder, .max_sequences = 1},
        *CreateCpuBackend({}));
    EXPECT_TRUE(engine.ok()) << engine.status();
    return *std::move(engine);
  };
  const auto plain = make(""), pair = make(models + "godwit-tale-draft");
  int64_t num_drafts = 0, num_accepted = 0;
  for (uint64_t seed = 1; seed <= 24; ++seed) {
    const std::vector<int32_t> start = {1};
    OfflineGenerateOptions options = {
        .seed = seed, .max_tokens = 24 + static_cast<int64_t>(seed), .ignore_eos = true};
    const auto prompt_tokens = GenerateOffline(*plain, start, options);
    ASSERT_TRUE(prompt_tokens.ok()) << prompt_tokens.status();
    std::vector<int32_t> prompt = start;
    for (const SampledToken& token : prompt_tokens->tokens) prompt.push_back(token.token_id);

    options.max_tokens = 96;
    options.ignore_eos = false;
    options.sampling.temperature = seed % 2 == 0 ? 0.0f : 0.9f;
    if (seed % 3 == 0) options.sampling.repetition_penalty = 1.15f;
    const auto expected = GenerateOffline(*plain, prompt, options);
    options.max_draft_tokens = 1 + static_cast<int>(seed) % kMaxDraftTokens;
    options.draft_policy = static_cast<DraftPolicy>(seed % 3);
    const auto actual = GenerateOffline(*pair, prompt, options);
    ASSERT_TRUE(expected.ok() && actual.ok()) << actual.status();
    ASSERT_EQ(actual->tokens.size(), expected->tokens.size()) << seed;
    for (size_t i = 0; i < actual->tokens.size(); ++i) {
      ASSERT_EQ(actual->tokens[i].token_id, expected->tokens[i].token_id) << seed << " at " << i;
    }
    EXPECT_EQ(actual->ended_by_eos, expected->ended_by_eos);
    num_drafts += actual->num_drafts;
    num_accepted += actual->num_accepted;
  }
  EXPECT_GT(num_accepted, num_drafts / 5);
}

}  // namespace
}  // namespace godwit
