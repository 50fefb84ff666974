#include "engine/sampler.h"

#include <algorithm>
#include <utility>

#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace godwit {
namespace {

// Rows of logits that are held at once: the head's weights are read once for so many draws.
constexpr int64_t kMostLogitRows = 1024;
constexpr int64_t kVerifiedTokens = 4;  // of a row, at batch sizes where drafts still pay
int64_t LogitRows(const SamplerOptions& options) {
  const int64_t tokens = options.max_drafts == 0 ? 1 : kVerifiedTokens;
  return std::clamp(options.num_slots * tokens, kLogitRows, kMostLogitRows);
}

}  // namespace

int64_t Sampler::DeviceBytes(const SamplerOptions& options) {
  return LogitRows(options) * (options.d_model + options.vocab_size) * DTypeBytes(DType::kF32);
}

int64_t Sampler::ArenaBytes(const SamplerOptions& options) {
  const int64_t max_draws = MaxDraws(options);
  const int64_t scores =
      2 * StepArena::Footprint(options.max_tokens_per_step * DTypeBytes(DType::kI32));
  return scores + StepArena::Footprint(max_draws * DTypeBytes(DType::kI32)) +
         StepArena::Footprint(options.num_slots * int64_t{sizeof(VerifyRow)}) +
         DrawList::ArenaBytes(max_draws, options.num_slots);
}

absl::StatusOr<Sampler> Sampler::Create(Backend& backend, Model& model,
                                        const SamplerOptions& options) {
  Sampler sampler(backend, model, options);
  const int64_t row_bytes = LogitRows(options) * DTypeBytes(DType::kF32);
  ASSIGN_OR_RETURN(sampler.gathered_, DeviceBuffer::Allocate(backend, row_bytes * options.d_model));
  ASSIGN_OR_RETURN(sampler.logits_,
                   DeviceBuffer::Allocate(backend, row_bytes * options.vocab_size));
  if (options.max_drafts == 0) return sampler;
  const int64_t num_bytes = options.num_slots * DTypeBytes(DType::kI32);
  ASSIGN_OR_RETURN(sampler.num_tokens_, DeviceBuffer::Allocate(backend, num_bytes));
  for (HostBuffer& host : sampler.host_num_tokens_) {
    ASSIGN_OR_RETURN(host, HostBuffer::Allocate(backend, num_bytes));
  }
  return sampler;
}

Sampler::Sampler(Backend& backend, Model& model, const SamplerOptions& options)
    : backend_(&backend),
      model_(&model),
      options_(options),
      draws_(MaxDraws(options), options.vocab_size) {
  logit_tokens_.reserve(static_cast<size_t>(MaxDraws(options)));
  verify_rows_.reserve(static_cast<size_t>(options.num_slots));
  score_tokens_.reserve(static_cast<size_t>(options.max_tokens_per_step));
  score_targets_.reserve(static_cast<size_t>(options.max_tokens_per_step));
}

// Where the logits that are planned next go, all in one block.
Sampler::DrawBlock& Sampler::BlockFor(int64_t num_logits) {
  const int64_t logit_row = std::ssize(logit_tokens_);
  if (draw_blocks_.empty() || draw_blocks_.back().num_logits + num_logits > LogitRows(options_)) {
    draw_blocks_.push_back({.logit_begin = logit_row, .draw_begin = draws_.size()});
  }
  draw_blocks_.back().num_logits += num_logits;
  return draw_blocks_.back();
}

SampleRow& Sampler::AddDraw(const RowOutput& output, int64_t position, int64_t prompt_length) {
  wanted_.draw_logprobs |= output.sampling->num_logprobs >= 0;
  wanted_.draw_tops |= output.sampling->num_logprobs > 0;
  return draws_.Add(output, position, prompt_length);
}

void Sampler::PlanDraws(const BatchRow& row, const StepRow& step_row, int64_t position) {
  if (row.outputs.empty()) return;
  DrawBlock& block = BlockFor(1);
  const int64_t logit_row = std::ssize(logit_tokens_) - block.logit_begin;
  logit_tokens_.push_back(step_row.first_token + step_row.num_tokens - 1);
  for (const RowOutput& output : row.outputs) {
    AddDraw(output, position, row.prompt_length).logit_row = static_cast<int32_t>(logit_row);
    ++block.num_draws;
  }
}

// A draw after each of the row's tokens; indices are relative to the block.
void Sampler::PlanVerify(const BatchRow& row, const StepRow& step_row, int32_t first_draft) {
  DrawBlock& block = BlockFor(step_row.num_tokens);
  if (block.num_verify == 0) block.verify_begin = std::ssize(verify_rows_);
  ++block.num_verify;
  verify_rows_.push_back(
      {.first_row = static_cast<int32_t>(block.num_draws),
       .num_drafts = step_row.num_tokens - 1,
       .first_draft = first_draft,
       .rule = IsCoupled(row.outputs[0]) ? AcceptRule::kMatch : AcceptRule::kStandard,
       .num_dropped = row.num_dropped});
  for (int32_t token = 0; token < step_row.num_tokens; ++token) {
    SampleRow& draw = AddDraw(row.outputs[0], step_row.position + token + 1, row.prompt_length);
    draw.logit_row = static_cast<int32_t>(std::ssize(logit_tokens_) - block.logit_begin);
    if (options_.recorder != nullptr && HasDrafts(row)) {
      draw.probability_row = options_.recorder->TargetRow(first_draft / options_.max_drafts, token);
    }
    logit_tokens_.push_back(step_row.first_token + token);
    ++block.num_draws;
  }
}

void Sampler::Pad(const Padding& padding) {
  while (draws_.size() < padding.num_draws) {
    DrawBlock& block = BlockFor(1);
    logit_tokens_.push_back(0);
    draws_.AddPadding();
    ++block.num_draws;
  }
  while (std::ssize(verify_rows_) < padding.num_verify) {
    DrawBlock& block = draw_blocks_.back();
    verify_rows_.push_back({.first_row = static_cast<int32_t>(block.num_draws - 1)});
    ++block.num_verify;
  }
}

int64_t Sampler::max_logits() const { return LogitRows(options_); }

void Sampler::Push(StepArena& arena) {
  device_logit_tokens_ = arena.Push(logit_tokens_);
  device_sample_rows_ = draws_.PushRows(arena);
  device_verify_rows_ = arena.Push(verify_rows_);
  device_score_tokens_ = arena.Push(score_tokens_);
  device_score_targets_ = arena.Push(score_targets_);
}

void Sampler::PlanScores(const BatchRow& row, const StepRow& step_row, int32_t num_top) {
  if (row.score_targets.empty() && row.logits == nullptr) return;
  const bool has_targets = !row.score_targets.empty();
  ScoreRun run = {.begin = std::ssize(score_tokens_),
                  .num_top = num_top,
                  .has_targets = has_targets,
                  .logits = row.logits};
  for (int32_t offset = 0; offset < step_row.num_tokens; ++offset) {
    const int32_t target = has_targets ? row.score_targets[static_cast<size_t>(offset)] : -1;
    if (target < 0 && row.logits == nullptr) continue;
    score_tokens_.push_back(step_row.first_token + offset);
    score_targets_.push_back(target);
    ++run.count;
  }
  wanted_.score_tops |= has_targets && run.num_top > 0;
  if (run.count > 0) score_runs_.push_back(run);
}

std::span<const RowOutputs> Sampler::Plan(std::span<const BatchRow> rows, const StepArrays& arrays,
                                          const Padding& padding, StepArena& arena) {
  row_outputs_.clear();
  logit_tokens_.clear();
  draws_.Clear();
  verify_rows_.clear();
  draw_blocks_.clear();
  score_tokens_.clear();
  score_targets_.clear();
  score_runs_.clear();
  wanted_ = {};
  for (size_t batch_row = 0; batch_row < rows.size(); ++batch_row) {
    const StepRow& step_row = arrays.rows[static_cast<size_t>(arrays.row_of_batch[batch_row])];
    RowOutputs& outputs = row_outputs_.emplace_back();
    if (!HasDrafts(rows[batch_row]) && padding.num_verify == 0) {
      outputs.draw_begin = draws_.size();
      const auto last_token = static_cast<size_t>(step_row.first_token + step_row.num_tokens - 1);
      PlanDraws(rows[batch_row], step_row, arrays.positions[last_token] + 1);
      outputs.draw_end = draws_.size();
    }
    outputs.score_begin = std::ssize(score_tokens_);
    GODWIT_CHECK(rows[batch_row].num_score_top >= 0 &&
                 rows[batch_row].num_score_top <= kMaxTopLogprobs);
    outputs.num_score_top =
        static_cast<int32_t>(std::min<int64_t>(rows[batch_row].num_score_top, options_.vocab_size));
    PlanScores(rows[batch_row], step_row, outputs.num_score_top);
    outputs.score_end = std::ssize(score_tokens_);
  }
  PlanVerifies(rows, arrays, padding.num_verify > 0);
  wanted_.num_draws = draws_.size();
  wanted_.num_scores = std::ssize(score_tokens_);
  Pad(padding);
  Push(arena);
  return row_outputs_;
}

// After all plain rows, so that a block of logits has only one kind.
void Sampler::PlanVerifies(std::span<const BatchRow> rows, const StepArrays& arrays, bool all) {
  const size_t num_plain = draw_blocks_.size();
  int64_t num_draft_rows = 0;
  for (size_t batch_row = 0; batch_row < rows.size(); ++batch_row) {
    if (!HasDrafts(rows[batch_row]) && !all) continue;
    const StepRow& step_row = arrays.rows[static_cast<size_t>(arrays.row_of_batch[batch_row])];
    RowOutputs& outputs = row_outputs_[batch_row];
    outputs.verify = static_cast<int32_t>(verify_rows_.size());
    outputs.draw_begin = draws_.size();
    if (draw_blocks_.size() == num_plain) {
      draw_blocks_.push_back(
          {.logit_begin = std::ssize(logit_tokens_), .draw_begin = draws_.size()});
    }
    const int64_t first_draft =
        HasDrafts(rows[batch_row]) ? num_draft_rows++ * options_.max_drafts : 0;
    PlanVerify(rows[batch_row], step_row, static_cast<int32_t>(first_draft));
    outputs.draw_end = draws_.size();
  }
}

TensorView Sampler::Counts() const {
  return MakeView(options_.counts, DType::kU32, options_.num_slots, options_.vocab_size);
}

absl::Status Sampler::CountPrompts(const StepArrays& arrays, const TensorView& token_ids) {
  for (const StepRow& row : arrays.rows) {
    if (!row.is_prefill) continue;
    RETURN_IF_ERROR(
        backend_->CountTokens({.counts = Counts(),
                               .slot = row.slot,
                               .token_ids = RowRange(token_ids, row.first_token, row.num_tokens),
                               .is_prompt = 1}));
  }
  return absl::OkStatus();
}

absl::Status Sampler::Uncount(int32_t slot, std::span<const int32_t> token_ids) {
  for (const int32_t token_id : token_ids) {
    uint32_t* const at = options_.counts + slot * options_.vocab_size + token_id;
    uint32_t count = 0;
    RETURN_IF_ERROR(backend_->CopyToHost(&count, at, sizeof(count)));
    RETURN_IF_ERROR(backend_->Synchronize());
    GODWIT_CHECK((count & ~kPromptBit) > 0);
    --count;
    RETURN_IF_ERROR(backend_->CopyFromHost(at, &count, sizeof(count)));
  }
  return absl::OkStatus();
}

absl::StatusOr<TensorView> Sampler::Logits(const TensorView& hidden, int32_t* tokens,
                                           int64_t count) {
  const TensorView gathered = MakeView(gathered_.bytes(), DType::kF32, count, options_.d_model);
  const TensorView logits = MakeView(logits_.bytes(), DType::kF32, count, options_.vocab_size);
  RETURN_IF_ERROR(backend_->GatherRows(
      {.x = hidden, .rows = MakeView(tokens, DType::kI32, count), .y = gathered}));
  RETURN_IF_ERROR(model_->Logits(gathered, logits));
  return logits;
}

absl::Status Sampler::SampleBlock(const DrawBlock& block, const TensorView& logits,
                                  const OutputArrays& draws) {
  const int64_t top = block.draw_begin * kMaxTopLogprobs;
  return ToStatus(backend_->Sample(
      {.logits = logits,
       .rows = device_sample_rows_ + block.draw_begin,
       .num_rows = static_cast<int32_t>(block.num_draws),
       .counts = Counts(),
       .tokens = MakeView(draws.tokens + block.draw_begin, DType::kI32, block.num_draws),
       .logprobs = MakeView(draws.logprobs + block.draw_begin, DType::kF32, block.num_draws),
       .top_ids = MakeView(draws.top_ids + top, DType::kI32, block.num_draws, kMaxTopLogprobs),
       .top_logprobs =
           MakeView(draws.top_logprobs + top, DType::kF32, block.num_draws, kMaxTopLogprobs)}));
}

// The distributions of a block that VerifyTokens judges by, without penalties.
absl::Status Sampler::RecordBlock(const DrawBlock& block, const TensorView& logits) {
  return ToStatus(backend_->Sample({.logits = logits,
                                    .rows = device_sample_rows_ + block.draw_begin,
                                    .num_rows = static_cast<int32_t>(block.num_draws),
                                    .tokens = options_.recorder->tokens(block.num_draws),
                                    .probabilities = options_.recorder->target_probabilities()}));
}

absl::Status Sampler::VerifyBlock(const DrawBlock& block, const TensorView& logits,
                                  const Drafts& drafts, const OutputArrays& draws) {
  if (options_.recorder != nullptr) RETURN_IF_ERROR(RecordBlock(block, logits));
  const int64_t top = block.draw_begin * kMaxTopLogprobs;
  return ToStatus(backend_->VerifyTokens(
      {.logits = logits,
       .rows = device_sample_rows_ + block.draw_begin,
       .num_rows = static_cast<int32_t>(block.num_draws),
       .verify_rows = device_verify_rows_ + block.verify_begin,
       .num_verify_rows = static_cast<int32_t>(block.num_verify),
       .counts = Counts(),
       .drafts = drafts.tokens,
       .probabilities = drafts.probabilities,
       .num_tokens =
           MakeView(num_tokens_.as<int32_t>() + block.verify_begin, DType::kI32, block.num_verify),
       .tokens = MakeView(draws.tokens + block.draw_begin, DType::kI32, block.num_draws),
       .logprobs = MakeView(draws.logprobs + block.draw_begin, DType::kF32, block.num_draws),
       .top_ids = MakeView(draws.top_ids + top, DType::kI32, block.num_draws, kMaxTopLogprobs),
       .top_logprobs =
           MakeView(draws.top_logprobs + top, DType::kF32, block.num_draws, kMaxTopLogprobs)}));
}

absl::Status Sampler::Draw(const TensorView& hidden, const Drafts& drafts, StepOutputs& outputs) {
  const OutputArrays& draws = outputs.device_draws();
  for (const DrawBlock& block : draw_blocks_) {
    ASSIGN_OR_RETURN(const TensorView logits,
                     Logits(hidden, device_logit_tokens_ + block.logit_begin, block.num_logits));
    RETURN_IF_ERROR(block.num_verify > 0 ? VerifyBlock(block, logits, drafts, draws)
                                         : SampleBlock(block, logits, draws));
  }
  return absl::OkStatus();
}

absl::Status Sampler::ScoreBlock(const ScoreRun& run, int64_t begin, const TensorView& logits,
                                 const OutputArrays& scores) {
  const int64_t count = logits.rows();
  if (run.logits != nullptr) {
    RETURN_IF_ERROR(backend_->CopyToHost(run.logits + (begin - run.begin) * options_.vocab_size,
                                         logits.data, logits.elements() * DTypeBytes(DType::kF32)));
  }
  if (!run.has_targets) return absl::OkStatus();
  ScoreTokensArgs args = {.logits = logits,
                          .targets = MakeView(device_score_targets_ + begin, DType::kI32, count),
                          .logprobs = MakeView(scores.logprobs + begin, DType::kF32, count),
                          .num_top = run.num_top};
  if (run.num_top > 0) {
    const int64_t top = StepOutputs::ScoreTop(run.begin, begin - run.begin, run.num_top);
    args.top_ids = MakeView(scores.top_ids + top, DType::kI32, count, run.num_top);
    args.top_logprobs = MakeView(scores.top_logprobs + top, DType::kF32, count, run.num_top);
  }
  return ToStatus(backend_->ScoreTokens(args));
}

absl::Status Sampler::Score(const TensorView& hidden, StepOutputs& outputs) {
  for (const ScoreRun& run : score_runs_) {
    for (int64_t done = 0; done < run.count; done += kLogitRows) {
      const int64_t begin = run.begin + done;
      const int64_t count = std::min(kLogitRows, run.count - done);
      ASSIGN_OR_RETURN(const TensorView logits,
                       Logits(hidden, device_score_tokens_ + begin, count));
      RETURN_IF_ERROR(ScoreBlock(run, begin, logits, outputs.device_scores()));
    }
  }
  return absl::OkStatus();
}

absl::Status Sampler::ReadBack(StepId step, StepOutputs& outputs) {
  if (!verify_rows_.empty()) {
    RETURN_IF_ERROR(backend_->CopyToHost(host_num_tokens_[step % kMaxStepsInFlight].bytes(),
                                         num_tokens_.bytes(),
                                         std::ssize(verify_rows_) * DTypeBytes(DType::kI32)));
  }
  return outputs.ReadBack(step, wanted_);
}

}  // namespace godwit
