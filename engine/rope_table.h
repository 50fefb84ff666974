#pragma once
// Every RoPE variant is a table: frequencies in double, an attention factor, a width and a pair layout. Kernels never know
// the method.

#include <vector>

#include "absl/status/statusor.h"
#include "engine/model_config.h"

namespace godwit {

struct RopeTable {
  std::vector<double> inv_freq;  // [rotary_dim / 2], radians per token
  double attention_factor = 1;   // multiplies cos and sin
  PairLayout pair_layout = PairLayout::kHalfSplit;
};

// default: theta^(-2i/D); linear: that over factor (2306.15595). Unknown type: UNIMPLEMENTED naming it.
absl::StatusOr<RopeTable> MakeRopeTable(const RopeConfig& config);

}  // namespace godwit
