#include "engine/rope_table.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numbers>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/json_object.h"
#include "kernels/base/status.h"

namespace godwit {
namespace {

constexpr double kTwoPi = 2 * std::numbers::pi;

double NumPairs(const RopeConfig& config) { return static_cast<double>(config.rotary_dim / 2); }

// theta^(-2i/D)
std::vector<double> Frequencies(double theta, int64_t rotary_dim) {
  std::vector<double> frequencies;
  for (int64_t pair = 0; pair < rotary_dim / 2; ++pair) {
    frequencies.push_back(
        std::pow(theta, -2.0 * static_cast<double>(pair) / static_cast<double>(rotary_dim)));
  }
  return frequencies;
}

std::vector<double> Unscaled(const RopeConfig& config) {
  return Frequencies(config.theta, config.rotary_dim);
}

absl::Status CheckOriginalLength(const RopeConfig& config) {
  if (config.original_length > 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("rope type '", config.type, "': original_max_position_embeddings is missing"));
}

// --- One function per type: num_positions matters to dynamic and longrope only. ---

absl::StatusOr<RopeTable> Default(const RopeConfig& config, int64_t) {
  return RopeTable{.inv_freq = Unscaled(config)};
}

absl::StatusOr<RopeTable> Linear(const RopeConfig& config, int64_t) {
  RopeTable table{.inv_freq = Unscaled(config)};
  for (double& frequency : table.inv_freq) frequency /= config.factor;
  return table;
}

// The fastest pair unchanged, the slowest divided by `scale`.
absl::StatusOr<RopeTable> NtkAwareBy(double scale, const RopeConfig& config) {
  if (config.rotary_dim < 4) {
    return absl::InvalidArgumentError(absl::StrCat("rope type '", config.type, "': rotary width ",
                                                   config.rotary_dim,
                                                   " has no pair between fastest and slowest"));
  }
  const auto width = static_cast<double>(config.rotary_dim);
  const double theta = config.theta * std::pow(scale, width / (width - 2));
  if (!std::isfinite(theta)) {
    return absl::InvalidArgumentError(
        absl::StrCat("rope type '", config.type, "': factor ", config.factor, " is too large"));
  }
  return RopeTable{.inv_freq = Frequencies(theta, config.rotary_dim)};
}

absl::StatusOr<RopeTable> NtkAware(const RopeConfig& config, int64_t) {
  return NtkAwareBy(config.factor, config);
}

absl::StatusOr<RopeTable> Dynamic(const RopeConfig& config, int64_t num_positions) {
  if (config.alpha) return NtkAwareBy(*config.alpha, config);
  RETURN_IF_ERROR(CheckOriginalLength(config));
  const auto length = static_cast<double>(std::max(num_positions, config.original_length));
  const double grown = length / static_cast<double>(config.original_length);
  return NtkAwareBy(config.factor * grown - (config.factor - 1), config);
}

absl::StatusOr<RopeTable> Ntk(const RopeConfig& config, int64_t) {
  if (!config.mixed_b) {
    RopeTable table{.inv_freq = Frequencies(config.theta * config.factor, config.rotary_dim)};
    const double divisor = std::pow(config.factor, 2.0 / static_cast<double>(config.rotary_dim));
    for (double& frequency : table.inv_freq) frequency /= divisor;
    return table;
  }
  RopeTable table{.inv_freq = Unscaled(config)};
  const double slope = std::log(config.factor) / std::pow(NumPairs(config), *config.mixed_b);
  double index = 1;
  for (double& frequency : table.inv_freq) {
    frequency /= std::exp(slope * std::pow(index++, *config.mixed_b));
  }
  return table;
}

absl::StatusOr<RopeTable> NtkByParts(const RopeConfig& config, int64_t) {
  RETURN_IF_ERROR(CheckOriginalLength(config));
  const double low = config.low_freq_factor, high = config.high_freq_factor;
  if (!(low < high)) {
    return absl::InvalidArgumentError(absl::StrCat("rope type '", config.type, "': low factor ",
                                                   low, " is not below the high one, ", high));
  }
  RopeTable table{.inv_freq = Unscaled(config)};
  for (double& frequency : table.inv_freq) {
    const double turns = static_cast<double>(config.original_length) * frequency / kTwoPi;
    const double keep = std::clamp((turns - low) / (high - low), 0.0, 1.0);
    frequency = (1 - keep) * frequency / config.factor + keep * frequency;
  }
  return table;
}

double YarnMscale(double factor, double mscale) {
  return factor <= 1 ? 1 : 0.1 * mscale * std::log(factor) + 1;
}

double YarnAttentionFactor(const RopeConfig& config) {
  if (config.attention_factor) return *config.attention_factor;
  if (config.mscale != 0 && config.mscale_all_dim != 0) {
    return YarnMscale(config.factor, config.mscale) /
           YarnMscale(config.factor, config.mscale_all_dim);
  }
  return YarnMscale(config.factor, 1);
}

absl::StatusOr<RopeTable> Yarn(const RopeConfig& config, int64_t) {
  RETURN_IF_ERROR(CheckOriginalLength(config));
  if (!(config.beta_slow < config.beta_fast) || !(config.theta > 1)) {
    return absl::InvalidArgumentError(
        absl::StrCat("rope type 'yarn': expected beta_slow < beta_fast and theta > 1, found ",
                     config.beta_slow, ", ", config.beta_fast, " and ", config.theta));
  }
  const auto width = static_cast<double>(config.rotary_dim);
  // The pair, as a real index, that makes so many turns within L.
  const auto pair_of = [&](double turns) {
    return width * std::log(static_cast<double>(config.original_length) / (turns * kTwoPi)) /
           (2 * std::log(config.theta));
  };
  double low = pair_of(config.beta_fast), high = pair_of(config.beta_slow);
  if (config.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, width - 1);  // of the width, not of the pairs, in every implementation
  if (low == high) high += 0.001;
  RopeTable table{.inv_freq = Unscaled(config), .attention_factor = YarnAttentionFactor(config)};
  double index = 0;
  for (double& frequency : table.inv_freq) {
    const double keep = 1 - std::clamp((index++ - low) / (high - low), 0.0, 1.0);
    frequency = frequency / config.factor * (1 - keep) + frequency * keep;
  }
  return table;
}

absl::StatusOr<RopeTable> LongRope(const RopeConfig& config, int64_t num_positions) {
  RETURN_IF_ERROR(CheckOriginalLength(config));
  const bool is_long = num_positions > config.original_length;
  const std::vector<double>& divisors = is_long ? config.long_factor : config.short_factor;
  RopeTable table{.inv_freq = Unscaled(config)};
  if (divisors.size() != table.inv_freq.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("rope type '", config.type, "': ", is_long ? "long_factor" : "short_factor",
                     ": expected ", table.inv_freq.size(), " numbers, found ", divisors.size()));
  }
  for (size_t pair = 0; pair < divisors.size(); ++pair) table.inv_freq[pair] /= divisors[pair];
  const std::optional<double>& mscale = is_long ? config.long_mscale : config.short_mscale;
  if (mscale) {
    table.attention_factor = *mscale;
  } else if (config.attention_factor) {
    table.attention_factor = *config.attention_factor;
  } else if (config.factor > 1) {
    table.attention_factor = std::sqrt(
        1 + std::log(config.factor) / std::log(static_cast<double>(config.original_length)));
  }
  return table;
}

absl::StatusOr<RopeTable> Proportional(const RopeConfig& config, int64_t) {
  RopeTable table{.inv_freq = Unscaled(config)};
  const double num_rotated =
      std::floor(config.rotated_share * static_cast<double>(config.rotary_dim) / 2);
  double index = 0;
  for (double& frequency : table.inv_freq) {
    frequency = index++ < num_rotated ? frequency / config.factor : 0;
  }
  return table;
}

absl::StatusOr<RopeTable> Giraffe(const RopeConfig& config, int64_t) {
  RopeTable table{.inv_freq = Unscaled(config)};
  double index = config.power_first_index;
  for (double& frequency : table.inv_freq) {
    frequency /= config.factor;
    if (config.power > 0) frequency *= std::pow(1 - index++ / NumPairs(config), config.power);
    if (frequency >= config.truncate_high) continue;
    frequency = frequency >= config.truncate_low ? config.truncate_value : 0;
  }
  return table;
}

struct RopeType {
  absl::string_view name;
  absl::StatusOr<RopeTable> (*make)(const RopeConfig& config, int64_t num_positions);
};

constexpr RopeType kTypes[] = {
    {"default", Default},
    {"linear", Linear},
    {"dynamic", Dynamic},
    {"yarn", Yarn},
    {"longrope", LongRope},
    {"su", LongRope},  // its older name
    {"llama3", NtkByParts},
    {"proportional", Proportional},
    {"ntk", Ntk},
    {"ntk-aware", NtkAware},
    {"ntk-by-parts", NtkByParts},
    {"giraffe", Giraffe},
};

const RopeType* FindType(absl::string_view name) {
  for (const RopeType& type : kTypes) {
    if (type.name == name) return &type;
  }
  return nullptr;
}

absl::Status CheckNumbers(const RopeConfig& config) {
  if (config.rotary_dim < 2 || config.rotary_dim % 2 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("rotary width: expected an even number >= 2, found ", config.rotary_dim));
  }
  if (!(config.theta > 0) || !(config.factor >= 1) || !std::isfinite(config.factor)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "rope: expected theta > 0 and factor >= 1, found ", config.theta, " and ", config.factor));
  }
  return absl::OkStatus();
}

// The finaliser of SplitMix64.
uint64_t Mix(uint64_t word) {
  word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9u;
  word = (word ^ (word >> 27)) * 0x94d049bb133111ebu;
  return word ^ (word >> 31);
}

RopeRegime Digest(const RopeTable& table) {
  RopeRegime regime = {{0x243f6a8885a308d3u, 0x13198a2e03707344u}};
  const auto add = [&regime](uint64_t word) {
    regime.digest[0] = Mix(regime.digest[0] + 0x9e3779b97f4a7c15u + word);
    regime.digest[1] = Mix((regime.digest[1] ^ word) * 0xd6e8feb86659fd93u + 1);
  };
  add(table.inv_freq.size());
  add(static_cast<uint64_t>(table.pair_layout));
  add(std::bit_cast<uint64_t>(table.attention_factor));
  for (const double frequency : table.inv_freq) add(std::bit_cast<uint64_t>(frequency));
  return regime;
}

}  // namespace

std::string RopeRegime::ToString() const {
  return absl::StrFormat("%016x%016x", digest[0], digest[1]);
}

absl::StatusOr<RopeTable> MakeRopeTable(const RopeConfig& config, int64_t num_positions) {
  const RopeType* type = FindType(config.type);
  if (type == nullptr) {
    return absl::UnimplementedError(absl::StrCat("rope type '", Shown(config.type),
                                                 "' is not built in, only ", RopeTypeNames()));
  }
  RETURN_IF_ERROR(CheckNumbers(config));
  ASSIGN_OR_RETURN(RopeTable table, type->make(config, num_positions));
  table.pair_layout = config.pair_layout;
  table.regime = Digest(table);
  return table;
}

absl::StatusOr<std::shared_ptr<const RopeTable>> RopeOfRequest(const ModelConfig& config,
                                                               const RopeConfig* chosen,
                                                               int64_t num_positions) {
  if (!config.rope || (chosen == nullptr && !DependsOnLength(*config.rope))) return nullptr;
  ASSIGN_OR_RETURN(const RopeTable own, MakeRopeTable(*config.rope));
  ASSIGN_OR_RETURN(RopeTable table,
                   MakeRopeTable(chosen == nullptr ? *config.rope : *chosen, num_positions));
  if (table.regime == own.regime) return nullptr;
  return std::make_shared<const RopeTable>(std::move(table));
}

std::string RopeTypeNames() {
  std::string names;
  for (const RopeType& type : kTypes)
    absl::StrAppend(&names, names.empty() ? "'" : ", '", type.name, "'");
  return names;
}

bool IsRopeType(absl::string_view type) { return FindType(type) != nullptr; }

bool DependsOnLength(const RopeConfig& config) {
  return (config.type == "dynamic" && !config.alpha) || config.type == "longrope" ||
         config.type == "su";
}

}  // namespace godwit
