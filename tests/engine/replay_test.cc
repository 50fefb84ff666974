// Recorded decode steps: nothing of a step may live in the arguments of its ops, and padding
// changes nothing. On the CPU with a back end around it that records; on a GPU against the same
// engine without recordings.

#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/engine/engine_driver.h"
#include "tests/engine/gpu.h"
#include "tests/engine/wrapped_backend.h"

namespace godwit {
namespace {

using BackendPointer = std::unique_ptr<Backend, BackendDeleter>;
using Case = std::tuple<TinyFamily, std::string>;

class ReplayTest : public testing::TestWithParam<Case> {
 protected:
  ReplayTest() : model_({.family = std::get<0>(GetParam())}) {}

  void SetUp() override {
    if (!OnGpu()) return;
    if (const absl::Status gpu = OpenGpu().status(); !gpu.ok()) GTEST_SKIP() << gpu.message();
  }

  static bool OnGpu() { return std::get<1>(GetParam()) == "cuda"; }

  static BackendPointer Device() {
    return OnGpu() ? std::move(*OpenGpu()) : std::move(*CreateCpuBackend({.num_threads = 2}));
  }

  EngineOptions Options(bool warm_up) const {
    return {.dtype = DType::kBF16,
            .max_sequences = 24,
            .max_tokens_per_step = 512,
            .kv_bytes = 8 << 20,
            .swap_bytes = 64 << 20,
            .max_steps_in_flight = 2,
            .deterministic = true,
            .warm_up = warm_up};
  }

  std::unique_ptr<Engine> Plain() const {
    return MakeEngine(model_, Options(false), BackendPointer(new WrappedBackend(Device(), {})));
  }
  // *backend is the engine's. On a GPU the device records by itself.
  std::unique_ptr<Engine> Recording(bool warm_up, WrappedBackend** backend,
                                    const std::string& draft_folder = "") const {
    EngineOptions options = Options(warm_up);
    options.draft_folder = draft_folder;
    if (OnGpu()) return MakeEngine(model_, options, Device());
    *backend = new WrappedBackend(Device(), {.replays = true});
    return MakeEngine(model_, options, BackendPointer(*backend));
  }

  // Of every kind that shares a step: greedy, sampled, penalised, biased, with log-probabilities,
  // forked, moved to host memory, beginning and ending at other times.
  std::vector<DriverRequest> Requests() const {
    std::vector<DriverRequest> requests;
    for (uint64_t index = 0; index < 11; ++index) {
      DriverRequest& request = requests.emplace_back();
      request.prompt = RandomTokens(700 + index, 1 + 37 * static_cast<int64_t>(index) % 200,
                                    model_.options().vocab_size);
      request.seed = index;
      request.max_tokens = 20 + 5 * static_cast<int64_t>(index % 4);
      request.start_step = static_cast<int64_t>(index * 5 % 17);
      request.sampling.temperature = index % 2 == 0 ? 0.0f : 0.9f;
      request.sampling.num_logprobs = static_cast<int32_t>(index % 3) - 1;
      if (index % 3 == 1) request.sampling.frequency_penalty = 0.5f;
      if (index % 4 == 2) {
        for (int32_t id = 0; id < 40; ++id) {
          request.sampling.logit_bias.push_back({id + static_cast<int32_t>(index), -3});
        }
      }
      if (index == 5) {
        request.sampling.end_token_ids = {7, 8, 9};
        request.sampling.min_tokens = 12;
      }
      if (index == 6) request.swap_after = 4;
      if (index == 7) request.num_outputs = 3;
    }
    return requests;
  }

  TinyModel model_;
};

TEST_P(ReplayTest, ReplayedStepsEqualUnrecordedOnes) {
  const std::vector<DriverOutput> expected = Drive(*Plain(), 2, Requests());
  for (const bool warm_up : {false, true}) {
    SCOPED_TRACE(warm_up);
    WrappedBackend* backend = nullptr;
    const auto engine = Recording(warm_up, &backend);
    // Twice: the second time every number of rows has its recording.
    for (int run = 0; run < 2; ++run) {
      const std::vector<DriverOutput> outputs = Drive(*engine, 2, Requests());
      ASSERT_EQ(outputs.size(), expected.size());
      for (size_t index = 0; index < outputs.size(); ++index) {
        EXPECT_TRUE(outputs[index].SameBits(expected[index])) << "output " << index;
      }
    }
    if (backend != nullptr) {
      EXPECT_GT(backend->num_replays(), 30);
    }
  }
}

// Steps with drafts stand between recorded ones, and allocate nothing either.
TEST_P(ReplayTest, SpeculationBetweenReplayedStepsEqualsNone) {
  const std::vector<DriverOutput> expected = Drive(*Plain(), 2, Requests());
  const TinyModel other({.family = std::get<0>(GetParam()), .seed = 99, .num_layers = 2});
  for (const TinyModel* draft : {&std::as_const(model_), &other}) {
    WrappedBackend* backend = nullptr;
    const auto engine = Recording(true, &backend, draft->folder());
    EXPECT_EQ(engine->caches().free_slots(), 24);
    const int64_t at_start = backend == nullptr ? 0 : backend->num_allocations();
    std::vector<DriverRequest> requests = Requests();
    for (size_t index = 0; index < requests.size(); ++index) {
      const int drafts = static_cast<int>(3 * index % (kMaxDraftTokens + 1));
      if (index % 4 != 3) requests[index].draft_tokens = {drafts, 0, 2, 0};
      requests[index].draft_policy = static_cast<DraftPolicy>(index % 3);
    }
    const std::vector<DriverOutput> outputs = Drive(*engine, 2, requests);
    ASSERT_EQ(outputs.size(), expected.size());
    int64_t num_drafts = 0, num_accepted = 0;
    for (size_t index = 0; index < outputs.size(); ++index) {
      EXPECT_EQ(outputs[index].ids(), expected[index].ids()) << "output " << index;
      EXPECT_TRUE(outputs[index].SameBits(expected[index])) << "output " << index;
      num_drafts += outputs[index].num_drafts;
      num_accepted += outputs[index].num_accepted;
    }
    EXPECT_GT(num_drafts, 30);
    if (draft == &model_) {
      EXPECT_GE(num_accepted, num_drafts * 9 / 10);
    }
    if (backend != nullptr) {
      EXPECT_EQ(backend->num_allocations(), at_start);
      EXPECT_GT(backend->num_replays(), 10);
    }
  }
}

// The passes of the draft model and the steps that judge them are recorded too. Padding and
// recording change neither what is proposed nor what stands.
TEST_P(ReplayTest, ReplayedRoundsEqualUnrecordedOnes) {
  const TinyModel draft({.family = std::get<0>(GetParam()), .num_layers = 2});
  std::vector<DriverRequest> requests = Requests();
  for (size_t index = 0; index < requests.size(); ++index) {
    const int drafts = static_cast<int>(index % 5);
    if (index != 3) requests[index].draft_tokens = {drafts, 1, 0, 7};
    requests[index].draft_policy = DraftPolicy::kFixed;
  }
  EngineOptions options = Options(false);
  options.draft_folder = draft.folder();
  const auto unrecorded =
      MakeEngine(model_, options, BackendPointer(new WrappedBackend(Device(), {})));
  const std::vector<DriverOutput> expected = Drive(*unrecorded, 2, requests);
  WrappedBackend* backend = nullptr;
  const auto engine = Recording(true, &backend, draft.folder());
  int64_t num_accepted = 0;
  for (int run = 0; run < 3; ++run) {
    SCOPED_TRACE(run);
    const std::vector<DriverOutput> outputs = Drive(*engine, 2, requests);
    ASSERT_EQ(outputs.size(), expected.size());
    for (size_t index = 0; index < outputs.size(); ++index) {
      EXPECT_TRUE(outputs[index].SameBits(expected[index])) << "output " << index;
      EXPECT_EQ(outputs[index].num_drafts, expected[index].num_drafts) << "output " << index;
      EXPECT_EQ(outputs[index].num_accepted, expected[index].num_accepted) << "output " << index;
      num_accepted += outputs[index].num_accepted;
    }
  }
  EXPECT_GT(num_accepted, 0);
}

// Between the powers of two that passes are padded to: the arrays of a pass have room for as many
// rows as there are sequences, and each pass begins where the one before it may end.
TEST_P(ReplayTest, AsManyRowsDraftAsThereAreSequences) {
  WrappedBackend* backend = nullptr;
  const auto engine = Recording(false, &backend, model_.folder());
  std::vector<DriverRequest> requests;
  for (uint64_t index = 0; index < 24; ++index) {
    requests.push_back(RandomRequest(model_, 900 + index, 4, 24));
    requests.back().draft_tokens = {3};
  }
  const std::vector<DriverOutput> outputs = Drive(*engine, 2, requests);
  for (auto& request : requests) request.draft_tokens = {0};
  const std::vector<DriverOutput> expected = Drive(*Plain(), 2, requests);
  for (size_t index = 0; index < outputs.size(); ++index) {
    EXPECT_TRUE(outputs[index].SameBits(expected[index])) << "output " << index;
    EXPECT_GT(outputs[index].num_drafts, 3) << "output " << index;
  }
}

// Three passes and the step that judges them: nothing is left between the recordings, whichever way
// the last round ended.
TEST_P(ReplayTest, ARoundOfOneSequenceIsReplayedWhole) {
  WrappedBackend* backend = nullptr;
  const auto engine = Recording(true, &backend, model_.folder());
  if (backend == nullptr) GTEST_SKIP() << "a GPU keeps no count";
  const SamplingParams sampling = {.temperature = 0};
  const std::vector<int32_t> prompt = {5, 6, 7};
  CacheLease lease = *engine->caches().Reserve(200);
  const RowOutput output = {.lease = &lease, .sampling = &sampling};
  BatchRow row = {.token_ids = prompt,
                  .prompt_length = 3,
                  .lease = &lease,
                  .outputs = {&output, 1},
                  .max_draft_tokens = 3};
  ASSERT_TRUE(engine->Collect(*engine->Submit({&row, 1})).ok());
  row.token_ids = {};
  int64_t num_ops = 0, num_replays = 0;
  for (int round = 0; round < 20; ++round) {
    row.max_draft_tokens = 3;
    row.confirmed_position = lease.position();
    num_ops = backend->num_unrecorded_ops();
    num_replays = backend->num_replays();
    ASSERT_TRUE(engine->Collect(*engine->Submit({&row, 1})).ok());
    if (round >= 16) {
      EXPECT_EQ(backend->num_replays() - num_replays, 4) << round;
      EXPECT_EQ(backend->num_unrecorded_ops() - num_ops, 0) << round;
    }
  }
}

// Padding alone makes them at start, so that no request waits while its shapes are recorded.
TEST_P(ReplayTest, WarmUpMakesTheRecordingsOfRounds) {
  if (OnGpu()) GTEST_SKIP() << "a GPU keeps no count";
  const TinyModel draft({.family = std::get<0>(GetParam()), .num_layers = 2});
  WrappedBackend* backend = nullptr;
  const auto engine = Recording(true, &backend, draft.folder());
  const int64_t at_start = backend->num_recordings();
  EXPECT_LT(at_start, 450);
  std::vector<DriverRequest> requests = Requests();
  for (DriverRequest& request : requests) {
    request.prompt.resize(std::min<size_t>(request.prompt.size(), 16));
    request.num_outputs = 1;
    request.draft_tokens = {6};
  }
  for (const DraftPolicy policy :
       {DraftPolicy::kFixed, DraftPolicy::kMargin, DraftPolicy::kThroughput}) {
    for (DriverRequest& request : requests) request.draft_policy = policy;
    Drive(*engine, 1, requests);
  }
  // Some read what a pause had left.
  EXPECT_LE(backend->num_recordings() - at_start, 16);
}

// A back end that has made too many recordings drops them all (1024 on a GPU), and each is made
// anew: under policies that stop rows one by one their number is bounded all the same.
TEST_P(ReplayTest, PoliciesOfManySequencesMakeFewRecordings) {
  if (OnGpu()) GTEST_SKIP() << "a GPU keeps no count";
  const TinyModel draft({.family = std::get<0>(GetParam()), .num_layers = 2});
  for (const int64_t num_sequences : {32, 128}) {
    SCOPED_TRACE(num_sequences);
    EngineOptions options = Options(false);
    options.max_sequences = num_sequences;
    options.max_tokens_per_step = 2048;
    std::vector<DriverRequest> requests;
    for (int64_t index = 0; index < num_sequences; ++index) {
      DriverRequest& request = requests.emplace_back();
      request.prompt = RandomTokens(900 + static_cast<uint64_t>(index), 3 + index % 5,
                                    model_.options().vocab_size);
      request.seed = static_cast<uint64_t>(index);
      request.max_tokens = 40 + index % 16;
      request.is_probed = false;
      request.sampling.temperature = index % 2 == 0 ? 0.0f : 0.9f;
    }
    const auto plain =
        MakeEngine(model_, options, BackendPointer(new WrappedBackend(Device(), {})));
    const std::vector<DriverOutput> expected = Drive(*plain, 1, requests);
    options.draft_folder = draft.folder();
    auto* const backend = new WrappedBackend(Device(), {.replays = true});
    const auto engine = MakeEngine(model_, options, BackendPointer(backend));
    constexpr DraftPolicy kPolicies[] = {DraftPolicy::kThroughput, DraftPolicy::kMargin,
                                         DraftPolicy::kFixed};
    for (size_t first = 0; first < 4; ++first) {  // each alone, then all at once
      for (size_t index = 0; index < requests.size(); ++index) {
        requests[index].draft_tokens = {6, 6, 5, 4, 7};
        requests[index].draft_policy = kPolicies[first < 3 ? first : index % 3];
        requests[index].draft_threshold = 0.2f + 0.1f * static_cast<float>(index % 5);
      }
      const std::vector<DriverOutput> outputs = Drive(*engine, 1, requests);
      for (size_t index = 0; index < outputs.size(); ++index) {
        EXPECT_EQ(outputs[index].ids(), expected[index].ids()) << "output " << index;
      }
    }
    EXPECT_LT(backend->num_recordings(), 192);
  }
}

TEST_P(ReplayTest, WarmUpRecordsEveryNumberOfRows) {
  WrappedBackend* backend = nullptr;
  const auto engine = Recording(true, &backend);
  if (backend == nullptr) GTEST_SKIP() << "a GPU keeps no count";
  EXPECT_EQ(backend->num_recordings(), 8);  // 1, 2, 3, 4, 8, 12, 16, 24
  Drive(*engine, 2, Requests());
  EXPECT_EQ(backend->num_recordings(), 8);
  EXPECT_EQ(engine->caches().free_slots(), 24);
}

TEST_P(ReplayTest, ADecodeStepIsOneUploadAndOneDownload) {
  WrappedBackend* backend = nullptr;
  const auto engine = Recording(true, &backend);
  if (backend == nullptr) GTEST_SKIP() << "a GPU keeps no count";
  for (const int32_t num_logprobs : {-1, 0, 5}) {
    const SamplingParams sampling = {.num_logprobs = num_logprobs};
    const std::vector<int32_t> prompt = {5, 6, 7};
    CacheLease lease = *engine->caches().Reserve(64);
    const RowOutput output = {.lease = &lease, .sampling = &sampling};
    BatchRow row = {
        .token_ids = prompt, .prompt_length = 3, .lease = &lease, .outputs = {&output, 1}};
    ASSERT_TRUE(engine->Collect(*engine->Submit({&row, 1})).ok());
    row.token_ids = {};
    const int64_t before = backend->num_host_copies();
    ASSERT_TRUE(engine->Collect(*engine->Submit({&row, 1})).ok());
    EXPECT_EQ(backend->num_host_copies() - before, 2) << num_logprobs;
  }
}

TEST_P(ReplayTest, NothingIsAllocatedOnTheStepPath) {
  WrappedBackend* backend = nullptr;
  const auto engine = Recording(true, &backend);
  if (backend == nullptr) GTEST_SKIP() << "a GPU keeps no count";
  const int64_t at_start = backend->num_allocations();
  Drive(*engine, 2, Requests());
  EXPECT_EQ(backend->num_allocations(), at_start);
}

// A step that fails is not what is replayed later.
TEST_P(ReplayTest, AFailedStepSaysWhy) {
  if (OnGpu()) GTEST_SKIP() << "needs a back end that fails";
  bool fails = false;
  auto* backend = new WrappedBackend(
      Device(), {.replays = true, .fault = [&](const char* op) {
                   const bool now = fails && op[0] == 'S';
                   return now ? OpStatus{OpCode::kUnavailable, "planted in Sample"} : OpStatus();
                 }});
  const auto engine = MakeEngine(model_, Options(true), BackendPointer(backend));
  const SamplingParams sampling;
  const std::vector<int32_t> prompt = {5, 6, 7};
  CacheLease lease = *engine->caches().Reserve(64);
  const RowOutput output = {.lease = &lease, .sampling = &sampling};
  BatchRow row = {
      .token_ids = prompt, .prompt_length = 3, .lease = &lease, .outputs = {&output, 1}};
  ASSERT_TRUE(engine->Collect(*engine->Submit({&row, 1})).ok());
  row.token_ids = {};
  fails = true;
  const auto step = engine->Submit({&row, 1});
  EXPECT_EQ(step.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(step.status().message(), "planted in Sample");
}

std::string CaseName(const testing::TestParamInfo<Case>& info) {
  return std::string(std::get<0>(info.param) == TinyFamily::kTransnormer ? "Transnormer"
                                                                         : "Llama") +
         "_" + std::get<1>(info.param);
}

INSTANTIATE_TEST_SUITE_P(Models, ReplayTest,
                         testing::Combine(testing::Values(TinyFamily::kTransnormer,
                                                          TinyFamily::kLlama),
                                          testing::Values("cpu", "cuda")),
                         CaseName);

}  // namespace
}  // namespace godwit
