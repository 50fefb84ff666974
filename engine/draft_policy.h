#pragma once
// How far to draft: when one more draft pays, by what it costs and how likely it is to stand
// (acceptance_score.h). Pure: no device, no model, no clock.
//
// Whether a draft is verified may depend on the distribution that it is drawn from, on all before
// it, and on earlier rounds, but never on the drawn token: else what remains is no longer
// distributed as the target (a retrospective trim; tests/kernels/cpu/verify_tokens_test.cc plants
// it). So scores are of the distribution, and every draft that was drawn is verified.

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/strings/string_view.h"
#include "engine/batch.h"

namespace godwit {

// "fixed", "margin", "throughput", "specdecpp".
absl::string_view DraftPolicyName(DraftPolicy policy);
std::optional<DraftPolicy> ParseDraftPolicy(absl::string_view name);

// Seconds per pass of the draft model and per row of the target, and the tokens per second that
// they have to beat, from the steps that ran.
class SpeculationCosts {
 public:
  // A step of decode rows only: passes and seconds of the draft, rows and seconds of the target,
  // tokens gained.
  void Observe(int64_t num_passes, double draft_seconds, int64_t num_rows, double verify_seconds,
               int64_t num_tokens);

  bool known() const { return steps_ > 0 && passes_ > 0; }
  double tokens_per_second() const { return tokens_ / (draft_seconds_ + verify_seconds_); }
  double seconds_per_pass() const { return draft_seconds_ / passes_; }
  // The target's time for `added` rows on top of num_rows. A step's time jumps where a product
  // takes another tile, so it is kept by number of rows, as far as rows are few; between two
  // numbers that were seen, and beyond them, by a line.
  double SecondsOfRows(int64_t num_rows, int64_t added) const;

 private:
  static constexpr int64_t kMaxCounted = 128;
  struct Mean {
    double seconds = 0;
    int64_t num_steps = 0;
  };
  double SlopeOfRows() const;
  double SecondsAt(int64_t num_rows) const;

  Mean by_rows_[kMaxCounted + 1];
  double steps_ = 0, tokens_ = 0;  // sums that fade
  double passes_ = 0, draft_seconds_ = 0;
  double verify_seconds_ = 0;
  double rows_ = 0, rows_squared_ = 0, rows_seconds_ = 0;
};

// A row that has drafts in this step and could have one more.
struct DraftCandidate {
  DraftPolicy policy = DraftPolicy::kFixed;
  float threshold = 0;
  double survival = 1;    // P(all its drafts are accepted)
  double acceptance = 1;  // of the next one, before anything is known of it
  bool goes_on = true;    // the answer
};

// fixed: go on. margin and specdecpp: while 1 - survival <= threshold. throughput: while some
// number of further drafts, up to 4, is worth its rows of the target and its passes of the draft
// model:
//   survival * (acceptance + acceptance^2 + ...) > tokens/s * seconds of the rows, each row for
//   itself, and the sum of what is left over > tokens/s * seconds of the passes, unless others run
//   them.
// At that rate of tokens/s, more would make the batch slower (Dinkelbach). Where costs are unknown
// it goes on. num_rows: of the target's step so far.
void DecideDrafts(const SpeculationCosts& costs, int64_t num_rows,
                  std::vector<DraftCandidate>& candidates);

}  // namespace godwit
