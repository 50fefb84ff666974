#pragma once
// The engine thread's record of a request and of each of its outputs. Owned and changed by the
// scheduler only.

#include <cstdint>
#include <vector>

#include "engine/cache_manager.h"
#include "scheduler/request.h"

namespace godwit {

struct RequestGroup;  // the request and its n sequences

// One output of one request. Until the prompt is computed only sequences[0] has rows; its last
// prompt chunk forks its state to the others.
struct Sequence {
  RequestGroup* group = nullptr;
  int32_t output_index = 0;
  CacheLease lease;                // may not be swapped or released while steps_in_flight > 0
  int64_t confirmed_position = 0;  // tokens in the state, as of the last applied step
  int64_t num_output = 0;          // tokens kept
  int64_t num_drawn = 0;           // kept or in flight, one for each step in flight
  int64_t last_step = -1;          // number of the last step with a row of it
  int steps_in_flight = 0;
  bool finished = false;  // results still in flight are dropped
  // The state is kept when the group ends: cut to kept_position, with kept_token drawn after it and
  // dropped_tokens taken back.
  bool kept = false;
  int64_t kept_position = 0;
  int32_t kept_token = -1;
  int32_t last_token = -1;  // of the output so far
  std::vector<int32_t> dropped_tokens;
};

// Phases: kWaiting -> kPrefilling -> kDecoding -> kFinished; kSwapped between any two rows.
struct RequestGroup {
  GenerateRequest request;  // token_ids carries one more id, -1: then the score targets of the
                            // prompt tokens [a, b) are token_ids[a + 1, b + 1)
  int64_t prompt_length = 0;        // with the tokens of the state that it starts from
  int64_t first_prompt_token = 0;   // position of token_ids[0]
  int64_t order = 0;  // of arrival; also names the group
  Phase phase = Phase::kWaiting;
  std::vector<Sequence> sequences;  // n; never resized, rows point to the leases
  int64_t num_prompt_submitted = 0;
  int64_t num_prompt_confirmed = 0;
  int64_t num_cached = 0;               // of the prompt: where the first row began
  std::vector<int64_t> keep_positions;  // where the prompt is cut and its state kept, ascending
  size_t num_kept = 0;                  // of these

  int64_t admission = 0;    // order of admission and resumption
  TimeNs queued_since = 0;  // waiting or swapped
  TimeNs last_row = 0;      // time of the last row, or of admission
  int num_bypassed = 0;     // later requests that were admitted before it
  bool aged = false;        // for good: first in its queue, never preempted
  bool held = false;        // gets no rows in this plan, so that it can be preempted in the next

  RequestTimings timings;
  SpeculationStats speculation;
  int64_t num_dropped = 0;  // of its sequences that have ended
  std::vector<SampledToken> prompt_scores;
  std::vector<TokenEvent> events;  // of this step, pushed at its end
  bool ended_ok = false;

  // Tokens that one sequence reserves.
  int64_t num_reserved() const { return prompt_length + request.max_tokens; }
  int64_t num_live() const;  // sequences that have not finished
  int64_t steps_in_flight() const;
  bool speculates() const { return request.max_draft_tokens > 0; }
  int64_t num_input() const { return std::ssize(request.token_ids) - 1; }
  bool prompt_submitted() const { return num_prompt_submitted == prompt_length; }
};

}  // namespace godwit
