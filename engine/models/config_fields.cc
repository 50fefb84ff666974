#include "engine/models/config_fields.h"

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/rope_table.h"
#include "kernels/base/status.h"

namespace godwit {
namespace {

constexpr double kDefaultRopeTheta =
    10000;  // what the library of these checkpoints assumes when none is stated
constexpr double kMinRopeTheta = 1, kMaxRopeTheta = 1e15;
constexpr double kMaxRopeFactor = 1e6;
constexpr int64_t kMaxArchitectures = 16;

// `rope_type`, or its older spelling `type`; "default" when neither is there.
std::string ReadRopeType(JsonObject& rope) {
  const std::string newer = rope.StringOr("rope_type", "");
  const std::string older = rope.StringOr("type", "");
  if (!newer.empty() && !older.empty() && newer != older) {
    rope.Fail(absl::InvalidArgumentError(
        absl::StrCat(rope.where(), ": rope_type is '", newer, "' but type is '", older, "'")));
  }
  const std::string type = newer.empty() ? older : newer;
  return type.empty() ? "default" : type;
}

// Type and factor of one rope dictionary into `config`; theta too when stated.
absl::Status ReadRopeFields(JsonObject& rope, RopeConfig& config) {
  config.type = ReadRopeType(rope);
  RETURN_IF_ERROR(rope.status());
  // An unknown type, before its unknown fields.
  if (const absl::Status status = MakeRopeTable(config).status(); !status.ok()) {
    return absl::Status(status.code(), absl::StrCat(rope.where(), ": ", status.message()));
  }
  config.theta = rope.NumberOr("rope_theta", kMinRopeTheta, kMaxRopeTheta, config.theta);
  if (config.type == "linear") {
    config.factor = rope.Number("factor", 1, kMaxRopeFactor);
  } else {
    rope.MustBe("factor", 1.0);
    config.factor = 1;
  }
  rope.MustBe("partial_rotary_factor", 1.0);
  rope.Ignore({"original_max_position_embeddings"});  // neither table reads it
  return rope.Finish();
}

// The dictionary of the checkpoint, under either of its names.
std::optional<JsonObject> RopeDictionary(JsonObject& json) {
  std::optional<JsonObject> newer = json.Object("rope_parameters");
  std::optional<JsonObject> older = json.Object("rope_scaling");
  if (newer && older) {
    json.Fail(absl::InvalidArgumentError(absl::StrCat(
        json.where(), ": rope_parameters and rope_scaling are both given; expected one")));
  }
  return newer ? std::move(newer) : std::move(older);
}

}  // namespace

void IgnoreMetadata(JsonObject& json) {
  // Origin and storage (the loader reads each tensor's own dtype).
  json.Ignore({"model_type", "architectures", "transformers_version", "torch_dtype", "dtype",
               "auto_map", "name_or_path", "tokenizer_class", "unsloth_version", "unsloth_fixed",
               "license", "model_max_length", "max_length"});
  // Training.
  json.Ignore({"initializer_range", "init_std", "attention_dropout", "hidden_dropout", "dropout",
               "use_cache", "gradient_checkpointing", "pretraining_tp"});
  // Tokens that a forward pass does not know; eos and bos are read.
  json.Ignore(
      {"pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id", "add_eos_token"});
  // What the training library writes into every config: generation defaults, labels, which outputs
  // to return.
  json.Ignore({"bad_words_ids",
               "begin_suppress_tokens",
               "chunk_size_feed_forward",
               "diversity_penalty",
               "do_sample",
               "early_stopping",
               "encoder_no_repeat_ngram_size",
               "exponential_decay_length_penalty",
               "finetuning_task",
               "forced_bos_token_id",
               "forced_eos_token_id",
               "id2label",
               "label2id",
               "num_labels",
               "length_penalty",
               "min_length",
               "no_repeat_ngram_size",
               "num_beam_groups",
               "num_beams",
               "num_return_sequences",
               "output_attentions",
               "output_hidden_states",
               "output_scores",
               "prefix",
               "problem_type",
               "pruned_heads",
               "remove_invalid_values",
               "repetition_penalty",
               "return_dict",
               "return_dict_in_generate",
               "suppress_tokens",
               "task_specific_params",
               "temperature",
               "top_k",
               "top_p",
               "typical_p",
               "torchscript",
               "use_bfloat16"});
}

void CheckArchitecture(JsonObject& json, std::initializer_list<absl::string_view> classes) {
  for (const std::string& found : json.StringListOr("architectures", kMaxArchitectures)) {
    bool known = false;
    for (const absl::string_view name : classes) known |= absl::EqualsIgnoreCase(found, name);
    if (!known) {
      json.Fail(absl::UnimplementedError(
          absl::StrCat(json.where(), ": architectures: '", found,
                       "' is not built in for this model_type, only ", *classes.begin())));
    }
  }
}

void ReadTokenIds(JsonObject& json, bool adds_bos, ModelConfig& config) {
  const int64_t last = config.vocab_size - 1;
  for (const int64_t id : json.IntOrList("eos_token_id", 0, last, kMaxEosTokenIds)) {
    config.eos_token_ids.push_back(static_cast<int32_t>(id));
  }
  if (const auto bos = json.OptionalInt("bos_token_id", 0, last))
    config.bos_token_id = static_cast<int32_t>(*bos);
  config.add_bos = json.BoolOr("add_bos_token", adds_bos) && config.bos_token_id.has_value();
  if (json.Has("add_bos_token") && json.BoolOr("add_bos_token", false) && !config.add_bos) {
    json.Fail(absl::InvalidArgumentError(
        absl::StrCat(json.where(), ": add_bos_token is true but there is no bos_token_id")));
  }
}

absl::StatusOr<RopeConfig> ReadRope(JsonObject& json, int64_t head_dim,
                                    absl::string_view rope_override) {
  RopeConfig config;
  config.rotary_dim = head_dim;
  const bool theta_at_top = json.Has("rope_theta");
  config.theta = json.NumberOr("rope_theta", kMinRopeTheta, kMaxRopeTheta, kDefaultRopeTheta);
  json.MustBe("partial_rotary_factor", 1.0);
  const double top_theta = config.theta;

  std::optional<JsonObject> rope = RopeDictionary(json);
  RETURN_IF_ERROR(json.status());
  if (!rope_override.empty()) {
    // The checkpoint's own method need not be built in: only its theta is kept.
    if (rope)
      config.theta = rope->NumberOr("rope_theta", kMinRopeTheta, kMaxRopeTheta, config.theta);
    if (rope) RETURN_IF_ERROR(rope->status());
    ASSIGN_OR_RETURN(JsonObject override_fields, JsonObject::Parse(rope_override, "--rope"));
    RETURN_IF_ERROR(ReadRopeFields(override_fields, config));
    return config;
  }
  if (rope) RETURN_IF_ERROR(ReadRopeFields(*rope, config));
  if (theta_at_top && config.theta != top_theta) {
    return absl::InvalidArgumentError(absl::StrCat(json.where(), ": rope_theta is ", top_theta,
                                                   " but ", rope->where(), " says ", config.theta));
  }
  return config;
}

}  // namespace godwit
