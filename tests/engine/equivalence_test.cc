// What must be equal to the last bit (docs/architecture.md section 3.2), on small random models of
// both families and types.

#include <cmath>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"
#include "tests/engine/engine_driver.h"

namespace godwit {
namespace {

using Case = std::tuple<TinyFamily, DType, std::string>;  // on which device

class EquivalenceTest : public testing::TestWithParam<Case> {
 protected:
  EquivalenceTest() : model_({.family = std::get<0>(GetParam())}) {}

  void SetUp() override {
    const absl::Status device = OpenDevice(std::get<2>(GetParam())).status();
    if (!device.ok()) GTEST_SKIP() << device.message();
  }

  EngineOptions Options(int max_steps_in_flight = 1) const {
    return {.dtype = std::get<1>(GetParam()),
            .max_sequences = 24,
            .max_tokens_per_step = 2048,
            .kv_bytes = 8 << 20,
            .swap_bytes = 64 << 20,
            .max_steps_in_flight = max_steps_in_flight};
  }

  std::unique_ptr<Engine> Make(int max_steps_in_flight = 1) const {
    return MakeDeterministicEngine(model_, Options(max_steps_in_flight), std::get<2>(GetParam()));
  }

  DriverRequest Request(uint64_t seed, int64_t prompt_length, int64_t max_tokens) const {
    return RandomRequest(model_, seed, prompt_length, max_tokens);
  }

  // As the first and only sequence of a new engine.
  DriverOutput Alone(const DriverRequest& request) const {
    const std::unique_ptr<Engine> engine = Make();
    return Drive(*engine, 1, {request})[0];
  }

  TinyModel model_;
};

// The comparisons below mean something: outputs are finite, not one repeated token, and differ
// between prompts.
TEST_P(EquivalenceTest, OutputsAreFiniteAndDependOnThePrompt) {
  const DriverOutput greedy = Alone(Request(20, 150, 30)), other = Alone(Request(22, 150, 30));
  EXPECT_NE(greedy.ids(), other.ids());
  const std::vector<int32_t> ids = greedy.ids();
  EXPECT_GT(std::set<int32_t>(ids.begin(), ids.end()).size(), 3u);
  for (const float logit : greedy.probe) ASSERT_TRUE(std::isfinite(logit));
  EXPECT_FALSE(greedy.SameBits(other));
}

TEST_P(EquivalenceTest, AloneEqualsInABatchOfSeventeenOthers) {
  const auto engine = Make();
  std::vector<DriverRequest> requests;
  for (uint64_t index = 0; index < 18; ++index) {
    requests.push_back(Request(100 + index, 1 + 23 * static_cast<int64_t>(index) % 190,
                               20 + static_cast<int64_t>(index)));
    requests.back().start_step = static_cast<int64_t>(index * 5 % 7);
  }
  const std::vector<DriverOutput> outputs = Drive(*engine, 1, requests);
  for (const size_t index : {size_t{0}, size_t{5}, size_t{8}, size_t{17}}) {
    SCOPED_TRACE(index);
    EXPECT_TRUE(outputs[index].SameBits(Alone(requests[index])));
  }
}

TEST_P(EquivalenceTest, PromptCutAtMultiplesOfPEqualsAtOnce) {
  for (const uint64_t seed : {uint64_t{2}, uint64_t{3}}) {
    const DriverRequest at_once = Request(seed, 333, 20);
    const DriverOutput expected = Alone(at_once);
    const std::vector<std::vector<int64_t>> all_cuts = {
        {64}, {320}, {128, 64}, {64, 64, 64, 64, 64}, {192, 128}, {256, 64}};
    for (const std::vector<int64_t>& cuts : all_cuts) {
      DriverRequest request = at_once;
      request.cuts = cuts;
      EXPECT_TRUE(Alone(request).SameBits(expected)) << "seed " << seed << " first cut " << cuts[0];
    }
  }
}

TEST_P(EquivalenceTest, OneOrTwoStepsInFlightAreEqual) {
  const auto engine = Make(2);
  std::vector<DriverRequest> requests;
  for (uint64_t index = 0; index < 7; ++index) {
    requests.push_back(Request(200 + index, 50 + 31 * static_cast<int64_t>(index), 40));
    requests.back().start_step = static_cast<int64_t>(index) * 3;
    requests.back().cuts = {64};
  }
  const std::vector<DriverOutput> two = Drive(*engine, 2, requests);
  const auto one_engine = Make(1);
  const std::vector<DriverOutput> one = Drive(*one_engine, 1, requests);
  for (size_t index = 0; index < requests.size(); ++index)
    EXPECT_TRUE(two[index].SameBits(one[index])) << index;
  EXPECT_TRUE(two[6].SameBits(Alone(requests[6])));
}

TEST_P(EquivalenceTest, SwappedAndResumedEqualsUninterrupted) {
  for (const int steps_in_flight : {1, 2}) {
    const auto engine = Make(steps_in_flight);
    std::vector<DriverRequest> requests;
    for (uint64_t index = 0; index < 6; ++index) {
      requests.push_back(Request(300 + index, 10 + 40 * static_cast<int64_t>(index), 50));
    }
    std::vector<DriverRequest> swapped = requests;
    for (size_t index = 0; index < 4; ++index) {
      swapped[index].swap_after = 1 + 11 * static_cast<int64_t>(index);
      swapped[index].swap_steps = 2 + 3 * static_cast<int64_t>(index);
    }
    const std::vector<DriverOutput> outputs = Drive(*engine, steps_in_flight, swapped);
    for (size_t index = 0; index < requests.size(); ++index) {
      EXPECT_TRUE(outputs[index].SameBits(Alone(requests[index]))) << index;
    }
  }
}

TEST_P(EquivalenceTest, ForkEqualsAloneWithItsSeedAndOutputIndex) {
  const auto engine = Make(2);
  DriverRequest request = Request(11, 141, 40);
  request.num_outputs = 4;
  request.cuts = {64};
  const std::vector<DriverOutput> forks = Drive(*engine, 2, {request, Request(12, 70, 30)});
  for (int output = 0; output < 4; ++output) {
    DriverRequest alone = Request(11, 141, 40);
    alone.output_index = output;
    EXPECT_TRUE(forks[static_cast<size_t>(output)].SameBits(Alone(alone))) << output;
  }
  EXPECT_NE(forks[0].ids(), forks[1].ids());
}

TEST_P(EquivalenceTest, SlotsUsedBeforeLeaveNoTrace) {
  const auto engine = Make(2);
  std::vector<DriverRequest> first;
  for (uint64_t index = 0; index < 24; ++index) {
    first.push_back(Request(400 + index, 5 + 6 * static_cast<int64_t>(index), 20));
  }
  Drive(*engine, 2, first);
  const DriverRequest request = Request(13, 99, 30);
  EXPECT_TRUE(Drive(*engine, 2, {request})[0].SameBits(Alone(request)));
}

// A sequence that the host stops keeps one step in flight, whose token is dropped; its slot and
// blocks go to another.
TEST_P(EquivalenceTest, OverrunStepAfterAStopLeavesNoTrace) {
  const auto engine = Make(2);
  const DriverRequest other = Request(14, 77, 25);
  {
    const DriverRequest stopped = Request(15, 40, 3);  // its third token is the over-run
    CacheLease lease = *engine->caches().Reserve(64);
    const RowOutput output = {.lease = &lease, .sampling = &stopped.sampling, .seed = stopped.seed};
    BatchRow row = {.token_ids = stopped.prompt,
                    .prompt_length = 40,
                    .lease = &lease,
                    .outputs = std::span(&output, 1)};
    const StepId first = *engine->Submit(std::span(&row, 1));
    row.token_ids = {};
    const StepId second = *engine->Submit(std::span(&row, 1));
    ASSERT_TRUE(engine->Collect(first).ok());
    const StepId overrun = *engine->Submit(std::span(&row, 1));
    ASSERT_TRUE(engine->Collect(second).ok());
    ASSERT_TRUE(engine->Collect(overrun).ok());
  }
  EXPECT_TRUE(Drive(*engine, 2, {other})[0].SameBits(Alone(other)));
}

std::string CaseName(const testing::TestParamInfo<Case>& info) {
  return std::string(std::get<0>(info.param) == TinyFamily::kTransnormer ? "Transnormer"
                                                                         : "Llama") +
         (std::get<1>(info.param) == DType::kF32 ? "F32" : "BF16") + std::get<2>(info.param);
}

INSTANTIATE_TEST_SUITE_P(
    Cpu, EquivalenceTest,
    testing::Combine(testing::Values(TinyFamily::kTransnormer, TinyFamily::kLlama),
                     testing::Values(DType::kF32, DType::kBF16), testing::Values("cpu")),
    CaseName);
INSTANTIATE_TEST_SUITE_P(Gpu, EquivalenceTest,
                         testing::Combine(testing::Values(TinyFamily::kTransnormer,
                                                          TinyFamily::kLlama),
                                          testing::Values(DType::kBF16), testing::Values("cuda")),
                         CaseName);

}  // namespace
}  // namespace godwit
