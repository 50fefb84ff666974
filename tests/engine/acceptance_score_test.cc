#include "engine/acceptance_score.h"

#include <cmath>
#include <random>

#include "gtest/gtest.h"

namespace godwit {
namespace {

TEST(AcceptanceScoreTest, LearnsTheProbabilityOfEachPlaceAndClass) {
  AcceptanceScore score(false);
  std::mt19937 random(1);
  std::uniform_real_distribution<double> uniform;
  const auto truth = [](int place, double margin) {
    return 1 / (1 + std::exp(1.0 - 0.3 * place - 1.5 * std::log1p(margin)));
  };
  double accepted = 0;
  constexpr int kObservations = 20'000;
  for (int i = 0; i < kObservations; ++i) {
    const int place = i % 4;
    const double margin = -2 * std::log(uniform(random));
    const bool accepts = uniform(random) < truth(place, margin);
    accepted += accepts;
    score.Observe(AcceptanceClass::kStandard, place, {.margin = margin}, accepts);
  }
  for (int place = 0; place < 4; ++place) {
    for (const double margin : {0.1, 0.5, 1.0, 3.0, 6.0}) {
      EXPECT_NEAR(score.Predict(DraftPolicy::kMargin, AcceptanceClass::kStandard, place,
                                {.margin = margin}),
                  truth(place, margin), 0.1)
          << place << " " << margin;
    }
  }
  EXPECT_NEAR(score.Mean(AcceptanceClass::kStandard), accepted / kObservations, 0.15);
  EXPECT_EQ(score.num_observed(AcceptanceClass::kStandard), kObservations);
  EXPECT_EQ(score.num_observed(AcceptanceClass::kGreedy), 0);
}

// A head that is too sure of itself: what it means is learnt from what became of the drafts.
TEST(AcceptanceScoreTest, FollowsAHeadWhereThePolicyDoesAndCorrectsIt) {
  AcceptanceScore score(true);
  std::mt19937 random(2);
  std::uniform_real_distribution<double> uniform;
  const DraftSigns unsure = {.margin = 5, .head = 0.5};
  const DraftSigns unknown = {.margin = 5};
  EXPECT_NEAR(score.Predict(DraftPolicy::kSpecDecPP, AcceptanceClass::kGreedy, 0, unsure),
              1 / (1 + std::exp(-0.5)), 1e-9)
      << "as it says, before anything is known";
  for (int i = 0; i < 5000; ++i) {
    const double logit = 4 * (2 * uniform(random) - 1);
    const bool accepts = uniform(random) < 1 / (1 + std::exp(-(0.5 * logit + 1)));
    score.Observe(AcceptanceClass::kGreedy, 0, {.margin = 5, .head = logit}, accepts);
  }
  const double corrected = 1 / (1 + std::exp(-1.25));
  for (const DraftPolicy policy : {DraftPolicy::kSpecDecPP, DraftPolicy::kThroughput}) {
    EXPECT_NEAR(score.Predict(policy, AcceptanceClass::kGreedy, 0, unsure), corrected, 0.08);
    EXPECT_EQ(score.Predict(policy, AcceptanceClass::kGreedy, 0, unknown),
              score.Mean(AcceptanceClass::kGreedy));
  }
  EXPECT_NEAR(score.Predict(DraftPolicy::kMargin, AcceptanceClass::kGreedy, 0, unsure),
              score.Mean(AcceptanceClass::kGreedy), 0.1)
      << "the margin says nothing here";
}

}  // namespace
}  // namespace godwit
