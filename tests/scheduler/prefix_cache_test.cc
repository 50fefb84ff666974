#include "scheduler/prefix_cache.h"

#include <algorithm>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/scheduler/harness.h"

namespace godwit {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

std::vector<int64_t> Positions(const PrefixCachePolicy& policy, int64_t prompt_length,
                               int64_t num_known = 0, int64_t num_cached = 0,
                               std::vector<int64_t> marks = {}) {
  return PositionsToKeep(policy, prompt_length, marks,
                         {.num_known = num_known, .num_cached = num_cached});
}

TEST(PositionsToKeepTest, TheEndLeavesATokenToCompute) {
  const PrefixCachePolicy policy{.at_branch = false, .interval = 0};
  EXPECT_THAT(Positions(policy, 1), IsEmpty());
  EXPECT_THAT(Positions(policy, 64), IsEmpty());
  EXPECT_THAT(Positions(policy, 65), ElementsAre(64));
  EXPECT_THAT(Positions(policy, 128), ElementsAre(64));
  EXPECT_THAT(Positions(policy, 129), ElementsAre(128));
  EXPECT_THAT(Positions(policy, 1000), ElementsAre(960));
  EXPECT_THAT(Positions(policy, 1000, 960, 960), IsEmpty());
}

TEST(PositionsToKeepTest, ABranchIsWhereAnEarlierPathIsLeft) {
  const PrefixCachePolicy policy{.at_end = false, .interval = 0};
  EXPECT_THAT(Positions(policy, 1000, 512), ElementsAre(512));
  EXPECT_THAT(Positions(policy, 1000, 512, 512), IsEmpty());
  EXPECT_THAT(Positions(policy, 1000, 512, 64), ElementsAre(512));
  EXPECT_THAT(Positions({.interval = 0}, 1000, 512, 64), ElementsAre(512, 960));
}

TEST(PositionsToKeepTest, IntervalsStandAtAbsoluteMultiples) {
  const PrefixCachePolicy policy{.at_end = false, .at_branch = false, .interval = 300};
  EXPECT_THAT(Positions(policy, 1000), ElementsAre(256, 512, 768));  // rounded down to 256
  EXPECT_THAT(Positions(policy, 1000, 320, 320), ElementsAre(512, 768));
  EXPECT_THAT(Positions({.at_end = false, .at_branch = false, .interval = 1}, 200),
              ElementsAre(64, 128, 192));
}

TEST(PositionsToKeepTest, WhatSavesLittleIsNotKeptUnlessItIsNamed) {
  const PrefixCachePolicy policy{.interval = 0, .min_tokens = 256};
  EXPECT_THAT(Positions(policy, 256), IsEmpty());
  EXPECT_THAT(Positions(policy, 257), ElementsAre(256));
  EXPECT_THAT(Positions(policy, 555, 512, 300), IsEmpty());
  EXPECT_THAT(Positions(policy, 200, 0, 0, {100, 130, 150, 190, 200}), ElementsAre(64, 128, 192));
  EXPECT_THAT(Positions(policy, 600, 0, 0, {-5, 0, 63, 100, 5000}), ElementsAre(64, 576));
}

class PrefixSchedulingTest : public testing::TestWithParam<std::tuple<bool, int>> {
 protected:
  Harness Make(int64_t num_snapshots = 4, int64_t num_blocks = 400, int64_t num_slots = 4) const {
    HarnessOptions options;
    options.geometry =
        FakeGeometry(num_slots, std::get<0>(GetParam()), num_blocks, 1 << 24, num_snapshots);
    options.scheduler.max_steps_in_flight = std::get<1>(GetParam());
    return Harness(options);
  }
  // `shared` tokens of one text, then others.
  static GenerateRequest Prompt(int64_t shared, int64_t own, uint64_t seed) {
    GenerateRequest request = Harness::Request(shared, 5, 77);
    const GenerateRequest rest = Harness::Request(own, 5, 1000 + seed);
    request.token_ids.insert(request.token_ids.end(), rest.token_ids.begin(), rest.token_ids.end());
    request.seed = seed;
    request.prefix_domain = "t";
    return request;
  }
  // Runs it alone; how many of its prompt tokens were cached.
  static int64_t Run(Harness& harness, const GenerateRequest& request) {
    Client& client = harness.Add(request);
    harness.Run();
    EXPECT_TRUE(client.status.ok()) << client.status;
    harness.ExpectReference(client, request);
    return client.num_cached;
  }
};
INSTANTIATE_TEST_SUITE_P(All, PrefixSchedulingTest,
                         testing::Combine(testing::Bool(), testing::Values(1, 2)));

TEST_P(PrefixSchedulingTest, TheSamePromptStartsAtItsLastBlock) {
  for (const int64_t length : {1, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1000}) {
    SCOPED_TRACE(length);
    Harness harness = Make();
    const GenerateRequest request = Prompt(length, 0, 3);
    EXPECT_EQ(Run(harness, request), 0);
    EXPECT_EQ(Run(harness, request), (length - 1) / 64 * 64);
    EXPECT_EQ(Run(harness, request), (length - 1) / 64 * 64);
    harness.ExpectClean();
  }
}

TEST_P(PrefixSchedulingTest, TheThirdPromptWithASharedBeginningStartsThere) {
  Harness harness = Make(8);
  EXPECT_EQ(Run(harness, Prompt(512, 100, 1)), 0);
  EXPECT_EQ(Run(harness, Prompt(512, 100, 2)), 0);
  EXPECT_EQ(Run(harness, Prompt(512, 100, 3)), 512);
  EXPECT_EQ(Run(harness, Prompt(100, 30, 4)), 0);   // finds the branch at 64
  EXPECT_EQ(Run(harness, Prompt(100, 30, 5)), 64);  // a short one hits
  EXPECT_EQ(Run(harness, Prompt(512, 100, 6)), 512);
  const PrefixCacheStats stats = harness.scheduler->stats().prefix_cache;
  EXPECT_EQ(stats.num_queries, 4 * 612 + 2 * 130);
  EXPECT_EQ(stats.num_hits, 2 * 512 + 64);
  harness.ExpectClean();
}

TEST_P(PrefixSchedulingTest, AMarkedBeginningServesTheSecondPrompt) {
  Harness harness = Make();
  GenerateRequest first = Prompt(130, 100, 1);
  first.prefix_marks = {130};
  EXPECT_EQ(Run(harness, first), 0);
  EXPECT_EQ(Run(harness, Prompt(130, 100, 2)), 128);
  harness.ExpectClean();
}

TEST_P(PrefixSchedulingTest, NothingIsSharedAcrossDomainsOrWithoutOne) {
  Harness harness = Make(8);
  GenerateRequest request = Prompt(300, 0, 1);
  EXPECT_EQ(Run(harness, request), 0);
  request.prefix_domain = "u";
  EXPECT_EQ(Run(harness, request), 0);
  request.prefix_domain = "";
  EXPECT_EQ(Run(harness, request), 0);
  EXPECT_EQ(harness.scheduler->stats().prefix_cache.num_queries, 600);
  EXPECT_EQ(harness.scheduler->stats().prefix_cache.num_states, 2);
  // One without the draft model's state is none for a sequence that speculates.
  request.prefix_domain = "t";
  request.max_draft_tokens = 3;
  EXPECT_EQ(Run(harness, request), 0);
  EXPECT_EQ(Run(harness, request), 256);
  request.max_draft_tokens = 0;
  EXPECT_EQ(Run(harness, request), 256);
  harness.ExpectClean();
}

TEST_P(PrefixSchedulingTest, ScoredPromptsAreComputedWhole) {
  Harness harness = Make();
  GenerateRequest request = Prompt(300, 0, 1);
  EXPECT_EQ(Run(harness, request), 0);
  request.prompt_logprobs = 0;
  EXPECT_EQ(Run(harness, request), 0);
  EXPECT_EQ(harness.clients.back().scores.size(), 299u);
  harness.ExpectClean();
}

TEST_P(PrefixSchedulingTest, OffWithoutSnapshots) {
  Harness harness = Make(0);
  const GenerateRequest request = Prompt(300, 0, 1);
  EXPECT_EQ(Run(harness, request), 0);
  EXPECT_EQ(Run(harness, request), 0);
  EXPECT_EQ(harness.scheduler->stats().prefix_cache.num_queries, 0);
  EXPECT_EQ(harness.executor->num_steps(), 10);  // no prompt was cut
  harness.ExpectClean();
}

TEST_P(PrefixSchedulingTest, OldStatesGiveWayToNewOnes) {
  Harness harness = Make(2);
  for (uint64_t seed = 1; seed <= 3; ++seed) EXPECT_EQ(Run(harness, Prompt(0, 200, seed)), 0);
  EXPECT_EQ(Run(harness, Prompt(0, 200, 2)), 192);
  EXPECT_EQ(Run(harness, Prompt(0, 200, 1)), 0);  // drops 3
  EXPECT_EQ(Run(harness, Prompt(0, 200, 2)), 192);
  EXPECT_EQ(Run(harness, Prompt(0, 200, 3)), 0);
  EXPECT_EQ(harness.scheduler->stats().prefix_cache.num_dropped, 3);
  harness.ExpectClean();
}

TEST_P(PrefixSchedulingTest, ManyAtOnceStartFromOneState) {
  Harness harness = Make(4, 400, 8);
  Run(harness, Prompt(256, 10, 0));
  std::vector<GenerateRequest> requests;
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    requests.push_back(Prompt(256, static_cast<int64_t>(seed * 7), seed));
    requests.back().num_outputs = 1 + static_cast<int32_t>(seed % 3);
    harness.Add(requests.back());
  }
  harness.Run();
  for (size_t index = 0; index < requests.size(); ++index) {
    const Client& client = harness.clients[index + 1];
    harness.ExpectReference(client, requests[index]);
    EXPECT_EQ(client.num_cached, 256);
  }
  harness.ExpectClean();
}

TEST_P(PrefixSchedulingTest, CancelledAndPreemptedPromptsLeaveNothingBehind) {
  Harness harness = Make(4, 400, 1);
  GenerateRequest low = Prompt(600, 200, 1);
  low.prefix_marks = {128, 256, 512};
  low.priority = -1;
  for (int steps = 1; steps <= 6; ++steps) {
    const GenerateRequest request = low;
    Client& client = harness.Add(request);
    for (int step = 0; step < steps; ++step) harness.Step();
    GenerateRequest urgent = Prompt(0, 90, 100 + static_cast<uint64_t>(steps));
    urgent.priority = 5;
    harness.Add(urgent);
    harness.Run();
    harness.ExpectReference(client, request);
    EXPECT_TRUE(client.status.ok());
  }
  EXPECT_GT(harness.scheduler->stats().num_preemptions, 0);
  Client& cancelled = harness.Add(Prompt(600, 200, 9));
  harness.Step();
  cancelled.stream->Cancel();
  harness.Run();
  EXPECT_EQ(Run(harness, low), 768);
  harness.ExpectClean();
}

TEST_P(PrefixSchedulingTest, AfterAFailedStepNothingIsTrusted) {
  HarnessOptions options = Make().options;
  bool fails = false;
  options.executor.fault = [&](const std::string& call, int64_t) {
    const bool now = fails && call == "collect";
    if (now) fails = false;
    return now ? absl::InternalError("planted") : absl::OkStatus();
  };
  Harness harness(options);
  const GenerateRequest request = Prompt(300, 0, 1);
  EXPECT_EQ(Run(harness, request), 0);
  EXPECT_EQ(Run(harness, request), 256);
  fails = true;
  Client& client = harness.Add(request);
  harness.Run();
  EXPECT_FALSE(client.status.ok());
  EXPECT_EQ(Run(harness, request), 0);
  EXPECT_EQ(Run(harness, request), 256);
  harness.ExpectClean();
}

// Of paged models.
TEST(PrefixBlocksTest, IdleBlocksGiveWayToSequences) {
  HarnessOptions options;
  options.geometry = FakeGeometry(4, true, 60, 0, 8);
  Harness harness(options);
  const auto run = [&](int64_t num_tokens, uint64_t seed) {
    GenerateRequest request = Harness::Request(num_tokens, 5, seed);
    request.prefix_domain = "t";
    Client& client = harness.Add(request);
    harness.Run();
    EXPECT_TRUE(client.status.ok()) << client.status;
    harness.ExpectReference(client, request);
    return client.num_cached;
  };
  EXPECT_EQ(run(260, 1), 0);  // keeps 16 blocks
  EXPECT_EQ(run(260, 2), 0);
  EXPECT_EQ(run(260, 3), 0);
  EXPECT_EQ(harness.scheduler->stats().blocks_used, 0);
  EXPECT_EQ(harness.caches->idle_blocks(), 48);
  // Needs 17 blocks of which 12 are free: the oldest goes, the one it starts from stays.
  EXPECT_EQ(run(260, 4), 0);
  EXPECT_EQ(run(260, 1), 0);
  EXPECT_EQ(run(260, 4), 256);
  EXPECT_EQ(run(900, 5), 0);  // all of them
  EXPECT_EQ(run(260, 4), 0);
  harness.ExpectClean();
}

TEST(PrefixBlocksTest, SequencesThatShareFitWhereTheyWouldNotAlone) {
  HarnessOptions options;
  options.geometry = FakeGeometry(4, true, 60, 0, 2);
  Harness harness(options);
  GenerateRequest request = Harness::Request(650, 20, 1);  // 42 blocks, 40 of them shared
  request.prefix_domain = "t";
  harness.Add(request);
  harness.Run();
  for (uint64_t seed = 2; seed <= 5; ++seed) {
    request.seed = seed;
    harness.Add(request);
  }
  harness.Step();
  EXPECT_EQ(harness.scheduler->stats().num_running, 4);
  EXPECT_EQ(harness.scheduler->stats().blocks_used, 40 + 4 * 2);
  harness.Run();
  for (const Client& client : harness.clients) EXPECT_TRUE(client.status.ok());
  harness.ExpectClean();
}

}  // namespace
}  // namespace godwit
