// Cancel, deadline and time limit in every phase.

#include <gtest/gtest.h>

#include <functional>

#include "scheduler/scheduler.h"
#include "tests/scheduler/harness.h"

namespace godwit {
namespace {

// Brings one request to `phase` and returns its index among the clients.
size_t BringTo(Phase phase, GenerateRequest request, Harness& harness) {
  GenerateRequest other = Harness::Request(10, 200, 9);
  if (phase == Phase::kWaiting) {
    other.num_outputs = 2;
    harness.Add(other);
    harness.Step();
    harness.Add(request);
    harness.Step();
    return 1;
  }
  harness.Add(request);
  harness.Step();
  if (phase == Phase::kPrefilling) return 0;
  for (int step = 0; step < 8; ++step) harness.Step();
  if (phase == Phase::kDecoding) return 0;
  other.num_outputs = 2;
  other.priority = 1;
  harness.Add(other);
  for (int step = 0; step < 3; ++step) harness.Step();
  EXPECT_EQ(harness.scheduler->stats().num_swapped, 1);
  return 0;
}

struct Case {
  Phase phase;
  const char* name;
  int steps_in_flight;
};

class EndingTest : public testing::TestWithParam<Case> {
 protected:
  HarnessOptions options() const {
    HarnessOptions options;
    options.geometry = FakeGeometry(2, true, 128, 1 << 30);
    options.scheduler.max_steps_in_flight = GetParam().steps_in_flight;
    options.scheduler.max_tokens_per_step = 128;
    return options;
  }
  static GenerateRequest Request() {
    GenerateRequest request = Harness::Request(600, 60, 1);
    request.num_outputs = 2;
    return request;
  }
  // What was streamed stands, and nothing comes after the end.
  static void RunOut(Harness& harness, const Client& client) {
    const std::vector<std::vector<int32_t>> before = client.tokens;
    harness.Run();
    EXPECT_EQ(client.tokens, before);
    for (size_t index = 0; index < harness.clients.size(); ++index) {
      if (&harness.clients[index] != &client) {
        EXPECT_TRUE(harness.clients[index].status.ok());
      }
    }
    harness.ExpectReference(client, Request());
    harness.ExpectClean();
  }
};

TEST_P(EndingTest, Cancel) {
  Harness harness(options());
  Client& client = harness.clients[BringTo(GetParam().phase, Request(), harness)];
  client.stream->Cancel();
  client.Read();
  harness.Step();
  EXPECT_EQ(client.num_done, 1);
  EXPECT_EQ(client.status.code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(client.status.message(), std::string("cancelled while ") + GetParam().name);
  EXPECT_EQ(client.phase, GetParam().phase);
  RunOut(harness, client);
}

TEST_P(EndingTest, Deadline) {
  Harness harness(options());
  GenerateRequest request = Request();
  // The clock stands until BringTo is done.
  harness.options.step_ns = 0;
  request.deadline = 10;
  Client& client = harness.clients[BringTo(GetParam().phase, request, harness)];
  harness.now = 10;
  harness.Step();
  EXPECT_EQ(client.num_done, 1);
  EXPECT_EQ(client.status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(client.status.message(), std::string("deadline exceeded while ") + GetParam().name);
  EXPECT_EQ(client.phase, GetParam().phase);
  RunOut(harness, client);
}

TEST_P(EndingTest, TimeLimitEndsOkAndEveryOutput) {
  Harness harness(options());
  GenerateRequest request = Request();
  harness.options.step_ns = 0;
  request.time_limit = 10;
  request.deadline = 10;  // at the same time: what was generated is not thrown away
  Client& client = harness.clients[BringTo(GetParam().phase, request, harness)];
  harness.now = 10;
  harness.Step();
  EXPECT_EQ(client.num_done, 1);
  EXPECT_TRUE(client.status.ok());
  ASSERT_EQ(client.finishes.size(), 2u);
  for (const auto& finishes : client.finishes) {
    ASSERT_EQ(finishes.size(), 1u);
    EXPECT_EQ(finishes[0].reason, FinishReason::kTimeLimit);
  }
  RunOut(harness, client);
}

TEST_P(EndingTest, AbortAll) {
  Harness harness(options());
  BringTo(GetParam().phase, Request(), harness);
  harness.scheduler->AbortAll(absl::UnavailableError("shutting down"), harness.now);
  for (Client& client : harness.clients) {
    client.Read();
    EXPECT_EQ(client.status.code(), absl::StatusCode::kUnavailable);
  }
  harness.Run();
  harness.ExpectClean();
}

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (int steps_in_flight : {1, 2}) {
    cases.push_back({Phase::kWaiting, "waiting", steps_in_flight});
    cases.push_back({Phase::kPrefilling, "prefilling", steps_in_flight});
    cases.push_back({Phase::kDecoding, "decoding", steps_in_flight});
    cases.push_back({Phase::kSwapped, "swapped", steps_in_flight});
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Phases, EndingTest, testing::ValuesIn(Cases()), [](const auto& info) {
  return std::string(info.param.name) + "_" + std::to_string(info.param.steps_in_flight);
});

TEST(EndTest, LeaseOfACancelledRequestIsHeldUntilItsStepIsCollected) {
  CacheGeometry geometry = FakeGeometry(1, false);
  std::unique_ptr<CacheManager> caches = *CacheManager::Create(geometry);
  FakeExecutor executor({.max_steps_in_flight = 2}, *caches);
  Scheduler scheduler({.max_steps_in_flight = 2, .context_length = 1000}, *caches);
  Client client;
  GenerateRequest request = Harness::Request(10, 10);
  request.stream = client.stream;
  ASSERT_TRUE(scheduler.Add(request, 0).ok());
  StepPlan first = scheduler.Plan(0);
  ASSERT_EQ(first.rows.size(), 1u);
  const StepId id = *executor.Submit(first.rows);
  client.stream->Cancel();
  EXPECT_TRUE(scheduler.Plan(0).rows.empty());
  client.Read();
  EXPECT_EQ(client.num_done, 1);
  EXPECT_EQ(caches->free_slots(), 0);
  EXPECT_FALSE(scheduler.idle());
  scheduler.Apply(std::move(first), *executor.Collect(id), 0);
  EXPECT_EQ(caches->free_slots(), 1);
  EXPECT_TRUE(scheduler.idle());
  client.Read();
  EXPECT_TRUE(client.errors.empty());
}

TEST(EndTest, AnEarlierDeadlineBeatsTheTimeLimit) {
  HarnessOptions options;
  options.geometry = FakeGeometry(1, false);
  Harness harness(options);
  GenerateRequest request = Harness::Request(10, 1000);
  request.deadline = 5 * kMillisecond;
  request.time_limit = 6 * kMillisecond;
  const Client& client = harness.Add(request);
  harness.options.step_ns = 20 * kMillisecond;  // both have passed when it is looked at
  harness.Run();
  EXPECT_EQ(client.status.code(), absl::StatusCode::kDeadlineExceeded);
  harness.ExpectClean();
}

}  // namespace
}  // namespace godwit
