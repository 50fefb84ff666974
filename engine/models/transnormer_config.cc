#include <cmath>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/models/config_fields.h"
#include "engine/models/transnormer.h"
#include "kernels/base/status.h"

namespace godwit {
namespace {

constexpr float kSrmsEpsilon = 1e-6f;  // fixed in the published code, no field of the config

void MustBeOneOf(JsonObject& json, const char* name, const char* fallback,
                 std::initializer_list<absl::string_view> known) {
  const std::string found = json.StringOr(name, fallback);
  for (const absl::string_view value : known) {
    if (found == value) return;
  }
  json.Fail(absl::UnimplementedError(absl::StrCat(
      json.where(), ": ", name, ": '", found, "' is not built in, only '", *known.begin(), "'")));
}

void RefuseOtherFeatures(JsonObject& json) {
  json.Refuse("gate_dim", "the low-rank gate of TransNormerLLM3");
  json.Refuse("quantization_config", "quantised weights");
  json.Refuse("rope_scaling", "a rotary embedding in this family");
  json.Refuse("rope_parameters", "a rotary embedding in this family");
  json.MustBe("bias", false);
  json.MustBe("is_encoder_decoder", false);
  json.MustBe("is_decoder", true);
  json.MustBe("add_cross_attention", false);
  json.MustBe("tie_encoder_decoder", false);
  MustBeOneOf(json, "linear_act_fun", "silu", {"silu", "swish"});
  MustBeOneOf(json, "norm_type", "simplermsnorm", {"simplermsnorm"});
}

absl::Status ReadLrpeLayers(JsonObject& json, ModelConfig& config) {
  const std::vector<int64_t> uses_lrpe = json.IntList("linear_use_lrpe_list", 0, 1, kMaxLayers);
  RETURN_IF_ERROR(json.status());
  if (static_cast<int64_t>(uses_lrpe.size()) != config.num_layers) {
    return absl::InvalidArgumentError(
        absl::StrCat(json.where(), ": linear_use_lrpe_list: expected one 0 or 1 for each of the ",
                     config.num_layers, " layers, found ", uses_lrpe.size(), " entries"));
  }
  config.lrpe_layers.assign(uses_lrpe.begin(), uses_lrpe.end());
  return absl::OkStatus();
}

absl::Status ReadHeads(JsonObject& json, ModelConfig& config) {
  config.num_heads = json.Int("decoder_attention_heads", 1, kMaxHeads);
  config.num_kv_heads = config.num_heads;
  const int64_t hidden =
      json.Int("hidden_dim", 1, kMaxWidth);  // width of q, k, v and u: num_heads * head_dim
  RETURN_IF_ERROR(json.status());
  config.head_dim = hidden / config.num_heads;
  if (hidden % config.num_heads != 0 || config.head_dim > kMaxHeadDim) {
    return absl::InvalidArgumentError(
        absl::StrCat(json.where(), ": hidden_dim: expected ", config.num_heads,
                     " heads times a head_dim <= ", kMaxHeadDim, ", found ", hidden));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ModelConfig> ParseTransnormerConfig(JsonObject& json,
                                                   absl::string_view rope_override) {
  if (!rope_override.empty()) {
    return absl::InvalidArgumentError(
        "--rope: the family transnormer has no rotary embedding to replace");
  }
  ModelConfig config;
  config.family = "transnormer";
  CheckArchitecture(json, {"TransnormerForCausalLM"});
  RefuseOtherFeatures(json);
  IgnoreMetadata(json);
  json.Ignore({"max_position_embeddings"});  // no table and no state depends on a length
  config.vocab_size = json.Int("vocab_size", 1, kMaxVocabSize);
  config.d_model = json.Int("decoder_embed_dim", 1, kMaxWidth);
  config.num_layers =
      json.Int("decoder_layers", 2, kMaxLayers);  // the decay divides by num_layers - 1
  config.d_ff = json.Int("glu_dim", 1, kMaxWidth);
  RETURN_IF_ERROR(ReadHeads(json, config));
  RETURN_IF_ERROR(ReadLrpeLayers(json, config));

  config.context_length = 0;  // the state has one size at every position
  config.norm_epsilon = kSrmsEpsilon;
  config.norm_has_weight = false;
  config.gate_activation = Activation::kNone;
  config.decay_rule = DecayRule::kAlibiLayer;
  config.qk_activation = Activation::kSilu;
  config.q_scale = 1;
  config.tie_word_embeddings = json.BoolOr("tie_word_embeddings", true);
  const bool is_unscaled = json.BoolOr("no_scale_embedding", false);
  config.embedding_scale =
      is_unscaled ? 1.0f : static_cast<float>(std::sqrt(static_cast<double>(config.d_model)));
  ReadTokenIds(json, /*adds_bos=*/false, config);
  RETURN_IF_ERROR(json.Finish());
  return config;
}

}  // namespace godwit
