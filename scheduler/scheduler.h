#pragma once
// The policy: which rows run in the next step. Plan(now) and Apply(result, now) have no threads, no clock and no device, so a
// seeded simulation replays them. Continuous batching; prompts in chunks under a token budget; priority, then first come
// first served; preemption for priority only and only when the swap budget holds the victim's whole lease (never recompute);
// aging, so that every request runs within max_wait.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "engine/batch.h"
#include "engine/cache_manager.h"
#include "scheduler/request.h"

namespace godwit {

struct SchedulerOptions {
  int64_t max_tokens_per_step = 2048;  // decode rows first, the rest for prompts, cut at multiples of kPrefillBlock
  int64_t max_waiting = 256;           // requests; more is RESOURCE_EXHAUSTED
  int64_t max_waiting_tokens = 1 << 20;  // prompt tokens in the queue
  TimeNs max_wait = 30'000'000'000;    // a request waiting longer is served before any priority
  int max_steps_in_flight = 1;         // 1 or 2
  int64_t context_length = 0;          // prompt + max_tokens may not exceed it
};

// Gauges and counters for metrics; a copy is published once per step.
struct SchedulerStats {
  int64_t num_waiting = 0, num_waiting_tokens = 0, num_running = 0, num_swapped = 0;
  int64_t slots_used = 0, slots_total = 0, blocks_used = 0, blocks_total = 0;
  int64_t num_preemptions = 0, num_steps = 0, prompt_tokens = 0, generation_tokens = 0;
};

// One planned step; owns what the BatchRows point to. Keep it until its result is applied.
struct StepPlan {
  std::vector<CacheCopy> copies;     // before the rows
  std::vector<BatchRow> rows;        // empty: nothing to run
  struct RowState;                   // scheduler's own record per row
  std::vector<std::unique_ptr<RowState>> states;
  StepPlan();
  StepPlan(StepPlan&&) noexcept;
  StepPlan& operator=(StepPlan&&) noexcept;
  ~StepPlan();
};

class Scheduler {
 public:
  Scheduler(SchedulerOptions options, CacheManager& caches);
  ~Scheduler();

  // INVALID_ARGUMENT: exceeds the context or can never fit (names the limit); RESOURCE_EXHAUSTED: the queue is full. Then the
  // request is untouched and no event is pushed. Otherwise exactly one kDone will be pushed.
  absl::Status Add(GenerateRequest request, TimeNs now);

  // Reaps cancelled, expired and timed-out requests, admits, preempts, resumes, and plans one step. If nothing runs and nothing
  // can be admitted, the oldest waiting request fails with RESOURCE_EXHAUSTED instead of the loop spinning.
  StepPlan Plan(TimeNs now);

  // The result of a step planned before, in order. Confirms tokens, finds stops, pushes events, releases leases.
  void Apply(StepPlan plan, const StepResult& result, TimeNs now);

  // The step failed: its requests end with `status`, all others go on.
  void Fail(StepPlan plan, const absl::Status& status, TimeNs now);

  // Ends every request with `status` (drain timeout, lost device).
  void AbortAll(const absl::Status& status, TimeNs now);

  bool idle() const;                   // no request at all
  TimeNs next_deadline() const;        // earliest time at which Plan must run again though nothing happens; kNever if none
  SchedulerStats stats() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace godwit
