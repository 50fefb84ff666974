// The shipped models against the greedy continuations that the training code (PyTorch, f32) wrote beside them.

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

INSTANTIATE_TEST_SUITE_P(Models, ShippedModelTest, testing::Values("godwit-tale", "godwit-tale-draft"),
                         [](const auto& info) { return info.index == 0 ? "Target" : "Draft"; });

}  // namespace
}  // namespace godwit
