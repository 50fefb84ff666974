#include "engine/model_config.h"

#include "absl/strings/str_cat.h"
#include "engine/json_object.h"
#include "engine/model_registry.h"
#include "engine/models/config_fields.h"
#include "kernels/base/status.h"

namespace godwit {
namespace {

// The JSON object of a file that may be absent.
absl::StatusOr<std::optional<JsonObject>> ReadOptionalObject(const std::string& path) {
  const absl::StatusOr<std::string> text = ReadTextFile(path, kMaxJsonFileBytes);
  if (absl::IsNotFound(text.status())) return std::nullopt;
  RETURN_IF_ERROR(text.status());
  return JsonObject::Parse(*text, path);
}

absl::StatusOr<ModelConfig> ParseConfigObject(JsonObject& json, absl::string_view rope_override) {
  const std::string type = json.String("model_type");
  RETURN_IF_ERROR(json.status());
  const ModelFamily* family = FindModelFamily(type);
  if (family == nullptr) {
    return absl::UnimplementedError(absl::StrCat(json.where(), ": model_type '", Shown(type),
                                                 "' is not built in, only ", ModelFamilyNames()));
  }
  return family->parse_config(json, rope_override);
}

}  // namespace

absl::StatusOr<ModelConfig> ParseModelConfig(absl::string_view text,
                                             absl::string_view rope_override) {
  ASSIGN_OR_RETURN(JsonObject json, JsonObject::Parse(text, "config.json"));
  return ParseConfigObject(json, rope_override);
}

absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& folder,
                                            absl::string_view rope_override) {
  const std::string path = absl::StrCat(folder, "/config.json");
  ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kMaxJsonFileBytes));
  ASSIGN_OR_RETURN(JsonObject json, JsonObject::Parse(text, path));
  ASSIGN_OR_RETURN(ModelConfig config, ParseConfigObject(json, rope_override));

  ASSIGN_OR_RETURN(auto generation,
                   ReadOptionalObject(absl::StrCat(folder, "/generation_config.json")));
  if (generation && generation->Has("eos_token_id")) {
    config.eos_token_ids.clear();
    for (const int64_t id :
         generation->IntOrList("eos_token_id", 0, config.vocab_size - 1, kMaxEosTokenIds)) {
      config.eos_token_ids.push_back(static_cast<int32_t>(id));
    }
    RETURN_IF_ERROR(generation->status());
  }

  ASSIGN_OR_RETURN(auto tokenizer,
                   ReadOptionalObject(absl::StrCat(folder, "/tokenizer_config.json")));
  if (tokenizer && !json.Has("add_bos_token")) {
    config.add_bos =
        tokenizer->BoolOr("add_bos_token", config.add_bos) && config.bos_token_id.has_value();
    RETURN_IF_ERROR(tokenizer->status());
  }
  return config;
}

}  // namespace godwit
