#include "engine/round_planner.h"

#include <algorithm>
#include <cmath>

namespace godwit {
namespace {

constexpr double kLevelsOfLogit = 2;
constexpr int kPlanRounds = 8;        // that a plan of many sequences serves
constexpr int64_t kFewSequences = 4;  // of which each round is planned: one history may turn it

}  // namespace

size_t RoundPlanner::BucketOf(const Row& row) {
  constexpr int kMiddle = kLevels / 2;
  const auto level =
      std::clamp(static_cast<int>(std::lround(kLevelsOfLogit * row.history)), -kMiddle, kMiddle) +
      kMiddle;
  return static_cast<size_t>(static_cast<int>(row.acceptance_class) * kLevels + level);
}

const RoundPlanner::Bucket& RoundPlanner::Known(const AcceptanceScore& score, const Row& row) {
  const size_t index = BucketOf(row);
  Bucket& bucket = buckets_[index];
  if (bucket.is_known) return bucket;
  bucket.is_known = true;
  const double logit =
      (static_cast<int>(index) % kLevels - kLevels / 2) / kLevelsOfLogit;  // the level's
  double survival = 1;
  for (int place = 0; place < kMaxDraftTokens; ++place) {
    survival *= score.ExpectBlindly(row.acceptance_class, place, logit);
    bucket.survival[static_cast<size_t>(place)] = survival;
  }
  return bucket;
}

void RoundPlanner::FillBuckets(const AcceptanceScore& score, const std::vector<Row>& rows) {
  buckets_ = {};
  for (const Row& row : rows) {
    Known(score, row);
    Bucket& bucket = buckets_[BucketOf(row)];
    for (int place = 0; place < row.most_drafts; ++place) ++bucket.rows[static_cast<size_t>(place)];
  }
  drafts_.clear();
  for (const Bucket& bucket : buckets_) {
    for (int place = 0; place < kMaxDraftTokens; ++place) {
      const auto at = static_cast<size_t>(place);
      if (bucket.rows[at] > 0) drafts_.push_back({bucket.survival[at], place, bucket.rows[at]});
    }
  }
  // Of one survival, those before come first.
  std::sort(drafts_.begin(), drafts_.end(), [](const Drafts& a, const Drafts& b) {
    return a.survival != b.survival ? a.survival > b.survival : a.place < b.place;
  });
}

void RoundPlanner::Choose(const Load& load) {
  const auto sequences = static_cast<double>(load.num_sequences);
  const double passes_in_any_case = load.costs.SecondsOfPasses(load.num_passes, RoundWay::kPlanned);
  const double plain = sequences / (load.costs.SecondsAt(load.num_rows) + passes_in_any_case);
  rate_ = plain;
  num_passes_ = 0;
  double best = plain * (1 + load.reluctance);
  int most = 0;
  for (const Drafts& drafts : drafts_) most = std::max(most, drafts.place + 1);
  for (int passes = 1; passes <= most; ++passes) {
    const double seconds_of_passes =
        load.costs.SecondsOfPasses(std::max<int64_t>(passes, load.num_passes), RoundWay::kPlanned);
    double tokens = sequences;
    int64_t rows = load.num_rows;
    for (const Drafts& drafts : drafts_) {
      if (drafts.place >= passes) continue;
      tokens += drafts.rows * drafts.survival;
      rows += drafts.rows;
      const double rate = tokens / (seconds_of_passes + load.costs.SecondsAt(rows));
      if (rate <= best) continue;
      best = rate_ = rate;
      num_passes_ = passes;
      least_survival_ = drafts.survival;
    }
  }
}

void RoundPlanner::Plan(const Load& load, std::vector<Row>& rows) {
  for (Row& row : rows) row.num_drafts = 0;
  if (!load.costs.known()) {
    rate_ = 0;
    num_sequences_ = 0;
    return;
  }
  const bool is_new = load.num_sequences != num_sequences_ || load.num_rows != num_rows_ ||
                      load.num_sequences <= kFewSequences || ++num_rounds_ >= kPlanRounds;
  if (is_new) {
    num_sequences_ = load.num_sequences;
    num_rows_ = load.num_rows;
    num_rounds_ = 0;
    FillBuckets(load.score, rows);
    Choose(load);
  }
  for (Row& row : rows) {
    const Bucket& bucket = Known(load.score, row);
    const int most = std::min(row.most_drafts, num_passes_);
    while (row.num_drafts < most &&
           bucket.survival[static_cast<size_t>(row.num_drafts)] >= least_survival_) {
      ++row.num_drafts;
    }
  }
}

}  // namespace godwit
