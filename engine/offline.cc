#include "engine/offline.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/rope_table.h"
#include "kernels/base/status.h"
#include "kernels/ops.h"

namespace godwit {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

absl::Status CheckTokens(const ModelCard& card, std::span<const int32_t> token_ids,
                         int64_t max_tokens) {
  if (token_ids.empty()) return absl::InvalidArgumentError("the prompt is empty");
  const int64_t num_tokens = std::ssize(token_ids);
  const CacheGeometry& geometry = card.geometry;
  if (geometry.bound_tokens > 0 && num_tokens + max_tokens > geometry.bound_beyond) {
    if (num_tokens > geometry.bound_tokens) {
      return absl::InvalidArgumentError(absl::StrCat("prompt of ", num_tokens,
                                                     " tokens exceeds the ", geometry.bound_tokens,
                                                     " that a sequence of unlimited output holds"));
    }
  } else if (max_tokens > card.context_length - num_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("prompt of ", num_tokens,
                                                   " tokens and max_tokens ", max_tokens,
                                                   " exceed the context of ", card.context_length));
  }
  for (int64_t index = 0; index < num_tokens; ++index) {
    const int32_t token_id = token_ids[static_cast<size_t>(index)];
    if (token_id >= 0 && token_id < card.config.vocab_size) continue;
    return absl::InvalidArgumentError(absl::StrCat("token id ", token_id, " at index ", index,
                                                   " not in [0, ", card.config.vocab_size, ")"));
  }
  return absl::OkStatus();
}

// chunk 0: the most that a step takes and that cuts prompts where the server would.
absl::StatusOr<int64_t> ChunkTokens(const ModelCard& card, int64_t chunk) {
  if (chunk == 0) return card.max_tokens_per_step / kPrefillBlock * kPrefillBlock;
  if (chunk > 0 && chunk <= card.max_tokens_per_step) return chunk;
  return absl::InvalidArgumentError(
      absl::StrCat("chunk ", chunk, " not in [0, ", card.max_tokens_per_step, "]"));
}

absl::StatusOr<StepResult> RunStep(Engine& engine, const BatchRow& row) {
  ASSIGN_OR_RETURN(const StepId id, engine.Submit(std::span(&row, 1)));
  return engine.Collect(id);
}

absl::StatusOr<RowResult> RunRow(Engine& engine, const BatchRow& row) {
  ASSIGN_OR_RETURN(StepResult result, RunStep(engine, row));
  return std::move(result.rows[0]);
}

// Computes the prompt; the result is that of its last chunk, which draws the first token.
absl::StatusOr<RowResult> Prefill(Engine& engine, std::span<const int32_t> prompt, int64_t chunk,
                                  BatchRow row) {
  const std::span<const RowOutput> outputs = row.outputs;
  RowResult result;
  for (int64_t begin = 0; begin < std::ssize(prompt); begin += chunk) {
    const int64_t count = std::min(chunk, std::ssize(prompt) - begin);
    row.token_ids = prompt.subspan(static_cast<size_t>(begin), static_cast<size_t>(count));
    row.first_position = row.confirmed_position = begin;
    row.outputs = begin + count == std::ssize(prompt) ? outputs : std::span<const RowOutput>();
    ASSIGN_OR_RETURN(result, RunRow(engine, row));
  }
  return result;
}

// A decode step, counted in `result`.
absl::StatusOr<RowResult> Decode(Engine& engine, const OfflineGenerateOptions& options,
                                 BatchRow row, OfflineGenerateResult& result) {
  const int64_t left = options.max_tokens - std::ssize(result.tokens);
  row.confirmed_position = row.lease->position();
  row.max_draft_tokens = static_cast<int>(std::min<int64_t>(options.max_draft_tokens, left - 1));
  ASSIGN_OR_RETURN(StepResult step, RunStep(engine, row));
  RowResult& decoded = step.rows[0];
  ++result.num_steps;
  result.draft_seconds += step.draft_seconds;
  result.verify_seconds += step.forward_seconds - step.draft_seconds;
  if (decoded.num_drafts > 0) {
    ++result.num_rounds;
    if (options.on_round) options.on_round();
  }
  result.num_drafts += decoded.num_drafts;
  result.num_accepted += std::ssize(decoded.outputs[0]) - 1;
  return std::move(decoded);
}

// Keeps the tokens of a step up to the end of the output; true: it has ended.
bool Keep(const std::vector<SampledToken>& tokens, const std::vector<int32_t>& end_tokens,
          const OfflineGenerateOptions& options, OfflineGenerateResult& result) {
  for (const SampledToken& token : tokens) {
    if (std::find(end_tokens.begin(), end_tokens.end(), token.token_id) != end_tokens.end()) {
      result.ended_by_eos = true;
      return true;
    }
    if (options.on_token) options.on_token(token);
    result.tokens.push_back(token);
    if (std::ssize(result.tokens) == options.max_tokens) return true;
  }
  return false;
}

// EOS ids of the model, unless they are ordinary tokens here.
std::vector<int32_t> EndTokens(const ModelCard& card, const OfflineGenerateOptions& options) {
  return options.ignore_eos ? std::vector<int32_t>() : card.config.eos_token_ids;
}

}  // namespace

absl::StatusOr<OfflineGenerateResult> GenerateOffline(Engine& engine,
                                                      std::span<const int32_t> prompt,
                                                      const OfflineGenerateOptions& options) {
  const ModelCard& card = engine.card();
  if (options.max_tokens < 1) {
    return absl::InvalidArgumentError(absl::StrCat("max_tokens ", options.max_tokens, " not >= 1"));
  }
  if (options.max_draft_tokens < 0 || options.max_draft_tokens > card.max_draft_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("max_draft_tokens ", options.max_draft_tokens,
                                                   " not in [0, ", card.max_draft_tokens, "]"));
  }
  if (options.max_draft_tokens > 0 && options.draft_policy == DraftPolicy::kSpecDecPP &&
      !card.has_acceptance_head) {
    return absl::FailedPreconditionError(
        "draft policy specdecpp, but the draft model has no acceptance head");
  }
  RETURN_IF_ERROR(CheckTokens(card, prompt, options.max_tokens));
  const std::vector<int32_t> end_tokens = EndTokens(card, options);
  SamplingParams sampling = options.sampling;
  sampling.end_token_ids.insert(sampling.end_token_ids.end(), end_tokens.begin(), end_tokens.end());
  RETURN_IF_ERROR(ValidateSampling(sampling, card.config.vocab_size));
  ASSIGN_OR_RETURN(const int64_t chunk, ChunkTokens(card, options.chunk));
  ASSIGN_OR_RETURN(CacheLease lease,
                   engine.caches().Reserve(std::ssize(prompt) + options.max_tokens));

  const RowOutput output = {
      .lease = &lease, .sampling = &sampling, .seed = options.seed, .coupled = options.coupled};
  ASSIGN_OR_RETURN(const auto rope,
                   RopeOfRequest(card.config, nullptr,
                                 NumRotatedPositions(std::ssize(prompt), options.max_tokens)));
  BatchRow row = {.prompt_length = std::ssize(prompt),
                  .rope = rope.get(),
                  .lease = &lease,
                  .outputs = std::span(&output, 1),
                  .max_draft_tokens = options.max_draft_tokens,
                  .draft_policy = options.draft_policy,
                  .draft_threshold = options.draft_threshold};
  OfflineGenerateResult result;
  Clock::time_point start = Clock::now();
  ASSIGN_OR_RETURN(RowResult step, Prefill(engine, prompt, chunk, row));
  result.prefill_seconds = SecondsSince(start);
  start = Clock::now();
  while (!Keep(step.outputs[0], end_tokens, options, result)) {
    ASSIGN_OR_RETURN(step, Decode(engine, options, row, result));
  }
  result.decode_seconds = SecondsSince(start);
  result.num_dropped = lease.dropped();
  return result;
}

absl::StatusOr<OfflineScoreResult> ScoreOffline(Engine& engine, std::span<const int32_t> token_ids,
                                                int64_t chunk, float* logits) {
  const ModelCard& card = engine.card();
  RETURN_IF_ERROR(CheckTokens(card, token_ids, 0));
  ASSIGN_OR_RETURN(chunk, ChunkTokens(card, chunk));
  const int64_t num_tokens = std::ssize(token_ids);
  ASSIGN_OR_RETURN(CacheLease lease, engine.caches().Reserve(num_tokens));

  std::vector<int32_t> targets(token_ids.begin() + 1, token_ids.end());
  targets.push_back(-1);
  OfflineScoreResult result;
  const Clock::time_point start = Clock::now();
  ASSIGN_OR_RETURN(const auto rope, RopeOfRequest(card.config, nullptr, num_tokens));
  BatchRow row = {.prompt_length = num_tokens, .rope = rope.get(), .lease = &lease};
  for (int64_t begin = 0; begin < num_tokens; begin += chunk) {
    const auto count = static_cast<size_t>(std::min(chunk, num_tokens - begin));
    row.token_ids = token_ids.subspan(static_cast<size_t>(begin), count);
    row.first_position = row.confirmed_position = begin;
    row.score_targets = std::span(targets).subspan(static_cast<size_t>(begin), count);
    row.logits = logits == nullptr ? nullptr : logits + begin * card.config.vocab_size;
    ASSIGN_OR_RETURN(const RowResult step, RunRow(engine, row));
    for (const SampledToken& token : step.scores) {
      result.logprobs.push_back(token.logprob);
      result.total_logprob += token.logprob;
    }
  }
  result.seconds = SecondsSince(start);
  const double num_scored = static_cast<double>(std::max<int64_t>(num_tokens - 1, 1));
  result.perplexity = std::exp(-result.total_logprob / num_scored);
  return result;
}

}  // namespace godwit
