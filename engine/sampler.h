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
#include "engine/draw_list.h"
#include "engine/forward_plan.h"
#include "engine/model.h"
#include "engine/round_recorder.h"
#include "engine/step_arena.h"
#include "engine/step_outputs.h"
#include "kernels/backend.h"
#include "kernels/base/tensor.h"

namespace godwit {

// Which draws and scores of a step belong to a batch row: half-open ranges.
struct RowOutputs {
  int64_t draw_begin = 0, draw_end = 0;
  int32_t verify = -1;  // index among the rows that are verified, whose draws are its positions
  int64_t score_begin = 0, score_end = 0;
  int32_t num_score_top = 0;  // BatchRow's, or the vocabulary's size when that is smaller
};

struct SamplerOptions {
  int64_t max_tokens_per_step = 0;
  int64_t num_slots = 0;
  int64_t vocab_size = 0;
  int64_t d_model = 0;
  int64_t max_drafts = 0;             // of a row; 0: no draft model
  uint32_t* counts = nullptr;         // device, [num_slots, vocab]
  RoundRecorder* recorder = nullptr;  // what drafts are judged by goes there too
};

class Sampler {
 public:
  static absl::StatusOr<Sampler> Create(Backend& backend, Model& model,
                                        const SamplerOptions& options);

  static int64_t DeviceBytes(const SamplerOptions& options);  // besides counts
  static int64_t ArenaBytes(const SamplerOptions& options);
  // Draws of a step at most.
  static int64_t MaxDraws(const SamplerOptions& options) {
    return options.num_slots * (options.max_drafts + 1);
  }

  // What a step that is replayed is filled up to; 0: nothing.
  struct Padding {
    int64_t num_draws = 0;
    // Of a step with drafts: all its rows are verified then, those without drafts too, so that its
    // ops depend on no more than these two numbers. num_draws exceeds its draws where this exceeds
    // its rows, and is at most max_logits().
    int64_t num_verify = 0;
  };
  // Step 1, before the arena is uploaded: which rows need logits and how each token is drawn; then
  // padding. Pushes what keeps its size from step to step (StepArena). The span is as long as
  // `rows` and valid until the next call.
  std::span<const RowOutputs> Plan(std::span<const BatchRow> rows, const StepArrays& arrays,
                                   const Padding& padding, StepArena& arena);
  int64_t max_logits() const;  // rows that are held at once
  // Pushes what does not, after everything whose address a replay knows.
  void PushBiases(StepArena& arena) { draws_.PushBiases(arena); }

  // Step 2: counts prompt tokens. Forks copy the counts afterwards.
  absl::Status CountPrompts(const StepArrays& arrays, const TensorView& token_ids);

  // Takes drawn tokens off the counts of a slot again. Waits for the device when there are some.
  absl::Status Uncount(int32_t slot, std::span<const int32_t> token_ids);

  // Step 3: draws, then scores. hidden: [T, d_model] f32. drafts of the rows that have some: draft
  // i of the r-th of them at r * max_drafts + i; probabilities likewise.
  struct Drafts {
    TensorView tokens, probabilities;
  };
  absl::Status Draw(const TensorView& hidden, const Drafts& drafts, StepOutputs& outputs);
  absl::Status Score(const TensorView& hidden, StepOutputs& outputs);

  // Queues the copy of all results to the host.
  absl::Status ReadBack(StepId step, StepOutputs& outputs);

  // Tokens that stand of a row with drafts, once the queue has passed the step.
  int32_t num_tokens(StepId step, int32_t verify) const {
    return host_num_tokens_[step % kMaxStepsInFlight].as<const int32_t>()[verify];
  }

 private:
  // Up to LogitRows rows of logits and what is done with them: draws of plain rows, or of rows with
  // drafts.
  struct DrawBlock {
    int64_t logit_begin = 0, num_logits = 0;
    int64_t draw_begin = 0, num_draws = 0;
    int64_t verify_begin = 0, num_verify = 0;
  };
  struct ScoreRun {
    int64_t begin = 0, count = 0;  // of score_tokens_
    int32_t num_top = 0;
    bool has_targets = false;
    float* logits = nullptr;  // host
  };

  Sampler(Backend& backend, Model& model, const SamplerOptions& options);
  DrawBlock& BlockFor(int64_t num_logits);
  SampleRow& AddDraw(const RowOutput& output, int64_t position, int64_t prompt_length);
  // position: in the text, of the token that is drawn.
  void PlanDraws(const BatchRow& row, const StepRow& step_row, int64_t position);
  void PlanVerifies(std::span<const BatchRow> rows, const StepArrays& arrays, bool all);
  void PlanVerify(const BatchRow& row, const StepRow& step_row, int32_t first_draft);
  void Pad(const Padding& padding);
  void PlanScores(const BatchRow& row, const StepRow& step_row, int32_t num_top);
  void Push(StepArena& arena);
  absl::StatusOr<TensorView> Logits(const TensorView& hidden, int32_t* tokens, int64_t count);
  absl::Status SampleBlock(const DrawBlock& block, const TensorView& logits,
                           const OutputArrays& draws);
  absl::Status RecordBlock(const DrawBlock& block, const TensorView& logits);
  absl::Status VerifyBlock(const DrawBlock& block, const TensorView& logits, const Drafts& drafts,
                           const OutputArrays& draws);
  absl::Status ScoreBlock(const ScoreRun& run, int64_t begin, const TensorView& logits,
                          const OutputArrays& scores);
  TensorView Counts() const;

  Backend* backend_;
  Model* model_;
  SamplerOptions options_;
  DeviceBuffer gathered_;    // [LogitRows, d_model] f32
  DeviceBuffer logits_;      // [LogitRows, vocab] f32
  DeviceBuffer num_tokens_;  // [num_slots] i32, of the rows with drafts
  HostBuffer host_num_tokens_[kMaxStepsInFlight];

  // Of the step being run.
  std::vector<RowOutputs> row_outputs_;
  std::vector<int32_t> logit_tokens_;  // index in the step's token order, one per row that draws
  DrawList draws_;
  std::vector<VerifyRow> verify_rows_;
  std::vector<DrawBlock> draw_blocks_;
  std::vector<int32_t> score_tokens_, score_targets_;
  std::vector<ScoreRun> score_runs_;
  StepOutputs::Wanted wanted_;
  int32_t* device_logit_tokens_ = nullptr;
  SampleRow* device_sample_rows_ = nullptr;
  VerifyRow* device_verify_rows_ = nullptr;
  int32_t* device_score_tokens_ = nullptr;
  int32_t* device_score_targets_ = nullptr;
};

}  // namespace godwit
