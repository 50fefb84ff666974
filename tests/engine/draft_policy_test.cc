#include "engine/draft_policy.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace godwit {
namespace {

TEST(DraftPolicyTest, NamesAreReadAsTheyAreWritten) {
  for (const DraftPolicy policy : {DraftPolicy::kFixed, DraftPolicy::kMargin,
                                   DraftPolicy::kThroughput, DraftPolicy::kSpecDecPP}) {
    EXPECT_EQ(ParseDraftPolicy(DraftPolicyName(policy)), policy);
  }
  EXPECT_FALSE(ParseDraftPolicy("off").has_value());
}

TEST(SpeculationCostsTest, TellsWhatPassesAndRowsCost) {
  SpeculationCosts costs;
  EXPECT_FALSE(costs.known());
  for (int step = 0; step < 200; ++step) {
    const int drafts = step % 5;
    costs.Observe(drafts, 0.2 * drafts, 1 + drafts, 1 + 0.1 * drafts, 1 + drafts / 2);
  }
  ASSERT_TRUE(costs.known());
  EXPECT_NEAR(costs.seconds_per_pass(), 0.2, 1e-9);
  EXPECT_NEAR(costs.SecondsOfRows(2, 1), 0.1, 1e-9);
  EXPECT_NEAR(costs.SecondsOfRows(5, 2), 0.2, 1e-9) << "beyond what was seen";
  EXPECT_NEAR(costs.tokens_per_second(), 1.8 / 1.6, 0.02);
}

TEST(SpeculationCostsTest, KnowsWhereAStepsTimeJumps) {
  SpeculationCosts costs;
  for (int step = 0; step < 300; ++step) {
    const int rows = 1 + step % 8;
    if (rows == 3) continue;
    costs.Observe(rows - 1, 0.1 * (rows - 1), rows, rows <= 4 ? 1 : 2, 1);
  }
  EXPECT_NEAR(costs.SecondsOfRows(1, 1), 0, 1e-9);
  EXPECT_NEAR(costs.SecondsOfRows(2, 1), 0, 1e-9) << "between two that were seen";
  EXPECT_NEAR(costs.SecondsOfRows(4, 1), 1, 1e-9);
  EXPECT_NEAR(costs.SecondsOfRows(5, 3), 0, 1e-9);
}

TEST(DecideDraftsTest, FixedGoesOnAndMarginStopsAtItsThreshold) {
  std::vector<DraftCandidate> candidates = {
      {.policy = DraftPolicy::kFixed, .survival = 0},
      {.policy = DraftPolicy::kMargin, .threshold = 0.5f, .survival = 0.51},
      {.policy = DraftPolicy::kMargin, .threshold = 0.5f, .survival = 0.49}};
  DecideDrafts(SpeculationCosts(), 3, candidates);
  EXPECT_TRUE(candidates[0].goes_on);
  EXPECT_TRUE(candidates[1].goes_on);
  EXPECT_FALSE(candidates[2].goes_on);
}

TEST(DecideDraftsTest, RowsShareThePassThatOneAloneCannotPay) {
  // A pass takes 0.3 s, a row 0.1 s; of 1.45 s for a step, 1.45 tokens on average.
  SpeculationCosts costs;
  for (int step = 0; step < 2000; ++step) {
    const int extra = step % 2;
    costs.Observe(1, 0.3, 2 + extra, 1.1 + 0.1 * extra, 1 + (step % 20 < 9));
  }
  ASSERT_NEAR(costs.tokens_per_second(), 1.0, 0.06);
  const DraftCandidate one = {
      .policy = DraftPolicy::kThroughput, .survival = 0.5, .acceptance = 0.6};
  std::vector<DraftCandidate> candidates = {one};
  DecideDrafts(costs, 2, candidates);
  EXPECT_FALSE(candidates[0].goes_on) << "0.3 tokens for 0.4 s";
  candidates = {one, one, one};
  candidates.push_back({.policy = DraftPolicy::kThroughput, .survival = 0.1, .acceptance = 0.6});
  DecideDrafts(costs, 2, candidates);
  EXPECT_TRUE(candidates[0].goes_on && candidates[1].goes_on && candidates[2].goes_on)
      << "0.9 tokens for 0.6 s";
  EXPECT_FALSE(candidates[3].goes_on) << "0.06 tokens for a row of 0.1 s";
  candidates = {one, {.policy = DraftPolicy::kFixed}};
  DecideDrafts(costs, 2, candidates);
  EXPECT_TRUE(candidates[0].goes_on) << "another row pays for the pass";
}

// One sequence whose drafts are accepted with a known, varying probability: what the rule reaches
// beside the best fixed number of drafts, where costs are measured as it goes.
TEST(DecideDraftsTest, ThroughputBeatsTheBestFixedNumberWhereAcceptanceVaries) {
  constexpr double kPass = 0.2, kRow = 0.05;
  constexpr int kRounds = 20'000;
  const auto run = [](int fixed) {
    std::mt19937 random(5);
    std::uniform_real_distribution<double> uniform;
    SpeculationCosts costs;
    double tokens = 0, seconds = 0;
    for (int round = 0; round < kRounds; ++round) {
      double p[kMaxDraftTokens + 1];
      for (double& value : p) value = uniform(random) < 0.6 ? 0.97 : 0.4;
      int drafts = 0;
      double survival = 1;
      while (drafts < kMaxDraftTokens) {
        std::vector<DraftCandidate> candidates = {
            {.policy = DraftPolicy::kThroughput, .survival = survival, .acceptance = 0.74}};
        DecideDrafts(costs, 1 + drafts, candidates);
        if (fixed >= 0 ? drafts == fixed : !candidates[0].goes_on) break;
        survival *= p[drafts++];
      }
      int accepted = 0;
      while (accepted < drafts && uniform(random) < p[accepted]) ++accepted;
      costs.Observe(drafts, kPass * drafts, 1 + drafts, 1 + kRow * drafts, 1 + accepted);
      tokens += 1 + accepted;
      seconds += 1 + (kPass + kRow) * drafts;
    }
    return tokens / seconds;
  };
  double best_fixed = 0;
  for (int drafts = 0; drafts <= 12; ++drafts) best_fixed = std::max(best_fixed, run(drafts));
  EXPECT_GT(run(-1), 1.02 * best_fixed);
}

}  // namespace
}  // namespace godwit
