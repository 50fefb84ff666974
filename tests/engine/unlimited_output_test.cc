// Unlimited output: bounded sequences hold their first block and the latest tokens. What they
// compute equals a float64 model of that policy, is a function of the sequence alone, and takes the
// same memory at any length.

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/offline.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/ref/ref_backend.h"
#include "tests/engine/engine_driver.h"
#include "tests/engine/gpu.h"
#include "tests/engine/naive_models.h"
#include "tests/engine/temp_folder.h"
#include "tests/engine/wrapped_backend.h"

namespace godwit {
namespace {

using BackendPointer = std::unique_ptr<Backend, BackendDeleter>;

constexpr int64_t kWindowTokens = 40;  // 48 as whole blocks
constexpr int64_t kBound = 16 + 48 + 16;
constexpr int64_t kContext = 96;

BackendPointer Cpu() { return *CreateCpuBackend({.num_threads = 2}); }

EngineOptions Options(DType dtype) {
  return {.dtype = dtype,
          .max_sequences = 12,
          .max_tokens_per_step = 512,
          .kv_bytes = 8 << 20,
          .swap_bytes = 64 << 20,
          .store_bytes = 64 << 20,
          .context_length = kContext,
          .unlimited_output = kWindowTokens,
          .max_steps_in_flight = 2,
          .deterministic = true};
}

// --- Against float64. ---

std::vector<double> LogSoftmax(std::span<const double> logits) {
  const double max = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const double logit : logits) sum += std::exp(logit - max);
  std::vector<double> y;
  for (const double logit : logits) y.push_back(logit - max - std::log(sum));
  return y;
}

// Largest difference of the log-probabilities that were reported from those of the naive model.
double Error(const RandomModel& model, const std::string& folder,
             const std::vector<int32_t>& prompt, const std::vector<SampledToken>& output,
             const NaiveBound& bound) {
  std::vector<int32_t> tokens = prompt;
  for (const SampledToken& token : output) tokens.push_back(token.token_id);
  const std::vector<double> logits = NaiveLogits(model, folder, tokens, bound);
  const auto vocab = static_cast<size_t>(model.vocab_size);
  double error = 0;
  for (size_t index = 0; index < output.size(); ++index) {
    const std::vector<double> expected =
        LogSoftmax(std::span(logits).subspan((prompt.size() + index - 1) * vocab, vocab));
    for (const TopLogprob& top : output[index].top) {
      const double delta =
          std::abs(double{top.logprob} - expected[static_cast<size_t>(top.token_id)]);
      if (!(delta <= error)) error = delta;
    }
  }
  return error;
}

TEST(UnlimitedOutputTest, EqualsAFloat64ModelThatKeepsTheSameTokens) {
  std::vector<RandomModel> models = {
      {.seed = 31, .num_layers = 2, .head_dim = 16, .dtype = "F32"},
      {.seed = 32, .num_layers = 3, .num_kv_heads = 2, .rope_factor = 4, .interleaved = true},
      {.seed = 33, .num_layers = 2, .num_kv_heads = 1, .rotary_share = 0.5}};
  for (RandomModel& model : models) {
    model.family = "llama";
    const TempFolder folder;
    WriteRandomModel(model, folder.path());
    for (const bool ref : {false, true}) {
      SCOPED_TRACE(testing::Message() << model.seed << (ref ? " ref" : " cpu"));
      EngineOptions options = Options(DType::kF32);
      options.model_folder = folder.path();
      const auto engine = Engine::Create(options, ref ? CreateRefBackend() : Cpu());
      ASSERT_TRUE(engine.ok()) << engine.status();
      const std::vector<int32_t> prompt = RandomTokens(model.seed, 50, 60);
      OfflineGenerateOptions generate = {.max_tokens = ref ? 80 : 250, .ignore_eos = true};
      generate.sampling = {.temperature = 0.9f, .num_logprobs = kMaxTopLogprobs};
      const auto result = GenerateOffline(**engine, prompt, generate);
      ASSERT_TRUE(result.ok()) << result.status();
      const auto error = [&](const NaiveBound& bound) {
        return Error(model, folder.path(), prompt, result->tokens, bound);
      };
      EXPECT_LT(error({.most = kBound}), 2e-4);
      EXPECT_GT(error({}), 1e-2) << "nothing dropped";
      EXPECT_GT(error({.most = kBound + 16}), 1e-2) << "dropped later";
      EXPECT_EQ(result->num_dropped, ref ? 64 : 224);  // the last token drawn is never computed
    }
  }
}

// --- A function of the sequence alone. ---

std::vector<DriverRequest> Requests(const TinyModel& model) {
  std::vector<DriverRequest> requests;
  for (uint64_t index = 0; index < 8; ++index) {
    DriverRequest& request = requests.emplace_back();
    request.prompt =
        RandomTokens(50 + index, 1 + 11 * static_cast<int64_t>(index), model.options().vocab_size);
    request.seed = index;
    request.max_tokens = 110 + 17 * static_cast<int64_t>(index);
    request.sampling.num_logprobs = kMaxTopLogprobs;
    request.sampling.temperature = index % 2 == 0 ? 0.0f : 0.8f;
    if (index % 3 == 1) request.sampling.frequency_penalty = 0.5f;
    if (index % 4 == 3) request.rope = R"({"type":"linear","factor":2})";
  }
  requests[6].num_outputs = 2;
  return requests;
}

class UnlimitedOutputDeviceTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    if (!OnGpu()) return;
    if (const absl::Status gpu = OpenGpu().status(); !gpu.ok()) GTEST_SKIP() << gpu.message();
  }
  static bool OnGpu() { return GetParam() == "cuda"; }
  static BackendPointer Device(bool replays) {
    if (OnGpu()) return std::move(*OpenGpu());
    return BackendPointer(new WrappedBackend(Cpu(), {.replays = replays}));
  }

  const TinyModel model_{{.family = TinyFamily::kLlama}};
};

// Alone and unmoved, against: in a batch, prompts cut, two steps in flight, steps recorded, moved
// to host memory before the first drop, at it and after several.
TEST_P(UnlimitedOutputDeviceTest, BitsDependOnTheSequenceAlone) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    const std::vector<DriverRequest> requests = Requests(model_);
    std::vector<DriverOutput> expected;
    for (const DriverRequest& request : requests) {
      const auto engine = MakeEngine(model_, Options(dtype), Device(false));
      for (DriverOutput& output : Drive(*engine, 1, {request})) {
        expected.push_back(std::move(output));
      }
    }
    std::vector<DriverRequest> others = requests;
    for (size_t index = 0; index < others.size(); ++index) {
      others[index].start_step = static_cast<int64_t>(index * 5 % 13);
      if (others[index].prompt.size() > 64) others[index].cuts = {64};
      others[index].swap_after = static_cast<int64_t>(30 + 9 * index);
    }
    const auto engine = MakeEngine(model_, Options(dtype), Device(true));
    const std::vector<DriverOutput> actual = Drive(*engine, 2, others);
    ASSERT_EQ(actual.size(), expected.size());
    for (size_t index = 0; index < actual.size(); ++index) {
      EXPECT_TRUE(actual[index].SameBits(expected[index])) << index;
    }
    EXPECT_EQ(engine->caches().free_blocks(), engine->card().geometry.num_blocks);
  }
}

TEST_P(UnlimitedOutputDeviceTest, ChangesNothingWithinTheContext) {
  std::vector<DriverRequest> requests = Requests(model_);
  for (DriverRequest& request : requests) {
    request.prompt.resize(std::min<size_t>(request.prompt.size(), 60));
    request.max_tokens = kContext - 3 - std::ssize(request.prompt);
  }
  EngineOptions options = Options(DType::kBF16);
  const auto with = Drive(*MakeEngine(model_, options, Device(true)), 2, requests);
  options.unlimited_output = 0;
  const auto without = Drive(*MakeEngine(model_, options, Device(true)), 2, requests);
  for (size_t index = 0; index < with.size(); ++index) {
    EXPECT_TRUE(with[index].SameBits(without[index])) << index;
    EXPECT_FALSE(with[index].probe.empty()) << "none of these is bounded";
  }
}

TEST_P(UnlimitedOutputDeviceTest, TenWindowsTakeTheMemoryOfOne) {
  EngineOptions options = Options(DType::kBF16);
  // 3 layers, keys and values of 2 heads of 16 in bf16: a pool of one bounded sequence.
  options.kv_bytes = (kBound / 16 + 1) * 16 * 3 * 2 * 2 * 16 * 2;
  options.max_sequences = 2;
  const auto engine = MakeEngine(model_, options, Device(true));
  ASSERT_EQ(engine->card().geometry.num_blocks, kBound / 16 + 1);
  const OfflineGenerateOptions generate = {
      .sampling = {.temperature = 0.7f}, .max_tokens = 11 * kBound, .ignore_eos = true};
  const auto result = GenerateOffline(*engine, RandomTokens(3, 20, 300), generate);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(std::ssize(result->tokens), 11 * kBound);
  EXPECT_EQ(engine->caches().free_blocks(), kBound / 16 + 1);
}

std::string DeviceName(const testing::TestParamInfo<std::string>& info) { return info.param; }
INSTANTIATE_TEST_SUITE_P(Devices, UnlimitedOutputDeviceTest, testing::Values("cpu", "cuda"),
                         DeviceName);

// --- What is refused. ---

TEST(UnlimitedOutputTest, AStateThatDroppedTokensIsNotSaved) {
  const TinyModel model({.family = TinyFamily::kLlama});
  const auto engine = MakeEngine(model, Options(DType::kBF16));
  CacheManager& caches = engine->caches();
  CacheLease lease = *caches.Reserve(200);
  ASSERT_TRUE(lease.bounded());
  const SamplingParams sampling = {.temperature = 0};
  const RowOutput output = {.lease = &lease, .sampling = &sampling};
  const std::vector<int32_t> prompt = RandomTokens(9, kBound, 300);
  BatchRow row = {
      .token_ids = prompt, .prompt_length = kBound, .lease = &lease, .outputs = {&output, 1}};
  ASSERT_TRUE(engine->Collect(*engine->Submit({&row, 1})).ok());
  EXPECT_EQ(lease.dropped(), 0);
  EXPECT_TRUE(caches.Save(lease, kBound).ok());
  row.token_ids = {};
  row.confirmed_position = kBound;
  ASSERT_TRUE(engine->Collect(*engine->Submit({&row, 1})).ok());
  EXPECT_EQ(lease.dropped(), 16);
  const absl::Status saved = caches.Save(lease, kBound + 1).status();
  EXPECT_EQ(saved.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(saved.message().find("dropped 16 tokens"), std::string::npos) << saved;
}

TEST(UnlimitedOutputTest, RefusedWithTheReason) {
  const TinyModel llama({.family = TinyFamily::kLlama}), lightning;
  const auto refusal = [](const TinyModel& model, EngineOptions options) {
    options.model_folder = model.folder();
    const absl::Status status = Engine::Create(options, Cpu()).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    return std::string(status.message());
  };
  const auto expect = [](const std::string& message, const std::string& part) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  EngineOptions options = Options(DType::kBF16);
  expect(refusal(lightning, options), "'transnormer' has no softmax attention");
  options.unlimited_output = kContext - 31;
  expect(refusal(llama, options), "beyond the context of 96");
  options.unlimited_output = -1;
  expect(refusal(llama, options), "unlimited_output -1 not in");
  options = Options(DType::kBF16);
  options.rope_override = R"({"type":"dynamic","factor":2})";
  expect(refusal(llama, options), "'dynamic' depends on the length");
  options = Options(DType::kBF16);
  options.draft_folder = llama.folder();
  expect(refusal(llama, options), "not with a draft model");
}

TEST(UnlimitedOutputTest, ThePromptMustFit) {
  const TinyModel model({.family = TinyFamily::kLlama});
  const auto engine = MakeEngine(model, Options(DType::kBF16));
  const OfflineGenerateOptions generate = {.max_tokens = 200, .ignore_eos = true};
  EXPECT_TRUE(GenerateOffline(*engine, RandomTokens(1, kBound, 300), generate).ok());
  const absl::Status status =
      GenerateOffline(*engine, RandomTokens(1, kBound + 1, 300), generate).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("prompt of 81 tokens"), std::string::npos) << status;
}

}  // namespace
}  // namespace godwit
