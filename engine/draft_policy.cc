#include "engine/draft_policy.h"

#include <algorithm>
#include <cmath>

namespace godwit {
namespace {

constexpr double kFitMemory = 0.998;  // per observation of a place: about 500 of them
constexpr double kMeanMemory = 0.99;  // per observation of a class
constexpr double kCostMemory = 0.98;  // per step: about 50 of them

double Logit(const double* weight, double x) { return weight[0] + weight[1] * x; }
double Sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

}  // namespace

AcceptanceEstimator::AcceptanceEstimator() = default;

double AcceptanceEstimator::Predict(AcceptanceClass acceptance_class, int place,
                                    double margin) const {
  const Logistic& fit = classes_[static_cast<int>(acceptance_class)].places[place];
  return Sigmoid(Logit(fit.weight, std::log1p(margin)));
}

void AcceptanceEstimator::Observe(AcceptanceClass acceptance_class, int place, double margin,
                                  bool accepted) {
  Class& of = classes_[static_cast<int>(acceptance_class)];
  of.accepted = kMeanMemory * of.accepted + (accepted ? 1 : 0);
  of.total = kMeanMemory * of.total + 1;
  ++of.num_observed;
  Logistic& fit = of.places[place];
  const double x = std::log1p(margin);
  const double p = Sigmoid(Logit(fit.weight, x));
  const double curvature = std::max(p * (1 - p), 1e-3);
  double* const h = fit.hessian;
  h[0] = kFitMemory * h[0] + curvature;
  h[1] = kFitMemory * h[1] + curvature * x;
  h[2] = kFitMemory * h[2] + curvature * x * x;
  const double determinant = h[0] * h[2] - h[1] * h[1];
  if (!(determinant > 1e-9)) return;  // one margin only, so far
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

void SpeculationCosts::Observe(int64_t num_passes, double draft_seconds, int64_t num_rows,
                               double verify_seconds, int64_t num_tokens) {
  const auto rows = static_cast<double>(num_rows);
  for (double* sum : {&steps_, &tokens_, &passes_, &draft_seconds_, &verify_seconds_, &rows_,
                      &rows_squared_, &rows_seconds_}) {
    *sum *= kCostMemory;
  }
  steps_ += 1;
  tokens_ += static_cast<double>(num_tokens);
  passes_ += static_cast<double>(num_passes);
  draft_seconds_ += draft_seconds;
  verify_seconds_ += verify_seconds;
  rows_ += rows;
  rows_squared_ += rows * rows;
  rows_seconds_ += rows * verify_seconds;
}

double SpeculationCosts::seconds_per_row() const {
  const double variance = rows_squared_ - rows_ * rows_ / steps_;
  if (!(variance > 0.01 * steps_)) return 0;
  return std::max((rows_seconds_ - rows_ * verify_seconds_ / steps_) / variance, 0.0);
}

void DecideDrafts(const SpeculationCosts& costs, std::vector<DraftCandidate>& candidates) {
  const bool known = costs.known();
  const double rate = known ? costs.tokens_per_second() : 0;
  const double row_cost = known ? rate * costs.seconds_per_row() : 0;
  double surplus = 0;
  bool is_paid = false;
  for (DraftCandidate& candidate : candidates) {
    if (candidate.policy == DraftPolicy::kThroughput) {
      const double gain = candidate.survival * candidate.acceptance - row_cost;
      candidate.goes_on = gain > 0;
      surplus += std::max(gain, 0.0);
      continue;
    }
    candidate.goes_on = candidate.policy == DraftPolicy::kFixed ||
                        1 - candidate.survival <= static_cast<double>(candidate.threshold);
    is_paid |= candidate.goes_on;
  }
  if (is_paid || !known || surplus > rate * costs.seconds_per_pass()) return;
  for (DraftCandidate& candidate : candidates) {
    if (candidate.policy == DraftPolicy::kThroughput) candidate.goes_on = false;
  }
}

}  // namespace godwit
