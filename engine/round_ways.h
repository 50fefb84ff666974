#pragma once
// What the throughput policy goes by in a round, and which of these has gained more of late. To see
// what a draft is like costs time: a pass shows it, and the host waits for that before it decides.
// Where drafts of many sequences share their passes, or a pass takes no longer than the wait, a
// round that is planned blindly is faster. Pure: no device, no model, no clock.

#include <array>
#include <cstddef>
#include <cstdint>

namespace godwit {

enum class RoundWay {
  kPlanned,  // all numbers of drafts before the first pass (round_planner.h)
  kMargins,  // place by place, by the margins that passes show (draft_policy.h)
  kHead      // the same, by the acceptance head
};
inline constexpr int kNumRoundWays = 3;

// Of rounds of about as many sequences. A way is judged by its tokens over those that the planner
// expected in the time it took, so that a text that is easy to draft favours none. Taken is the way
// whose gain is highest with what its few rounds leave open on top (UCB1's idea, with the measured
// spread). The spread says nothing of what was wrong in all of its rounds, because it was new: so
// each is tried again after a while, then after twice as long, and counts more than it did.
class RoundWays {
 public:
  using Gains = std::array<double, kNumRoundWays>;
  // prior: gains as good as measured over some hundred rounds of a sequence; 0: a way that is never
  // taken.
  RoundWays(const Gains& prior, int64_t num_sequences);

  // Whether there is more than one: else nothing need be observed.
  bool has_choice() const;
  // Of the step that begins now.
  RoundWay Next();
  // A step took `way`; per sequence: tokens, and expected ones, the planner's rate times its
  // seconds. Not called for steps that say nothing about their kind.
  void Observe(RoundWay way, double tokens, double expected);

  double gain(RoundWay way) const { return ways_[static_cast<size_t>(way)].gain(); }

 private:
  static constexpr int kRun = 8;  // steps in one way before another is considered
  static constexpr int kFirstPause = 128, kLongestPause = 4096;
  // Sums that fade.
  struct Way {
    double steps = 0, tokens = 0, expected = 0;
    double deviation = 0;                          // squares of tokens beyond gain * expected
    int pause = kFirstPause, until = kFirstPause;  // steps: between two trials, to the next one
    double gain() const { return expected > 0 ? tokens / expected : 0; }
    double most_gain() const;
    void Fade(double memory);
  };
  RoundWay Best() const;

  std::array<Way, kNumRoundWays> ways_;
  RoundWay current_ = RoundWay::kPlanned;
  int num_taken_ = kRun;  // of this run
};

}  // namespace godwit
