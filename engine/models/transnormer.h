#pragma once
// TransNormerLLM 1 and 2 (2307.14995): lightning attention with a gate, SRMSNorm, SGLU, LRPE in the
// layers that the config lists. Version 3 has another gate and is refused.

#include <memory>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "engine/json_object.h"
#include "engine/model.h"

namespace godwit {

absl::StatusOr<ModelConfig> ParseTransnormerConfig(JsonObject& json,
                                                   absl::string_view rope_override);

absl::StatusOr<std::unique_ptr<Model>> LoadTransnormer(const ModelConfig& config,
                                                       const WeightSource& source,
                                                       const ModelOptions& options,
                                                       Backend& backend);

}  // namespace godwit
