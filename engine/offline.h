#pragma once
// One request on an engine without scheduler or threads: what `godwit generate` and `godwit score`
// run.

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "engine/sampling_params.h"

namespace godwit {

struct OfflineGenerateOptions {
  SamplingParams sampling;
  uint64_t seed = 0;
  int64_t max_tokens = 128;
  bool ignore_eos = false;
  int64_t chunk =
      0;  // prompt tokens per step, any N; 0: the engine's own (multiples of kPrefillBlock)
  int max_draft_tokens = 0;  // of a step; 0: no speculation
  DraftPolicy draft_policy = DraftPolicy::kFixed;
  float draft_threshold = 0.5f;
  bool coupled = true;  // RowOutput's
  // Called with each drawn token that belongs to the output (not EOS); may be empty.
  std::function<void(const SampledToken&)> on_token;
  // Called after each step with drafts; may be empty.
  std::function<void()> on_round;
};

struct OfflineGenerateResult {
  std::vector<SampledToken> tokens;  // without the EOS that ended it
  bool ended_by_eos = false;
  double prefill_seconds = 0, decode_seconds = 0;
  int64_t num_dropped = 0;  // tokens that the sequence no longer held at its end
  // Decode steps; of these with drafts; drafts, and those accepted; the device's part of the time.
  int64_t num_steps = 0, num_rounds = 0, num_drafts = 0, num_accepted = 0;
  double draft_seconds = 0, verify_seconds = 0;
};

// INVALID_ARGUMENT: empty prompt, id out of range, prompt + max_tokens over the context; with unlimited
// output, a prompt over what a bounded sequence holds.
absl::StatusOr<OfflineGenerateResult> GenerateOffline(Engine& engine,
                                                      std::span<const int32_t> prompt,
                                                      const OfflineGenerateOptions& options);

struct OfflineScoreResult {
  std::vector<float> logprobs;  // of tokens 1..T-1
  double total_logprob = 0;     // their sum
  double perplexity = 0;        // exp(-total / (T - 1))
  double seconds = 0;
};

// logits: [T, vocab] f32 to fill, or null.
absl::StatusOr<OfflineScoreResult> ScoreOffline(Engine& engine, std::span<const int32_t> token_ids,
                                                int64_t chunk, float* logits);

}  // namespace godwit
