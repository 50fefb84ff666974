#pragma once
// Every RoPE variant is a table: frequencies in double, an attention factor, a width and a pair
// layout. Kernels never know the method. What depends on the length of a request is decided once,
// when its table is made.

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model_config.h"
#include "engine/rope_regime.h"

namespace godwit {

struct RopeTable {
  std::vector<double> inv_freq;  // [rotary_dim / 2], radians per token
  double attention_factor = 1;   // multiplies cos and sin
  PairLayout pair_layout = PairLayout::kHalfSplit;
  RopeRegime regime;  // digest of the above
};

// The table for a request that rotates `num_positions` positions. With theta_i = theta^(-2i/D), s =
// factor, L = original_length and i counted from 0:
//
//   default      theta_i
//   linear       theta_i / s                                              (2306.15595 eq. 4)
//   dynamic      theta'^(-2i/D), theta' = theta a^(D/(D-2)), a = s n/L - (s-1), n =
//   max(num_positions, L);
//                or a = alpha when that is given
//   ntk-aware    the same with a = s
//   ntk          (theta s)^(-2i/D) / s^(2/D); with mixed_b: theta_i / exp(c (i+1)^b), c = ln s /
//   (D/2)^b ntk-by-parts g = clamp((L theta_i / 2 pi - low) / (high - low), 0, 1): (1-g) theta_i/s
//   + g theta_i
//                                                                         (2309.00071 eq. 13, ramp
//                                                                         in turns)
//   llama3       that very formula, as the Llama 3.1 checkpoints declare it
//   yarn         the same blend with a ramp in the pair index, as every implementation has it and
//                checkpoints were trained; attention factor 0.1 ln s + 1
//   longrope     theta_i / short_factor_i, or / long_factor_i when num_positions > L; attention
//   factor
//                sqrt(1 + ln s / ln L)                                    (2402.13753)
//   proportional theta_i / s for i < rotated_share D / 2, 0 after
//   giraffe      theta_i / s, times (1 - (i + first)/(D/2))^power, then truncated: kept from
//                truncate_high, truncate_value from truncate_low, 0 below (2308.10882)
//
// UNIMPLEMENTED naming an unknown type; INVALID_ARGUMENT naming the field that makes no table.
absl::StatusOr<RopeTable> MakeRopeTable(const RopeConfig& config, int64_t num_positions = 0);

// Positions that a request can rotate: the last token it draws is never computed.
inline int64_t NumRotatedPositions(int64_t num_prompt, int64_t max_tokens) {
  return num_prompt + std::max<int64_t>(max_tokens - 1, 0);
}

// The table of one request, decided at its admission and never changed: that of `chosen`, or of the
// model's own method where it chose none. Null where that is the model's own table, and for a model
// without RoPE. Errors as MakeRopeTable's.
absl::StatusOr<std::shared_ptr<const RopeTable>> RopeOfRequest(const ModelConfig& config,
                                                               const RopeConfig* chosen,
                                                               int64_t num_positions);

// The types above in one line, for messages.
std::string RopeTypeNames();
bool IsRopeType(absl::string_view type);

// Whether requests of different lengths may get different tables.
bool DependsOnLength(const RopeConfig& config);

}  // namespace godwit
