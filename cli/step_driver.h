#pragma once
// Requests through scheduler and engine in this process, step by step on one thread: the serving
// path without server and clients, for benches and checks.

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "scheduler/request.h"
#include "scheduler/scheduler.h"

namespace godwit::cli {

struct DrivenOutput {
  std::vector<SampledToken> tokens;
  FinishInfo finish;
  SpeculationStats speculation;
};

struct DrivenStep {
  int64_t num_rows = 0, num_tokens = 0;     // tokens: that stand
  int64_t num_drafts = 0, num_dropped = 0;  // verified, and drawn for nothing
  int64_t num_drawn() const { return num_drafts + num_dropped; }
  double seconds = 0, draft_seconds = 0;
};

struct DrivenRun {
  std::vector<DrivenOutput> outputs;  // as the requests
  // Of steps that only decode: wall time between their ends, of which the draft model's and the
  // model's on the device, steps, rows, and tokens that stand.
  double seconds = 0, draft_seconds = 0, verify_seconds = 0;
  int64_t num_steps = 0, num_rows = 0, num_tokens = 0;
  std::vector<DrivenStep> steps;  // these, in order
  int64_t num_preemptions = 0;
};

// Adds the requests in order, at most `concurrency` at a time (0: all at once), each two steps
// after one that has ended, and runs them to their ends. Each has one output; its stream is set
// here. The first error ends all.
absl::StatusOr<DrivenRun> Drive(Engine& engine, std::vector<GenerateRequest> requests,
                                int64_t concurrency);

}  // namespace godwit::cli
