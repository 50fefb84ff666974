// Whole models against the logits of another implementation, through the engine. Tolerances are
// those that the cases were published with: f32 within 2e-3 and the same greedy ids; bf16 within a
// normalised mean square error of 1e-3 and the same greedy ids wherever the reference's two best
// logits differ by more than 0.05.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/offline.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/ref/ref_backend.h"
#include "nlohmann/json.hpp"
#include "tests/engine/golden_data.h"
#include "tests/engine/gpu.h"

namespace godwit {
namespace {

constexpr float kMaxError = 2e-3f;
constexpr double kMaxBf16Nmse = 1e-3;
constexpr float kMinMargin = 0.05f;
constexpr int64_t kMaxTokensPerStep = 512;

struct Param {
  const char* golden;
  const char* backend;
};

std::string ParamName(const testing::TestParamInfo<Param>& info) {
  std::string name = std::string(info.param.golden) + "_" + info.param.backend;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

// An engine that may run past the length that the checkpoint states: the cases do.
std::unique_ptr<Engine> MakeEngine(const GoldenCase& golden, const std::string& backend_name,
                                   DType dtype) {
  std::unique_ptr<Backend, BackendDeleter> backend;
  if (backend_name == "ref") {
    backend = CreateRefBackend();
  } else if (backend_name == "cuda") {
    auto gpu = OpenGpu();
    EXPECT_TRUE(gpu.ok()) << gpu.status();
    if (!gpu.ok()) return nullptr;
    backend = std::move(*gpu);
  } else {
    auto cpu = CreateCpuBackend({.num_threads = 2});
    EXPECT_TRUE(cpu.ok()) << cpu.status();
    if (!cpu.ok()) return nullptr;
    backend = std::move(*cpu);
  }
  auto engine = Engine::Create({.model_folder = golden.folder,
                                .dtype = dtype,
                                .max_sequences = 2,
                                .max_tokens_per_step = kMaxTokensPerStep,
                                .kv_bytes = 16 << 20,
                                .context_length = 1024},
                               std::move(backend));
  EXPECT_TRUE(engine.ok()) << engine.status();
  return engine.ok() ? std::move(*engine) : nullptr;
}

std::vector<float> Score(Engine& engine, const std::vector<int32_t>& tokens, int64_t vocab_size,
                         int64_t chunk) {
  std::vector<float> logits(tokens.size() * static_cast<size_t>(vocab_size), NAN);
  const auto result = ScoreOffline(engine, tokens, chunk, logits.data());
  EXPECT_TRUE(result.ok()) << result.status();
  return logits;
}

std::vector<int32_t> Generate(Engine& engine, const GoldenCase& golden, int64_t chunk) {
  const auto result = GenerateOffline(engine, golden.tokens,
                                      {.sampling = {.temperature = 0},
                                       .max_tokens = std::ssize(golden.greedy),
                                       .ignore_eos = true,
                                       .chunk = chunk});
  EXPECT_TRUE(result.ok()) << result.status();
  std::vector<int32_t> ids;
  if (result.ok()) {
    for (const SampledToken& token : result->tokens) ids.push_back(token.token_id);
  }
  return ids;
}

float MaxError(const std::vector<float>& logits, const std::vector<float>& expected) {
  float error = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const float difference = std::abs(logits[i] - expected[i]);
    if (!(difference <= error)) error = difference;  // a NaN stays
  }
  return error;
}

// sum (x - y)^2 / sum y^2
double Nmse(const std::vector<float>& logits, const std::vector<float>& expected) {
  double error = 0, power = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error += (static_cast<double>(logits[i]) - expected[i]) *
             (static_cast<double>(logits[i]) - expected[i]);
    power += static_cast<double>(expected[i]) * expected[i];
  }
  return error / power;
}

struct Best {
  int32_t token_id = 0;
  float margin = 0;  // to the second best
};

Best BestOf(const std::vector<float>& logits, int64_t row, int64_t vocab_size) {
  const float* begin = logits.data() + row * vocab_size;
  const auto best = static_cast<int32_t>(std::max_element(begin, begin + vocab_size) - begin);
  float second = -INFINITY;
  for (int32_t id = 0; id < vocab_size; ++id) {
    if (id != best) second = std::max(second, begin[id]);
  }
  return {best, begin[best] - second};
}

class GoldenTest : public testing::TestWithParam<Param> {
 protected:
  void SetUp() override {
    if (TestDataFolder().empty()) GTEST_SKIP() << "GODWIT_TEST_DATA names no folder with golden/";
    if (GetParam().backend == std::string("cuda")) {
      if (const absl::Status gpu = OpenGpu().status(); !gpu.ok()) GTEST_SKIP() << gpu.message();
    }
    auto golden = ReadGoldenCase(GetParam().golden);
    ASSERT_TRUE(golden.ok()) << golden.status();
    golden_ = *std::move(golden);
  }

  GoldenCase golden_;
};

TEST_P(GoldenTest, F32LogitsAndGreedyIdsAgreeInEveryCut) {
  const auto engine = MakeEngine(golden_, GetParam().backend, DType::kF32);
  ASSERT_NE(engine, nullptr);
  for (const int64_t chunk : {0, 1, 7, 64, 255, 256, 257}) {
    if (chunk > std::ssize(golden_.tokens)) continue;
    SCOPED_TRACE(testing::Message() << "chunk " << chunk);
    EXPECT_LE(MaxError(Score(*engine, golden_.tokens, golden_.vocab_size, chunk), golden_.logits),
              kMaxError);
    EXPECT_EQ(Generate(*engine, golden_, chunk), golden_.greedy);
  }
}

TEST_P(GoldenTest, Bf16AgreesWhereTheReferenceIsSure) {
  const auto exact = MakeEngine(golden_, GetParam().backend, DType::kF32);
  const auto engine = MakeEngine(golden_, GetParam().backend, DType::kBF16);
  ASSERT_NE(exact, nullptr);
  ASSERT_NE(engine, nullptr);
  EXPECT_LE(Nmse(Score(*engine, golden_.tokens, golden_.vocab_size, 0), golden_.logits),
            kMaxBf16Nmse);
  EXPECT_LE(Nmse(Score(*engine, golden_.tokens, golden_.vocab_size, 7), golden_.logits),
            kMaxBf16Nmse);

  // Where the reference is sure of the continuation: the f32 logits stand for its own, which end
  // with the prompt.
  std::vector<int32_t> tokens = golden_.tokens;
  tokens.insert(tokens.end(), golden_.greedy.begin(), golden_.greedy.end());
  const std::vector<float> expected = Score(*exact, tokens, golden_.vocab_size, 0);
  const std::vector<float> logits = Score(*engine, tokens, golden_.vocab_size, 0);
  for (int64_t position = std::ssize(golden_.tokens) - 1; position < std::ssize(tokens) - 1;
       ++position) {
    const Best best = BestOf(expected, position, golden_.vocab_size);
    if (best.margin <= kMinMargin) continue;
    EXPECT_EQ(BestOf(logits, position, golden_.vocab_size).token_id, best.token_id)
        << "position " << position;
  }

  // Decoding by itself: the same ids up to the first that the reference is not sure of.
  const std::vector<int32_t> greedy = Generate(*engine, golden_, 0);
  ASSERT_EQ(greedy.size(), golden_.greedy.size());
  for (size_t index = 0; index < greedy.size(); ++index) {
    const auto position = static_cast<int64_t>(golden_.tokens.size() + index) - 1;
    if (BestOf(expected, position, golden_.vocab_size).margin <= kMinMargin) break;
    EXPECT_EQ(greedy[index], golden_.greedy[index]) << "token " << index << " of the continuation";
  }
}

std::vector<Param> AllParams() {
  std::vector<Param> params;
  for (const char* golden :
       {"tnl-small", "tnl-untied-heads6", "llama-default", "llama-gqa-tied", "llama-linear-8",
        "llama-yarn-4", "llama-llama3", "llama-dynamic-4-short", "llama-dynamic-4-long"}) {
    for (const char* backend : {"cpu", "ref", "cuda"}) params.push_back({golden, backend});
  }
  return params;
}

// A trained model: each of its continuations was checked in double when the case was made.
TEST(TrainedModelTest, Stories260KContinuesAsRecorded) {
  if (TestDataFolder().empty()) GTEST_SKIP() << "GODWIT_TEST_DATA names no folder with assets/";
  const std::string folder = TestDataFolder() + "/assets/models/stories260K";
  std::ifstream file(folder + "/greedy.json");
  const auto recorded = nlohmann::json::parse(file, nullptr, /*allow_exceptions=*/false);
  ASSERT_TRUE(recorded.is_object()) << folder;
  const auto engine = MakeEngine({.folder = folder}, "cpu", DType::kF32);
  ASSERT_NE(engine, nullptr);
  EXPECT_EQ(engine->card().config.bos_token_id, 1);
  for (const auto& recorded_case : recorded["cases"]) {
    const GoldenCase golden = {.tokens = recorded_case["prompt_ids"],
                               .greedy = recorded_case["greedy_ids"]};
    EXPECT_EQ(Generate(*engine, golden, 0), golden.greedy) << recorded_case["prompt"];
  }
}

INSTANTIATE_TEST_SUITE_P(All, GoldenTest, testing::ValuesIn(AllParams()), ParamName);

}  // namespace
}  // namespace godwit
