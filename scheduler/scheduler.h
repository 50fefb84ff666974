#pragma once
// The policy: which rows run in the next step. Plan(now) and Apply(result, now) have no threads, no
// clock and no device, so a seeded simulation replays them. Continuous batching; prompts in chunks
// under a token budget; priority, then first come first served; preemption for priority only and
// only when the swap budget holds the victim's whole lease (never recompute); aging, so that every
// request runs within max_wait.
//
// Order of the queue (new and preempted requests): aged first; then by priority; within a priority
// preempted before new; then first come first served.
// * Aged: max_wait spent in the queue in all, preemptions included. While an aged request does not
//   fit, nothing behind it starts: it starts once the requests that run at that moment have left it
//   room, whatever arrives meanwhile, and is never preempted afterwards. A running prompt that got
//   no row for max_wait is aged too and goes first.
// * A request that does not fit preempts running ones of lower priority (lowest first, of these the
//   last admitted first) if the swap budget holds all state of those needed. A request's sequences
//   are swapped together, once none has a step in flight: until then they get no rows and nothing
//   else is admitted.
// * Before anything is preempted, states of sessions that wait on the device go to host memory, the
//   one used longest ago first.
// * If that is not possible, those behind it (also of lower priority) may pass, kMaxBypass in all;
// then
//   the request keeps what becomes free and nothing behind it starts before it.
// Rows: every running sequence decodes one token a step, unless the budget is too small for all of
// them and a prompt block; then those served longest ago go first. What decoding leaves of the
// budget, but for that block, is for drafts, in equal parts. A sequence with drafts waits for its
// step to be collected: only then is its position known. Prompts: aged, then priority,
// then order of admission.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "engine/batch.h"
#include "engine/cache_manager.h"
#include "scheduler/prefix_cache.h"
#include "scheduler/request.h"
#include "scheduler/session_table.h"

namespace godwit {

struct SchedulerOptions {
  int64_t max_tokens_per_step =
      2048;  // decode rows first, the rest for prompts, cut at multiples of kPrefillBlock
  int64_t max_waiting = 256;             // requests; more is RESOURCE_EXHAUSTED
  int64_t max_waiting_tokens = 1 << 20;  // prompt tokens in the queue
  TimeNs max_wait = 30'000'000'000;      // a request waiting longer is served before any priority
  int max_steps_in_flight = 1;           // 1 or 2
  PrefixCachePolicy prefix_cache;        // with CacheGeometry.num_snapshots
  int64_t context_length = 0;  // prompt + max_tokens may not exceed it, but for bounded sequences
                               // (CacheGeometry); required
  bool may_drop_sessions = true;  // SessionTable's may_drop
};

// Gauges and counters for metrics; a copy is published once per step. waiting, running and swapped
// count requests, whatever their num_outputs.
struct SchedulerStats {
  int64_t num_waiting = 0, num_waiting_tokens = 0, num_running = 0, num_swapped = 0;
  int64_t slots_used = 0, slots_total = 0, blocks_used = 0, blocks_total = 0;
  int64_t num_preemptions = 0, num_steps = 0, prompt_tokens = 0, generation_tokens = 0;
  int64_t num_dropped = 0;  // tokens; counted when a request ends
  SpeculationStats speculation;
  SessionStats sessions;
  PrefixCacheStats prefix_cache;  // its idle blocks are not in blocks_used
};

// No smaller max_tokens_per_step: one prompt block beside kPrefillBlock decode rows. Whoever parses
// the option refuses less.
inline constexpr int64_t kMinTokensPerStep = 2 * kPrefillBlock;

// A request that does not fit lets this many later ones pass, then it keeps what becomes free.
inline constexpr int kMaxBypass = 16;

inline constexpr int32_t kMaxPriority = 100;  // and at least -kMaxPriority

// One planned step; owns what the BatchRows point to. Every plan with rows goes back to the
// scheduler once: to Apply, or to Fail.
struct StepPlan {
  std::vector<CacheCopy> copies;  // before the rows; clear once they are done
  std::vector<BatchRow> rows;     // empty: nothing to run (but copies may be there)
  struct Record;                  // what the scheduler has to know when the result comes
  std::unique_ptr<Record> record;
  StepPlan();
  StepPlan(StepPlan&&) noexcept;
  StepPlan& operator=(StepPlan&&) noexcept;
  ~StepPlan();
};

// INVALID_ARGUMENT: malformed, exceeds the context, or can never fit (names value and limit). Reads
// nothing that changes, so any thread may call it.
absl::Status ValidateRequest(const GenerateRequest& request, const SchedulerOptions& options,
                             const CacheManager& caches);

// RESOURCE_EXHAUSTED when a request of num_tokens prompt tokens may not join a queue of num_waiting
// requests with num_waiting_tokens. A prompt longer than the token limit joins an empty queue.
absl::Status CheckQueue(int64_t num_waiting, int64_t num_waiting_tokens, int64_t num_tokens,
                        const SchedulerOptions& options);

class Scheduler {
 public:
  Scheduler(SchedulerOptions options, CacheManager& caches);
  ~Scheduler();

  // INVALID_ARGUMENT: exceeds the context or can never fit (names the limit); RESOURCE_EXHAUSTED:
  // the queue is full. Then the request is untouched and no event is pushed. Otherwise exactly one
  // kDone will be pushed.
  absl::Status Add(GenerateRequest request, TimeNs now);

  // Reaps cancelled, expired and timed-out requests, admits, preempts, resumes, and plans one step.
  // If nothing runs and nothing can be admitted, the first request of the queue fails with
  // RESOURCE_EXHAUSTED instead of the loop spinning; unless states of sessions may not be dropped
  // and one has no room in host memory: then it waits for that (waits_for_room), for max_wait at
  // most, or until SessionTable::RefuseRoom. At most max_steps_in_flight plans with rows may be
  // out.
  StepPlan Plan(TimeNs now);

  // The result of a step planned before, in order. Confirms tokens, finds stops, pushes events,
  // releases leases.
  void Apply(StepPlan plan, StepResult result, TimeNs now);

  // The step failed: its requests (and those of plan.copies) end with `status`, all others go on.
  // No kept prefix is trusted any more.
  void Fail(StepPlan plan, const absl::Status& status, TimeNs now);

  // Ends every request with `status` (drain timeout, lost device).
  void AbortAll(const absl::Status& status, TimeNs now);

  // No request and no step in flight. While there is a request each Plan has rows, ends a request
  // or waits for a step in flight or for room, so whoever calls Plan at every step boundary needs a
  // timer in the last case only.
  bool idle() const;
  // Nothing runs before a state in host memory goes elsewhere.
  bool waits_for_room() const;
  SchedulerStats stats() const;
  SessionTable& sessions();  // on the same thread

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace godwit
