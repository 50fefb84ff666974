#pragma once
// A model family: which state it keeps and how a step flows through it. One file per family in
// engine/models/, one row in model_registry.cc. Model code is written once against Backend and
// reads like the paper.

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/cache_pool.h"
#include "engine/forward_plan.h"
#include "engine/model_config.h"
#include "engine/safetensors.h"
#include "engine/state_component.h"
#include "kernels/backend.h"

namespace godwit {

struct ModelOptions {
  DType dtype = DType::kBF16;  // kF32: f32 weights, activations and KV, for reference checks
  int64_t max_tokens_per_step =
      2048;                 // sizes the activations; nothing is allocated on the step path
  int first_component = 0;  // its components follow one another in the pool from here
  int rank = 0, world = 1;
};

// The weights of a model: those of a checkpoint, or random ones.
struct WeightSource {
  const SafetensorsReader* stored = nullptr;  // null: random
  uint64_t seed = 1;                          // of random ones
};

class Model {
 public:
  virtual ~Model() = default;

  virtual const ModelConfig& config() const = 0;
  virtual const std::vector<StateComponent>& state_components() const = 0;
  virtual int64_t num_parameters() const = 0;
  virtual int64_t weight_bytes() const = 0;  // on the device
  virtual int64_t workspace_bytes() const = 0;

  // tokens -> hidden [T, d_model] f32 (before the final norm), a view into the model's workspace
  // valid until the next call.
  virtual absl::StatusOr<TensorView> Forward(const ForwardPlan& plan, CachePool& pool) = 0;

  // Of hidden rows, in front of the head.
  virtual const NormSpec& final_norm() const = 0;

  // Before the step's Forward, where plan.turns says so. Nothing to do without softmax layers.
  virtual absl::Status TurnKeys(const ForwardPlan& /*plan*/, CachePool& /*pool*/) {
    return absl::OkStatus();
  }

  // Final norm and head: hidden rows [R, d_model] f32 -> logits [R, vocab] f32. Path D for every
  // row: the logits of a position are the same bits however it was reached.
  virtual absl::Status Logits(const TensorView& hidden, const TensorView& logits) = 0;
};

// Builds the model of a Hugging Face folder (config.json, safetensors). `backend` outlives the
// model. Component i of state_components() is component first_component + i of the pool; the engine
// adds its own (penalties).
absl::StatusOr<std::unique_ptr<Model>> LoadModel(const std::string& folder,
                                                 const ModelOptions& options,
                                                 absl::string_view rope_override, Backend& backend);

// The same model without a checkpoint: text of a config.json, random weights.
absl::StatusOr<std::unique_ptr<Model>> MakeRandomModel(absl::string_view config_json,
                                                       const ModelOptions& options,
                                                       absl::string_view rope_override,
                                                       Backend& backend);

}  // namespace godwit
