#include "engine/rope_table.h"

#include <cmath>

#include "absl/strings/str_cat.h"

namespace godwit {

absl::StatusOr<RopeTable> MakeRopeTable(const RopeConfig& config) {
  const bool is_linear = config.type == "linear";
  if (!is_linear && config.type != "default") {
    return absl::UnimplementedError(
        absl::StrCat("rope type '", config.type, "' is not built in, only 'default' and 'linear'"));
  }
  if (config.rotary_dim < 2 || config.rotary_dim % 2 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("rotary width: expected an even number >= 2, found ", config.rotary_dim));
  }
  if (!(config.theta > 0) || !(config.factor >= 1)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "rope: expected theta > 0 and factor >= 1, found ", config.theta, " and ", config.factor));
  }
  RopeTable table;
  table.pair_layout = config.pair_layout;
  const double divisor =
      is_linear ? config.factor : 1;  // linear interpolation: position / factor (2306.15595 eq. 4)
  for (int64_t pair = 0; pair < config.rotary_dim / 2; ++pair) {
    const double exponent =
        -2.0 * static_cast<double>(pair) / static_cast<double>(config.rotary_dim);
    table.inv_freq.push_back(std::pow(config.theta, exponent) / divisor);
  }
  return table;
}

}  // namespace godwit
