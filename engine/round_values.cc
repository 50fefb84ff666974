#include "engine/round_values.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <numeric>
#include <utility>

#include "kernels/base/check.h"

namespace godwit {

RoundValues::RoundValues(const RoundCosts& costs, std::span<const double> acceptances, int lag,
                         double rate)
    : costs_(costs), acceptances_(acceptances.begin(), acceptances.end()), lag_(lag), rate_(rate) {
  GODWIT_CHECK(!acceptances_.empty() && most() >= 1);
  mean_ = std::accumulate(acceptances_.begin(), acceptances_.end(), 0.0) /
          static_cast<double>(acceptances_.size());
  values_.resize(costs_.verify.size());
  values_.back().fill(Stop(most()));
  for (int kept = most() - 1; kept >= 0; --kept) {
    Row& row = values_[static_cast<size_t>(kept)];
    for (int point = 0; point <= kGrid; ++point) {
      const double survival = static_cast<double>(point) / kGrid;
      row[static_cast<size_t>(point)] = std::max(Enough(kept, survival), GoOn(kept, survival));
    }
  }
}

double RoundValues::At(int kept, double survival) const {
  const Row& row = values_[static_cast<size_t>(kept)];
  const auto point = std::min(static_cast<size_t>(survival * kGrid), size_t{kGrid - 1});
  const double share = survival * kGrid - static_cast<double>(point);
  return row[point] + share * (row[point + 1] - row[point]);
}

// Nothing more is drawn.
double RoundValues::Enough(int kept, double survival) const {
  return lag_ == 0 ? Stop(kept) : survival * mean_ + Stop(kept + 1);
}

double RoundValues::GoOn(int kept, double survival) const {
  if (kept + lag_ >= most()) return -HUGE_VAL;
  double sum = 0;
  for (const double p : acceptances_) {
    sum += std::max(Stop(kept), survival * p + At(kept + 1, survival * p));
  }
  return sum / static_cast<double>(acceptances_.size()) - rate_ * costs_.pass;
}

double RoundValues::First() const {
  if (lag_ > 0) return At(0, 1) - rate_ * costs_.first_pass;
  return GoOn(0, 1) - rate_ * (costs_.first_pass - costs_.pass);
}

double RoundValues::ValueOfRound() const { return 1 + std::max(Stop(0), First()); }

std::vector<double> Quantiles(std::vector<double> values, int parts) {
  std::sort(values.begin(), values.end());
  const size_t count = std::min(values.size(), static_cast<size_t>(parts));
  std::vector<double> means(count);
  for (size_t part = 0; part < count; ++part) {
    const size_t begin = values.size() * part / count, end = values.size() * (part + 1) / count;
    const auto first = values.begin() + static_cast<std::ptrdiff_t>(begin);
    const auto last = values.begin() + static_cast<std::ptrdiff_t>(end);
    means[part] = std::accumulate(first, last, 0.0) / static_cast<double>(end - begin);
  }
  return means;
}

}  // namespace godwit
