#include "engine/acceptance_score.h"

#include <cmath>
#include <random>

#include "gtest/gtest.h"

namespace godwit {
namespace {

double Sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

TEST(AcceptanceScoreTest, LearnsFromMarginPlaceAndHistory) {
  AcceptanceScore score;
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
        EXPECT_NEAR(score.Predict(false, AcceptanceClass::kStandard, place,
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
  AcceptanceScore score;
  std::mt19937 random(3);
  for (int i = 0; i < 50'000; ++i) {
    score.Observe(AcceptanceClass::kGreedy, 0, {.margin = 1, .history = 0.2}, random() % 10 < 8);
  }
  EXPECT_NEAR(score.Predict(false, AcceptanceClass::kGreedy, 0, {.margin = 1, .history = 0.2}), 0.8,
              0.06);
  const double other =
      score.Predict(false, AcceptanceClass::kGreedy, 3, {.margin = 0.01, .history = -0.5});
  EXPECT_GT(other, 0.1);
  EXPECT_LT(other, 0.95);
}

// A head that is too sure of itself: what it means is learnt from what became of the drafts.
TEST(AcceptanceScoreTest, FollowsAHeadWhereItIsAskedToAndCorrectsIt) {
  AcceptanceScore score;
  std::mt19937 random(2);
  std::uniform_real_distribution<double> uniform;
  const DraftSigns unsure = {.margin = 5, .head = 0.5};
  const DraftSigns unknown = {.margin = 5};
  EXPECT_NEAR(score.Predict(true, AcceptanceClass::kGreedy, 0, unsure), Sigmoid(0.5), 1e-9)
      << "as it says, before anything is known";
  for (int i = 0; i < 5000; ++i) {
    const double logit = 4 * (2 * uniform(random) - 1);
    const bool accepts = uniform(random) < Sigmoid(0.5 * logit + 1);
    score.Observe(AcceptanceClass::kGreedy, 0, {.margin = 5, .head = logit}, accepts);
  }
  const double corrected = Sigmoid(1.25);
  EXPECT_NEAR(score.Predict(true, AcceptanceClass::kGreedy, 0, unsure), corrected, 0.08);
  const double expected = score.Expect(AcceptanceClass::kGreedy, 0, 0);
  EXPECT_EQ(score.Predict(true, AcceptanceClass::kGreedy, 0, unknown), expected);
  EXPECT_EQ(score.Predict(false, AcceptanceClass::kGreedy, 0, {}), expected);
  EXPECT_NEAR(score.Predict(false, AcceptanceClass::kGreedy, 0, unsure),
              score.Mean(AcceptanceClass::kGreedy), 0.1)
      << "the margin says nothing here";
}

// The longest round there is, and one that is rejected at once: a head's word is that of many more
// drafts.
TEST(AcceptanceScoreTest, OneRoundHardlyMovesAHead) {
  for (const bool accepted : {false, true}) {
    AcceptanceScore score;
    for (int place = 0; place < (accepted ? kMaxDraftTokens : 1); ++place) {
      score.Observe(AcceptanceClass::kStandard, place, {.margin = 1, .head = 0.5}, accepted);
    }
    for (int place = 0; place < kMaxDraftTokens; ++place) {
      EXPECT_NEAR(
          score.Predict(true, AcceptanceClass::kStandard, place, {.margin = 1, .head = 0.5}),
          Sigmoid(0.5), accepted ? 0.08 : 0.01)
          << accepted << " " << place;
    }
  }
}

// Drafts as likely to be accepted as the head says: what is learnt from them does not make it
// worse than it was, by more than a thousandth in any few of them.
TEST(AcceptanceScoreTest, ACalibratedHeadStaysOne) {
  AcceptanceScore score;
  std::mt19937 random(7);
  std::uniform_real_distribution<double> uniform;
  SequenceHistory history;
  double lost = 0;
  constexpr int kObservations = 200;
  for (int i = 0; i < kObservations; ++i) {
    const DraftSigns signs = {.head = 3 * uniform(random) - 1, .history = history.logit()};
    const double p = Sigmoid(*signs.head);
    const double q = score.Predict(true, AcceptanceClass::kStandard, i % 3, signs);
    lost += p * std::log(p / q) + (1 - p) * std::log((1 - p) / (1 - q));
    const bool accepted = uniform(random) < p;
    score.Observe(AcceptanceClass::kStandard, i % 3, signs, accepted);
    history.Observe(accepted);
  }
  EXPECT_LT(lost / kObservations, 0.002);
}

}  // namespace
}  // namespace godwit
