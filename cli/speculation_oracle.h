#pragma once
// What a policy could have reached: the rounds of recorded texts over again, with the acceptance
// that target and draft really had at each position and the times that were measured.

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "engine/round_values.h"

namespace godwit::cli {

// P(a draft is accepted) at each position of one text: 1 or 0 where both are greedy, else the sum
// of the smaller probabilities.
using AcceptanceTrace = std::vector<double>;

// Of positions prompt_length.. of the text; both models read all of it.
absl::StatusOr<AcceptanceTrace> TraceAcceptance(Engine& target, Engine& draft,
                                                std::span<const int32_t> text,
                                                int64_t prompt_length, float temperature);

struct SimulatedRounds {
  double seconds = 0;
  int64_t num_tokens = 0, num_steps = 0, num_drawn = 0, num_accepted = 0;
  double tokens_per_second() const { return static_cast<double>(num_tokens) / seconds; }
  double verification_rate() const { return PerToken(num_steps); }
  double discard_rate() const { return PerToken(num_drawn - num_accepted); }

 private:
  double PerToken(int64_t count) const {
    return static_cast<double>(count) / static_cast<double>(num_tokens);
  }
};

// Always so many drafts.
SimulatedRounds SimulateFixed(std::span<const AcceptanceTrace> traces, const RoundCosts& costs,
                              int num_drafts);
// Knows the acceptance of each draft once it is drawn, as a policy knows its margin, and of later
// ones only how acceptance is distributed: drafts and drops what pays most at the rate that it
// reaches itself, by dynamic programming over what is drawn and how likely it is to stand. Were
// places independent, no policy that looks at no drawn token could do better.
SimulatedRounds SimulateTrueAcceptance(std::span<const AcceptanceTrace> traces,
                                       const RoundCosts& costs);
// The published rule with the same knowledge: drafts until P(any is rejected) > threshold.
SimulatedRounds SimulateThreshold(std::span<const AcceptanceTrace> traces, const RoundCosts& costs,
                                  double threshold);
// Knows which drafts will be accepted: no policy can.
SimulatedRounds SimulateClairvoyant(std::span<const AcceptanceTrace> traces,
                                    const RoundCosts& costs);

}  // namespace godwit::cli
