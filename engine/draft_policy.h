#pragma once
// How far to draft: when one more draft pays, by what it costs and how likely it is to stand
// (acceptance_score.h). Pure: no device, no model, no clock.
//
// Whether a draft is verified may depend on the distribution that it is drawn from, on all before
// it, and on earlier rounds, but never on the drawn token: else what remains is no longer
// distributed as the target (a retrospective trim; tests/engine/lossless_test.cc plants it). So
// scores are of the distribution, and places are decided one after the other.

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/strings/string_view.h"
#include "engine/acceptance_score.h"
#include "engine/batch.h"
#include "engine/round_values.h"
#include "engine/round_ways.h"

namespace godwit {

// "fixed", "margin", "throughput", "specdecpp".
absl::string_view DraftPolicyName(DraftPolicy policy);
std::optional<DraftPolicy> ParseDraftPolicy(absl::string_view name);
// "max_draft_tokens", "budget", "max_tokens", "policy", "measurement", "lag", "context".
absl::string_view DraftStopName(DraftStop stop);

// Seconds per pass of the draft model and per row of the target, and the tokens per second that
// they have to beat, from the steps that ran with about as many sequences.
class SpeculationCosts {
 public:
  struct Step {
    int64_t num_passes = 0;  // of the draft model
    double draft_seconds = 0;
    int64_t num_rows = 0;  // of the target
    double verify_seconds = 0;
    int64_t num_tokens = 0;  // gained
    RoundWay way = RoundWay::kMargins;
  };
  // The step's seconds, as they count: at the pace of those that SecondsAt and SecondsOfPasses are
  // of, and no more than they allow for.
  double Observe(Step step);

  // Where no step ran with as many sequences, what others know is better than nothing: times by
  // rows and passes are about the same, tokens are not.
  void BeginWith(const SpeculationCosts& others);

  bool known() const { return num_steps_ >= kMinKnown && all_passes_.passes > 0; }
  double tokens_per_second() const { return seconds_ > 0 ? tokens_ / seconds_ : 0; }
  // Of a round's passes. The first one reads what the target drew, and finds the caches of the
  // processor full of the target: it may take twice as long as the next. One that shows what it
  // drew takes longer; while none of that way ran, as all of them.
  double SecondsOfPasses(int64_t count, RoundWay way = RoundWay::kMargins) const;
  // Of a step of the target. Its time jumps where a product takes another tile, so it is kept by
  // number of rows; between two numbers that were seen, and beyond them, by a line. 0: unknown.
  // Found once between two steps, so that a decision may ask for many numbers.
  double SecondsAt(int64_t num_rows) const;
  // For `added` rows on top of num_rows.
  double SecondsOfRows(int64_t num_rows, int64_t added) const;

 private:
  static constexpr int64_t kMinKnown = 24;
  // Numbers up to 64 by themselves, above in eighths of a doubling.
  static constexpr int kExact = 64, kNumBins = kExact + 8 * 6 + 1;
  struct Bin {
    double rows = 0, seconds = 0;  // typical ones
    int64_t num_steps = 0;
    void Observe(double of_rows, double of_seconds);
  };
  // A line through the passes of steps that had some: sums that fade.
  struct Passes {
    double steps = 0, passes = 0, squares = 0, seconds = 0, products = 0;
    void Observe(double of_passes, double of_seconds);
    double SecondsOfFurther() const;
    double Seconds(int64_t count) const;
  };
  static int BinOf(int64_t num_rows);
  double FindSecondsAt(int64_t num_rows) const;
  double SlopeOfRows() const;

  Bin bins_[kNumBins];
  mutable std::vector<double> seconds_at_;  // by number of rows; less than 0: not found yet
  int64_t num_steps_ = 0;
  // How much longer steps take of late than those that the times here are of. A processor that
  // others use, or that runs hot, slows all steps down; numbers of rows that were last seen before
  // that are still to be compared with those seen since.
  double pace_ = 1;
  // Sums that fade: of what steps gained, and of what the lines need.
  double tokens_ = 0, seconds_ = 0;
  Passes all_passes_, passes_of_[kNumRoundWays];
  double steps_ = 0, rows_ = 0, rows_squared_ = 0, verify_seconds_ = 0, rows_seconds_ = 0;
};

// By number of sequences, in doublings: what beats one sequence does not beat sixty-four.
inline constexpr int kNumLoads = 14;
int LoadOf(int64_t num_sequences);
template <typename T>
class ByLoad {
 public:
  ByLoad() : of_(kNumLoads) {}
  // initial(num_sequences), of the most of a load.
  template <typename Initial>
  explicit ByLoad(const Initial& initial) {
    for (int load = 0; load < kNumLoads; ++load) of_.push_back(initial(int64_t{1} << load));
  }
  T& at(int64_t num_sequences) { return of_[static_cast<size_t>(LoadOf(num_sequences))]; }
  const T& at(int64_t num_sequences) const {
    return of_[static_cast<size_t>(LoadOf(num_sequences))];
  }

 private:
  std::vector<T> of_;
};

// A row that has drafts in this step, or could have.
struct DraftCandidate {
  DraftPolicy policy = DraftPolicy::kFixed;
  float threshold = 0;
  AcceptanceClass acceptance_class = AcceptanceClass::kGreedy;
  double survival = 1;    // P(all its drafts are accepted) of those whose distribution is known
  double acceptance = 1;  // of the next one, before anything is known of it
  bool has_open = false;  // the last of the drafts that are known is not decided on yet
  int num_unknown = 0;    // drafts after those, drawn already
  bool can_go_on = true;
  bool keeps = true;    // the answer. False: the open draft and those after it are dropped; it ends
  bool goes_on = true;  // the answer: another draft is drawn
};

// What is decided for all rows of a step at once: passes are shared, and the time of rows depends
// on their number.
//
// fixed: keep, go on. margin, specdecpp: while 1 - survival <= threshold. throughput: whatever
// brings more tokens than tokens/s * its seconds (at that rate more would make the batch slower,
// Dinkelbach): the open drafts are kept, in the rows where they are likeliest to stand, while
//   survival (1 + acceptance + ...) > tokens/s * seconds of the rows and of further passes
// for some number of drafts up to 4, as a row behind a jump may be cheap; and rows go on while
//   survival (acceptance + acceptance^2 + ...)
// is worth the rows and the passes, or one more draft is that is verified only if its distribution
// turns out well. One sequence alone shares nothing, so that its round can be planned to its
// end: RoundValues, at the rate that the plan itself reaches. An open draft is dropped for the
// distribution it was drawn from, in the order of the places, and no later one is looked at:
// whether a place is verified never depends on the token drawn there. Where costs are unknown
// all are kept and go on.
class DraftDecider {
 public:
  struct Load {
    const SpeculationCosts& costs;
    const AcceptanceScore& score;
    int64_t num_sequences = 0;
    int64_t num_rows = 0;   // of the target's step, with all drafts that are drawn and not dropped
    double reluctance = 0;  // share of a gain that going on has to bring on top
    int most_drafts = kMaxDraftTokens;  // of a round
    int lag = 0;  // passes whose draft is not known when the next is decided on; 0: what the next
                  // pass draws can be dropped when it is known
    RoundWay way = RoundWay::kMargins;

    double SecondsOfPasses(int64_t count) const { return costs.SecondsOfPasses(count, way); }
  };
  void Decide(const Load& load, std::vector<DraftCandidate>& candidates);

 private:
  // Of a row, by the drafts that are looked at so far.
  struct Gain {
    double tokens = 0;
    double next = 0;  // what one more brings
    DraftCandidate* candidate = nullptr;
  };
  void DecideByThroughput(const Load& load, bool passes_are_free,
                          std::vector<DraftCandidate>& candidates);
  // The number of rows, from the front of gains_ on, whose gains are worth the most beyond
  // `rows_each` rows of the target for each and what a pass costs.
  struct Choice {
    double value = 0;
    size_t count = 0;
  };
  Choice Choose(const Load& load, double rate, int64_t num_rows, int64_t rows_each,
                double pass_cost) const;
  void SortGains();
  void Keep(const Load& load, double rate, std::vector<DraftCandidate>& candidates);
  void GoOn(const Load& load, double rate, bool passes_are_free,
            std::vector<DraftCandidate>& candidates);
  Choice ChooseToGoOn(const Load& load, double rate, int64_t num_rows, int64_t num_passes,
                      bool passes_are_free);

  // The plan for one sequence alone. Made anew every so many rounds, as making it takes longer than
  // following it.
  struct Plan {
    std::optional<RoundValues> values;
    double rate = 0;
    int num_rounds = 0;  // since it was made
  };
  bool Replan(const Load& load, AcceptanceClass acceptance_class, Plan& plan);
  bool DecideAlone(const Load& load, DraftCandidate& candidate);

  Plan plans_[kNumAcceptanceClasses];
  std::vector<Gain> gains_;  // scratch; those whose first draft brings most first
};

// tokens/s that a draft has to beat: of late, but no less than without drafts.
double RateToBeat(const SpeculationCosts& costs, int64_t num_sequences);

}  // namespace godwit
