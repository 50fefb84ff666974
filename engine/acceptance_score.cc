#include "engine/acceptance_score.h"

#include <algorithm>
#include <cmath>

namespace godwit {
namespace {

constexpr double kFitMemory = 0.998;  // per observation of a place: about 500 of them
constexpr double kMeanMemory = 0.99;  // per observation of a class

double Logit(const double* weight, double x) { return weight[0] + weight[1] * x; }
double Sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Margins have a long tail.
double MarginFeature(const DraftSigns& signs) { return std::log1p(signs.margin); }

}  // namespace

double AcceptanceEstimator::Predict(AcceptanceClass acceptance_class, int place, double x) const {
  return Sigmoid(Logit(classes_[static_cast<int>(acceptance_class)].places[place].weight, x));
}

void AcceptanceEstimator::Observe(AcceptanceClass acceptance_class, int place, double x,
                                  bool accepted) {
  Class& of = classes_[static_cast<int>(acceptance_class)];
  of.accepted = kMeanMemory * of.accepted + (accepted ? 1 : 0);
  of.total = kMeanMemory * of.total + 1;
  ++of.num_observed;
  Logistic& fit = of.places[place];
  const double p = Sigmoid(Logit(fit.weight, x));
  const double curvature = std::max(p * (1 - p), 1e-3);
  double* const h = fit.hessian;
  h[0] = kFitMemory * h[0] + curvature;
  h[1] = kFitMemory * h[1] + curvature * x;
  h[2] = kFitMemory * h[2] + curvature * x * x;
  const double determinant = h[0] * h[2] - h[1] * h[1];
  if (!(determinant > 1e-9)) return;  // one value only, so far
  const double error = (accepted ? 1 : 0) - p;
  fit.weight[0] += error * (h[2] - h[1] * x) / determinant;
  fit.weight[1] += error * (h[0] * x - h[1]) / determinant;
}

double AcceptanceEstimator::Mean(AcceptanceClass acceptance_class) const {
  const Class& of = classes_[static_cast<int>(acceptance_class)];
  return of.accepted / of.total;
}

int64_t AcceptanceEstimator::num_observed(AcceptanceClass acceptance_class) const {
  return classes_[static_cast<int>(acceptance_class)].num_observed;
}

double AcceptanceScore::Predict(DraftPolicy policy, AcceptanceClass acceptance_class, int place,
                                const DraftSigns& signs) const {
  if (!FollowsHead(policy))
    return by_margin_.Predict(acceptance_class, place, MarginFeature(signs));
  // A head that reads the drawn token speaks one pass later.
  if (!signs.head) return Mean(acceptance_class);
  return by_head_.Predict(acceptance_class, place, *signs.head);
}

void AcceptanceScore::Observe(AcceptanceClass acceptance_class, int place, const DraftSigns& signs,
                              bool accepted) {
  by_margin_.Observe(acceptance_class, place, MarginFeature(signs), accepted);
  if (signs.head) by_head_.Observe(acceptance_class, place, *signs.head, accepted);
}

}  // namespace godwit
