#include "engine/acceptance_score.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace godwit {
namespace {

constexpr double kFitFading = 0.001;     // per observation of a class
constexpr int64_t kMostFading = 16;      // observations of a step, at most
constexpr double kMeanMemory = 0.99;     // the same
constexpr double kHistoryMemory = 0.94;  // per draft of a sequence
constexpr double kRidge = 0.05;          // keeps a direction that nothing shows from blowing up
constexpr double kMinCurvature = 0.01;   // of a draft that was all but sure
constexpr double kMaxLogit = 12;

double Sigmoid(double x) { return 1 / (1 + std::exp(-std::clamp(x, -kMaxLogit, kMaxLogit))); }

using Features = OnlineLogistic::Features;

// The solution of (h + ridge) x = b; h is symmetric and positive.
Features Solve(std::array<Features, OnlineLogistic::kFeatures> h, Features b) {
  constexpr int kSize = OnlineLogistic::kFeatures;
  for (int i = 0; i < kSize; ++i) h[i][i] += kRidge;
  for (int pivot = 0; pivot < kSize; ++pivot) {
    for (int row = pivot + 1; row < kSize; ++row) {
      const double factor = h[row][pivot] / h[pivot][pivot];
      for (int column = pivot; column < kSize; ++column)
        h[row][column] -= factor * h[pivot][column];
      b[row] -= factor * b[pivot];
    }
  }
  for (int row = kSize - 1; row >= 0; --row) {
    for (int column = row + 1; column < kSize; ++column) b[row] -= h[row][column] * b[column];
    b[row] /= h[row][row];
  }
  return b;
}

// Margins have a long tail; a place matters less the later it is.
Features FeaturesOf(double x, int place, double history) {
  return {1, x, std::log1p(place), history};
}

}  // namespace

void SequenceHistory::Observe(bool accepted) {
  accepted_ = kHistoryMemory * accepted_ + (accepted ? 1 : 0);
  total_ = kHistoryMemory * total_ + 1;
}

double SequenceHistory::logit() const {
  return std::log((accepted_ + 0.5) / (total_ - accepted_ + 0.5));
}

double OnlineLogistic::Predict(const Features& x) const {
  double logit = 0;
  for (int i = 0; i < kFeatures; ++i) logit += weights_[i] * x[i];
  return Sigmoid(logit);
}

void OnlineLogistic::Observe(const Features& x, bool accepted, int64_t num_together) {
  const double memory = 1 - kFitFading * static_cast<double>(std::min(num_together, kMostFading)) /
                                static_cast<double>(num_together);
  const double p = Predict(x);
  const double curvature = std::max(p * (1 - p), kMinCurvature);
  Features gradient;
  for (int row = 0; row < kFeatures; ++row) {
    for (int column = 0; column < kFeatures; ++column) {
      hessian_[row][column] = memory * hessian_[row][column] + curvature * x[row] * x[column];
    }
    gradient[row] = ((accepted ? 1 : 0) - p) * x[row];
  }
  const Features step = Solve(hessian_, gradient);
  for (int i = 0; i < kFeatures; ++i) weights_[i] += step[i];
}

double AcceptanceScore::Predict(bool by_head, AcceptanceClass acceptance_class, int place,
                                const DraftSigns& signs) const {
  const Class& fits = of(acceptance_class);
  // A head that reads the drawn token speaks one pass later.
  if (by_head && signs.head) {
    return fits.by_head.Predict(FeaturesOf(*signs.head, place, signs.history));
  }
  if (!by_head && signs.margin) {
    return fits.by_margin.Predict(FeaturesOf(std::log1p(*signs.margin), place, signs.history));
  }
  return Expect(acceptance_class, place, signs.history);
}

double AcceptanceScore::Expect(AcceptanceClass acceptance_class, int place, double history) const {
  return of(acceptance_class).by_history.Predict(FeaturesOf(0, place, history));
}

double AcceptanceScore::ExpectBlindly(AcceptanceClass acceptance_class, int place,
                                      double history) const {
  return of(acceptance_class).blindly.Predict(FeaturesOf(0, place, history));
}

double AcceptanceScore::ValueOfOption(AcceptanceClass acceptance_class, double survival,
                                      double row_cost) const {
  const Class& recent_of = of(acceptance_class);
  const size_t count = std::min(recent_of.num_seen, kRecent);
  if (count == 0) return 0;
  double sum = 0;
  for (size_t draft = 0; draft < count; ++draft) {
    sum += std::max(survival * static_cast<double>(recent_of.recent[draft]) - row_cost, 0.0);
  }
  return sum / static_cast<double>(count);
}

std::vector<double> AcceptanceScore::Recent(AcceptanceClass acceptance_class) const {
  const Class& recent_of = of(acceptance_class);
  const auto count = static_cast<std::ptrdiff_t>(std::min(recent_of.num_seen, kRecent));
  return {recent_of.recent.begin(), recent_of.recent.begin() + count};
}

void AcceptanceScore::Observe(AcceptanceClass acceptance_class, int place, const DraftSigns& signs,
                              bool accepted, int64_t num_together, bool chosen) {
  Class& of = classes_[static_cast<size_t>(acceptance_class)];
  of.accepted = kMeanMemory * of.accepted + (accepted ? 1 : 0);
  of.total = kMeanMemory * of.total + 1;
  ++of.num_observed;
  of.by_history.Observe(FeaturesOf(0, place, signs.history), accepted, num_together);
  if (!chosen) of.blindly.Observe(FeaturesOf(0, place, signs.history), accepted, num_together);
  if (signs.margin) {
    of.by_margin.Observe(FeaturesOf(std::log1p(*signs.margin), place, signs.history), accepted,
                         num_together);
  }
  if (signs.head) {
    of.by_head.Observe(FeaturesOf(*signs.head, place, signs.history), accepted, num_together);
  }
}

void AcceptanceScore::Saw(AcceptanceClass acceptance_class, double predicted) {
  Class& of = classes_[static_cast<size_t>(acceptance_class)];
  of.recent[of.num_seen++ % kRecent] = static_cast<float>(predicted);
}

int64_t AcceptanceScore::num_observed(AcceptanceClass acceptance_class) const {
  return of(acceptance_class).num_observed;
}

double AcceptanceScore::Mean(AcceptanceClass acceptance_class) const {
  return of(acceptance_class).accepted / of(acceptance_class).total;
}

}  // namespace godwit
