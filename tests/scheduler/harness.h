#pragma once
// What the scheduler tests share: a client that checks the order of its events, and a driver that
// runs Scheduler and FakeExecutor on a virtual clock.

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "engine/cache_manager.h"
#include "scheduler/request.h"
#include "scheduler/scheduler.h"
#include "tests/scheduler/fake_executor.h"

namespace godwit {

inline constexpr TimeNs kMillisecond = 1'000'000;

// The consumer of one request.
struct Client {
  Client() : stream(std::make_shared<TokenStream>([] {})) {}
  explicit Client(std::shared_ptr<TokenStream> stream) : stream(std::move(stream)) {}

  // Takes what has arrived; errors() holds what broke the contract of TokenEvent.
  void Read();
  bool done() const { return num_done > 0; }

  std::shared_ptr<TokenStream> stream;
  std::vector<std::vector<int32_t>> tokens;  // per output
  std::vector<std::vector<FinishInfo>> finishes;
  std::vector<SampledToken> scores;
  int num_prompt_events = 0, num_done = 0;
  int64_t num_cached = 0;  // tokens of the prompt
  absl::Status status;
  Phase phase = Phase::kWaiting;
  RequestTimings timings;
  SpeculationStats speculation;
  int64_t kept_position = -1;
  int32_t kept_token = -1;
  int64_t num_dropped = 0;
  std::vector<std::string> errors;

 private:
  void ReadOne(TokenEvent event);
};

// base + rows + lag + retain, and with `paged` a softmax layer too.
CacheGeometry FakeGeometry(int64_t num_slots, bool paged, int64_t num_blocks = 0,
                           int64_t swap_bytes = 0, int64_t num_snapshots = 0);

struct HarnessOptions {
  SchedulerOptions scheduler{.context_length = 1 << 20};
  CacheGeometry geometry;
  FakeExecutorOptions executor;  // budget and steps in flight are copied from the scheduler's
  TimeNs step_ns = kMillisecond;
};

class Harness {
 public:
  explicit Harness(HarnessOptions options);

  // A prompt of pseudo-random ids.
  static GenerateRequest Request(int64_t num_prompt, int64_t max_tokens, uint64_t seed = 1);

  // Adds it with a new client; aborts the test when it is refused.
  Client& Add(GenerateRequest request);
  // Plans and submits up to max_steps_in_flight steps, collects the oldest and reads all clients.
  // False: nothing ran.
  bool Step();
  // Until idle; at most max_steps.
  void Run(int64_t max_steps = 100'000);

  // No violation, all clients done exactly once, nothing leaked; kept prefixes hold what they say.
  void ExpectClean();
  // The client's tokens are those of an uninterrupted run (the first ones, if it ended early).
  void ExpectReference(const Client& client, const GenerateRequest& request) const;

  HarnessOptions options;
  std::unique_ptr<CacheManager> caches;
  std::unique_ptr<FakeExecutor> executor;
  std::unique_ptr<Scheduler> scheduler;
  std::deque<Client> clients;
  TimeNs now = 0;
  std::vector<int64_t> last_rows;  // tokens of each row of the last submitted step; 0: a decode row

 private:
  struct InFlight {
    StepPlan plan;
    StepId id = 0;
  };
  bool Submit();
  std::deque<InFlight> in_flight_;
};

}  // namespace godwit
