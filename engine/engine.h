#pragma once
// Engine: model + cache pool + sampler behind StepExecutor. No threads, no queues: one owner thread
// calls it.

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "engine/batch.h"
#include "engine/cache_manager.h"
#include "engine/model.h"
#include "engine/rope_regime.h"
#include "engine/round_recorder.h"
#include "kernels/backend.h"

namespace godwit {

inline constexpr int64_t kAutoPrefixCache = -1;

struct EngineOptions {
  std::string model_folder;
  std::string config_json;    // instead of a folder: text of a config.json, random weights
  std::string rope_override;  // --rope JSON, or ""
  std::string draft_folder;   // of a draft model with the same tokenizer; "": no speculation
  DType dtype = DType::kBF16;
  // State slots. 0: 64; where the device's memory is ours, 256 or as many as half of what the
  // weights leave holds.
  int64_t max_sequences = 0;
  int64_t max_tokens_per_step = 0;  // prefill budget + decode rows; 0: 2048, on a GPU 8192
  // Memory for KV blocks of softmax layers. 0: 1 GiB or half of what is free; where the device's
  // memory is ours, all that is free.
  int64_t kv_bytes = 0;
  int64_t swap_bytes = 0;       // host memory for preempted sequences
  int64_t store_bytes = 0;      // host memory for stored states: sessions
  // Device memory for states that later prompts start from; a whole number of slots of it is taken.
  // KV blocks of softmax layers are shared besides. kAutoPrefixCache: 128 MiB, or a 16th of what
  // the weights leave where the device's memory is ours.
  int64_t prefix_cache_bytes = 0;
  int64_t context_length = 0;   // limit of prompt + output; 0: the model's (recurrent: 2^31 - 1)
  // Unlimited output: requests beyond the context are served too, their sequences holding the first
  // block and at least so many of the latest tokens. 0: refused. Softmax models without a draft.
  int64_t unlimited_output = 0;
  int max_steps_in_flight = 0;  // 1, or 2: plan a step while one runs; 0: 2 on a GPU
  bool deterministic = false;   // BackendLimits; the CPU always is
  bool records_rounds = false;  // Engine::recorded; one step in flight
  bool warm_up = true;          // where steps are recorded: before Create returns, not in requests
};

// What a user, `inspect` and GetModel need to know.
struct ModelCard {
  // Of the draft model, when there is one: num_parameters 0 otherwise.
  ModelConfig draft_config;
  int64_t draft_num_parameters = 0;
  int max_draft_tokens = 0;  // that a BatchRow may ask for
  bool has_acceptance_head = false;  // DraftPolicy::kSpecDecPP may be asked for

  ModelConfig config;
  int64_t num_parameters = 0;
  int64_t weight_bytes = 0, workspace_bytes = 0;
  int64_t context_length = 0;
  int64_t max_tokens_per_step = 0;
  int max_steps_in_flight = 1;
  RopeRegime rope_regime;   // of rows without a table of their own
  CacheGeometry geometry;   // components, slots, blocks
  std::string memory_plan;  // one line
  std::string dtype, backend;
  std::string device;  // DeviceInfo's description
};

class Engine final : public StepExecutor {
 public:
  // Loads everything and allocates all memory. Errors name file, tensor, expected and found;
  // RESOURCE_EXHAUSTED carries the plan.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(
      const EngineOptions& options, std::unique_ptr<Backend, BackendDeleter> backend);
  ~Engine() override;

  const ModelCard& card() const;
  CacheManager& caches();  // for the scheduler, on the same thread

  absl::StatusOr<StepId> Submit(std::span<const BatchRow> rows) override;
  absl::StatusOr<StepResult> Collect(StepId id) override;
  absl::Status Copy(std::span<const CacheCopy> copies) override;
  std::shared_ptr<const StateImage> ExportState(int64_t host_id) override;
  absl::Status ImportState(int64_t host_id, std::shared_ptr<const StateImage> image) override;

  // With records_rounds: the drafts of the step that was collected last, but those of coupled rows
  // that are not greedy. Valid until the next step is. Penalties are left out of what they say.
  std::span<const RecordedDraft> recorded() const;

 private:
  struct Impl;
  explicit Engine(std::unique_ptr<Impl> impl);
  absl::Status WarmUp();
  std::unique_ptr<Impl> impl_;
};

}  // namespace godwit
