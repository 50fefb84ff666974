#include "engine/round_planner.h"

#include <algorithm>
#include <cmath>

namespace godwit {
namespace {

constexpr double kLevelsOfLogit = 2;
constexpr int kPlanRounds = 8;        // that a plan of many sequences serves
constexpr int64_t kFewSequences = 4;  // of which each round is planned: one history may turn it

}  // namespace

RoundPlanner::Places RoundPlanner::Count(const AcceptanceScore& score,
                                         const std::vector<Row>& rows) {
  constexpr int kMiddle = kLevels / 2;
  std::array<std::array<int64_t, kMaxDraftTokens + 1>, kNumAcceptanceClasses * kLevels> by_most{};
  for (const Row& row : rows) {
    const auto level = static_cast<int>(std::lround(kLevelsOfLogit * row.history));
    const int bucket = static_cast<int>(row.acceptance_class) * kLevels + kMiddle +
                       std::clamp(level, -kMiddle, kMiddle);
    ++by_most[static_cast<size_t>(bucket)][static_cast<size_t>(row.most_drafts)];
  }
  Places places;
  for (size_t bucket = 0; bucket < by_most.size(); ++bucket) {
    int64_t left = 0;
    for (const int64_t count : by_most[bucket]) left += count;
    const auto acceptance_class = static_cast<AcceptanceClass>(bucket / kLevels);
    const double logit = (static_cast<int>(bucket % kLevels) - kMiddle) / kLevelsOfLogit;
    double survival = 1;
    for (size_t place = 0; place < kMaxDraftTokens; ++place) {
      left -= by_most[bucket][place];
      if (left == 0) break;
      survival *= score.ExpectBlindly(acceptance_class, static_cast<int>(place), logit);
      places.rows[place] += left;
      places.tokens[place] += static_cast<double>(left) * survival;
    }
  }
  return places;
}

void RoundPlanner::Choose(const Load& load, const Places& places) {
  const auto passes = [&](int64_t count) {
    return load.costs.SecondsOfPasses(std::max(count, load.num_passes), RoundWay::kPlanned);
  };
  auto tokens = static_cast<double>(load.num_sequences);
  int64_t rows = load.num_rows;
  rate_ = tokens / (passes(0) + load.costs.SecondsAt(rows));
  num_drafts_ = 0;
  double best = rate_ * (1 + load.reluctance);
  for (int drafts = 1; drafts <= kMaxDraftTokens; ++drafts) {
    const auto place = static_cast<size_t>(drafts - 1);
    if (places.rows[place] == 0) break;
    tokens += places.tokens[place];
    rows += places.rows[place];
    const double rate = tokens / (passes(drafts) + load.costs.SecondsAt(rows));
    if (rate <= best) continue;
    best = rate_ = rate;
    num_drafts_ = drafts;
  }
}

int RoundPlanner::Plan(const Load& load, const std::vector<Row>& rows) {
  if (!load.costs.known()) {
    rate_ = 0;
    num_drafts_ = 0;
    num_sequences_ = 0;
    return 0;
  }
  if (load.num_sequences != num_sequences_ || load.num_rows != num_rows_ ||
      load.num_sequences <= kFewSequences || ++num_rounds_ >= kPlanRounds) {
    num_sequences_ = load.num_sequences;
    num_rows_ = load.num_rows;
    num_rounds_ = 0;
    Choose(load, Count(load.score, rows));
  }
  return num_drafts_;
}

}  // namespace godwit
