#include <gtest/gtest.h>

#include "scheduler/scheduler.h"
#include "tests/scheduler/harness.h"

namespace godwit {
namespace {

constexpr int64_t kPlenty = 1 << 30;

HarnessOptions Options(int64_t num_slots, int64_t swap_bytes, int steps_in_flight = 1) {
  HarnessOptions options;
  options.geometry = FakeGeometry(num_slots, true, 64 * num_slots, swap_bytes);
  options.scheduler.max_steps_in_flight = steps_in_flight;
  options.scheduler.max_tokens_per_step = 128;
  return options;
}

GenerateRequest Request(int64_t num_prompt, int64_t max_tokens, int32_t priority,
                        uint64_t seed = 1) {
  GenerateRequest request = Harness::Request(num_prompt, max_tokens, seed);
  request.priority = priority;
  return request;
}

TEST(PreemptionTest, PreemptedTokensAreThoseOfAnUninterruptedRun) {
  for (int steps_in_flight : {1, 2}) {
    for (int start = 0; start < 12; ++start) {  // in prefill (300 tokens, 3 steps) and in decode
      Harness harness(Options(2, kPlenty, steps_in_flight));
      std::vector<GenerateRequest> requests = {Request(300, 40, 0, 1), Request(10, 40, 0, 2),
                                               Request(130, 20, 5, 3)};
      requests[2].num_outputs = 2;
      harness.Add(requests[0]);
      harness.Add(requests[1]);
      for (int step = 0; step < start; ++step) harness.Step();
      harness.Add(requests[2]);
      harness.Run();
      for (size_t index = 0; index < requests.size(); ++index) {
        EXPECT_TRUE(harness.clients[index].status.ok());
        harness.ExpectReference(harness.clients[index], requests[index]);
      }
      if (start > 0) {
        EXPECT_EQ(harness.scheduler->stats().num_preemptions, 2);
        EXPECT_EQ(harness.clients[0].timings.num_preemptions, 1);
        EXPECT_GT(harness.clients[0].timings.queue_ns, 0);
      }
      EXPECT_EQ(harness.scheduler->stats().prompt_tokens, 440);  // nothing is computed twice
      harness.ExpectClean();
    }
  }
}

TEST(PreemptionTest, SequencesOfARequestAreSwappedTogether) {
  for (int steps_in_flight : {1, 2}) {
    for (int start = 0; start < 8; ++start) {
      Harness harness(Options(3, kPlenty, steps_in_flight));
      GenerateRequest triple = Request(200, 30, 0, 4);
      triple.num_outputs = 3;
      harness.Add(triple);
      for (int step = 0; step < start; ++step) harness.Step();
      const GenerateRequest urgent = Request(10, 15, 1, 5);
      harness.Add(urgent);
      for (int step = 0; step < 4; ++step) harness.Step();
      EXPECT_EQ(harness.scheduler->stats().num_swapped, start > 0 ? 1 : 0);
      harness.Run();
      harness.ExpectReference(harness.clients[0], triple);
      harness.ExpectReference(harness.clients[1], urgent);
      harness.ExpectClean();
    }
  }
}

TEST(PreemptionTest, OnlyWhenTheSwapBudgetHoldsTheWholeState) {
  Harness probe(Options(1, 0));
  absl::StatusOr<CacheLease> lease = probe.caches->Reserve(100);
  ASSERT_TRUE(lease.ok());
  lease->set_position(14);
  const int64_t needed = probe.caches->SwapBytes(*lease);
  for (bool enough : {false, true}) {
    Harness harness(Options(1, enough ? needed : needed - 1));
    const Client& low = harness.Add(Request(10, 30, 0));
    for (int step = 0; step < 5; ++step) harness.Step();  // position 14
    const Client& high = harness.Add(Request(10, 10, 1));
    harness.Run();
    EXPECT_EQ(low.timings.num_preemptions, enough ? 1 : 0);
    EXPECT_EQ(high.timings.admitted < low.timings.finished, enough);
    harness.ExpectReference(low, Request(10, 30, 0));
    harness.ExpectClean();
  }
}

TEST(PreemptionTest, NeverForTheSameOrLowerPriority) {
  Harness harness(Options(1, kPlenty));
  harness.Add(Request(10, 30, 3));
  harness.Step();
  harness.Add(Request(10, 5, 3));
  harness.Add(Request(10, 5, 2));
  harness.Run();
  EXPECT_EQ(harness.scheduler->stats().num_preemptions, 0);
  harness.ExpectClean();
}

TEST(PreemptionTest, TakesTheLowestPriorityAndOfTheseTheLastAdmitted) {
  Harness harness(Options(4, kPlenty));
  const int32_t priorities[] = {1, 0, 0, 2};
  for (int32_t priority : priorities) harness.Add(Request(10, 60, priority));
  harness.Step();
  harness.Add(Request(10, 5, 9));
  harness.Run();
  EXPECT_EQ(harness.clients[2].timings.num_preemptions, 1);
  for (size_t index : {0, 1, 3}) {
    EXPECT_EQ(harness.clients[index].timings.num_preemptions, 0) << index;
  }
  harness.ExpectClean();
}

TEST(PreemptionTest, PreemptsForBlocksToo) {
  HarnessOptions options = Options(4, kPlenty);
  options.geometry.num_blocks = 12;
  Harness harness(options);
  harness.Add(Request(10, 100, 0, 1));  // 7 blocks
  harness.Add(Request(10, 40, 0, 2));   // 4 blocks
  for (int step = 0; step < 3; ++step) harness.Step();
  harness.Add(Request(10, 100, 1, 3));  // needs both gone: 12 - 7 < 7
  harness.Run();
  EXPECT_EQ(harness.scheduler->stats().num_preemptions, 2);
  harness.ExpectReference(harness.clients[0], Request(10, 100, 0, 1));
  harness.ExpectReference(harness.clients[1], Request(10, 40, 0, 2));
  harness.ExpectClean();
}

TEST(PreemptionTest, SwappedResumeBeforeNewOnesOfTheSamePriority) {
  Harness harness(Options(1, kPlenty));
  const Client& victim = harness.Add(Request(10, 30, 0));
  const Client& waiting = harness.Add(Request(10, 30, 0));
  for (int step = 0; step < 5; ++step) harness.Step();
  harness.Add(Request(10, 5, 1));
  harness.Run();
  EXPECT_EQ(victim.timings.num_preemptions, 1);
  EXPECT_LT(victim.timings.finished, waiting.timings.first_token);
  harness.ExpectClean();
}

TEST(PreemptionTest, AnAgedRequestIsNotPreemptedAgain) {
  HarnessOptions options = Options(1, kPlenty);
  options.scheduler.max_wait = 50 * kMillisecond;
  Harness harness(options);
  const Client& low = harness.Add(Request(10, 100, 0));
  for (int step = 0; step < 400; ++step) {
    if (step % 10 == 3) harness.Add(Request(10, 8, 1));
    harness.Step();
  }
  EXPECT_EQ(low.num_done, 1);
  EXPECT_LE(low.timings.queue_ns, 70 * kMillisecond);
  // In the queue for 50 ms, 100 ms of work, 8 for the drain.
  EXPECT_LE(low.timings.finished, 170 * kMillisecond);
  harness.Run();
  harness.ExpectClean();
}

TEST(PreemptionTest, VictimsWithStepsInFlightWaitUntilTheyAreCollected) {
  Harness harness(Options(1, kPlenty, 2));
  const GenerateRequest low = Request(10, 30, 0, 1);
  harness.Add(low);
  for (int step = 0; step < 4; ++step) harness.Step();
  const Client& high = harness.Add(Request(10, 5, 1, 2));
  harness.Step();  // at its Plan one step of the victim was in flight
  EXPECT_EQ(harness.scheduler->stats().num_running, 1);
  EXPECT_EQ(harness.scheduler->stats().num_preemptions, 0);
  harness.Step();
  EXPECT_EQ(harness.scheduler->stats().num_preemptions, 1);
  EXPECT_EQ(high.num_prompt_events, 1);
  harness.Run();
  harness.ExpectReference(harness.clients[0], low);
  harness.ExpectClean();
}

TEST(PreemptionTest, AFailedCopyEndsOnlyTheRequestsOfItsStep) {
  HarnessOptions options = Options(2, kPlenty);
  options.executor.fault = [](const std::string& call, int64_t count) {
    return call == "copy" && count == 0 ? absl::InternalError("planted") : absl::OkStatus();
  };
  Harness harness(options);
  const Client& victim = harness.Add(Request(10, 30, 0, 1));
  const Client& other = harness.Add(Request(10, 30, 5, 2));
  for (int step = 0; step < 3; ++step) harness.Step();
  const Client& high = harness.Add(Request(10, 5, 1, 3));
  const Client& later = harness.Add(Request(10, 5, 0, 4));
  harness.Run();
  EXPECT_EQ(victim.status.message(), "planted");
  EXPECT_EQ(high.status.message(), "planted");
  EXPECT_EQ(other.status.message(), "planted");  // had a row in that step
  EXPECT_TRUE(later.status.ok());
  harness.ExpectClean();
}

}  // namespace
}  // namespace godwit
