#pragma once
// The families, one row each: model_type of config.json, the reader of its fields, the maker of the
// model.

#include <memory>
#include <span>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "engine/json_object.h"
#include "engine/model.h"
#include "engine/model_config.h"

namespace godwit {

struct ModelFamily {
  absl::string_view name;  // model_type
  absl::StatusOr<ModelConfig> (*parse_config)(JsonObject& json, absl::string_view rope_override);
  absl::StatusOr<std::unique_ptr<Model>> (*load)(const ModelConfig& config,
                                                 const WeightSource& source,
                                                 const ModelOptions& options, Backend& backend);
};

std::span<const ModelFamily> ModelFamilies();
const ModelFamily* FindModelFamily(absl::string_view name);  // null when unknown
std::string ModelFamilyNames();  // "'llama', 'transnormer'", for messages

}  // namespace godwit
