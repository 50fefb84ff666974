#include "engine/engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "engine/model_shapes.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/engine/engine_driver.h"
#include "tests/engine/wrapped_backend.h"

namespace godwit {
namespace {

using testing::HasSubstr;

EngineOptions Options() {
  return {.dtype = DType::kF32,
          .max_sequences = 8,
          .max_tokens_per_step = 512,
          .kv_bytes = 4 << 20,
          .swap_bytes = 1 << 24};
}

class EngineTest : public testing::Test {
 protected:
  EngineTest() : engine_(MakeEngine(model_, Options())) {}

  int32_t vocab() const { return model_.options().vocab_size; }

  absl::Status CreateStatus(const EngineOptions& changed) const {
    EngineOptions options = changed;
    options.model_folder = model_.folder();
    return Engine::Create(options, *CreateCpuBackend({.num_threads = 1})).status();
  }

  StepResult Step(const BatchRow& row) {
    auto id = engine_->Submit(std::span(&row, 1));
    EXPECT_TRUE(id.ok()) << id.status();
    auto result = engine_->Collect(*id);
    EXPECT_TRUE(result.ok()) << result.status();
    return *std::move(result);
  }

  TinyModel model_;
  std::unique_ptr<Engine> engine_;
};

TEST_F(EngineTest, CardStatesBytesByComponent) {
  const ModelCard& card = engine_->card();
  const TinyModelOptions& tiny = model_.options();
  EXPECT_EQ(card.config.family, "transnormer");
  EXPECT_EQ(card.dtype, "f32");
  EXPECT_EQ(card.backend, "cpu");
  EXPECT_EQ(card.context_length, (int64_t{1} << 31) - 1);
  EXPECT_EQ(card.max_tokens_per_step, 512);
  const std::vector<StateComponent>& components = card.geometry.components;
  ASSERT_EQ(components.size(), 4u);
  EXPECT_EQ(components[0].base_bytes, 2 * components[1].base_bytes) << "LRPE doubles d_k";
  EXPECT_EQ(components[3].name, "penalties");
  EXPECT_EQ(components[3].base_bytes, 4 * tiny.vocab_size);
  EXPECT_EQ(card.geometry.window_rows, WindowRows(1, kMaxDraftTokens));
  EXPECT_EQ(card.geometry.bytes_per_sequence(1'000'000), card.geometry.slot_bytes());
  EXPECT_THAT(card.memory_plan, HasSubstr("8 state slots"));
}

TEST_F(EngineTest, OptionsOutOfRangeAreNamed) {
  const auto expect = [&](EngineOptions options, const char* words) {
    const absl::Status status = CreateStatus(options);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << words;
    EXPECT_THAT(std::string(status.message()), HasSubstr(words));
  };
  EngineOptions options = Options();
  options.max_sequences = -1;
  expect(options, "max_sequences -1 not in [0, 65536]");
  options = Options();
  options.max_tokens_per_step = 63;
  expect(options, "max_tokens_per_step 63 not in [64, ");
  options.max_sequences = 513;
  options.max_tokens_per_step = 512;
  expect(options, "max_tokens_per_step 512 not in [513, ");
  options = Options();
  options.max_steps_in_flight = 3;
  expect(options, "max_steps_in_flight 3 not in [0, 2]");
  options = Options();
  options.kv_bytes = -1;
  expect(options, "kv_bytes -1");
  options = Options();
  options.swap_bytes = -1;
  expect(options, "swap_bytes -1");
  options = Options();
  options.context_length = -1;
  expect(options, "context_length -1");
  options = Options();
  options.dtype = DType::kI32;
  expect(options, "dtype");
}

TEST_F(EngineTest, TooMuchMemoryIsRefusedWithThePlan) {
  const TinyModel llama({.family = TinyFamily::kLlama});
  EngineOptions options = Options();
  options.model_folder = llama.folder();
  options.kv_bytes = int64_t{1} << 44;
  const auto engine = Engine::Create(options, *CreateCpuBackend({.num_threads = 1}));
  EXPECT_EQ(engine.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(engine.status().message()),
              testing::AllOf(HasSubstr("weights"), HasSubstr("KV blocks")));
}

TEST_F(EngineTest, MissingFolderIsAnErrorNotACrash) {
  EngineOptions options = Options();
  options.model_folder = "/nonexistent";
  EXPECT_FALSE(Engine::Create(options, *CreateCpuBackend({.num_threads = 1})).ok());
}

TEST_F(EngineTest, TokenOutsideTheVocabularyChangesNothing) {
  const DriverRequest request = {.prompt = RandomTokens(1, 20, vocab())};
  const DriverOutput expected = Drive(*engine_, 1, {request})[0];
  CacheLease lease = *engine_->caches().Reserve(64);
  const std::vector<int32_t> bad = {1, vocab()};
  const BatchRow row = {.token_ids = bad, .prompt_length = 2, .lease = &lease};
  EXPECT_EQ(engine_->Submit(std::span(&row, 1)).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(lease.fresh());
  EXPECT_EQ(lease.position(), 0);
  lease.Release();
  EXPECT_TRUE(Drive(*engine_, 1, {request})[0].SameBits(expected));
}

TEST_F(EngineTest, CollectMovesTheHostsPosition) {
  CacheLease lease = *engine_->caches().Reserve(64);
  const std::vector<int32_t> prompt = RandomTokens(2, 5, vocab());
  const SamplingParams sampling;
  const RowOutput output = {.lease = &lease, .sampling = &sampling};
  BatchRow row = {
      .token_ids = prompt, .prompt_length = 5, .lease = &lease, .outputs = std::span(&output, 1)};
  auto id = engine_->Submit(std::span(&row, 1));
  ASSERT_TRUE(id.ok());
  EXPECT_EQ(lease.position(), 0);
  const StepResult result = *engine_->Collect(*id);
  EXPECT_EQ(lease.position(), 5);
  EXPECT_EQ(result.rows[0].num_computed, 5);
  EXPECT_EQ(result.num_tokens, 5);
  EXPECT_GT(result.forward_seconds, 0);
  EXPECT_EQ(result.idle_seconds, std::nullopt) << "nobody knows why it began when it did";
  row.token_ids = {};
  row.confirmed_position = 5;
  EXPECT_EQ(Step(row).rows[0].num_computed, 6);
  EXPECT_EQ(lease.position(), 6);
}

TEST_F(EngineTest, AStepBehindAnotherSaysHowLongItsDevicePaused) {
  EngineOptions options = Options();
  options.max_steps_in_flight = 2;
  const std::unique_ptr<Engine> engine = MakeEngine(model_, options);
  CacheLease lease = *engine->caches().Reserve(64);
  const std::vector<int32_t> prompt = RandomTokens(2, 5, vocab());
  const SamplingParams sampling;
  const RowOutput output = {.lease = &lease, .sampling = &sampling};
  BatchRow row = {
      .token_ids = prompt, .prompt_length = 5, .lease = &lease, .outputs = std::span(&output, 1)};
  const auto begin = std::chrono::steady_clock::now();
  const StepId first = *engine->Submit(std::span(&row, 1));
  row.token_ids = {};
  const StepId second = *engine->Submit(std::span(&row, 1));
  EXPECT_EQ(engine->Collect(first)->idle_seconds, std::nullopt);
  const StepId third = *engine->Submit(std::span(&row, 1));
  for (const StepId id : {second, third}) {
    const StepResult result = *engine->Collect(id);
    const std::chrono::duration<double> all = std::chrono::steady_clock::now() - begin;
    ASSERT_TRUE(result.idle_seconds.has_value());
    EXPECT_GT(*result.idle_seconds, 0) << "the host did something in between";
    EXPECT_LT(*result.idle_seconds + result.forward_seconds, all.count());
  }
}

TEST_F(EngineTest, GreedyTakesTheHighestLogit) {
  CacheLease lease = *engine_->caches().Reserve(64);
  const std::vector<int32_t> prompt = RandomTokens(3, 20, vocab());
  const SamplingParams sampling = {.temperature = 0, .num_logprobs = 2};
  const RowOutput output = {.lease = &lease, .sampling = &sampling};
  std::vector<float> logits(20 * static_cast<size_t>(vocab()));
  const StepResult result = Step({.token_ids = prompt,
                                  .prompt_length = 20,
                                  .lease = &lease,
                                  .outputs = std::span(&output, 1),
                                  .logits = logits.data()});
  const SampledToken& token = result.rows[0].outputs[0][0];
  const auto last = logits.end() - vocab();
  EXPECT_EQ(token.token_id, std::max_element(last, logits.end()) - last);
  ASSERT_EQ(token.top.size(), 2u);
  EXPECT_EQ(token.top[0].token_id, token.token_id);
  EXPECT_EQ(token.top[0].logprob, token.logprob);
  EXPECT_LE(token.top[1].logprob, token.logprob);
}

// log softmax of one row of logits, in double.
double LogProb(const float* logits, int64_t vocab_size, int32_t token_id) {
  double sum = 0;
  const double most = *std::max_element(logits, logits + vocab_size);
  for (int64_t id = 0; id < vocab_size; ++id) sum += std::exp(logits[id] - most);
  return logits[token_id] - most - std::log(sum);
}

// 150 rows: more than two blocks of kLogitRows.
TEST_F(EngineTest, ScoresAreTheLogSoftmaxOfTheLogits) {
  const std::vector<int32_t> prompt = RandomTokens(4, 150, vocab());
  std::vector<int32_t> targets(prompt.begin() + 1, prompt.end());
  targets.push_back(-1);
  targets[70] = -1;
  std::vector<float> logits(150 * static_cast<size_t>(vocab()));
  std::vector<std::vector<SampledToken>> runs;
  for (float* const wanted : {logits.data(), static_cast<float*>(nullptr)}) {
    CacheLease lease = *engine_->caches().Reserve(150);
    runs.push_back(Step({.token_ids = prompt,
                         .prompt_length = 150,
                         .lease = &lease,
                         .score_targets = targets,
                         .num_score_top = 3,
                         .logits = wanted})
                       .rows[0]
                       .scores);
  }
  ASSERT_EQ(runs[0].size(), 148u);
  ASSERT_EQ(runs[1].size(), 148u);
  size_t score = 0;
  for (size_t row = 0; row < 150; ++row) {
    if (targets[row] < 0) continue;
    const float* row_logits = logits.data() + row * static_cast<size_t>(vocab());
    const SampledToken& token = runs[0][score];
    EXPECT_EQ(token.token_id, targets[row]);
    EXPECT_NEAR(token.logprob, LogProb(row_logits, vocab(), targets[row]), 1e-4) << row;
    ASSERT_EQ(token.top.size(), 3u);
    EXPECT_EQ(token.top[0].token_id,
              std::max_element(row_logits, row_logits + vocab()) - row_logits);
    EXPECT_EQ(runs[1][score].logprob, token.logprob) << row;
    EXPECT_EQ(runs[1][score].top[2].token_id, token.top[2].token_id) << row;
    ++score;
  }
}

TEST_F(EngineTest, LogitBiasAndMinTokensSteerTheDraw) {
  DriverRequest forced = {.prompt = RandomTokens(5, 30, vocab()), .max_tokens = 5};
  forced.sampling.temperature = 0;
  forced.sampling.logit_bias = {{77, 100}};
  EXPECT_THAT(Drive(*engine_, 1, {forced})[0].ids(), testing::Each(77));
  forced.sampling.end_token_ids = {77};
  forced.sampling.min_tokens = 3;
  const std::vector<int32_t> ids = Drive(*engine_, 1, {forced})[0].ids();
  for (size_t index = 0; index < ids.size(); ++index)
    EXPECT_EQ(ids[index] == 77, index >= 3) << index;
}

TEST_F(EngineTest, PenaltiesSeePromptAndDrawnTokens) {
  DriverRequest request = {.prompt = {10, 11, 12}, .max_tokens = 6};
  request.sampling.temperature = 0;
  request.sampling.logit_bias = {{10, 100}, {20, 88}, {21, 76}, {22, 64}, {23, 52}, {24, 40}};
  request.sampling.repetition_penalty = 100;
  const std::vector<int32_t> repetition = Drive(*engine_, 1, {request})[0].ids();
  EXPECT_THAT(repetition, testing::ElementsAre(20, 21, 22, 23, 24, testing::_))
      << "10 is in the prompt";
  request.sampling.repetition_penalty = 1;
  request.sampling.presence_penalty = 2;
  request.sampling.logit_bias = {{10, 100}};
  EXPECT_THAT(Drive(*engine_, 1, {request})[0].ids(), testing::Each(10))
      << "presence looks at the output only";
}

TEST_F(EngineTest, MoreRowsThanABlockOfLogits) {
  EngineOptions options = Options();
  options.max_sequences = 150;
  const auto engine = MakeEngine(model_, options);
  std::vector<DriverRequest> requests;
  for (uint64_t index = 0; index < 150; ++index) {
    requests.push_back(
        {.prompt = RandomTokens(500 + index, 3, vocab()), .seed = index, .max_tokens = 5});
    requests.back().sampling.num_logprobs = static_cast<int32_t>(index % 5);
  }
  const std::vector<DriverOutput> outputs = Drive(*engine, 1, requests);
  for (const size_t index : {0, 63, 64, 127, 128, 149}) {
    EXPECT_TRUE(outputs[index].SameBits(Drive(*engine_, 1, {requests[index]})[0])) << index;
  }
}

TEST_F(EngineTest, ReleasedSwappedSequenceIsForgotten) {
  CacheManager& caches = engine_->caches();
  CacheLease lease = *caches.Reserve(64);
  const std::vector<int32_t> prompt = RandomTokens(6, 40, vocab());
  Step({.token_ids = prompt, .prompt_length = 64, .lease = &lease});
  const CacheCopy copy = *caches.SwapOut(lease);
  ASSERT_TRUE(engine_->Copy(std::span(&copy, 1)).ok());
  lease.Release();
  EXPECT_EQ(caches.free_swap_bytes(), Options().swap_bytes);
  const DriverRequest request = {.prompt = prompt};
  EXPECT_EQ(Drive(*engine_, 1, {request}).size(), 1u);
  EXPECT_TRUE(caches.TakeReleasedHostIds().empty()) << "the engine took them";
}

TEST_F(EngineTest, ScheduledForkContinuesLikeItsSource) {
  CacheLease from = *engine_->caches().Reserve(80), to = *engine_->caches().Reserve(80);
  const std::vector<int32_t> prompt = RandomTokens(7, 40, vocab());
  const SamplingParams sampling = {.num_logprobs = 0};
  const RowOutput output = {.lease = &from, .sampling = &sampling, .seed = 3};
  BatchRow row = {
      .token_ids = prompt, .prompt_length = 40, .lease = &from, .outputs = std::span(&output, 1)};
  Step(row);
  const CacheCopy copy = {.kind = CacheCopy::Kind::kFork,
                          .from_slot = from.slot(),
                          .to_slot = to.slot(),
                          .position = 40};
  ASSERT_TRUE(engine_->Copy(std::span(&copy, 1)).ok());
  to.clear_fresh();
  to.set_position(40);
  RowOutput fork = output;
  fork.lease = &to;
  row.token_ids = {};
  row.confirmed_position = 40;
  BatchRow fork_row = row;
  fork_row.lease = &to;
  fork_row.outputs = std::span(&fork, 1);
  const SampledToken source = Step(row).rows[0].outputs[0][0],
                     forked = Step(fork_row).rows[0].outputs[0][0];
  EXPECT_EQ(source.token_id, forked.token_id);
  EXPECT_EQ(source.logprob, forked.logprob);
}

// A GPU's: two steps in flight, large steps, as many slots as half of the memory holds.
TEST_F(EngineTest, DefaultsDependOnTheDevice) {
  const auto make = [&](bool is_gpu) {
    auto backend = new WrappedBackend(*CreateCpuBackend({.num_threads = 1}),
                                      {.replays = is_gpu, .owns_memory = is_gpu});
    return MakeEngine(model_, {.warm_up = false},
                      std::unique_ptr<Backend, BackendDeleter>(backend));
  };
  const auto cpu = make(false), gpu = make(true);
  EXPECT_EQ(cpu->card().max_steps_in_flight, 1);
  EXPECT_EQ(cpu->card().max_tokens_per_step, 2048);
  EXPECT_EQ(cpu->card().geometry.num_slots, 64);
  EXPECT_EQ(gpu->card().max_steps_in_flight, 2);
  EXPECT_EQ(gpu->card().max_tokens_per_step, 8192);
  EXPECT_EQ(gpu->card().geometry.num_slots, 256);
  EXPECT_EQ(gpu->card().geometry.window_rows, WindowRows(2, kMaxDraftTokens));
}

// Whichever allocation it is, and whatever its name.
TEST_F(EngineTest, AnAllocationThatFailsAtStartShowsThePlan) {
  int64_t num_allocations = 0, failing = -1;
  const auto create = [&] {
    num_allocations = 0;
    const auto fault = [&](const char* op) {
      const bool allocates = std::string(op).starts_with("Allocate");
      if (allocates && num_allocations++ == failing) {
        return OpStatus{OpCode::kResourceExhausted, "planted"};
      }
      return OpStatus();
    };
    EngineOptions options = Options();
    options.model_folder = model_.folder();
    return Engine::Create(options, std::unique_ptr<Backend, BackendDeleter>(new WrappedBackend(
                                       *CreateCpuBackend({.num_threads = 1}), {.fault = fault})))
        .status();
  };
  ASSERT_TRUE(create().ok());
  const int64_t count = num_allocations;
  for (failing = 0; failing < count; ++failing) {
    const absl::Status status = create();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << failing;
    EXPECT_THAT(std::string(status.message()),
                testing::AllOf(HasSubstr("memory plan"), HasSubstr("planted")))
        << failing;
  }
}

TEST_F(EngineTest, AShapeWithoutWeightsGenerates) {
  for (const char* shape : {"tnl-tiny", "llama-tiny"}) {
    EngineOptions options = Options();
    options.config_json = *ConfigOfShape(shape);
    const auto engine = Engine::Create(options, *CreateCpuBackend({.num_threads = 1}));
    ASSERT_TRUE(engine.ok()) << engine.status();
    const DriverRequest request = {.prompt = RandomTokens(1, 50, 320), .max_tokens = 20};
    const DriverOutput output = Drive(**engine, 1, {request})[0];
    const std::vector<int32_t> ids = output.ids();
    EXPECT_GT(std::set<int32_t>(ids.begin(), ids.end()).size(), 5u) << shape;
    double square = 0;
    for (const float logit : output.probe) square += static_cast<double>(logit) * logit;
    EXPECT_NEAR(std::sqrt(square / static_cast<double>(output.probe.size())), 1, 0.3) << shape;
  }
}

using EngineDeathTest = EngineTest;

TEST_F(EngineDeathTest, StepsBeyondTheLimitOrCollectedOutOfOrderAreOurBugs) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  CacheLease first = *engine_->caches().Reserve(64);
  const std::vector<int32_t> prompt = {1, 2};
  const BatchRow row = {.token_ids = prompt, .lease = &first};
  EXPECT_DEATH((void)engine_->Collect(0), "in_flight.empty");
  EXPECT_DEATH(
      {
        (void)engine_->Submit(std::span(&row, 1));
        (void)engine_->Submit(std::span(&row, 1));
      },
      "max_steps_in_flight");
  EXPECT_DEATH((void)engine_->Collect(*engine_->Submit(std::span(&row, 1)) + 1),
               "front\\(\\).id == id");
}

}  // namespace
}  // namespace godwit
