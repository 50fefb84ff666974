#include "cli/speculation_oracle.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <utility>

#include "engine/offline.h"
#include "kernels/base/status.h"

namespace godwit::cli {
namespace {

constexpr int kRepetitions = 8;  // of each text, with other draws of what is accepted
constexpr int kRateIterations = 12;
constexpr int kQuantiles = 64;  // of acceptance

std::vector<double> Softmax(std::span<const float> logits, float temperature) {
  std::vector<double> p(logits.size());
  const double most = static_cast<double>(*std::max_element(logits.begin(), logits.end()));
  double sum = 0;
  for (size_t id = 0; id < p.size(); ++id) {
    sum += p[id] =
        std::exp((static_cast<double>(logits[id]) - most) / static_cast<double>(temperature));
  }
  for (double& value : p) value /= sum;
  return p;
}

double Acceptance(std::span<const float> target, std::span<const float> draft, float temperature) {
  if (temperature == 0) {
    const auto best = [](std::span<const float> logits) {
      return std::max_element(logits.begin(), logits.end()) - logits.begin();
    };
    return best(target) == best(draft) ? 1 : 0;
  }
  const std::vector<double> p = Softmax(target, temperature), q = Softmax(draft, temperature);
  double shared = 0;
  for (size_t id = 0; id < p.size(); ++id) shared += std::min(p[id], q[id]);
  return shared;
}

// How a round goes: the acceptance from its first place on, and which of these would be accepted,
// to the numbers of drafts that are drawn and verified.
struct Round {
  int num_drawn = 0, num_verified = 0;
};
using Policy = std::function<Round(std::span<const double> acceptance, int num_would_stand)>;

SimulatedRounds Simulate(std::span<const AcceptanceTrace> traces, const RoundCosts& costs,
                         const Policy& policy) {
  SimulatedRounds sum;
  std::mt19937 random(1);
  std::uniform_real_distribution<double> uniform;
  for (int repetition = 0; repetition < kRepetitions; ++repetition) {
    for (const AcceptanceTrace& trace : traces) {
      const auto length = static_cast<int64_t>(trace.size());
      for (int64_t position = 0; position < length;) {
        const std::span<const double> rest =
            std::span(trace).subspan(static_cast<size_t>(position));
        int num_would_stand = 0;
        for (const double p : rest) {
          if (uniform(random) >= p) break;
          ++num_would_stand;
        }
        // The last token of a text needs no draft.
        const Round round = policy(rest.first(rest.size() - 1), num_would_stand);
        const int num_accepted = std::min(round.num_verified, num_would_stand);
        sum.seconds +=
            costs.Passes(round.num_drawn) + costs.verify[static_cast<size_t>(round.num_verified)];
        sum.num_tokens += 1 + num_accepted;
        sum.num_accepted += num_accepted;
        sum.num_drawn += round.num_drawn;
        ++sum.num_steps;
        position += 1 + num_accepted;
      }
    }
  }
  return sum;
}

SimulatedRounds SimulateAtRate(std::span<const AcceptanceTrace> traces, const RoundCosts& costs,
                               std::span<const double> acceptances, double rate) {
  const RoundValues values(costs, acceptances, 0, rate);
  return Simulate(traces, costs, [&](std::span<const double> acceptance, int) {
    Round round;
    double survival = 1;
    const int limit = std::min(values.most(), static_cast<int>(acceptance.size()));
    while (round.num_drawn < limit && values.GoesOn(round.num_verified, survival)) {
      survival *= acceptance[static_cast<size_t>(round.num_drawn++)];
      if (!values.Keeps(round.num_verified, survival)) break;
      round.num_verified = round.num_drawn;
    }
    return round;
  });
}

}  // namespace

absl::StatusOr<AcceptanceTrace> TraceAcceptance(Engine& target, Engine& draft,
                                                std::span<const int32_t> text,
                                                int64_t prompt_length, float temperature) {
  const auto vocab = static_cast<size_t>(target.card().config.vocab_size);
  std::vector<float> target_logits(text.size() * vocab), draft_logits(text.size() * vocab);
  RETURN_IF_ERROR(ScoreOffline(target, text, 0, target_logits.data()).status());
  RETURN_IF_ERROR(ScoreOffline(draft, text, 0, draft_logits.data()).status());
  AcceptanceTrace trace;
  for (size_t position = static_cast<size_t>(prompt_length); position < text.size(); ++position) {
    const size_t row = (position - 1) * vocab;
    trace.push_back(Acceptance(std::span(target_logits).subspan(row, vocab),
                               std::span(draft_logits).subspan(row, vocab), temperature));
  }
  return trace;
}

SimulatedRounds SimulateFixed(std::span<const AcceptanceTrace> traces, const RoundCosts& costs,
                              int num_drafts) {
  return Simulate(traces, costs, [&](std::span<const double> acceptance, int) {
    const int drafts = std::min(num_drafts, static_cast<int>(acceptance.size()));
    return Round{drafts, drafts};
  });
}

SimulatedRounds SimulateTrueAcceptance(std::span<const AcceptanceTrace> traces,
                                       const RoundCosts& costs) {
  std::vector<double> all;
  for (const AcceptanceTrace& trace : traces) all.insert(all.end(), trace.begin(), trace.end());
  const std::vector<double> acceptances = Quantiles(std::move(all), kQuantiles);
  SimulatedRounds best = SimulateFixed(traces, costs, 0);
  for (int iteration = 0; iteration < kRateIterations; ++iteration) {
    const SimulatedRounds next =
        SimulateAtRate(traces, costs, acceptances, best.tokens_per_second());
    if (next.tokens_per_second() <= best.tokens_per_second()) break;
    best = next;
  }
  return best;
}

SimulatedRounds SimulateThreshold(std::span<const AcceptanceTrace> traces, const RoundCosts& costs,
                                  double threshold) {
  const auto most = static_cast<int>(costs.verify.size()) - 1;
  return Simulate(traces, costs, [&](std::span<const double> acceptance, int) {
    const int limit = std::min(most, static_cast<int>(acceptance.size()));
    double survival = 1;
    int drafts = 0;
    while (drafts < limit && 1 - survival <= threshold) {
      survival *= acceptance[static_cast<size_t>(drafts++)];
    }
    return Round{drafts, drafts};
  });
}

SimulatedRounds SimulateClairvoyant(std::span<const AcceptanceTrace> traces,
                                    const RoundCosts& costs) {
  const auto most = static_cast<int>(costs.verify.size()) - 1;
  double rate = SimulateFixed(traces, costs, 0).tokens_per_second();
  SimulatedRounds best;
  for (int iteration = 0; iteration < kRateIterations; ++iteration) {
    best = Simulate(traces, costs, [&](std::span<const double> acceptance, int num_would_stand) {
      const int limit = std::min({most, num_would_stand, static_cast<int>(acceptance.size())});
      int drafts = 0;
      double most_worth = 0;
      for (int count = 1; count <= limit; ++count) {
        const double seconds = costs.verify[static_cast<size_t>(count)] - costs.verify[0];
        const double worth = count - rate * (seconds + costs.Passes(count));
        if (worth <= most_worth) continue;
        most_worth = worth;
        drafts = count;
      }
      return Round{drafts, drafts};
    });
    if (best.tokens_per_second() <= rate * 1.0001) break;
    rate = best.tokens_per_second();
  }
  return best;
}

}  // namespace godwit::cli
