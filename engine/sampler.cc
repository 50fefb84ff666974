#include "engine/sampler.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace godwit {
namespace {

constexpr int64_t kMaxBiases = kMaxLogitBiases + kMaxEndTokenIds;  // of a draw

// Rows of logits that are held at once: the head's weights are read once for so many draws.
constexpr int64_t kMostLogitRows = 1024;
int64_t LogitRows(const SamplerOptions& options) {
  return std::clamp(options.num_slots, kLogitRows, kMostLogitRows);
}

}  // namespace

void AppendBiases(const SamplingParams& sampling, int64_t output_index,
                  std::vector<TokenBias>& biases) {
  biases.insert(biases.end(), sampling.logit_bias.begin(), sampling.logit_bias.end());
  if (output_index >= sampling.min_tokens) return;
  constexpr float kBan = -std::numeric_limits<float>::infinity();
  for (const int32_t token_id : sampling.end_token_ids) {
    const auto found = std::find_if(biases.begin(), biases.end(), [&](const TokenBias& bias) {
      return bias.token_id == token_id;
    });
    if (found == biases.end()) {
      biases.push_back({token_id, kBan});
    } else {
      found->bias = kBan;
    }
  }
}

int64_t Sampler::DeviceBytes(const SamplerOptions& options) {
  return LogitRows(options) * (options.d_model + options.vocab_size) * DTypeBytes(DType::kF32);
}

int64_t Sampler::ArenaBytes(int64_t max_tokens_per_step, int64_t num_slots) {
  const int64_t scores = 2 * StepArena::Footprint(max_tokens_per_step * DTypeBytes(DType::kI32));
  const int64_t draws = StepArena::Footprint(num_slots * DTypeBytes(DType::kI32)) +
                        StepArena::Footprint(num_slots * int64_t{sizeof(SampleRow)});
  const int64_t biases = StepArena::Footprint(num_slots * kMaxBiases * int64_t{sizeof(TokenBias)});
  return scores + draws + biases;
}

absl::StatusOr<Sampler> Sampler::Create(Backend& backend, Model& model,
                                        const SamplerOptions& options) {
  Sampler sampler(backend, model, options);
  const int64_t row_bytes = LogitRows(options) * DTypeBytes(DType::kF32);
  ASSIGN_OR_RETURN(sampler.gathered_, DeviceBuffer::Allocate(backend, row_bytes * options.d_model));
  ASSIGN_OR_RETURN(sampler.logits_,
                   DeviceBuffer::Allocate(backend, row_bytes * options.vocab_size));
  return sampler;
}

Sampler::Sampler(Backend& backend, Model& model, const SamplerOptions& options)
    : backend_(&backend), model_(&model), options_(options) {
  logit_tokens_.reserve(static_cast<size_t>(options.num_slots));
  sample_rows_.reserve(static_cast<size_t>(options.num_slots));
  score_tokens_.reserve(static_cast<size_t>(options.max_tokens_per_step));
  score_targets_.reserve(static_cast<size_t>(options.max_tokens_per_step));
  biases_.reserve(kMaxBiases);
}

SampleRow Sampler::MakeSampleRow(const RowOutput& output, const BatchRow& row,
                                 const StepRow& step_row) {
  const SamplingParams& sampling = *output.sampling;
  const int64_t position = step_row.position + step_row.num_tokens;  // of the token that is drawn
  GODWIT_CHECK(position >= row.prompt_length);
  GODWIT_CHECK(sampling.num_logprobs <= kMaxTopLogprobs);
  const size_t first_bias = biases_.size();
  AppendBiases(sampling, position - row.prompt_length, biases_);
  const std::span<const TokenBias> biases = std::span(biases_).subspan(first_bias);
  GODWIT_CHECK(std::ssize(biases) <= kMaxBiases);
  for (const TokenBias& bias : biases) {
    GODWIT_CHECK(bias.token_id >= 0 && bias.token_id < options_.vocab_size);
  }
  wanted_.draw_logprobs |= sampling.num_logprobs >= 0;
  wanted_.draw_tops |= sampling.num_logprobs > 0;
  return {.slot = output.lease->slot(),
          .output_index = output.output_index,
          .num_logprobs = sampling.num_logprobs,
          .position = position,
          .seed = output.seed,
          .temperature = sampling.temperature,
          .top_p = sampling.top_p,
          .min_p = sampling.min_p,
          .repetition_penalty = sampling.repetition_penalty,
          .presence_penalty = sampling.presence_penalty,
          .frequency_penalty = sampling.frequency_penalty,
          .top_k = sampling.top_k,
          .num_biases = static_cast<int32_t>(biases.size())};
}

// Where the logits that are planned next go.
Sampler::DrawBlock& Sampler::BlockOfNextLogits() {
  const int64_t logit_row = std::ssize(logit_tokens_);
  if (logit_row % LogitRows(options_) == 0) {
    draw_blocks_.push_back({.logit_begin = logit_row, .draw_begin = std::ssize(sample_rows_)});
  }
  ++draw_blocks_.back().num_logits;
  return draw_blocks_.back();
}

void Sampler::PlanDraws(const BatchRow& row, const StepRow& step_row) {
  if (row.outputs.empty()) return;
  DrawBlock& block = BlockOfNextLogits();
  const int64_t logit_row = std::ssize(logit_tokens_) - block.logit_begin;
  logit_tokens_.push_back(step_row.first_token + step_row.num_tokens - 1);
  for (const RowOutput& output : row.outputs) {
    sample_rows_.push_back(MakeSampleRow(output, row, step_row));
    sample_rows_.back().logit_row = static_cast<int32_t>(logit_row);
    ++block.num_draws;
  }
}

void Sampler::PadDraws(int64_t num_draws) {
  while (std::ssize(sample_rows_) < num_draws) {
    DrawBlock& block = BlockOfNextLogits();
    logit_tokens_.push_back(0);
    sample_rows_.push_back({.slot = -1});
    ++block.num_draws;
  }
}

void Sampler::Push(StepArena& arena) {
  device_logit_tokens_ = arena.Push(logit_tokens_);
  uploaded_rows_ = arena.Reserve(std::ssize(sample_rows_), &device_sample_rows_);
  device_score_tokens_ = arena.Push(score_tokens_);
  device_score_targets_ = arena.Push(score_targets_);
}

// The rows say where theirs lie.
void Sampler::PushBiases(StepArena& arena) {
  const TokenBias* biases = arena.Push(biases_);
  for (size_t draw = 0; draw < sample_rows_.size(); ++draw) {
    SampleRow& row = sample_rows_[draw];
    row.biases = row.num_biases > 0 ? biases : nullptr;
    biases += row.num_biases;
    uploaded_rows_[draw] = row;
  }
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
                                          int64_t num_draws, StepArena& arena) {
  row_outputs_.clear();
  logit_tokens_.clear();
  sample_rows_.clear();
  draw_blocks_.clear();
  score_tokens_.clear();
  score_targets_.clear();
  score_runs_.clear();
  biases_.clear();
  wanted_ = {};
  for (size_t batch_row = 0; batch_row < rows.size(); ++batch_row) {
    const StepRow& step_row = arrays.rows[static_cast<size_t>(arrays.row_of_batch[batch_row])];
    RowOutputs& outputs = row_outputs_.emplace_back();
    outputs.draw_begin = std::ssize(sample_rows_);
    PlanDraws(rows[batch_row], step_row);
    outputs.draw_end = std::ssize(sample_rows_);
    outputs.score_begin = std::ssize(score_tokens_);
    GODWIT_CHECK(rows[batch_row].num_score_top >= 0 &&
                 rows[batch_row].num_score_top <= kMaxTopLogprobs);
    outputs.num_score_top =
        static_cast<int32_t>(std::min<int64_t>(rows[batch_row].num_score_top, options_.vocab_size));
    PlanScores(rows[batch_row], step_row, outputs.num_score_top);
    outputs.score_end = std::ssize(score_tokens_);
  }
  wanted_.num_draws = std::ssize(sample_rows_);
  wanted_.num_scores = std::ssize(score_tokens_);
  PadDraws(num_draws);
  Push(arena);
  return row_outputs_;
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

absl::StatusOr<TensorView> Sampler::Logits(const TensorView& hidden, int32_t* tokens,
                                           int64_t count) {
  const TensorView gathered = MakeView(gathered_.bytes(), DType::kF32, count, options_.d_model);
  const TensorView logits = MakeView(logits_.bytes(), DType::kF32, count, options_.vocab_size);
  RETURN_IF_ERROR(backend_->GatherRows(
      {.x = hidden, .rows = MakeView(tokens, DType::kI32, count), .y = gathered}));
  RETURN_IF_ERROR(model_->Logits(gathered, logits));
  return logits;
}

absl::Status Sampler::Draw(const TensorView& hidden, StepOutputs& outputs) {
  const OutputArrays& draws = outputs.device_draws();
  for (const DrawBlock& block : draw_blocks_) {
    ASSIGN_OR_RETURN(const TensorView logits,
                     Logits(hidden, device_logit_tokens_ + block.logit_begin, block.num_logits));
    const int64_t top = block.draw_begin * kMaxTopLogprobs;
    RETURN_IF_ERROR(backend_->Sample(
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
  return outputs.ReadBack(step, wanted_);
}

}  // namespace godwit
