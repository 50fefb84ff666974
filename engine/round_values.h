#pragma once
// What is best to do with the drafts of one sequence: dynamic programming over how many are kept
// and how likely they are to stand. Pure: no device, no model, no clock.
//
// One round, in tokens less seconds at a rate (tokens/s) that they have to beat: a pass of the
// draft model shows how likely its draft is to be accepted, the draft is kept or dropped for that
// alone, and another is drawn or not. Acceptances to come are taken as independent draws from
// `acceptances`.

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/batch.h"

namespace godwit {

// Seconds.
struct RoundCosts {
  double first_pass = 0, pass = 0;  // of a round, of the draft model; and of each after it
  std::vector<double> verify;       // of a step of the target, by drafts: [0 .. most]

  double Passes(int64_t count) const {
    return count == 0 ? 0 : first_pass + static_cast<double>(count - 1) * pass;
  }
};

class RoundValues {
 public:
  // acceptances: some dozens, of equal weight. lag 0: a draft's acceptance is known before it is
  // decided whether another is drawn; 1: that of the one before it is, and the last one of a round
  // is verified unseen.
  RoundValues(const RoundCosts& costs, std::span<const double> acceptances, int lag, double rate);

  // `kept` drafts are verified in any case and stand with probability `survival`; with lag 1 one
  // more is drawn.
  bool GoesOn(int kept, double survival) const {
    return GoOn(kept, survival) > Enough(kept, survival);
  }
  // A draft after `kept`, with which all stand with `survival`.
  bool Keeps(int kept, double survival) const {
    return survival + At(kept + 1, survival) > Stop(kept);
  }
  bool Begins() const { return First() > Stop(0); }
  // Tokens less seconds of a round. Positive: more than `rate` can be reached.
  double ValueOfRound() const;
  int most() const { return static_cast<int>(costs_.verify.size()) - 1; }

 private:
  static constexpr int kGrid = 32;
  using Row = std::array<double, kGrid + 1>;

  double Stop(int kept) const { return -rate_ * costs_.verify[static_cast<size_t>(kept)]; }
  double At(int kept, double survival) const;
  double Enough(int kept, double survival) const;
  double GoOn(int kept, double survival) const;
  double First() const;

  const RoundCosts costs_;
  const std::vector<double> acceptances_;
  const int lag_;
  const double rate_;
  double mean_ = 0;
  std::vector<Row> values_;  // [kept][survival], beyond the tokens of those kept
};

// Means of equal parts of the values, in order: at most `parts`.
std::vector<double> Quantiles(std::vector<double> values, int parts);

}  // namespace godwit
