#pragma once
// Runs requests on an Engine the way a scheduler would, with every choice in the test's hands: when
// each starts, how its prompt is cut, how many steps are in flight, when it is moved to host
// memory.

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "tests/engine/tiny_model.h"

namespace godwit {

struct DriverRequest {
  std::vector<int32_t> prompt;
  SamplingParams sampling;
  uint64_t seed = 1;
  int32_t output_index = 0;
  int64_t max_tokens = 8;
  std::vector<int64_t> cuts;  // lengths of the first prompt chunks; the rest follows at once
  int64_t start_step = 0;     // not before this many steps
  int64_t swap_after = -1;    // swapped out when so many tokens are drawn, for swap_steps steps
  int64_t swap_steps = 3;
  bool swap_by_store = false;  // by saving, releasing and loading
  int num_outputs = 1;         // forks get output_index + 1, ...
  std::string rope;            // JSON of the request's own method; "": the model's
  // Drafts asked for in the row of step s: those of s % size; empty: none, and the draft model does
  // not read the prompt.
  std::vector<int> draft_tokens;
  DraftPolicy draft_policy = DraftPolicy::kFixed;
  float draft_threshold = 0.5f;
  bool coupled = true;
  bool is_probed = true;
};

// Everything that can be seen of one output; equal operator compares bits of logits and
// log-probabilities.
struct DriverOutput {
  std::vector<SampledToken> tokens;
  // Logits of three fixed tokens computed after the last one; none of a bounded sequence, and where
  // the request is not probed.
  std::vector<float> probe;
  int64_t num_drafts = 0, num_accepted = 0, num_dropped = 0;

  std::vector<int32_t> ids() const;
  bool SameBits(const DriverOutput& other) const;
};

// Greedy when `seed` is even, else sampled with penalties; the most log-probabilities either way.
DriverRequest RandomRequest(const TinyModel& model, uint64_t seed, int64_t prompt_length,
                            int64_t max_tokens);

// "cpu", with two threads, or "cuda". Not OK: this machine has none.
absl::StatusOr<std::unique_ptr<Backend, BackendDeleter>> OpenDevice(const std::string& name);

// One engine on the CPU. Fails the test (ASSERT in the constructor's place: check `engine()`) when
// it cannot be made.
std::unique_ptr<Engine> MakeEngine(const TinyModel& model, EngineOptions options);
std::unique_ptr<Engine> MakeEngine(const TinyModel& model, EngineOptions options,
                                   std::unique_ptr<Backend, BackendDeleter> backend);
// One that computes the same bits for a sequence whatever runs beside it, on a device that opens.
std::unique_ptr<Engine> MakeDeterministicEngine(const TinyModel& model, EngineOptions options,
                                                const std::string& device);

// Outputs of all requests, request by request, output by output.
std::vector<DriverOutput> Drive(Engine& engine, int steps_in_flight,
                                const std::vector<DriverRequest>& requests);

std::vector<int32_t> RandomTokens(uint64_t seed, int64_t count, int32_t vocab_size);

}  // namespace godwit
