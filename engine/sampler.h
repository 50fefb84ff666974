#pragma once
// Hidden rows of a step -> drawn tokens, log-probabilities of given tokens, and the token counts
// that penalties read.

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/batch.h"
#include "engine/device_buffer.h"
#include "engine/forward_plan.h"
#include "engine/model.h"
#include "engine/step_arena.h"
#include "engine/step_outputs.h"
#include "kernels/backend.h"
#include "kernels/base/tensor.h"

namespace godwit {

// Which draws and scores of a step belong to a batch row: half-open ranges.
struct RowOutputs {
  int64_t draw_begin = 0, draw_end = 0;
  int64_t score_begin = 0, score_end = 0;
  int32_t num_score_top = 0;  // BatchRow's, or the vocabulary's size when that is smaller
};

struct SamplerOptions {
  int64_t max_tokens_per_step = 0;
  int64_t num_slots = 0;
  int64_t vocab_size = 0;
  int64_t d_model = 0;
  uint32_t* counts = nullptr;  // device, [num_slots, vocab]
};

class Sampler {
 public:
  static absl::StatusOr<Sampler> Create(Backend& backend, Model& model,
                                        const SamplerOptions& options);

  static int64_t DeviceBytes(const SamplerOptions& options);  // besides counts
  static int64_t ArenaBytes(int64_t max_tokens_per_step, int64_t num_slots);

  // Step 1, before the arena is uploaded: which rows need logits and how each token is drawn; then
  // padding up to num_draws draws. Pushes what keeps its size from step to step (StepArena). The
  // span is as long as `rows` and valid until the next call.
  std::span<const RowOutputs> Plan(std::span<const BatchRow> rows, const StepArrays& arrays,
                                   int64_t num_draws, StepArena& arena);
  // Pushes what does not, after everything whose address a replay knows.
  void PushBiases(StepArena& arena);

  // Step 2: counts prompt tokens. Forks copy the counts afterwards.
  absl::Status CountPrompts(const StepArrays& arrays, const TensorView& token_ids);

  // Step 3: draws, then scores. hidden: [T, d_model] f32.
  absl::Status Draw(const TensorView& hidden, StepOutputs& outputs);
  absl::Status Score(const TensorView& hidden, StepOutputs& outputs);

  // Queues the copy of all results to the host.
  absl::Status ReadBack(StepId step, StepOutputs& outputs);

 private:
  // Up to LogitRows rows of logits and what is done with them.
  struct DrawBlock {
    int64_t logit_begin = 0, num_logits = 0;
    int64_t draw_begin = 0, num_draws = 0;
  };
  struct ScoreRun {
    int64_t begin = 0, count = 0;  // of score_tokens_
    int32_t num_top = 0;
    bool has_targets = false;
    float* logits = nullptr;  // host
  };

  Sampler(Backend& backend, Model& model, const SamplerOptions& options);
  DrawBlock& BlockOfNextLogits();
  void PlanDraws(const BatchRow& row, const StepRow& step_row);
  void PadDraws(int64_t num_draws);
  void PlanScores(const BatchRow& row, const StepRow& step_row, int32_t num_top);
  SampleRow MakeSampleRow(const RowOutput& output, const BatchRow& row, const StepRow& step_row);
  void Push(StepArena& arena);
  absl::StatusOr<TensorView> Logits(const TensorView& hidden, int32_t* tokens, int64_t count);
  absl::Status ScoreBlock(const ScoreRun& run, int64_t begin, const TensorView& logits,
                          const OutputArrays& scores);
  TensorView Counts() const;

  Backend* backend_;
  Model* model_;
  SamplerOptions options_;
  DeviceBuffer gathered_;  // [LogitRows, d_model] f32
  DeviceBuffer logits_;    // [LogitRows, vocab] f32

  // Of the step being run.
  std::vector<RowOutputs> row_outputs_;
  std::vector<int32_t> logit_tokens_;  // index in the step's token order, one per row that draws
  std::vector<SampleRow> sample_rows_;
  std::vector<DrawBlock> draw_blocks_;
  std::vector<int32_t> score_tokens_, score_targets_;
  std::vector<ScoreRun> score_runs_;
  std::vector<TokenBias> biases_;  // of all draws, in order
  StepOutputs::Wanted wanted_;
  std::span<SampleRow> uploaded_rows_;  // sample_rows_ in the arena; their biases come last
  int32_t* device_logit_tokens_ = nullptr;
  SampleRow* device_sample_rows_ = nullptr;
  int32_t* device_score_tokens_ = nullptr;
  int32_t* device_score_targets_ = nullptr;
};

// The biases of one draw: logit_bias, and a ban of end_token_ids before min_tokens. No token twice.
void AppendBiases(const SamplingParams& sampling, int64_t output_index,
                  std::vector<TokenBias>& biases);

}  // namespace godwit
