#pragma once
// The engine as the scheduler sees it: rows in, tokens out, at most kMaxStepsInFlight steps
// between.

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/cache_manager.h"
#include "engine/sampling_params.h"

namespace godwit {

struct RopeTable;   // rope_table.h
struct StateImage;  // state_image.h

// One sequence that draws from a row's logits. outputs[0] is the row's own lease; further outputs
// (n > 1, last prefill chunk only) are forks: the engine copies the row's state to their leases
// before anything else uses them.
struct RowOutput {
  CacheLease* lease = nullptr;
  const SamplingParams* sampling = nullptr;
  uint64_t seed = 0;  // random key (seed, output_index, position): never the batch slot
  int32_t output_index = 0;
  // Drafts are accepted while they equal what the target itself draws with this key: the tokens are
  // a function of the seed. False: by the standard rule, which accepts more and has the same
  // distribution. The same for a greedy output.
  bool coupled = true;
};

// What decides how many of max_draft_tokens a step proposes (draft_policy.h).
enum class DraftPolicy {
  kFixed,       // all of them
  kMargin,      // until P(any of them is rejected), by the draft's margins, exceeds the threshold
  kThroughput,  // while one more makes the batch faster, by what drafts and rows cost here
  kSpecDecPP,   // as kMargin, by the draft's acceptance head: ModelCard::has_acceptance_head
};

// What ended a row's drafts in a step.
enum class DraftStop {
  kMaxDraftTokens,  // the request's own number of them
  kBudget,          // max_tokens_per_step
  kMaxTokens,       // the output's length
  kPolicy,
  kMeasurement,  // a number that no estimate chose, for the estimates' sake
  kLag,          // the draft model has not followed the sequence
  kContext,      // the draft model's
};
inline constexpr int kNumDraftStops = 7;

// Pointers and spans must stay valid until the step is collected.
struct BatchRow {
  std::span<const int32_t>
      token_ids;  // prompt tokens to compute; empty = continue: the row's input token and position
                  // are what the device committed last for this lease
  int64_t first_position = 0;  // of token_ids[0]; ignored when token_ids is empty
  int64_t confirmed_position =
      0;  // what the scheduler has seen committed; bases may be folded up to here
  int64_t prompt_length = 0;        // output index of a drawn token = its position - prompt_length
  const RopeTable* rope = nullptr;  // the same in every row of a sequence; null: the model's own
  CacheLease* lease = nullptr;      // with room for the tokens of this step and max_draft_tokens
  std::span<const RowOutput> outputs;  // empty for every prefill chunk but the last
  // A decode row: what the draft model may propose in this step, fewer where it cannot; 0 turns
  // speculation off. A prompt row: other than 0, the draft model reads the prompt too, without
  // which the sequence is not speculated on. No other step of a row that speculates is in flight.
  int max_draft_tokens = 0;
  DraftPolicy draft_policy = DraftPolicy::kFixed;
  float draft_threshold = 0.5f;                        // kMargin, kSpecDecPP
  DraftStop draft_limit = DraftStop::kMaxDraftTokens;  // what set max_draft_tokens
  // Set by the engine: drafts after max_draft_tokens that were drawn but are not verified, for the
  // distributions that they were drawn from.
  int num_dropped = 0;

  // Scoring of given tokens (prompt log-probabilities): target i is the token whose log-probability
  // row token_ids[i] predicts (the next prompt token), -1 for none. Same length as token_ids, or
  // empty.
  std::span<const int32_t> score_targets;
  int32_t num_score_top = 0;  // also the n most likely per scored token
  float* logits = nullptr;    // offline score: receives [token_ids.size(), vocab] f32, or null
};

struct TopLogprob {
  int32_t token_id = 0;
  float logprob = 0;
};

struct SampledToken {
  int32_t token_id = 0;
  float logprob = 0;            // natural log of the raw distribution; 0 when not asked for
  std::vector<TopLogprob> top;  // num_logprobs entries
};

struct RowResult {
  absl::Status status;  // not OK: this row's outputs are no numbers; its sequence must end, others
                        // are as they were
  std::vector<std::vector<SampledToken>>
      outputs;                       // per RowOutput: 1, or 1..K+1 tokens when speculating
  std::vector<SampledToken> scores;  // per score target that is not -1
  int64_t num_computed = 0;          // tokens of this row now in the state
  int num_drafts = 0;   // verified in this step; one less than outputs[0] has were accepted
  int num_dropped = 0;  // and drawn for nothing
  std::optional<DraftStop> draft_stop;  // of a row that asked for drafts, and may have got none
  // P(draft is accepted | all before it are) as the policy saw it, of each draft; empty where no
  // policy asked.
  std::vector<float> predicted;
};

struct StepResult {
  std::vector<RowResult> rows;  // as submitted
  int64_t num_tokens = 0;       // computed in this step
  double forward_seconds = 0;   // device time of the step
  double wait_seconds = 0;      // that Collect waited for the device
  double draft_seconds = 0;     // of which the draft model's
  // From the end of the step before to its begin on the device; of a step submitted while that was
  // in flight.
  std::optional<double> idle_seconds;
};

using StepId = int64_t;

class StepExecutor {  // Engine in production, a fake in scheduler tests
 public:
  virtual ~StepExecutor() = default;

  // Steps run in order; at most kMaxStepsInFlight between Submit and Collect. The CPU engine
  // computes in Submit. On error nothing was committed. kUnavailable: the device is lost, drain and
  // exit.
  virtual absl::StatusOr<StepId> Submit(std::span<const BatchRow> rows) = 0;
  virtual absl::StatusOr<StepResult> Collect(StepId id) = 0;

  // Copies whole sequence states, in order with the steps (fork, preempt, save, load).
  virtual absl::Status Copy(std::span<const CacheCopy> copies) = 0;

  // The bytes of a stored state, whose copy has run; and the bytes that a state from elsewhere has.
  // INVALID_ARGUMENT: not as many as the state's tokens take here.
  virtual std::shared_ptr<const StateImage> ExportState(int64_t host_id) = 0;
  virtual absl::Status ImportState(int64_t host_id, std::shared_ptr<const StateImage> image) = 0;
};
// Invariant at every Collect: kv length == state position == num_computed_tokens of each confirmed
// row.

}  // namespace godwit
