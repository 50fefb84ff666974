#pragma once
// The engine thread: mailbox -> Plan -> Submit -> Collect -> Apply, with up to two steps in flight.
// Sole owner of scheduler, executor and caches while it runs.

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "engine/batch.h"
#include "engine/cache_manager.h"
#include "scheduler/request.h"
#include "scheduler/scheduler.h"

namespace godwit {

// Measured per step, called on the engine thread; must be short and not block.
struct StepReport {
  int64_t num_tokens = 0, num_rows = 0, num_drafts = 0;
  TimeNs step_ns =
      0;  // to the end of Apply, from Plan or from the end of the step before, the later
  TimeNs forward_ns = 0;  // of which the executor's own time
  TimeNs draft_ns = 0;    // of which the draft model's
  // What the executor's work did not cover: its device's pause before the step, or, where none was
  // in flight, the step's time without forward_ns.
  TimeNs overhead_ns = 0;
  SchedulerStats stats;
};

struct EngineLoopOptions {
  SchedulerOptions scheduler;
  int64_t max_mailbox = 1024;                      // requests not yet seen by the engine thread
  std::function<void(const StepReport&)> on_step;  // may be empty
};

// The status of a request that a lost device ended or refused, as against a server that drains.
bool IsDeviceLost(const absl::Status& status);
// The same status without the mark that IsDeviceLost reads.
absl::Status WithoutDeviceLostMark(absl::Status status);

class EngineLoop {
 public:
  // `executor` and `caches` outlive the loop and are used by its thread only.
  EngineLoop(EngineLoopOptions options, StepExecutor& executor, CacheManager& caches);
  ~EngineLoop();  // Stop()

  // Any thread. OK: exactly one kDone event will arrive on request.stream. RESOURCE_EXHAUSTED:
  // mailbox or queue full (the queue's size is counted here, at once); UNAVAILABLE: draining or
  // stopped; INVALID_ARGUMENT: can never run.
  absl::Status Submit(GenerateRequest request);

  // Any thread. Runs `work` on the engine thread between two steps, with what sessions are there;
  // it may use the executor for copies of theirs. False: the loop has stopped or lost its device,
  // `work` will not run.
  using SessionWork = std::function<void(SessionTable& sessions, StepExecutor& executor)>;
  bool Post(SessionWork work);

  // Any thread: a request's cancel flag was set; wakes the engine thread if it sleeps.
  void Wake();

  // No new requests; returns when all have ended. What has not after `timeout_ns` (a duration) ends
  // with UNAVAILABLE at the next step boundary.
  void Drain(TimeNs timeout_ns);
  // Ends everything with UNAVAILABLE at the next step boundary and joins the thread. Not from a
  // notify callback. May be called again.
  void Stop();

  SchedulerStats stats() const;  // any thread; of the last step
  TimeNs last_heartbeat()
      const;  // any thread; the thread is alive if this is younger than a few seconds
  // An executor call returned UNAVAILABLE: every request, running or new, ends with UNAVAILABLE
  // (IsDeviceLost).
  bool device_lost() const;
  std::string device_lost_cause() const;  // any thread; the executor's words, "" while all is well

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace godwit
