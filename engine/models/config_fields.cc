#include "engine/models/config_fields.h"

#include <optional>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace godwit {
namespace {

constexpr int64_t kMaxArchitectures = 16;

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

}  // namespace godwit
