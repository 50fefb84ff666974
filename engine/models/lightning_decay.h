#pragma once
// How fast each head of lightning attention forgets. Rates are formed in double; the tables hold
// exp(-s m), never products of a rounded lambda: the last layer's lambda is 1 - 1e-5 s, where one
// f32 rounding is 1 % of the rate.

#include <cstdint>
#include <vector>

#include "engine/model_config.h"

namespace godwit {

// ALiBi slopes. num_heads = 2^p: 2^(-8 (h + 1) / num_heads). Else the slopes of the largest power
// of two below, then entries 0, 2, 4, ... of those of the next one: 6 heads are 1/4, 1/16, 1/64,
// 1/256, 1/2, 1/8.
std::vector<double> AlibiSlopes(int64_t num_heads);

// The rate s[h] of each head of `layer`, of `num_layers` >= 2 in all.
std::vector<double> DecayRates(DecayRule rule, int64_t num_heads, int64_t layer,
                               int64_t num_layers);

// Host values of LightningDecay (kernels/ops.h), row-major.
struct DecayTables {
  std::vector<float> decay;         // [num_heads, kPrefillBlock + 1]
  std::vector<float> fold_epsilon;  // [num_heads, 2]
};
DecayTables MakeDecayTables(const std::vector<double>& rates);

}  // namespace godwit
