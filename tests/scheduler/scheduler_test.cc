// Rows of a step: budgets, cuts, forks, scores, two steps in flight.

#include "scheduler/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "tests/scheduler/harness.h"

namespace godwit {
namespace {

HarnessOptions Slots(int64_t num_slots, int64_t budget = 2048, int steps_in_flight = 1) {
  HarnessOptions options;
  options.geometry = FakeGeometry(num_slots, false);
  options.scheduler.max_tokens_per_step = budget;
  options.scheduler.max_steps_in_flight = steps_in_flight;
  return options;
}

TEST(SchedulerTest, CutsPromptsAtMultiplesOfTheBlockAndTheLastAtItsEnd) {
  Harness harness(Slots(2, 200));
  harness.Add(Harness::Request(500, 2));
  std::vector<int64_t> chunks;
  for (int step = 0; step < 3; ++step) {
    harness.Step();
    ASSERT_EQ(harness.last_rows.size(), 1u);
    chunks.push_back(harness.last_rows[0]);
  }
  EXPECT_EQ(chunks, (std::vector<int64_t>{192, 192, 116}));
  harness.Run();
  harness.ExpectClean();
}

TEST(SchedulerTest, DecodesFirstAndGivesTheRestToPromptsInOrder) {
  Harness harness(Slots(4, 200));
  harness.Add(Harness::Request(10, 100));
  harness.Add(Harness::Request(10, 100));
  harness.Step();
  EXPECT_EQ(harness.last_rows, (std::vector<int64_t>{10, 10}));
  harness.Add(Harness::Request(300, 1));
  harness.Add(Harness::Request(6, 1));  // fits beside the other's blocks: 2 + 192 + 6 = 200
  harness.Step();
  EXPECT_EQ(harness.last_rows, (std::vector<int64_t>{0, 0, 192, 6}));
  harness.Run();
  harness.ExpectClean();
}

TEST(SchedulerTest, PromptsOfHigherPriorityGetTheBudgetFirst) {
  Harness harness(Slots(4, 128));
  harness.Add(Harness::Request(256, 1));
  harness.Step();
  GenerateRequest urgent = Harness::Request(128, 1);
  urgent.priority = 5;
  Client& client = harness.Add(urgent);
  harness.Step();
  EXPECT_TRUE(client.done());
  harness.Run();
  harness.ExpectClean();
}

TEST(SchedulerTest, MoreSequencesThanTheBudgetTakeTurns) {
  Harness harness(Slots(150, 128));
  for (uint64_t seed = 0; seed < 150; ++seed) harness.Add(Harness::Request(1, 40, seed));
  harness.Add(Harness::Request(200, 40));
  harness.Run(400);
  for (const Client& client : harness.clients) EXPECT_EQ(client.finishes[0].size(), 1u);
  harness.ExpectClean();
}

TEST(SchedulerTest, TokensAreThoseOfAnUninterruptedRun) {
  for (int steps_in_flight : {1, 2}) {
    for (bool paged : {false, true}) {
      HarnessOptions options = Slots(8, 256, steps_in_flight);
      options.geometry = FakeGeometry(8, paged, 400);
      Harness harness(options);
      std::vector<GenerateRequest> requests;
      for (uint64_t seed = 0; seed < 20; ++seed) {
        GenerateRequest request =
            Harness::Request(1 + static_cast<int64_t>(seed * 37 % 500), 30, seed);
        request.num_outputs = 1 + static_cast<int32_t>(seed % 4);
        request.prompt_logprobs = static_cast<int32_t>(seed % 3) - 1;
        requests.push_back(request);
        harness.Add(request);
      }
      harness.Run();
      for (size_t index = 0; index < requests.size(); ++index) {
        const Client& client = harness.clients[index];
        harness.ExpectReference(client, requests[index]);
        EXPECT_EQ(client.num_prompt_events, 1);
        EXPECT_EQ(std::ssize(client.finishes), requests[index].num_outputs);
        if (requests[index].prompt_logprobs < 0) continue;
        const std::vector<float> expected = FakeExecutor::ReferenceScores(requests[index]);
        ASSERT_EQ(client.scores.size(), expected.size());
        for (size_t token = 0; token < expected.size(); ++token) {
          EXPECT_EQ(client.scores[token].logprob, expected[token]);
          EXPECT_EQ(client.scores[token].token_id, requests[index].token_ids[token + 1]);
        }
      }
      harness.ExpectClean();
    }
  }
}

TEST(SchedulerTest, ScoringOnlyDrawsNothing) {
  for (int steps_in_flight : {1, 2}) {
    Harness harness(Slots(2, 128, steps_in_flight));
    GenerateRequest request = Harness::Request(300, 0);
    request.prompt_logprobs = 3;
    const Client& client = harness.Add(request);
    harness.Run();
    EXPECT_EQ(client.scores.size(), 299u);
    EXPECT_EQ(client.num_prompt_events, 1);
    EXPECT_TRUE(client.status.ok());
    EXPECT_TRUE(client.finishes[0].empty());
    EXPECT_TRUE(client.tokens[0].empty());
    EXPECT_EQ(client.timings.first_token, kNever);
    EXPECT_EQ(harness.executor->num_steps(), 3);
    harness.ExpectClean();
  }
}

TEST(SchedulerTest, PrefillsOnceForAllOutputs) {
  Harness harness(Slots(4, 128));
  GenerateRequest request = Harness::Request(192, 5);
  request.num_outputs = 4;
  harness.Add(request);
  harness.Step();
  harness.Step();
  EXPECT_EQ(harness.last_rows, std::vector<int64_t>{64});
  harness.Step();
  EXPECT_EQ(harness.last_rows, (std::vector<int64_t>{0, 0, 0, 0}));
  harness.Run();
  EXPECT_EQ(harness.scheduler->stats().prompt_tokens, 192);
  EXPECT_EQ(harness.scheduler->stats().generation_tokens, 20);
  harness.ExpectClean();
}

TEST(SchedulerTest, TwoStepsInFlightNeverDrawPastMaxTokens) {
  Harness harness(Slots(1, 128, 2));
  harness.Add(Harness::Request(10, 3));
  harness.Run();
  EXPECT_EQ(harness.executor->num_steps(), 3);  // the prompt's step draws the first token
  harness.ExpectClean();
}

TEST(SchedulerTest, TimingsAreThoseOfTheSteps) {
  Harness harness(Slots(1));
  harness.Add(Harness::Request(10, 4));
  const Client& second = harness.Add(Harness::Request(10, 2));
  harness.Run();
  EXPECT_EQ(second.timings.submitted, 0);
  EXPECT_EQ(second.timings.admitted, 4 * kMillisecond);
  EXPECT_EQ(second.timings.queue_ns, 4 * kMillisecond);
  EXPECT_EQ(second.timings.first_token, 5 * kMillisecond);
  EXPECT_EQ(second.timings.last_token, 6 * kMillisecond);
  EXPECT_EQ(second.timings.finished, 6 * kMillisecond);
  harness.ExpectClean();
}

TEST(SchedulerTest, StatsFollowTheRequests) {
  HarnessOptions options = Slots(2);
  options.geometry = FakeGeometry(2, true, 10);
  Harness harness(options);
  for (int index = 0; index < 3; ++index) harness.Add(Harness::Request(20, 12));
  EXPECT_EQ(harness.scheduler->stats().num_waiting, 3);
  EXPECT_EQ(harness.scheduler->stats().num_waiting_tokens, 60);
  harness.Step();
  const SchedulerStats stats = harness.scheduler->stats();
  EXPECT_EQ(stats.num_waiting, 1);
  EXPECT_EQ(stats.num_running, 2);
  EXPECT_EQ(stats.slots_used, 2);
  EXPECT_EQ(stats.slots_total, 2);
  EXPECT_EQ(stats.blocks_used, 4);
  EXPECT_EQ(stats.blocks_total, 10);
  EXPECT_EQ(stats.num_steps, 1);
  harness.Run();
  harness.ExpectClean();
}

}  // namespace
}  // namespace godwit
