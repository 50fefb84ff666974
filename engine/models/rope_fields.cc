// The rotary embedding of a config.json, of --rope and of a request: one dictionary, one reader.

#include <cmath>
#include <numbers>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/model_config.h"
#include "engine/models/config_fields.h"
#include "engine/rope_table.h"
#include "kernels/base/status.h"

namespace godwit {
namespace {

constexpr double kMinTheta = 1, kMaxTheta = 1e15;
constexpr double kMaxFactor = 1e6;
constexpr double kMaxTurns = 1e6;   // bounds of a ramp
constexpr double kMaxMscale = 100;  // what multiplies cos and sin
constexpr double kMinShare = 1e-6;
constexpr double kMaxPower = 100;
constexpr double kMaxFrequency = 1e6;  // radians per token

// Whose dictionary it is: the same field may say more than one thing.
struct Origin {
  bool is_checkpoint = true;
  int64_t max_positions = 0;  // max_position_embeddings
};

// `rope_type`, or its older spelling `type`; "default" when neither is there.
std::string ReadType(JsonObject& rope) {
  const std::string newer = rope.StringOr("rope_type", "");
  const std::string older = rope.StringOr("type", "");
  if (!newer.empty() && !older.empty() && newer != older) {
    rope.Fail(absl::InvalidArgumentError(
        absl::StrCat(rope.where(), ": rope_type is '", newer, "' but type is '", older, "'")));
  }
  const std::string type = newer.empty() ? older : newer;
  return type.empty() ? "default" : type;
}

// What says how wide and how far the model was made to rotate, whatever the method.
void ReadShape(JsonObject& rope, RopeConfig& config) {
  config.theta = rope.NumberOr("rope_theta", kMinTheta, kMaxTheta, config.theta);
  config.original_length =
      rope.IntOr("original_max_position_embeddings", 1, kMaxContextLength, config.original_length);
  const bool interleaved = config.pair_layout == PairLayout::kInterleaved;
  config.pair_layout =
      rope.BoolOr("interleaved", interleaved) ? PairLayout::kInterleaved : PairLayout::kHalfSplit;
}

// rotary width = int(head_dim * share); with 'proportional' the width stays whole.
absl::Status ApplyShare(const std::string& where, double share, int64_t head_dim,
                        RopeConfig& config) {
  if (config.type == "proportional") {
    config.rotary_dim = head_dim;
    config.rotated_share = share;
    return absl::OkStatus();
  }
  const auto width = static_cast<int64_t>(static_cast<double>(head_dim) * share);
  if (width < 2 || width % 2 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": partial_rotary_factor: expected an even width of the head's ",
                     head_dim, ", found ", share, ", which gives ", width));
  }
  config.rotary_dim = width;
  return absl::OkStatus();
}

// factor, where it may be left to the two lengths: max_position_embeddings over the original one.
void ReadFactorOrRatio(JsonObject& rope, const Origin& origin, RopeConfig& config) {
  if (rope.Has("factor") || config.original_length == 0) {
    config.factor = rope.Number("factor", 1, kMaxFactor);
    return;
  }
  config.factor =
      static_cast<double>(origin.max_positions) / static_cast<double>(config.original_length);
  if (config.factor >= 1) return;
  rope.Fail(absl::InvalidArgumentError(absl::StrCat(
      rope.where(), ": factor is missing, and max_position_embeddings ", origin.max_positions,
      " is below original_max_position_embeddings ", config.original_length)));
}

void ReadLongRope(JsonObject& rope, const Origin& origin, RopeConfig& config) {
  config.short_factor = rope.NumberList("short_factor", 1e-6, kMaxFactor, kMaxHeadDim);
  config.long_factor = rope.NumberList("long_factor", 1e-6, kMaxFactor, kMaxHeadDim);
  config.attention_factor = rope.OptionalNumber("attention_factor", 1e-6, kMaxMscale);
  config.short_mscale = rope.OptionalNumber("short_mscale", 1e-6, kMaxMscale);
  config.long_mscale = rope.OptionalNumber("long_mscale", 1e-6, kMaxMscale);
  if (config.original_length == 0) {
    rope.Fail(absl::InvalidArgumentError(absl::StrCat(
        rope.where(), ": original_max_position_embeddings: required field is missing")));
  }
  ReadFactorOrRatio(rope, origin, config);
}

void ReadYarn(JsonObject& rope, const Origin& origin, RopeConfig& config) {
  config.attention_factor = rope.OptionalNumber("attention_factor", 1e-6, kMaxMscale);
  config.beta_fast = rope.NumberOr("beta_fast", 1e-6, kMaxTurns, config.beta_fast);
  config.beta_slow = rope.NumberOr("beta_slow", 1e-6, kMaxTurns, config.beta_slow);
  config.mscale = rope.NumberOr("mscale", 0, kMaxMscale, 0);
  config.mscale_all_dim = rope.NumberOr("mscale_all_dim", 0, kMaxMscale, 0);
  config.truncate = rope.BoolOr("truncate", true);
  rope.Ignore({"finetuned"});
  ReadFactorOrRatio(rope, origin, config);
}

// L is max_position_embeddings in every library that trained or serves such checkpoints, even
// beside an original length. One that disagrees is refused rather than resolved silently.
void ReadDynamic(JsonObject& rope, const Origin& origin, RopeConfig& config) {
  config.alpha = rope.OptionalNumber("alpha", 1, kMaxFactor);
  config.factor = config.alpha ? rope.NumberOr("factor", 1, kMaxFactor, 1)
                               : rope.Number("factor", 1, kMaxFactor);
  if (origin.is_checkpoint && config.original_length != 0 &&
      config.original_length != origin.max_positions) {
    rope.Fail(absl::InvalidArgumentError(
        absl::StrCat(rope.where(), ": rope type 'dynamic' grows from max_position_embeddings, ",
                     origin.max_positions, ", but original_max_position_embeddings is ",
                     config.original_length, "; say with --rope which it is")));
  }
}

void ReadGiraffe(JsonObject& rope, RopeConfig& config) {
  config.factor = rope.NumberOr("factor", 1, kMaxFactor, 1);
  config.power = rope.NumberOr("power", 0, kMaxPower, 0);
  config.power_first_index = static_cast<int32_t>(rope.IntOr("power_first_index", 0, 1, 0));
  // The repository has one number T; the paper three frequencies a < b and rho.
  if (const auto length = rope.OptionalInt("truncate_length", 1, kMaxContextLength)) {
    const double lowest_kept = 2 * std::numbers::pi / static_cast<double>(*length);
    config.truncate_high = lowest_kept;
    config.truncate_low = lowest_kept / 8;
    config.truncate_value = lowest_kept / 16;
  } else if (rope.Has("truncate_high")) {
    config.truncate_high = rope.Number("truncate_high", 0, kMaxFrequency);
    config.truncate_low = rope.Number("truncate_low", 0, config.truncate_high);
    config.truncate_value = rope.Number("truncate_value", 0, kMaxFrequency);
  }
}

// The fields that the type reads; any other is refused by Finish.
void ReadMethod(JsonObject& rope, const Origin& origin, RopeConfig& config) {
  const std::string& type = config.type;
  config.factor = 1;
  if (type == "default") {
    rope.MustBe("factor", 1.0);
  } else if (type == "dynamic") {
    ReadDynamic(rope, origin, config);
  } else if (type == "yarn") {
    ReadYarn(rope, origin, config);
  } else if (type == "longrope" || type == "su") {
    ReadLongRope(rope, origin, config);
  } else if (type == "giraffe") {
    ReadGiraffe(rope, config);
  } else if (type == "proportional") {
    config.factor = rope.NumberOr("factor", 1, kMaxFactor, 1);
  } else {  // linear, ntk, ntk-aware, ntk-by-parts, llama3
    config.factor = rope.Number("factor", 1, kMaxFactor);
  }
  if (type == "ntk") config.mixed_b = rope.OptionalNumber("mixed_b", 1e-6, 100);
  if (type == "ntk-by-parts") {  // alpha and beta of the paper
    config.low_freq_factor = rope.NumberOr("alpha", 1e-6, kMaxTurns, 1);
    config.high_freq_factor = rope.NumberOr("beta", 1e-6, kMaxTurns, 32);
  }
  if (type != "llama3") return;
  config.low_freq_factor = rope.Number("low_freq_factor", 1e-6, kMaxTurns);
  config.high_freq_factor = rope.Number("high_freq_factor", 1e-6, kMaxTurns);
  if (config.original_length == 0) {
    rope.Fail(absl::InvalidArgumentError(absl::StrCat(
        rope.where(), ": original_max_position_embeddings: required field is missing")));
  }
}

absl::Status Prefixed(const std::string& where, const absl::Status& status) {
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat(where, ": ", status.message()));
}

// A whole dictionary. `config` holds what is known before it.
absl::Status ReadFields(JsonObject& rope, const Origin& origin, int64_t head_dim,
                        RopeConfig& config) {
  config.type = ReadType(rope);
  RETURN_IF_ERROR(rope.status());
  if (!IsRopeType(config.type)) {  // before its fields, which nobody here knows either
    return absl::UnimplementedError(absl::StrCat(rope.where(), ": rope type '", Shown(config.type),
                                                 "' is not built in, only ", RopeTypeNames()));
  }
  ReadShape(rope, config);
  if (const auto share = rope.OptionalNumber("partial_rotary_factor", kMinShare, 1)) {
    RETURN_IF_ERROR(ApplyShare(rope.where(), *share, head_dim, config));
  }
  ReadMethod(rope, origin, config);
  RETURN_IF_ERROR(rope.Finish());

  // Tables of both regimes can be made, so that no request finds out that one cannot.
  RopeConfig probe = config;
  if (probe.original_length == 0) probe.original_length = origin.max_positions;
  for (const int64_t num_positions : {int64_t{0}, kMaxContextLength}) {
    RETURN_IF_ERROR(Prefixed(rope.where(), MakeRopeTable(probe, num_positions).status()));
  }
  return absl::OkStatus();
}

// The dictionary of the checkpoint, under either of its names; of one per layer type, that of the
// only type there is here.
std::optional<JsonObject> Dictionary(JsonObject& json) {
  std::optional<JsonObject> newer = json.Object("rope_parameters");
  std::optional<JsonObject> older = json.Object("rope_scaling");
  if (newer && older) {
    json.Fail(absl::InvalidArgumentError(absl::StrCat(
        json.where(), ": rope_parameters and rope_scaling are both given; expected one")));
  }
  std::optional<JsonObject> rope = newer ? std::move(newer) : std::move(older);
  if (!rope || !rope->Has("full_attention")) return rope;
  std::optional<JsonObject> of_layers = rope->Object("full_attention");
  rope->Ignore({"sliding_attention", "chunked_attention", "linear_attention"});
  json.Fail(rope->Finish());
  return of_layers;
}

// The limit, and why: see config_fields.h.
void StateContext(const Origin& origin, bool states_original, ModelConfig& config) {
  const RopeConfig& rope = *config.rope;
  const auto scaled = [&](int64_t length) {
    const double product = static_cast<double>(length) * rope.factor;
    return static_cast<int64_t>(std::min(product, static_cast<double>(kMaxContextLength)));
  };
  config.context_length = origin.max_positions;
  if (rope.factor == 1) return;
  if (!states_original) {
    config.context_note = absl::StrCat(
        "context of ", origin.max_positions, " tokens: max_position_embeddings, with rope factor ",
        rope.factor, "; should that be the length before scaling, give --context-length ",
        scaled(origin.max_positions));
  } else if (origin.max_positions <= rope.original_length) {
    config.context_length = scaled(rope.original_length);
    config.context_note = absl::StrCat("context of ", config.context_length,
                                       " tokens: original_max_position_embeddings ",
                                       rope.original_length, " times rope factor ", rope.factor,
                                       "; max_position_embeddings is ", origin.max_positions);
  }
}

}  // namespace

absl::Status ReadRope(JsonObject& json, absl::string_view rope_override, ModelConfig& config) {
  RopeConfig rope = {.rotary_dim = config.head_dim};
  Origin origin = {.max_positions = config.context_length};
  const bool theta_at_top = json.Has("rope_theta");
  rope.theta = json.NumberOr("rope_theta", kMinTheta, kMaxTheta, rope.theta);
  const double top_theta = rope.theta;
  rope.original_length = json.IntOr("original_max_position_embeddings", 1, kMaxContextLength, 0);
  const auto share = json.OptionalNumber("partial_rotary_factor", kMinShare, 1);
  std::optional<JsonObject> dictionary = Dictionary(json);
  RETURN_IF_ERROR(json.status());
  if (share) RETURN_IF_ERROR(ApplyShare(json.where(), *share, config.head_dim, rope));

  if (rope_override.empty()) {
    if (dictionary) {
      RETURN_IF_ERROR(ReadFields(*dictionary, origin, config.head_dim, rope));
      // A share at the top belongs to the type, which is known only now.
      if (share && !dictionary->Has("partial_rotary_factor"))
        RETURN_IF_ERROR(ApplyShare(json.where(), *share, config.head_dim, rope));
    }
    if (theta_at_top && rope.theta != top_theta) {
      return absl::InvalidArgumentError(absl::StrCat(json.where(), ": rope_theta is ", top_theta,
                                                     " but ", dictionary->where(), " says ",
                                                     rope.theta));
    }
  } else {
    // The checkpoint's own method need not be built in.
    if (dictionary) {
      ReadShape(*dictionary, rope);
      const auto inner_share = dictionary->OptionalNumber("partial_rotary_factor", kMinShare, 1);
      RETURN_IF_ERROR(dictionary->status());
      if (inner_share)
        RETURN_IF_ERROR(ApplyShare(dictionary->where(), *inner_share, config.head_dim, rope));
    }
    origin.is_checkpoint = false;
    ASSIGN_OR_RETURN(JsonObject fields, JsonObject::Parse(rope_override, "--rope"));
    RETURN_IF_ERROR(ReadFields(fields, origin, config.head_dim, rope));
  }
  const bool states_original = rope.original_length > 0;
  if (!states_original) rope.original_length = origin.max_positions;
  config.rope = std::move(rope);
  StateContext(origin, states_original, config);
  return absl::OkStatus();
}

absl::StatusOr<RopeConfig> OverrideRope(const ModelConfig& config, absl::string_view text,
                                        const std::string& where) {
  ASSIGN_OR_RETURN(JsonObject fields, JsonObject::Parse(text, where));
  if (!config.rope) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": a ", config.family, " model has no rotary embedding"));
  }
  const RopeConfig& own = *config.rope;
  RopeConfig rope = {.theta = own.theta,
                     .rotary_dim = own.rotary_dim,
                     .pair_layout = own.pair_layout,
                     .original_length = own.original_length};
  const Origin origin = {.is_checkpoint = false, .max_positions = config.context_length};
  RETURN_IF_ERROR(ReadFields(fields, origin, config.head_dim, rope));
  if (rope.rotary_dim != own.rotary_dim || rope.pair_layout != own.pair_layout) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": rotary width and pair layout are the model's"));
  }
  return rope;
}

}  // namespace godwit
