#pragma once
// What a policy could have reached: the rounds of recorded texts over again, with the acceptance
// that target and draft really had at each position and the times that were measured.

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/engine.h"

namespace godwit::cli {

// P(a draft is accepted) at each position of one text: 1 or 0 where both are greedy, else the sum
// of the smaller probabilities.
using AcceptanceTrace = std::vector<double>;

// Of positions prompt_length.. of the text; both models read all of it.
absl::StatusOr<AcceptanceTrace> TraceAcceptance(Engine& target, Engine& draft,
                                                std::span<const int32_t> text,
                                                int64_t prompt_length, float temperature);

// Seconds of a draft, and of a step of the target by number of drafts that it verifies.
struct RoundCosts {
  double pass = 0;
  std::vector<double> verify;  // [0 .. most drafts]
};

struct SimulatedRounds {
  double seconds = 0;
  int64_t num_tokens = 0, num_steps = 0, num_drawn = 0, num_accepted = 0;
  double tokens_per_second() const { return static_cast<double>(num_tokens) / seconds; }
};

// Always so many drafts.
SimulatedRounds SimulateFixed(std::span<const AcceptanceTrace> traces, const RoundCosts& costs,
                              int num_drafts);
// Knows the acceptance of each draft once it is drawn, as a policy knows its margin, and nothing of
// later ones but their mean: drafts and drops what pays at the rate that it reaches itself.
SimulatedRounds SimulateTrueAcceptance(std::span<const AcceptanceTrace> traces,
                                       const RoundCosts& costs);
// Knows which drafts will be accepted: no policy can.
SimulatedRounds SimulateClairvoyant(std::span<const AcceptanceTrace> traces,
                                    const RoundCosts& costs);

}  // namespace godwit::cli
