#pragma once
// Llama-style softmax models: RMSNorm, grouped-query attention with rotary positions, SwiGLU.

#include <memory>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "engine/json_object.h"
#include "engine/model.h"

namespace godwit {

absl::StatusOr<ModelConfig> ParseLlamaConfig(JsonObject& json, absl::string_view rope_override);

absl::StatusOr<std::unique_ptr<Model>> LoadLlama(const ModelConfig& config,
                                                 const WeightSource& source,
                                                 const ModelOptions& options, Backend& backend);

}  // namespace godwit
