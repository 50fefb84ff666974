#include "tests/scheduler/harness.h"

#include <gtest/gtest.h>

#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"

namespace godwit {

void Client::Read() {
  for (TokenEvent& event : stream->Drain()) ReadOne(std::move(event));
}

void Client::ReadOne(TokenEvent event) {
  if (num_done > 0) errors.push_back("an event after kDone");
  const auto output = static_cast<size_t>(event.output_index);
  if (tokens.size() <= output) {
    tokens.resize(output + 1);
    finishes.resize(output + 1);
  }
  switch (event.kind) {
    case TokenEvent::Kind::kPrompt:
      if (++num_prompt_events > 1) errors.push_back("two kPrompt events");
      scores = std::move(event.tokens);
      num_cached = event.num_cached_tokens;
      break;
    case TokenEvent::Kind::kTokens:
      if (num_prompt_events == 0) errors.push_back("tokens before kPrompt");
      if (!finishes[output].empty()) errors.push_back("tokens after kFinished");
      if (event.tokens.empty()) errors.push_back("a kTokens event without tokens");
      for (const SampledToken& token : event.tokens) tokens[output].push_back(token.token_id);
      break;
    case TokenEvent::Kind::kFinished:
      finishes[output].push_back(event.finish);
      if (finishes[output].size() > 1) errors.push_back("two kFinished events");
      break;
    case TokenEvent::Kind::kDone:
      ++num_done;
      status = event.status;
      phase = event.phase;
      timings = event.timings;
      speculation = event.speculation;
      kept_position = event.kept_position;
      kept_token = event.kept_token;
      num_dropped = event.num_dropped;
      break;
  }
}

CacheGeometry FakeGeometry(int64_t num_slots, bool paged, int64_t num_blocks, int64_t swap_bytes,
                           int64_t num_snapshots) {
  CacheGeometry geometry{
      .components =
          {{.name = "lightning", .base_bytes = 4096, .row_bytes = 64, .block = 16},
           {.name = "memory", .base_bytes = 1024, .row_bytes = 8, .block = 2048, .lag = 1},
           {.name = "convolution", .row_bytes = 32, .retain = 3}},
      .window_rows = WindowRows(kMaxStepsInFlight, 3),
      .num_slots = num_slots,
      .num_blocks = num_blocks,
      .swap_bytes = swap_bytes,
      .num_snapshots = num_snapshots};
  if (paged) geometry.components.push_back({.name = "kv", .row_bytes = 128, .retain = kRetainAll});
  return geometry;
}

Harness::Harness(HarnessOptions harness_options) : options(std::move(harness_options)) {
  options.executor.max_tokens_per_step = options.scheduler.max_tokens_per_step;
  options.executor.max_steps_in_flight = options.scheduler.max_steps_in_flight;
  caches = *CacheManager::Create(options.geometry);
  executor = std::make_unique<FakeExecutor>(options.executor, *caches);
  scheduler = std::make_unique<Scheduler>(options.scheduler, *caches);
}

GenerateRequest Harness::Request(int64_t num_prompt, int64_t max_tokens, uint64_t seed) {
  std::mt19937_64 random(seed);
  GenerateRequest request{.seed = seed, .max_tokens = max_tokens};
  for (int64_t token = 0; token < num_prompt; ++token) {
    request.token_ids.push_back(static_cast<int32_t>(random() % 1000));
  }
  return request;
}

Client& Harness::Add(GenerateRequest request) {
  Client& client = clients.emplace_back();
  request.stream = client.stream;
  const absl::Status added = scheduler->Add(std::move(request), now);
  EXPECT_TRUE(added.ok()) << added;
  GODWIT_CHECK(added.ok());
  return client;
}

bool Harness::Submit() {
  StepPlan plan = scheduler->Plan(now);
  if (!plan.copies.empty()) {
    if (absl::Status copied = executor->Copy(plan.copies); !copied.ok()) {
      scheduler->Fail(std::move(plan), copied, now);
      return true;
    }
    plan.copies.clear();
  }
  if (plan.rows.empty()) return false;
  last_rows.clear();
  for (const BatchRow& row : plan.rows) last_rows.push_back(std::ssize(row.token_ids));
  absl::StatusOr<StepId> id = executor->Submit(plan.rows);
  if (id.ok()) {
    in_flight_.push_back({std::move(plan), *id});
  } else {
    scheduler->Fail(std::move(plan), id.status(), now);
  }
  return true;
}

bool Harness::Step() {
  bool ran = false;
  while (std::ssize(in_flight_) < options.scheduler.max_steps_in_flight && Submit()) ran = true;
  now += options.step_ns;
  if (!in_flight_.empty()) {
    ran = true;
    InFlight step = std::move(in_flight_.front());
    in_flight_.pop_front();
    absl::StatusOr<StepResult> result = executor->Collect(step.id);
    if (result.ok()) {
      scheduler->Apply(std::move(step.plan), *std::move(result), now);
    } else {
      scheduler->Fail(std::move(step.plan), result.status(), now);
    }
  }
  for (Client& client : clients) client.Read();
  return ran;
}

void Harness::Run(int64_t max_steps) {
  for (int64_t step = 0; step < max_steps && !scheduler->idle(); ++step) Step();
  EXPECT_TRUE(scheduler->idle());
}

void Harness::ExpectClean() {
  for (const std::string& violation : executor->violations()) ADD_FAILURE() << violation;
  for (size_t index = 0; index < clients.size(); ++index) {
    Client& client = clients[index];
    client.Read();
    EXPECT_EQ(client.num_done, 1) << "request " << index;
    for (const std::string& error : client.errors)
      ADD_FAILURE() << "request " << index << ": " << error;
  }
  EXPECT_EQ(caches->free_slots(), options.geometry.num_slots);
  if (options.geometry.has_paged()) {
    EXPECT_EQ(caches->free_blocks() + caches->idle_blocks(), options.geometry.num_blocks);
  }
  EXPECT_EQ(caches->free_swap_bytes(), options.geometry.swap_bytes);
  EXPECT_EQ(executor->num_host_copies(), 0u);
  const SchedulerStats stats = scheduler->stats();
  EXPECT_EQ(caches->free_snapshots() + stats.prefix_cache.num_states,
            options.geometry.num_snapshots);
  EXPECT_EQ(stats.num_waiting, 0);
  EXPECT_EQ(stats.num_waiting_tokens, 0);
  EXPECT_EQ(stats.num_running, 0);
  EXPECT_EQ(stats.num_swapped, 0);
  EXPECT_EQ(stats.slots_used, 0);
  EXPECT_EQ(stats.blocks_used, 0);
}

void Harness::ExpectReference(const Client& client, const GenerateRequest& request) const {
  for (int32_t output = 0; output < request.num_outputs; ++output) {
    const auto index = static_cast<size_t>(output);
    std::vector<int32_t> expected = FakeExecutor::ReferenceTokens(
        request, output, options.executor.vocab_size, options.geometry.has_paged());
    if (index >= client.tokens.size()) continue;
    const std::vector<int32_t>& got = client.tokens[index];
    ASSERT_LE(got.size(), expected.size()) << "output " << output;
    const bool ended = client.status.ok() && !client.finishes[index].empty();
    const FinishReason reason = ended ? client.finishes[index][0].reason : FinishReason::kTimeLimit;
    if (reason == FinishReason::kLength) {
      EXPECT_EQ(std::ssize(got), request.max_tokens);
    }
    if (reason == FinishReason::kEos || reason == FinishReason::kStopToken) {
      EXPECT_EQ(got.size() + 1, expected.size());
      EXPECT_EQ(client.finishes[index][0].stop_token_id, expected.back());
    }
    expected.resize(got.size());
    EXPECT_EQ(got, expected) << "output " << output;
  }
}

}  // namespace godwit
