#include "engine/acceptance_score.h"

#include <cmath>
#include <random>

#include "gtest/gtest.h"

namespace godwit {
namespace {

double Sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

TEST(AcceptanceScoreTest, LearnsFromMarginPlaceAndHistory) {
  AcceptanceScore score(false);
  std::mt19937 random(1);
  std::uniform_real_distribution<double> uniform;
  const auto truth = [](int place, double margin, double history) {
    return Sigmoid(-1.0 + 0.4 * std::log1p(place) + 1.5 * std::log1p(margin) + 0.7 * history);
  };
  double accepted = 0;
  constexpr int kObservations = 20'000;
  for (int i = 0; i < kObservations; ++i) {
    const int place = i % 4;
    const double margin = -2 * std::log(uniform(random));
    const double history = 2 * uniform(random) - 1;
    const bool accepts = uniform(random) < truth(place, margin, history);
    accepted += accepts;
    score.Observe(AcceptanceClass::kStandard, place, {.margin = margin, .history = history},
                  accepts);
  }
  for (int place = 0; place < 4; ++place) {
    for (const double margin : {0.1, 0.5, 1.0, 3.0, 6.0}) {
      for (const double history : {-0.8, 0.0, 0.8}) {
        EXPECT_NEAR(score.Predict(DraftPolicy::kMargin, AcceptanceClass::kStandard, place,
                                  {.margin = margin, .history = history}),
                    truth(place, margin, history), 0.1)
            << place << " " << margin << " " << history;
      }
    }
  }
  EXPECT_NEAR(score.Mean(AcceptanceClass::kStandard), accepted / kObservations, 0.15);
  EXPECT_NEAR(score.Expect(AcceptanceClass::kStandard, 1, 0), accepted / kObservations, 0.08);
  EXPECT_EQ(score.num_observed(AcceptanceClass::kStandard), kObservations);
  EXPECT_EQ(score.num_observed(AcceptanceClass::kGreedy), 0);
}

// Drafts of one margin, one place and one history for long: nothing else is forgotten into
// nonsense.
TEST(AcceptanceScoreTest, SteadyInputDoesNotBlowUp) {
  AcceptanceScore score(false);
  std::mt19937 random(3);
  for (int i = 0; i < 50'000; ++i) {
    score.Observe(AcceptanceClass::kGreedy, 0, {.margin = 1, .history = 0.2}, random() % 10 < 8);
  }
  EXPECT_NEAR(score.Predict(DraftPolicy::kMargin, AcceptanceClass::kGreedy, 0,
                            {.margin = 1, .history = 0.2}),
              0.8, 0.06);
  const double other = score.Predict(DraftPolicy::kMargin, AcceptanceClass::kGreedy, 3,
                                     {.margin = 0.01, .history = -0.5});
  EXPECT_GT(other, 0.1);
  EXPECT_LT(other, 0.95);
}

// A head that is too sure of itself: what it means is learnt from what became of the drafts.
TEST(AcceptanceScoreTest, FollowsAHeadWhereThePolicyDoesAndCorrectsIt) {
  AcceptanceScore score(true);
  std::mt19937 random(2);
  std::uniform_real_distribution<double> uniform;
  const DraftSigns unsure = {.margin = 5, .head = 0.5};
  const DraftSigns unknown = {.margin = 5};
  EXPECT_NEAR(score.Predict(DraftPolicy::kSpecDecPP, AcceptanceClass::kGreedy, 0, unsure),
              Sigmoid(0.5), 1e-9)
      << "as it says, before anything is known";
  for (int i = 0; i < 5000; ++i) {
    const double logit = 4 * (2 * uniform(random) - 1);
    const bool accepts = uniform(random) < Sigmoid(0.5 * logit + 1);
    score.Observe(AcceptanceClass::kGreedy, 0, {.margin = 5, .head = logit}, accepts);
  }
  const double corrected = Sigmoid(1.25);
  for (const DraftPolicy policy : {DraftPolicy::kSpecDecPP, DraftPolicy::kThroughput}) {
    EXPECT_NEAR(score.Predict(policy, AcceptanceClass::kGreedy, 0, unsure), corrected, 0.08);
    EXPECT_EQ(score.Predict(policy, AcceptanceClass::kGreedy, 0, unknown),
              score.Expect(AcceptanceClass::kGreedy, 0, 0));
  }
  EXPECT_NEAR(score.Predict(DraftPolicy::kMargin, AcceptanceClass::kGreedy, 0, unsure),
              score.Mean(AcceptanceClass::kGreedy), 0.1)
      << "the margin says nothing here";
}

}  // namespace
}  // namespace godwit
