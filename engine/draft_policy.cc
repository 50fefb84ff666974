#include "engine/draft_policy.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

#include "kernels/base/check.h"

namespace godwit {
namespace {

constexpr double kRateMemory = 0.998;  // per step: about 500 of them
constexpr double kRowsWeight = 0.1;    // of a new step among those with as many rows
constexpr double kPaceWeight = 0.5;    // of a new step in the pace of all
constexpr double kMostOff = 0.03;      // of either: what is further off counts as this
constexpr double kHeldUp = 1.5;        // times what is expected: more counts as this
constexpr int64_t kMinSteps = 3;       // of as many rows, the least of which is believed
constexpr double kPriorOfPasses = 1;   // of equal cost, as a sum of squares

constexpr size_t kMinRecent = 32;   // predictions, before a round is planned by them
constexpr int kPlanQuantiles = 16;  // of predictions
constexpr int kPlanRounds = 64;     // that a plan serves
constexpr int kRateIterations = 4;  // of the first plan; later ones begin at the rate before

constexpr int64_t kLookAhead = 4;  // drafts; a row behind a jump may be cheap

constexpr std::pair<absl::string_view, DraftPolicy> kPolicyNames[] = {
    {"fixed", DraftPolicy::kFixed},
    {"margin", DraftPolicy::kMargin},
    {"throughput", DraftPolicy::kThroughput},
    {"specdecpp", DraftPolicy::kSpecDecPP}};

double SurvivalOfAll(const DraftCandidate& candidate) {
  double survival = candidate.survival;
  for (int draft = 0; draft < candidate.num_unknown; ++draft) survival *= candidate.acceptance;
  return survival;
}

// specdecpp, as published, stops by the drafts that its head has judged.
double RiskOfRejection(const DraftCandidate& candidate) {
  const bool by_known = candidate.policy == DraftPolicy::kSpecDecPP;
  return 1 - (by_known ? candidate.survival : SurvivalOfAll(candidate));
}

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

absl::string_view DraftStopName(DraftStop stop) {
  constexpr absl::string_view kNames[kNumDraftStops] = {
      "max_draft_tokens", "budget", "max_tokens", "policy", "measurement", "lag", "context"};
  return kNames[static_cast<size_t>(stop)];
}

int SpeculationCosts::BinOf(int64_t num_rows) {
  if (num_rows <= kExact) return static_cast<int>(num_rows);
  const double eighths = 8 * std::log2(static_cast<double>(num_rows) / kExact);
  return std::min(kExact + static_cast<int>(eighths), kNumBins - 1);
}

double SpeculationCosts::Observe(Step step) {
  seconds_at_.clear();
  Bin& bin = bins_[BinOf(step.num_rows)];
  step.verify_seconds /= pace_;
  step.draft_seconds /= pace_;
  // By the same measure as the bin below, so that what pushes both leaves the others where they
  // are.
  if (bin.num_steps >= kMinSteps && bin.seconds > 0) {
    const double off = step.verify_seconds / bin.seconds - 1;
    pace_ *= 1 + kPaceWeight * std::clamp(off, -kMostOff, kMostOff);
  }
  // A step that something else held up tells little.
  const double verify_seconds = bin.num_steps < kMinSteps
                                    ? step.verify_seconds
                                    : std::min(step.verify_seconds, kHeldUp * bin.seconds);
  const auto passes = static_cast<double>(step.num_passes);
  Passes& passes_of_way = passes_of_[static_cast<size_t>(step.way)];
  const double draft_seconds =
      passes_of_way.passes < 4
          ? step.draft_seconds
          : std::min(step.draft_seconds,
                     kHeldUp * passes_of_way.Seconds(std::max<int64_t>(step.num_passes, 1)));
  const auto rows = static_cast<double>(step.num_rows);
  for (double* sum :
       {&tokens_, &seconds_, &steps_, &rows_, &rows_squared_, &verify_seconds_, &rows_seconds_}) {
    *sum *= kRateMemory;
  }
  ++num_steps_;
  tokens_ += static_cast<double>(step.num_tokens);
  seconds_ += draft_seconds + verify_seconds;
  if (step.num_passes > 0) {
    all_passes_.Observe(passes, draft_seconds);
    passes_of_way.Observe(passes, draft_seconds);
  }
  steps_ += 1;
  rows_ += rows;
  rows_squared_ += rows * rows;
  verify_seconds_ += verify_seconds;
  rows_seconds_ += rows * verify_seconds;
  bin.Observe(rows, step.verify_seconds);
  return draft_seconds + verify_seconds;
}

void SpeculationCosts::BeginWith(const SpeculationCosts& others) {
  *this = others;
  tokens_ = seconds_ = 0;
}

void SpeculationCosts::Passes::Observe(double of_passes, double of_seconds) {
  for (double* sum : {&steps, &passes, &squares, &seconds, &products}) *sum *= kRateMemory;
  steps += 1;
  passes += of_passes;
  squares += of_passes * of_passes;
  seconds += of_seconds;
  products += of_passes * of_seconds;
}

// The slope of a line through the steps, drawn towards the mean of all passes: where steps have
// much the same number, they tell nothing else.
double SpeculationCosts::Passes::SecondsOfFurther() const {
  const double mean = seconds / passes;
  const double variance = squares - passes * passes / steps;
  const double covariance = products - passes * seconds / steps;
  return std::clamp((covariance + kPriorOfPasses * mean) / (variance + kPriorOfPasses), 0.0, mean);
}

double SpeculationCosts::Passes::Seconds(int64_t count) const {
  if (count == 0) return 0;
  return seconds / steps + (static_cast<double>(count) - passes / steps) * SecondsOfFurther();
}

double SpeculationCosts::SecondsOfPasses(int64_t count, RoundWay way) const {
  const Passes& passes = passes_of_[static_cast<size_t>(way)];
  return (passes.steps >= kMinSteps ? passes : all_passes_).Seconds(count);
}

// The least of the first few, then what about half of the steps take no longer than: a mean of few
// steps is that of the one that something held up, and a number of rows that seems dear is not
// tried again.
void SpeculationCosts::Bin::Observe(double of_rows, double of_seconds) {
  const double weight = std::max(1.0 / static_cast<double>(++num_steps), kRowsWeight);
  rows += weight * (of_rows - rows);
  if (num_steps <= kMinSteps) {
    seconds = num_steps == 1 ? of_seconds : std::min(seconds, of_seconds);
  } else {
    const double most = kMostOff * seconds;
    seconds += kRowsWeight * std::clamp(of_seconds - seconds, -most, most);
  }
}

double SpeculationCosts::SlopeOfRows() const {
  const double variance = rows_squared_ - rows_ * rows_ / steps_;
  if (!(variance > 0.01 * steps_)) return 0;
  return std::max((rows_seconds_ - rows_ * verify_seconds_ / steps_) / variance, 0.0);
}

double SpeculationCosts::SecondsAt(int64_t num_rows) const {
  const auto index = static_cast<size_t>(num_rows);
  if (index >= seconds_at_.size()) seconds_at_.resize(2 * index + 1, -1);
  if (seconds_at_[index] < 0) seconds_at_[index] = FindSecondsAt(num_rows);
  return seconds_at_[index];
}

double SpeculationCosts::FindSecondsAt(int64_t num_rows) const {
  const auto rows = static_cast<double>(num_rows);
  int low = BinOf(num_rows), high = low;
  while (low > 0 && (bins_[low].num_steps < kMinSteps || bins_[low].rows > rows)) --low;
  while (high < kNumBins && (bins_[high].num_steps < kMinSteps || bins_[high].rows < rows)) ++high;
  const bool has_low = low > 0, has_high = high < kNumBins;
  if (has_low && has_high) {
    const Bin &below = bins_[low], &above = bins_[high];
    if (above.rows <= below.rows) return below.seconds;
    const double share = (rows - below.rows) / (above.rows - below.rows);
    return below.seconds + share * (above.seconds - below.seconds);
  }
  if (!has_low && !has_high) return SlopeOfRows() * rows;
  const Bin& nearest = bins_[has_low ? low : high];
  return nearest.seconds + SlopeOfRows() * (rows - nearest.rows);
}

double SpeculationCosts::SecondsOfRows(int64_t num_rows, int64_t added) const {
  return std::max(SecondsAt(num_rows + added) - SecondsAt(num_rows), 0.0);
}

int LoadOf(int64_t num_sequences) {
  const auto doublings =
      std::bit_width(static_cast<uint64_t>(std::max<int64_t>(num_sequences, 1)) - 1);
  return std::min(static_cast<int>(doublings), kNumLoads - 1);
}

double RateToBeat(const SpeculationCosts& costs, int64_t num_sequences) {
  const double plain_seconds = costs.SecondsAt(num_sequences);
  const double plain = plain_seconds > 0 ? static_cast<double>(num_sequences) / plain_seconds : 0;
  return std::max(costs.tokens_per_second(), plain);
}

void DraftDecider::Decide(const Load& load, std::vector<DraftCandidate>& candidates) {
  bool passes_are_free = false, by_throughput = false;
  for (DraftCandidate& candidate : candidates) {
    candidate.keeps = true;
    candidate.goes_on = candidate.can_go_on;
    if (candidate.policy == DraftPolicy::kThroughput) {
      by_throughput = true;
      continue;
    }
    candidate.goes_on &= candidate.policy == DraftPolicy::kFixed ||
                         RiskOfRejection(candidate) <= static_cast<double>(candidate.threshold);
    passes_are_free |= candidate.goes_on;
  }
  if (by_throughput && load.costs.known()) DecideByThroughput(load, passes_are_free, candidates);
}

void DraftDecider::DecideByThroughput(const Load& load, bool passes_are_free,
                                      std::vector<DraftCandidate>& candidates) {
  if (load.num_sequences == 1 && candidates.size() == 1 && DecideAlone(load, candidates[0])) return;
  const double rate = RateToBeat(load.costs, load.num_sequences);
  Keep(load, rate, candidates);
  GoOn(load, rate, passes_are_free, candidates);
}

// Dinkelbach's iteration: the rate at which a round's tokens are worth just its seconds is the most
// that can be reached.
bool DraftDecider::Replan(const Load& load, AcceptanceClass acceptance_class, Plan& plan) {
  const std::vector<double> recent = load.score.Recent(acceptance_class);
  if (recent.size() < kMinRecent) return false;
  const double first_pass = load.SecondsOfPasses(1);
  RoundCosts costs = {.first_pass = first_pass, .pass = load.SecondsOfPasses(2) - first_pass};
  double most_seconds = 0;  // a step with more rows takes no less
  for (int drafts = 0; drafts <= load.most_drafts; ++drafts) {
    most_seconds = std::max(most_seconds, load.costs.SecondsAt(1 + drafts));
    costs.verify.push_back(most_seconds);
  }
  if (!(costs.verify[0] > 0)) return false;
  const std::vector<double> acceptances = Quantiles(recent, kPlanQuantiles);
  const int iterations = plan.values ? 1 : kRateIterations;
  if (!plan.values) plan.rate = 1 / costs.verify[0];
  for (int iteration = 0; iteration < iterations; ++iteration) {
    const auto value_at = [&](double rate) {
      return RoundValues(costs, acceptances, load.lag, rate).ValueOfRound();
    };
    const double value = value_at(plan.rate);
    const double more = plan.rate * 1e-3;
    const double seconds = (value - value_at(plan.rate + more)) / more;  // of the best round
    plan.rate = std::max(plan.rate + value / seconds, 1 / costs.verify[0]);
  }
  plan.values.emplace(costs, acceptances, load.lag, plan.rate);
  plan.num_rounds = 0;
  return true;
}

// False: too little is known.
bool DraftDecider::DecideAlone(const Load& load, DraftCandidate& candidate) {
  Plan& plan = plans_[static_cast<size_t>(candidate.acceptance_class)];
  const auto num_open = candidate.has_open ? 1 + candidate.num_unknown : candidate.num_unknown;
  const auto num_kept = static_cast<int>(load.num_rows) - 1 - num_open;
  const bool begins = load.num_rows == 1;
  if (begins && (!plan.values || ++plan.num_rounds > kPlanRounds)) {
    if (!Replan(load, candidate.acceptance_class, plan)) plan.values.reset();
  }
  if (!plan.values || candidate.num_unknown != (begins ? 0 : load.lag)) return false;
  if (begins) {
    candidate.goes_on = candidate.can_go_on && plan.values->Begins();
    return true;
  }
  if (num_kept + num_open > plan.values->most()) return false;
  if (candidate.has_open) candidate.keeps = plan.values->Keeps(num_kept, candidate.survival);
  const int num_known = num_kept + (candidate.has_open ? 1 : 0);
  candidate.goes_on =
      candidate.can_go_on && candidate.keeps && plan.values->GoesOn(num_known, candidate.survival);
  return true;
}

// By what one more draft brings: what more of them bring follows from it, or nearly so.
void DraftDecider::SortGains() {
  std::sort(gains_.begin(), gains_.end(),
            [](const Gain& a, const Gain& b) { return a.next > b.next; });
}

DraftDecider::Choice DraftDecider::Choose(const Load& load, double rate, int64_t num_rows,
                                          int64_t rows_each, double pass_cost) const {
  Choice best;
  double tokens = 0;
  const double without = load.costs.SecondsAt(num_rows);
  for (size_t count = 1; count <= gains_.size(); ++count) {
    tokens += gains_[count - 1].tokens;
    const double with = load.costs.SecondsAt(num_rows + static_cast<int64_t>(count) * rows_each);
    const double value = tokens - rate * std::max(with - without, 0.0) - pass_cost;
    if (value > best.value) best = {value, count};
  }
  return best;
}

void DraftDecider::Keep(const Load& load, double rate, std::vector<DraftCandidate>& candidates) {
  int64_t num_open = 0;
  gains_.clear();
  for (DraftCandidate& candidate : candidates) {
    if (candidate.policy != DraftPolicy::kThroughput || !candidate.has_open) continue;
    num_open += 1 + candidate.num_unknown;
    candidate.keeps = false;
    gains_.push_back({.next = candidate.survival, .candidate = &candidate});
  }
  if (num_open == 0) return;
  SortGains();
  Choice best;
  int64_t passes = 0;
  for (int64_t drafts = 1; drafts <= kLookAhead; ++drafts) {
    for (Gain& gain : gains_) {
      if (drafts > 1 + gain.candidate->num_unknown) {
        if (!gain.candidate->can_go_on) continue;
        passes = std::max(passes, drafts - 1 - gain.candidate->num_unknown);
      }
      gain.tokens += gain.next;
      gain.next *= gain.candidate->acceptance;
    }
    const double pass_cost = rate * (load.SecondsOfPasses(1 + passes) - load.SecondsOfPasses(1));
    const Choice choice = Choose(load, rate, load.num_rows - num_open, drafts, pass_cost);
    if (choice.value > best.value) best = choice;
  }
  for (size_t row = 0; row < best.count; ++row) gains_[row].candidate->keeps = true;
  for (DraftCandidate& candidate : candidates) candidate.goes_on &= candidate.keeps;
}

// Of the rows of gains_, sorted, as GoOn made them.
DraftDecider::Choice DraftDecider::ChooseToGoOn(const Load& load, double rate, int64_t num_rows,
                                                int64_t num_passes, bool passes_are_free) {
  const auto pass_cost = [&](int64_t passes) {
    if (passes_are_free) return 0.0;
    return rate * (load.SecondsOfPasses(num_passes + passes) - load.SecondsOfPasses(num_passes));
  };
  Choice best;
  for (int64_t drafts = 1; drafts <= kLookAhead; ++drafts) {
    for (Gain& gain : gains_) {
      gain.tokens += gain.next;
      gain.next *= gain.candidate->acceptance;
    }
    const Choice choice = Choose(load, rate, num_rows, drafts, pass_cost(drafts));
    if (choice.value > best.value) best = choice;
  }
  if (load.lag > 0) return best;
  // One draft that is verified only if it turns out well, so that its row is no cost yet. If it is,
  // it costs what as many rows do on average: before a jump few are free, behind it one is dear.
  for (size_t count = 1, last = 0; last < gains_.size();
       last = count, count = std::min(2 * count, gains_.size())) {
    const double row_cost = rate * load.costs.SecondsOfRows(num_rows, static_cast<int64_t>(count)) /
                            static_cast<double>(count);
    double tokens = 0;
    for (size_t row = 0; row < count; ++row) {
      const DraftCandidate& candidate = *gains_[row].candidate;
      tokens +=
          load.score.ValueOfOption(candidate.acceptance_class, SurvivalOfAll(candidate), row_cost);
    }
    const double value = (1 - load.reluctance) * tokens - pass_cost(1);
    if (value > 0 && value >= best.value) best = {value, count};
  }
  return best;
}

void DraftDecider::GoOn(const Load& load, double rate, bool passes_are_free,
                        std::vector<DraftCandidate>& candidates) {
  int64_t num_rows = load.num_rows;
  int64_t num_passes = 0;  // so far: the first costs more, how many there were does not
  gains_.clear();
  for (DraftCandidate& candidate : candidates) {
    if (candidate.has_open || candidate.num_unknown > 0) num_passes = 1;
    if (!candidate.keeps) num_rows -= 1 + candidate.num_unknown;
    if (candidate.policy != DraftPolicy::kThroughput) continue;
    if (!std::exchange(candidate.goes_on, false)) continue;
    gains_.push_back(
        {.next = (1 - load.reluctance) * SurvivalOfAll(candidate) * candidate.acceptance,
         .candidate = &candidate});
  }
  if (gains_.empty()) return;
  SortGains();
  const Choice best = ChooseToGoOn(load, rate, num_rows, num_passes, passes_are_free);
  for (size_t row = 0; row < best.count; ++row) gains_[row].candidate->goes_on = true;
}

}  // namespace godwit
