#include "engine/draft_policy.h"

#include <algorithm>
#include <utility>

#include "kernels/base/check.h"

namespace godwit {
namespace {

constexpr double kCostMemory = 0.98;  // per step: about 50 of them

constexpr double kRowsWeight = 0.05;  // of a new step among those with as many rows
constexpr int64_t kMinSteps = 4;      // of as many rows, before their time is believed

constexpr int64_t kLookAhead = 4;  // drafts; a row behind a jump may be cheap

constexpr std::pair<absl::string_view, DraftPolicy> kPolicyNames[] = {
    {"fixed", DraftPolicy::kFixed},
    {"margin", DraftPolicy::kMargin},
    {"throughput", DraftPolicy::kThroughput},
    {"specdecpp", DraftPolicy::kSpecDecPP}};

}  // namespace

absl::string_view DraftPolicyName(DraftPolicy policy) {
  for (const auto& [name, value] : kPolicyNames) {
    if (value == policy) return name;
  }
  GODWIT_CHECK(false);
}

std::optional<DraftPolicy> ParseDraftPolicy(absl::string_view name) {
  for (const auto& [known, value] : kPolicyNames) {
    if (known == name) return value;
  }
  return std::nullopt;
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
  if (num_rows > kMaxCounted) return;
  Mean& mean = by_rows_[num_rows];
  // A step that something else held up tells little.
  const double seconds =
      mean.num_steps < kMinSteps ? verify_seconds : std::min(verify_seconds, 2 * mean.seconds);
  const double weight = std::max(1.0 / static_cast<double>(++mean.num_steps), kRowsWeight);
  mean.seconds += weight * (seconds - mean.seconds);
}

double SpeculationCosts::SlopeOfRows() const {
  const double variance = rows_squared_ - rows_ * rows_ / steps_;
  if (!(variance > 0.01 * steps_)) return 0;
  return std::max((rows_seconds_ - rows_ * verify_seconds_ / steps_) / variance, 0.0);
}

// By the nearest numbers of rows that are known on both sides, or the slope from the nearest one.
double SpeculationCosts::SecondsAt(int64_t num_rows) const {
  int64_t low = std::min(num_rows, kMaxCounted), high = num_rows;
  while (low > 0 && by_rows_[low].num_steps < kMinSteps) --low;
  while (high <= kMaxCounted && by_rows_[high].num_steps < kMinSteps) ++high;
  const bool has_low = low > 0, has_high = high <= kMaxCounted;
  if (has_low && has_high && high > low) {
    const double share = static_cast<double>(num_rows - low) / static_cast<double>(high - low);
    return by_rows_[low].seconds + share * (by_rows_[high].seconds - by_rows_[low].seconds);
  }
  if (!has_low && !has_high) return SlopeOfRows() * static_cast<double>(num_rows);
  const int64_t nearest = has_low ? low : high;
  return by_rows_[nearest].seconds + SlopeOfRows() * static_cast<double>(num_rows - nearest);
}

double SpeculationCosts::SecondsOfRows(int64_t num_rows, int64_t added) const {
  return std::max(SecondsAt(num_rows + added) - SecondsAt(num_rows), 0.0);
}

namespace {

// Whether `more` drafts for each row that asks for throughput pay, given `rate` tokens a second;
// then goes_on of the rows that they pay for is true. passes_are_free: others run them anyway.
bool Pays(const SpeculationCosts& costs, double rate, int64_t num_rows, int64_t num_wanted,
          int64_t more, bool passes_are_free, std::vector<DraftCandidate>& candidates) {
  const double row_cost =
      rate * costs.SecondsOfRows(num_rows, num_wanted * more) / static_cast<double>(num_wanted);
  double surplus = 0;
  for (DraftCandidate& candidate : candidates) {
    if (candidate.policy != DraftPolicy::kThroughput) continue;
    double gain = 0, survival = candidate.survival;
    for (int64_t draft = 0; draft < more; ++draft) gain += survival *= candidate.acceptance;
    candidate.goes_on = gain > row_cost;
    surplus += std::max(gain - row_cost, 0.0);
  }
  const double pass_cost =
      passes_are_free ? 0 : rate * costs.seconds_per_pass() * static_cast<double>(more);
  return surplus > pass_cost;
}

}  // namespace

void DecideDrafts(const SpeculationCosts& costs, int64_t num_rows,
                  std::vector<DraftCandidate>& candidates) {
  int64_t num_wanted = 0;
  bool passes_are_free = false;
  for (DraftCandidate& candidate : candidates) {
    if (candidate.policy == DraftPolicy::kThroughput) {
      candidate.goes_on = true;
      ++num_wanted;
      continue;
    }
    candidate.goes_on = candidate.policy == DraftPolicy::kFixed ||
                        1 - candidate.survival <= static_cast<double>(candidate.threshold);
    passes_are_free |= candidate.goes_on;
  }
  if (num_wanted == 0 || !costs.known()) return;
  const double rate = costs.tokens_per_second();
  for (int64_t more = 1; more <= kLookAhead; ++more) {
    if (Pays(costs, rate, num_rows, num_wanted, more, passes_are_free, candidates)) return;
  }
  for (DraftCandidate& candidate : candidates) {
    if (candidate.policy == DraftPolicy::kThroughput) candidate.goes_on = false;
  }
}

}  // namespace godwit
