#include "engine/round_ways.h"

#include <algorithm>
#include <cmath>

namespace godwit {
namespace {

constexpr double kMemory = 0.999;           // per step of the same way
constexpr double kMemoryOfOthers = 0.9995;  // per step of another: what was learnt grows old
constexpr double kMaxBonus = 0.5;
constexpr double kMemoryAtTrial = 0.5;
// Of a prior: rounds of one sequence, what they expect each, and the spread of that.
constexpr double kPriorRounds = 100, kPriorTokens = 2, kPriorSpread = 1.2;

}  // namespace

RoundWays::RoundWays(const Gains& prior, int64_t num_sequences) {
  const double steps = std::max(kPriorRounds / static_cast<double>(num_sequences), double{kRun});
  for (size_t way = 0; way < kNumRoundWays; ++way) {
    if (prior[way] == 0) continue;
    ways_[way] = {
        .steps = steps,
        .tokens = steps * kPriorTokens * prior[way],
        .expected = steps * kPriorTokens,
        .deviation = steps * kPriorSpread * kPriorSpread / static_cast<double>(num_sequences)};
  }
}

// Half a standard error above.
double RoundWays::Way::most_gain() const {
  if (expected == 0) return 0;
  return gain() + std::min(0.5 * std::sqrt(deviation) / expected, kMaxBonus);
}

void RoundWays::Way::Fade(double memory) {
  for (double* sum : {&steps, &tokens, &expected, &deviation}) *sum *= memory;
}

bool RoundWays::has_choice() const {
  return std::count_if(ways_.begin(), ways_.end(),
                       [](const Way& way) { return way.expected > 0; }) > 1;
}

RoundWay RoundWays::Best() const {
  double most = 0;
  auto best = RoundWay::kPlanned;
  for (size_t way = 0; way < kNumRoundWays; ++way) {
    const double gain = ways_[way].most_gain();
    if (gain > most) most = gain, best = static_cast<RoundWay>(way);
  }
  return best;
}

RoundWay RoundWays::Next() {
  if (num_taken_++ < kRun) return current_;
  num_taken_ = 1;
  current_ = Best();
  Way& best = ways_[static_cast<size_t>(current_)];
  best.pause = best.until = kFirstPause;
  for (size_t index = 0; index < kNumRoundWays; ++index) {
    Way& way = ways_[index];
    if (&way == &best || way.expected == 0 || (way.until -= kRun) > 0) continue;
    way.pause = std::min(2 * way.pause, kLongestPause);
    way.until = way.pause;
    way.Fade(kMemoryAtTrial);
    current_ = static_cast<RoundWay>(index);
    break;
  }
  return current_;
}

void RoundWays::Observe(RoundWay way, double tokens, double expected) {
  for (size_t index = 0; index < kNumRoundWays; ++index) {
    ways_[index].Fade(index == static_cast<size_t>(way) ? kMemory : kMemoryOfOthers);
  }
  Way& taken = ways_[static_cast<size_t>(way)];
  taken.steps += 1;
  taken.tokens += tokens;
  taken.expected += expected;
  const double beyond = tokens - taken.gain() * expected;
  taken.deviation += beyond * beyond;
}

}  // namespace godwit
