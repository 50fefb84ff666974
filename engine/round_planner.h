#pragma once
// How many drafts each row of a step has, decided before its round begins: by what became of each
// sequence's drafts before, by what passes and rows cost, and by nothing that the round shows. It
// takes what a fixed number of drafts takes, and chooses that number. Pure: no device, no model, no
// clock.
//
// The rate, tokens over seconds, is the greatest for some number of passes K and some least
// survival s: each row has the drafts up to K that all before and themselves are accepted with
// probability s or more. Rows of about the same history are taken together.

#include <array>
#include <cstdint>
#include <vector>

#include "engine/acceptance_score.h"
#include "engine/draft_policy.h"

namespace godwit {

class RoundPlanner {
 public:
  struct Row {
    AcceptanceClass acceptance_class = AcceptanceClass::kGreedy;
    double history = 0;  // SequenceHistory::logit
    int most_drafts = 0;
    int num_drafts = 0;  // the answer
  };
  struct Load {
    const SpeculationCosts& costs;
    const AcceptanceScore& score;
    int64_t num_sequences = 0;
    int64_t num_rows = 0;    // of the target's step without drafts of `rows`
    int64_t num_passes = 0;  // that run in any case
    double reluctance = 0;   // share that drafts have to gain over none
  };
  // Sets num_drafts of each row: 0 where costs are unknown.
  void Plan(const Load& load, std::vector<Row>& rows);

  // Tokens/s that the last plan expects; 0: nothing is known.
  double rate() const { return rate_; }

 private:
  static constexpr int kLevels = 15;  // of history: logits up to 3.5 either way, in halves
  static constexpr int kNumBuckets = kNumAcceptanceClasses * kLevels;
  // Rows of one class and level.
  struct Bucket {
    std::array<int, kMaxDraftTokens> rows{};         // that may have a draft at the place
    std::array<double, kMaxDraftTokens> survival{};  // P(all drafts up to the place are accepted)
    bool is_known = false;                           // survival
  };
  // The drafts of a bucket at a place.
  struct Drafts {
    double survival;
    int place, rows;
  };

  static size_t BucketOf(const Row& row);
  void FillBuckets(const AcceptanceScore& score, const std::vector<Row>& rows);
  const Bucket& Known(const AcceptanceScore& score, const Row& row);
  void Choose(const Load& load);

  std::array<Bucket, kNumBuckets> buckets_;
  std::vector<Drafts> drafts_;  // scratch: likeliest first
  double rate_ = 0;
  int num_passes_ = 0;
  double least_survival_ = 1;
  // When the plan was made.
  int64_t num_sequences_ = 0, num_rows_ = 0;
  int num_rounds_ = 0;
};

}  // namespace godwit
