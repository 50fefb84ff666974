#include "engine/round_planner.h"

#include <cmath>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace godwit {
namespace {

constexpr auto kClass = AcceptanceClass::kGreedy;

class RoundPlannerTest : public testing::Test {
 protected:
  // Seconds of a step of the target by its rows: 1 up to `free_rows`, then `row` each; of passes
  // 0.1 each, those that show signs 0.3.
  void Learn(int64_t num_sequences, double row, int64_t free_rows = 0) {
    row_ = row;
    free_rows_ = free_rows;
    for (int step = 0; step < 600; ++step) {
      const int drafts = step % 9;
      const int64_t rows = num_sequences * (1 + drafts);
      const bool plans = step % 2 == 0;
      costs_.Observe({drafts, (plans ? 0.1 : 0.3) * drafts, rows, StepSeconds(rows), num_sequences,
                      plans ? RoundWay::kPlanned : RoundWay::kMargins});
    }
  }
  double StepSeconds(int64_t rows) const {
    return 1 + row_ * static_cast<double>(std::max<int64_t>(rows - free_rows_, 0));
  }
  // Of sequences whose drafts are accepted with probability p.
  void LearnAcceptance(const std::vector<double>& of_histories) {
    std::mt19937 random(3);
    std::uniform_real_distribution<double> uniform;
    for (int i = 0; i < 40'000; ++i) {
      const double p = of_histories[static_cast<size_t>(i) % of_histories.size()];
      score_.Observe(kClass, i % 8, {.history = Logit(p)}, uniform(random) < p, 1, false);
    }
  }
  static double Logit(double p) { return std::log(p / (1 - p)); }

  int Plan(const std::vector<double>& histories, int most_drafts = 8, double reluctance = 0,
           int64_t num_passes = 0) {
    std::vector<RoundPlanner::Row> rows;
    for (const double p : histories) rows.push_back({kClass, Logit(p), most_drafts});
    const auto count = static_cast<int64_t>(histories.size());
    return planner_.Plan({.costs = costs_,
                          .score = score_,
                          .num_sequences = count,
                          .num_rows = count,
                          .num_passes = num_passes,
                          .reluctance = reluctance},
                         rows);
  }
  // Of `drafts` drafts of each of `count` sequences that accept with p.
  double RateOf(int64_t count, int drafts, double p) const {
    double tokens = 0;
    for (int draft = 0; draft <= drafts; ++draft) tokens += std::pow(p, draft);
    return static_cast<double>(count) * tokens / (0.1 * drafts + StepSeconds(count * (1 + drafts)));
  }

  SpeculationCosts costs_;
  AcceptanceScore score_;
  RoundPlanner planner_;
  double row_ = 0;
  int64_t free_rows_ = 0;
};

TEST_F(RoundPlannerTest, NothingIsDraftedBeforeCostsAreKnown) {
  EXPECT_EQ(Plan({0.9}), 0);
  EXPECT_EQ(planner_.rate(), 0);
}

TEST_F(RoundPlannerTest, IsTheBestFixedNumber) {
  for (const int64_t count : {1, 4, 24}) {
    for (const double p : {0.3, 0.6, 0.85}) {
      SCOPED_TRACE(testing::Message() << count << " sequences, " << p);
      costs_ = {};
      score_ = {};
      planner_ = {};
      Learn(count, 0.4 / static_cast<double>(count));
      LearnAcceptance({p});
      const int drafts = Plan(std::vector<double>(static_cast<size_t>(count), p));
      int best = 0;
      for (int fixed = 1; fixed <= 8; ++fixed) {
        if (RateOf(count, fixed, p) > RateOf(count, best, p)) best = fixed;
      }
      EXPECT_NEAR(RateOf(count, drafts, p), RateOf(count, best, p), 0.01 * RateOf(count, best, p))
          << drafts << " " << best;
      EXPECT_NEAR(planner_.rate(), RateOf(count, best, p), 0.03 * planner_.rate());
    }
  }
}

TEST_F(RoundPlannerTest, FollowsWhatSequencesAccept) {
  Learn(16, 0.05);
  LearnAcceptance({0.3, 0.9});
  const int few = Plan(std::vector<double>(16, 0.3));
  planner_ = {};
  EXPECT_LE(few + 2, Plan(std::vector<double>(16, 0.9)));
}

// Rows up to 40 are free, the next ones are not.
TEST_F(RoundPlannerTest, FillsWhatIsFreeAndStopsBeforeAJump) {
  Learn(8, 0.2, 40);
  LearnAcceptance({0.7});
  EXPECT_EQ(Plan(std::vector<double>(8, 0.7)), 4);
}

TEST_F(RoundPlannerTest, KeepsTheLimitsOfRows) {
  Learn(2, 0.01);
  LearnAcceptance({0.9});
  EXPECT_GT(Plan({0.9, 0.9}, 8), 3);
  EXPECT_EQ(Plan({0.9, 0.9}, 3), 3);
  EXPECT_EQ(Plan({0.9, 0.9}, 0), 0);
}

TEST_F(RoundPlannerTest, PassesThatRunAnywayCostNothing) {
  Learn(2, 0.01);
  LearnAcceptance({0.2});
  const int alone = Plan({0.2, 0.2});
  EXPECT_LT(alone, Plan({0.2, 0.2}, 8, 0, 6));
}

TEST_F(RoundPlannerTest, AfterAPauseDraftsHaveToGainMore) {
  Learn(2, 0.25);
  LearnAcceptance({0.62});
  ASSERT_GT(Plan({0.62, 0.62}), 0);
  EXPECT_EQ(Plan({0.62, 0.62}, 8, 0.5), 0);
}

}  // namespace
}  // namespace godwit
