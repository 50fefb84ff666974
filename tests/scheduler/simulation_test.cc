// A million simulated steps: random arrivals, priorities, lengths, stops, n, cancels, deadlines,
// time limits and failed steps on small servers, from a seed that is printed on failure.
// GODWIT_SIM_STEPS sets the number of steps.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <random>

#include "absl/strings/str_cat.h"
#include "scheduler/scheduler.h"
#include "tests/scheduler/harness.h"

namespace godwit {
namespace {

constexpr int64_t kDefaultSteps = GODWIT_SIM_DEFAULT_STEPS;  // from the CMakeLists.txt
constexpr int64_t kStepsPerSeed = 2'000;
constexpr int32_t kVocabSize = 60;  // small: EOS and stop ids come up by themselves

int64_t NumSteps() {
  const char* steps = std::getenv("GODWIT_SIM_STEPS");
  return steps == nullptr ? kDefaultSteps : std::atoll(steps);
}

struct Live {
  GenerateRequest request;
  Client client;
  TimeNs submitted = 0;
  TimeNs cancel_at = kNever;
  int64_t stop_after = 0;  // find_stop ends output 0 here; 0: never
  std::vector<int64_t> seen;
};

class Simulation {
 public:
  explicit Simulation(uint64_t seed)
      : seed_(seed), random_(seed), options_(Options()), harness_(options_) {}

  int64_t Run();  // steps done
  uint64_t trace_hash() const { return harness_.executor->trace_hash() * 31 + outcome_hash_; }
  int64_t num_cached_tokens() const { return num_cached_tokens_; }

 private:
  int64_t Uniform(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(random_() % static_cast<uint64_t>(high - low + 1));
  }
  bool Chance(int percent) { return Uniform(1, 100) <= percent; }
  HarnessOptions Options();
  GenerateRequest RandomRequest();
  void Arrive();
  void ReadClients();
  void CheckEnd(Live& live);
  void CheckStats();

  const uint64_t seed_;
  std::mt19937_64 random_;
  const HarnessOptions options_;
  Harness harness_;
  std::map<int64_t, Live> live_;
  int64_t num_added_ = 0;
  int64_t longest_output_ = 60;
  uint64_t outcome_hash_ = 0;
  int64_t num_cached_tokens_ = 0;
};

HarnessOptions Simulation::Options() {
  HarnessOptions options;
  const bool paged = Chance(50);
  const int64_t num_slots = Uniform(1, 12);
  const int64_t num_blocks = paged ? Uniform(20, 20 + 12 * num_slots) : 0;
  const int64_t swap_bytes = Chance(30) ? 0 : Uniform(0, 40'000 * num_slots);
  const int64_t num_snapshots = Chance(30) ? 0 : Uniform(1, 8);
  options.geometry = FakeGeometry(num_slots, paged, num_blocks, swap_bytes, num_snapshots);
  options.scheduler = {.max_tokens_per_step = Uniform(kMinTokensPerStep, 400),
                       .max_waiting = Uniform(1, 30),
                       .max_waiting_tokens = Uniform(100, 5000),
                       .max_wait = Uniform(50, 400) * kMillisecond,
                       .max_steps_in_flight = static_cast<int>(Uniform(1, 2)),
                       .prefix_cache = {.at_end = Chance(80),
                                        .at_branch = Chance(80),
                                        .interval = Chance(50) ? 0 : Uniform(64, 500),
                                        .min_tokens = Uniform(1, 150)},
                       .context_length = Uniform(200, 2000)};
  options.executor.vocab_size = kVocabSize;
  if (Chance(20)) {
    options.executor.fault = [](const std::string& call, int64_t count) {
      const bool fails = count % 211 == 17 && (call != "copy" || count % 2 == 1);
      return fails ? absl::InternalError("planted") : absl::OkStatus();
    };
  }
  return options;
}

GenerateRequest Simulation::RandomRequest() {
  const int64_t num_prompt = Chance(20) ? Uniform(1, 700) : Uniform(1, 90);
  GenerateRequest request = Harness::Request(num_prompt, Uniform(1, longest_output_), random_());
  // Prompts of a few families, so that most begin like an earlier one.
  const GenerateRequest family = Harness::Request(700, 1, static_cast<uint64_t>(Uniform(1, 3)));
  const int64_t num_shared = Uniform(0, std::min<int64_t>(num_prompt, 700));
  std::copy_n(family.token_ids.begin(), num_shared, request.token_ids.begin());
  if (Chance(90)) request.prefix_domain = Chance(70) ? "a" : "b";
  if (Chance(20)) request.prefix_marks = {Uniform(1, num_prompt)};
  if (Chance(20)) request.num_outputs = static_cast<int32_t>(Uniform(2, 4));
  if (Chance(30)) request.max_draft_tokens = static_cast<int>(Uniform(1, kMaxDraftTokens));
  if (Chance(5)) request.num_outputs = 1, request.max_tokens = 0;
  if (Chance(50)) request.priority = static_cast<int32_t>(Uniform(-3, 3));
  if (Chance(50)) request.eos_token_ids = {2};
  if (Chance(20)) request.stop_token_ids = {5, 9};
  if (Chance(15)) request.deadline = harness_.now + Uniform(0, 200) * kMillisecond;
  if (Chance(15)) request.time_limit = harness_.now + Uniform(0, 200) * kMillisecond;
  if (Chance(10)) request.prompt_logprobs = static_cast<int32_t>(Uniform(0, 2));
  return request;
}

void Simulation::Arrive() {
  Live live{.request = RandomRequest(), .submitted = harness_.now};
  if (Chance(20)) live.cancel_at = harness_.now + Uniform(0, 150) * kMillisecond;
  if (Chance(20)) live.stop_after = Uniform(1, 40);
  GenerateRequest request = live.request;
  request.stream = live.client.stream;
  if (live.stop_after > 0) {
    request.find_stop.resize(static_cast<size_t>(request.num_outputs));
    request.find_stop[0] = [seen = int64_t{0},
                            stop = live.stop_after](std::span<const SampledToken> tokens) mutable {
      seen += std::ssize(tokens);
      std::optional<StopMatch> match;
      if (seen >= stop) match = StopMatch{.last_token = std::ssize(tokens) - 1 - (seen - stop)};
      return match;
    };
  }
  const SchedulerStats before = harness_.scheduler->stats();
  const absl::Status added = harness_.scheduler->Add(std::move(request), harness_.now);
  if (added.ok()) {
    live_.emplace(num_added_++, std::move(live));
  } else if (absl::IsResourceExhausted(added)) {
    const int64_t num_tokens = std::ssize(live.request.token_ids);
    EXPECT_TRUE(before.num_waiting >= options_.scheduler.max_waiting ||
                before.num_waiting_tokens + num_tokens > options_.scheduler.max_waiting_tokens);
  } else {
    EXPECT_TRUE(absl::IsInvalidArgument(added));
  }
}

void Simulation::CheckEnd(Live& live) {
  const Client& client = live.client;
  harness_.ExpectReference(client, live.request);
  outcome_hash_ = outcome_hash_ * 1'000'003 + static_cast<uint64_t>(client.status.raw_code());
  for (const auto& tokens : client.tokens) outcome_hash_ = outcome_hash_ * 31 + tokens.size();
  EXPECT_TRUE(client.errors.empty()) << client.errors[0];
  switch (client.status.code()) {
    case absl::StatusCode::kOk:
      if (live.request.max_tokens == 0) break;
      ASSERT_EQ(std::ssize(client.finishes), live.request.num_outputs);
      for (const auto& finishes : client.finishes) EXPECT_EQ(finishes.size(), 1u);
      if (live.stop_after > 0 && client.finishes[0][0].reason == FinishReason::kStopString) {
        EXPECT_EQ(std::ssize(client.tokens[0]), live.stop_after);
      }
      break;
    case absl::StatusCode::kCancelled:
      EXPECT_LE(live.cancel_at, harness_.now);
      break;
    case absl::StatusCode::kDeadlineExceeded:
      EXPECT_LE(live.request.deadline, client.timings.finished);
      break;
    default:
      EXPECT_EQ(client.status.message(), "planted");
      EXPECT_TRUE(options_.executor.fault != nullptr);
  }
}

void Simulation::ReadClients() {
  for (auto entry = live_.begin(); entry != live_.end();) {
    Live& live = entry->second;
    if (live.cancel_at <= harness_.now) live.client.stream->Cancel();
    live.client.Read();
    if (live.client.done()) {
      CheckEnd(live);
      entry = live_.erase(entry);
    } else {
      ++entry;
    }
  }
}

void Simulation::CheckStats() {
  const SchedulerStats stats = harness_.scheduler->stats();
  EXPECT_LE(stats.num_waiting, options_.scheduler.max_waiting);
  EXPECT_LE(stats.num_swapped, options_.scheduler.max_waiting);
  EXPECT_LE(stats.num_running, stats.slots_used);
  EXPECT_LE(stats.slots_used, stats.slots_total);
  EXPECT_LE(stats.blocks_used, stats.blocks_total);
  EXPECT_LE(stats.prefix_cache.num_states, stats.prefix_cache.max_states);
  EXPECT_EQ(stats.prefix_cache.num_states + harness_.caches->free_snapshots(),
            options_.geometry.num_snapshots);
  EXPECT_LE(stats.prefix_cache.num_hits, stats.prefix_cache.num_queries);
  num_cached_tokens_ = stats.prefix_cache.num_hits;
  EXPECT_GE(harness_.caches->free_swap_bytes(), 0);
  EXPECT_EQ(stats.num_waiting + stats.num_swapped + stats.num_running, std::ssize(live_));
  // Aged requests are served one after the other, so a request waits for at most those before it.
  const TimeNs longest_run =
      (longest_output_ + 20) * kMillisecond * (1 + options_.geometry.num_slots / 4);
  const TimeNs bound =
      options_.scheduler.max_wait + longest_run * (2 * options_.scheduler.max_waiting + 2);
  for (const auto& [order, live] : live_) EXPECT_LE(harness_.now - live.submitted, 2 * bound);
}

int64_t Simulation::Run() {
  SCOPED_TRACE(absl::StrCat("seed ", seed_));
  const int arrivals_percent = static_cast<int>(Uniform(2, 40));
  int64_t steps = 0;
  for (; steps < kStepsPerSeed; ++steps) {
    if (Chance(arrivals_percent)) Arrive();
    if (Chance(1)) {
      for (int64_t burst = Uniform(1, 12); burst > 0; --burst) Arrive();
    }
    if (live_.empty()) {
      harness_.now += kMillisecond;
      continue;
    }
    harness_.Step();
    ReadClients();
    CheckStats();
    if (testing::Test::HasFailure()) return steps;
  }
  for (; !harness_.scheduler->idle() && steps < 20 * kStepsPerSeed; ++steps) {
    harness_.Step();
    ReadClients();
  }
  EXPECT_TRUE(live_.empty());
  harness_.ExpectClean();
  return steps;
}

TEST(SimulationTest, AMillionSteps) {
  const int64_t num_steps = NumSteps();
  int64_t steps = 0, num_cached_tokens = 0;
  for (uint64_t seed = 1; steps < num_steps; ++seed) {
    Simulation simulation(seed);
    steps += simulation.Run();
    num_cached_tokens += simulation.num_cached_tokens();
    ASSERT_FALSE(HasFailure()) << "seed " << seed;
    if (seed % 25 != 0) continue;
    Simulation again(seed);
    steps += again.Run();
    ASSERT_EQ(again.trace_hash(), simulation.trace_hash()) << "seed " << seed;
  }
  EXPECT_GT(num_cached_tokens, 0);
  RecordProperty("steps", std::to_string(steps));
}

// No stop, cancel or deadline: with 1 and 2 steps in flight, with and without preemption, every
// request gets the tokens of an uninterrupted run, so the same everywhere.
TEST(SimulationTest, OutcomesDoNotDependOnTheSchedule) {
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    int64_t num_preemptions = 0;
    for (int steps_in_flight : {1, 2}) {
      for (int64_t swap_bytes : {int64_t{0}, int64_t{1} << 30}) {
        HarnessOptions options;
        options.geometry = FakeGeometry(4, seed % 2 == 0, 80, swap_bytes);
        options.scheduler.max_steps_in_flight = steps_in_flight;
        options.scheduler.max_tokens_per_step = 128;
        Harness harness(options);
        std::mt19937_64 random(seed);
        std::vector<GenerateRequest> requests;
        for (int index = 0; index < 25; ++index) {
          GenerateRequest request =
              Harness::Request(1 + static_cast<int64_t>(random() % 200),
                               1 + static_cast<int64_t>(random() % 40), random());
          request.num_outputs = 1 + static_cast<int32_t>(random() % 3);
          request.priority = static_cast<int32_t>(random() % 5);
          request.max_draft_tokens = random() % 2 == 0 ? 0 : static_cast<int>(random() % 8);
          requests.push_back(request);
          harness.Add(request);
          for (uint64_t step = random() % 6; step > 0; --step) harness.Step();
        }
        harness.Run();
        for (size_t index = 0; index < requests.size(); ++index) {
          harness.ExpectReference(harness.clients[index], requests[index]);
          for (const auto& tokens : harness.clients[index].tokens) {
            EXPECT_EQ(std::ssize(tokens), requests[index].max_tokens);
          }
        }
        num_preemptions += harness.scheduler->stats().num_preemptions;
        harness.ExpectClean();
      }
    }
    EXPECT_GT(num_preemptions, 0) << "seed " << seed;
  }
}

}  // namespace
}  // namespace godwit
