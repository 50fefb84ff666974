#pragma once
// Requests through scheduler and engine in this process, step by step on one thread: the serving
// path without server and clients, for benches and checks.

#include <cstdint>
#include <functional>
#include <span>
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
  // Wall time since the end of the step before, and of it the draft model's on the device.
  double seconds = 0, draft_seconds = 0;
};

struct DrivenRun {
  std::vector<DrivenOutput> outputs;  // as the requests
  std::vector<DrivenStep> steps;      // those that only decode, in order
  int64_t num_preemptions = 0;
};

// Called with a step's rows and what came of them, before the scheduler hears of it.
using OnStep = std::function<void(std::span<const BatchRow> rows, const StepResult& result)>;

// Adds the requests in order, at most `concurrency` at a time (0: all at once), each two steps
// after one that has ended, and runs them to their ends. Each has one output; its stream is set
// here. The first error ends all. on_step may be empty.
absl::StatusOr<DrivenRun> Drive(Engine& engine, std::vector<GenerateRequest> requests,
                                int64_t concurrency, OnStep on_step = {});

GenerateRequest MakeRequest(std::vector<int32_t> prompt, float temperature, uint64_t seed,
                            int64_t max_tokens);

// What the target itself writes from the beginning of a text, `length` tokens each: benches and
// recordings need no files, and drafts meet the text they serve.
absl::StatusOr<std::vector<std::vector<int32_t>>> WritePrompts(Engine& engine, uint64_t seed,
                                                               int64_t count, int64_t length);

}  // namespace godwit::cli
