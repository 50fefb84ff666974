#include "engine/models/lightning_decay.h"

#include <bit>
#include <cmath>

#include "kernels/base/check.h"

namespace godwit {
namespace {

double PowerOfTwoSlope(int64_t head, int64_t num_heads) {
  return std::exp2(-8.0 * static_cast<double>(head + 1) / static_cast<double>(num_heads));
}

}  // namespace

std::vector<double> AlibiSlopes(int64_t num_heads) {
  GODWIT_CHECK(num_heads > 0);
  const auto floor = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(num_heads)));
  std::vector<double> slopes;
  for (int64_t head = 0; head < floor; ++head) slopes.push_back(PowerOfTwoSlope(head, floor));
  for (int64_t head = 0; head < num_heads - floor; ++head)
    slopes.push_back(PowerOfTwoSlope(2 * head, 2 * floor));
  return slopes;
}

std::vector<double> DecayRates(DecayRule rule, int64_t num_heads, int64_t layer,
                               int64_t num_layers) {
  GODWIT_CHECK(rule == DecayRule::kAlibiLayer);
  GODWIT_CHECK(num_layers >= 2);
  std::vector<double> rates = AlibiSlopes(num_heads);
  const double factor = 1 - static_cast<double>(layer) / static_cast<double>(num_layers - 1) + 1e-5;
  for (double& rate : rates) rate *= factor;
  return rates;
}

DecayTables MakeDecayTables(const std::vector<double>& rates) {
  DecayTables tables;
  for (const double rate : rates) {
    for (int distance = 0; distance <= kPrefillBlock; ++distance) {
      tables.decay.push_back(static_cast<float>(std::exp(-rate * distance)));
    }
    tables.fold_epsilon.push_back(static_cast<float>(-std::expm1(-rate * kWindow)));
    tables.fold_epsilon.push_back(static_cast<float>(-std::expm1(-rate * kPrefillBlock)));
  }
  return tables;
}

}  // namespace godwit
