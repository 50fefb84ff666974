#include "engine/draft_policy.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <utility>
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
  for (int step = 0; step < 400; ++step) {
    const int drafts = step % 5;
    costs.Observe({drafts, 0.2 * drafts, 1 + drafts, 1 + 0.1 * drafts, 1 + drafts / 2});
  }
  ASSERT_TRUE(costs.known());
  EXPECT_NEAR(costs.SecondsOfPasses(1), 0.2, 1e-9);
  EXPECT_NEAR(costs.SecondsOfRows(2, 1), 0.1, 1e-9);
  EXPECT_NEAR(costs.SecondsOfRows(5, 2), 0.2, 1e-9) << "beyond what was seen";
  EXPECT_NEAR(costs.tokens_per_second(), 1.8 / 1.6, 0.02);
}

TEST(SpeculationCostsTest, KnowsWhereAStepsTimeJumps) {
  SpeculationCosts costs;
  for (int step = 0; step < 300; ++step) {
    const int rows = 1 + step % 8;
    if (rows == 3) continue;
    costs.Observe({rows - 1, 0.1 * (rows - 1), rows, rows <= 4 ? 1.0 : 2.0, 1});
  }
  EXPECT_NEAR(costs.SecondsOfRows(1, 1), 0, 1e-9);
  EXPECT_NEAR(costs.SecondsOfRows(2, 1), 0, 1e-9) << "between two that were seen";
  EXPECT_NEAR(costs.SecondsOfRows(4, 1), 1, 1e-9);
  EXPECT_NEAR(costs.SecondsOfRows(5, 3), 0, 1e-9);
}

TEST(SpeculationCostsTest, ManyRowsAreKeptByEighthsOfADoubling) {
  SpeculationCosts costs;
  for (int step = 0; step < 300; ++step) {
    const int rows = 64 + 32 * (step % 8);
    costs.Observe({1, 0.1, rows, 1 + 0.01 * rows, 1});
  }
  EXPECT_NEAR(costs.SecondsAt(128), 2.28, 1e-6);
  EXPECT_NEAR(costs.SecondsOfRows(100, 50), 0.5, 0.05);
}

TEST(SpeculationCostsTest, AStepThatWasHeldUpTellsLittle) {
  SpeculationCosts costs;
  for (int step = 0; step < 200; ++step) {
    const bool held_up = step % 50 == 49;
    costs.Observe({1, held_up ? 30 : 0.1, 2, held_up ? 50.0 : 1.0, 1});
  }
  EXPECT_NEAR(costs.SecondsAt(2), 1, 0.1);
  EXPECT_NEAR(costs.SecondsOfPasses(1), 0.1, 0.02);
}

TEST(SpeculationCostsTest, AStepsFirstPassCostsMoreThanTheNext) {
  SpeculationCosts costs;
  for (int step = 0; step < 400; ++step) {
    const int passes = step % 20 == 0 ? 3 : step % 2;
    costs.Observe({passes, passes == 0 ? 0 : 0.1 + 0.05 * passes, 1 + passes, 1.0, 1});
  }
  EXPECT_EQ(costs.SecondsOfPasses(0), 0);
  EXPECT_NEAR(costs.SecondsOfPasses(1), 0.15, 0.005);
  EXPECT_NEAR(costs.SecondsOfPasses(3) - costs.SecondsOfPasses(1), 0.1, 0.01);
}

// A third of the steps takes up to three times as long. The dear ones are no more frequent among
// steps with many rows, which are few.
TEST(SpeculationCostsTest, TimesAreThoseThatMostStepsTake) {
  SpeculationCosts costs;
  std::mt19937 random(4);
  std::uniform_real_distribution<double> uniform;
  for (int step = 0; step < 1000; ++step) {
    const int drafts = step % 25 == 0 ? 3 : 1;
    const double longer = uniform(random) < 0.33 ? 1 + 2 * uniform(random) : 1;
    costs.Observe({drafts, 0.1 * drafts, 1 + drafts, longer * (1 + 0.2 * drafts), 1 + drafts / 2});
  }
  EXPECT_NEAR(costs.SecondsAt(4) / costs.SecondsAt(2), 1.6 / 1.2, 0.06);
}

// What slows all steps down is no reason to think that those cost more which were seen since: five
// parts of six of it are taken for that.
TEST(SpeculationCostsTest, NumbersOfRowsSeenLongAgoAreComparedAtTheSamePace) {
  SpeculationCosts costs;
  const auto observe = [&](int drafts, double pace) {
    costs.Observe({drafts, 0.1 * drafts * pace, 1 + drafts, (1 + 0.2 * drafts) * pace, 1});
  };
  for (int step = 0; step < 100; ++step) observe(step % 4, 1);
  for (int step = 0; step < 200; ++step) observe(1, 1.7);
  EXPECT_GT(costs.SecondsAt(4) / costs.SecondsAt(2), 1.6 / 1.2 / std::pow(1.7, 0.2));
  EXPECT_NEAR(costs.SecondsOfPasses(1) / costs.SecondsAt(2), 0.1 / 1.2, 0.01);
}

TEST(SpeculationCostsTest, TheRateToBeatIsNoLessThanWithoutDrafts) {
  SpeculationCosts costs;
  for (int step = 0; step < 40; ++step) costs.Observe({0, 0, 4, 2.0, 4});
  for (int step = 0; step < 400; ++step) costs.Observe({1, 1.0, 8, 4.0, 5});
  EXPECT_LT(costs.tokens_per_second(), 1.5);
  EXPECT_NEAR(RateToBeat(costs, 4), 2, 1e-9);
}

TEST(CostsByLoadTest, LoadsAreApart) {
  ByLoad<SpeculationCosts> costs;
  for (int step = 0; step < 100; ++step) {
    costs.at(1).Observe({1, 0.1, 2, 1.0, 2});
    costs.at(64).Observe({1, 0.1, 128, 5.0, 80});
  }
  EXPECT_NEAR(costs.at(1).SecondsAt(2), 1, 1e-9);
  EXPECT_NEAR(costs.at(48).SecondsAt(128), 5, 1e-9);
  EXPECT_FALSE(costs.at(8).known());
}

// A pass takes 0.3 s, a row 0.1 s; a token a second.
class DraftDeciderTest : public testing::Test {
 protected:
  DraftDeciderTest() {
    for (int step = 0; step < 4000; ++step) {
      const int extra = step % 5;
      costs_.Observe({1, 0.3, 2 + extra, 1.1 + 0.1 * extra, 1 + (step % 20 < 12)});
    }
  }
  void Decide(int64_t num_rows, bool can_drop = false) {
    decider_.Decide({.costs = costs_,
                     .score = score_,
                     .num_sequences = 1,
                     .num_rows = num_rows,
                     .lag = can_drop ? 0 : 1},
                    candidates_);
  }

  SpeculationCosts costs_;
  AcceptanceScore score_;
  DraftDecider decider_;
  std::vector<DraftCandidate> candidates_;
};

TEST_F(DraftDeciderTest, FixedGoesOnAndThresholdsStop) {
  candidates_ = {{.policy = DraftPolicy::kFixed, .survival = 0},
                 {.policy = DraftPolicy::kMargin, .threshold = 0.5f, .survival = 0.51},
                 {.policy = DraftPolicy::kMargin, .threshold = 0.5f, .survival = 0.49},
                 {.policy = DraftPolicy::kSpecDecPP, .threshold = 0.5f, .survival = 0.49},
                 {.policy = DraftPolicy::kMargin,
                  .threshold = 0.5f,
                  .survival = 0.9,
                  .acceptance = 0.5,
                  .num_unknown = 1}};
  Decide(3);
  EXPECT_TRUE(candidates_[0].goes_on);
  EXPECT_TRUE(candidates_[1].goes_on);
  EXPECT_FALSE(candidates_[2].goes_on);
  EXPECT_FALSE(candidates_[3].goes_on);
  EXPECT_FALSE(candidates_[4].goes_on);
  for (const DraftCandidate& candidate : candidates_) EXPECT_TRUE(candidate.keeps);
}

TEST_F(DraftDeciderTest, RowsShareThePassThatOneAloneCannotPay) {
  ASSERT_NEAR(RateToBeat(costs_, 1), 1.0, 0.06);
  const DraftCandidate one = {
      .policy = DraftPolicy::kThroughput, .survival = 0.5, .acceptance = 0.6};
  candidates_ = {one};
  Decide(2);
  EXPECT_FALSE(candidates_[0].goes_on) << "0.3 tokens for 0.4 s";
  candidates_ = {one, one, one};
  candidates_.push_back({.policy = DraftPolicy::kThroughput, .survival = 0.1, .acceptance = 0.6});
  Decide(2);
  EXPECT_TRUE(candidates_[0].goes_on && candidates_[1].goes_on && candidates_[2].goes_on)
      << "0.9 tokens for 0.6 s";
  EXPECT_FALSE(candidates_[3].goes_on) << "0.06 tokens for a row of 0.1 s";
  candidates_ = {one, {.policy = DraftPolicy::kFixed}};
  Decide(2);
  EXPECT_TRUE(candidates_[0].goes_on) << "another row pays for the pass";
}

TEST_F(DraftDeciderTest, AnOpenDraftIsDroppedWhereItsRowDoesNotPay) {
  const DraftCandidate open = {
      .policy = DraftPolicy::kThroughput, .acceptance = 0.1, .has_open = true, .can_go_on = false};
  candidates_ = {open, open};
  candidates_[0].survival = 0.3;
  candidates_[1].survival = 0.05;
  Decide(4);
  EXPECT_TRUE(candidates_[0].keeps);
  EXPECT_FALSE(candidates_[1].keeps) << "0.05 tokens for a row of 0.1 s";
  EXPECT_FALSE(candidates_[1].goes_on);
}

TEST_F(DraftDeciderTest, ADraftThatCanBeDroppedIsWorthMore) {
  for (int draft = 0; draft < 100; ++draft) {
    score_.Saw(AcceptanceClass::kGreedy, draft % 2 == 0 ? 0.9 : 0.01);
  }
  candidates_ = {{.policy = DraftPolicy::kThroughput, .survival = 0.8, .acceptance = 0.455}};
  Decide(2, false);
  EXPECT_FALSE(candidates_[0].goes_on) << "0.364 tokens for 0.4 s";
  candidates_[0].survival = 1;
  candidates_[0].acceptance = 0.38;
  Decide(2, false);
  EXPECT_FALSE(candidates_[0].goes_on) << "0.38 tokens for 0.4 s";
  Decide(2, true);
  EXPECT_TRUE(candidates_[0].goes_on) << "half of the time 0.8 for 0.3 s";
}

// One sequence whose drafts are accepted with a known, varying probability: what the rule reaches
// beside the best fixed number of drafts, where costs are measured as it goes. The first 40 rounds
// are of all lengths, as an engine's are. lag: whether the last draft is known.
double SimulatedRate(int fixed, int lag, double pass, double row) {
  constexpr int kRounds = 20'000;
  std::mt19937 random(5);
  std::uniform_real_distribution<double> uniform;
  SpeculationCosts costs;
  AcceptanceScore score;
  DraftDecider decider;
  double tokens = 0, seconds = 0;
  for (int round = 0; round < kRounds; ++round) {
    double p[kMaxDraftTokens + 1];
    for (double& value : p) value = uniform(random) < 0.6 ? 0.97 : 0.2;
    const int forced = fixed >= 0 ? fixed : round < 40 ? round % 8 : -1;
    int drawn = 0, kept = 0;
    for (;;) {
      const int known = std::max(drawn - lag, 0);
      DraftCandidate candidate = {.policy = DraftPolicy::kThroughput,
                                  .acceptance = 0.66,
                                  .has_open = known > 0,
                                  .num_unknown = drawn - known,
                                  .can_go_on = drawn < kMaxDraftTokens};
      for (int draft = 0; draft < known; ++draft) candidate.survival *= p[draft];
      std::vector<DraftCandidate> candidates = {candidate};
      decider.Decide(
          {.costs = costs, .score = score, .num_sequences = 1, .num_rows = 1 + drawn, .lag = lag},
          candidates);
      const bool goes_on = forced >= 0 ? drawn < forced : candidates[0].goes_on;
      kept = forced >= 0 || candidates[0].keeps ? drawn : known - 1;
      if (!goes_on) break;
      score.Saw(AcceptanceClass::kGreedy, p[drawn++]);
    }
    int accepted = 0;
    while (accepted < kept && uniform(random) < p[accepted]) ++accepted;
    const double draft_seconds = pass * drawn, verify_seconds = 1 + row * kept;
    costs.Observe({drawn, draft_seconds, 1 + kept, verify_seconds, 1 + accepted});
    tokens += 1 + accepted;
    seconds += draft_seconds + verify_seconds;
  }
  return tokens / seconds;
}

// Both plans draw a second draft only for what is likely to stand; where the next pass is cheap
// beside the first, for more.
TEST(RoundValuesTest, OnlyTheNextPassCountsOnceTheFirstIsDrawn) {
  const std::vector<double> acceptances = {0.2, 0.5, 0.8};
  const std::vector<double> verify = {1, 1.2, 1.4, 1.6};
  const RoundValues even({.first_pass = 0.15, .pass = 0.15, .verify = verify}, acceptances, 0, 1.1);
  const RoundValues dear_first({.first_pass = 0.25, .pass = 0.05, .verify = verify}, acceptances, 0,
                               1.1);
  EXPECT_FALSE(even.GoesOn(1, 0.7));
  EXPECT_TRUE(dear_first.GoesOn(1, 0.7));
  const RoundValues too_dear({.first_pass = 0.6, .pass = 0.05, .verify = verify}, acceptances, 0,
                             1.1);
  EXPECT_TRUE(dear_first.Begins());
  EXPECT_FALSE(too_dear.Begins());
  EXPECT_TRUE(too_dear.GoesOn(1, 0.7)) << "what it took to begin is spent";
}

TEST(ThroughputPolicyTest, BeatsTheBestFixedNumberWhereAcceptanceVaries) {
  for (const auto& [pass, row] : {std::pair(0.2, 0.05), std::pair(0.09, 0.25)}) {
    double best_fixed = 0;
    for (int drafts = 0; drafts <= 12; ++drafts) {
      best_fixed = std::max(best_fixed, SimulatedRate(drafts, 0, pass, row));
    }
    const double known = SimulatedRate(-1, 0, pass, row), late = SimulatedRate(-1, 1, pass, row);
    EXPECT_GT(late, 1.01 * best_fixed) << pass;
    EXPECT_GT(known, 1.02 * best_fixed) << pass;
    EXPECT_GT(known, late) << "what is known of a draft is worth something";
  }
}

}  // namespace
}  // namespace godwit
