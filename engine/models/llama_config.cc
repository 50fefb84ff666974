#include <string>

#include "absl/strings/str_cat.h"
#include "engine/models/config_fields.h"
#include "engine/models/llama.h"
#include "kernels/base/status.h"

namespace godwit {
namespace {

void RefuseOtherFeatures(JsonObject& json) {
  json.MustBe("attention_bias", false);
  json.MustBe("mlp_bias", false);
  json.Refuse("quantization_config", "quantised weights");
  json.Refuse("sliding_window", "sliding-window attention");
  json.Refuse("use_sliding_window", "sliding-window attention");
  json.MustBe("is_encoder_decoder", false);
  json.MustBe("is_decoder", true);
  json.MustBe("add_cross_attention", false);
  json.MustBe("tie_encoder_decoder", false);
  for (const std::string& type : json.StringListOr("layer_types", kMaxLayers)) {
    if (type != "full_attention") {
      json.Fail(absl::UnimplementedError(absl::StrCat(json.where(), ": layer_types: '", type,
                                                      "' is not built in, only 'full_attention'")));
    }
  }
  const std::string activation = json.StringOr("hidden_act", "silu");
  if (activation != "silu" && activation != "swish") {
    json.Fail(absl::UnimplementedError(absl::StrCat(json.where(), ": hidden_act: '", activation,
                                                    "' is not built in, only 'silu'")));
  }
}

absl::Status ReadHeads(JsonObject& json, ModelConfig& config) {
  config.num_heads = json.Int("num_attention_heads", 1, kMaxHeads);
  config.num_kv_heads = json.IntOr("num_key_value_heads", 1, kMaxHeads, config.num_heads);
  config.head_dim = json.IntOr("head_dim", 2, kMaxHeadDim, 0);
  RETURN_IF_ERROR(json.status());
  if (config.num_heads % config.num_kv_heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(json.where(), ": num_key_value_heads: expected a divisor of the ",
                     config.num_heads, " attention heads, found ", config.num_kv_heads));
  }
  if (config.head_dim == 0 && config.d_model % config.num_heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(json.where(), ": num_attention_heads: expected a divisor of hidden_size ",
                     config.d_model, " (head_dim is not given), found ", config.num_heads));
  }
  if (config.head_dim == 0) config.head_dim = config.d_model / config.num_heads;
  if (config.head_dim % 2 != 0 || config.head_dim > kMaxHeadDim ||
      config.num_heads * config.head_dim > kMaxWidth) {
    return absl::InvalidArgumentError(
        absl::StrCat(json.where(), ": head_dim: expected an even number <= ", kMaxHeadDim,
                     " and heads * head_dim <= ", kMaxWidth, ", found ", config.head_dim, " for ",
                     config.num_heads, " heads"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ModelConfig> ParseLlamaConfig(JsonObject& json, absl::string_view rope_override) {
  ModelConfig config;
  config.family = "llama";
  CheckArchitecture(json, {"LlamaForCausalLM"});
  RefuseOtherFeatures(json);
  IgnoreMetadata(json);
  config.vocab_size = json.Int("vocab_size", 1, kMaxVocabSize);
  config.d_model = json.Int("hidden_size", 1, kMaxWidth);
  config.num_layers = json.Int("num_hidden_layers", 1, kMaxLayers);
  config.d_ff = json.Int("intermediate_size", 1, kMaxWidth);
  RETURN_IF_ERROR(ReadHeads(json, config));

  config.context_length = json.Int("max_position_embeddings", 1, kMaxContextLength);

  config.norm_epsilon = static_cast<float>(json.Number("rms_norm_eps", 1e-12, 0.1));
  config.norm_has_weight = true;
  config.gate_activation = Activation::kSilu;
  config.tie_word_embeddings = json.BoolOr("tie_word_embeddings", false);
  config.lrpe_layers.assign(static_cast<size_t>(config.num_layers), false);
  RETURN_IF_ERROR(ReadRope(json, rope_override, config));
  ReadTokenIds(json, /*adds_bos=*/true, config);
  RETURN_IF_ERROR(json.Finish());
  return config;
}

}  // namespace godwit
