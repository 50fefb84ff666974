#pragma once
// How many drafts the rows of a step have, decided before its round begins: by what became of each
// sequence's drafts before, by what passes and rows cost, and by nothing that the round shows. It
// takes what a fixed number of drafts takes, and chooses that number: the one at which tokens over
// seconds is greatest. One for all rows, although some accept more: to draft further for these
// gains tokens now, and leaves the slots to the others (of batches that run out, 3 % longer).
// Pure: no device, no model, no clock.

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
    double history = 0;   // SequenceHistory::logit
    int most_drafts = 0;  // in [0, kMaxDraftTokens]
  };
  struct Load {
    const SpeculationCosts& costs;
    const AcceptanceScore& score;
    int64_t num_sequences = 0;
    int64_t num_rows = 0;    // of the target's step without drafts of the rows planned for
    int64_t num_passes = 0;  // that run in any case
    double reluctance = 0;   // share that drafts have to gain over none
  };
  // Drafts of each row, or as many as it may have; 0 where costs are unknown.
  int Plan(const Load& load, const std::vector<Row>& rows);

  // Tokens/s that the last plan expects; 0: nothing is known.
  double rate() const { return rate_; }

 private:
  // Of history: logits up to 3.5 either way, in halves. Rows of one class and level are one.
  static constexpr int kLevels = 15;
  // By place: rows that may have a draft there, and how many of these are accepted.
  struct Places {
    std::array<int64_t, kMaxDraftTokens> rows{};
    std::array<double, kMaxDraftTokens> tokens{};
  };

  static Places Count(const AcceptanceScore& score, const std::vector<Row>& rows);
  void Choose(const Load& load, const Places& places);

  double rate_ = 0;
  int num_drafts_ = 0;
  // When the plan was made.
  int64_t num_sequences_ = 0, num_rows_ = 0;
  int num_rounds_ = 0;  // since
};

}  // namespace godwit
