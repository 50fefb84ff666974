// The queue: what is refused, who starts when.

#include <gtest/gtest.h>

#include "scheduler/scheduler.h"
#include "tests/scheduler/harness.h"

namespace godwit {
namespace {

HarnessOptions Slots(int64_t num_slots) {
  HarnessOptions options;
  options.geometry = FakeGeometry(num_slots, false);
  return options;
}

HarnessOptions Blocks(int64_t num_slots, int64_t num_blocks) {
  HarnessOptions options;
  options.geometry = FakeGeometry(num_slots, true, num_blocks);
  return options;
}

GenerateRequest Urgent(int64_t num_prompt, int64_t max_tokens, int32_t priority) {
  GenerateRequest request = Harness::Request(num_prompt, max_tokens);
  request.priority = priority;
  return request;
}

struct Refusal {
  const char* text;
  void (*change)(GenerateRequest&);
};

// Beyond the context, 4 blocks of table and one behind them serve any length of output.
TEST(AdmissionTest, UnlimitedOutputReservesABoundAndCountsWhatWasDropped) {
  HarnessOptions options = Blocks(4, 10);
  options.scheduler.context_length = 100;
  options.geometry.bound_tokens = 64;
  options.geometry.bound_beyond = 100;
  Harness harness(options);
  const auto refusal = [&](int64_t num_prompt, int64_t max_tokens) {
    GenerateRequest request = Harness::Request(num_prompt, max_tokens);
    request.stream = std::make_shared<TokenStream>([] {});
    return std::string(ValidateRequest(request, options.scheduler, *harness.caches).message());
  };
  EXPECT_EQ(refusal(90, 10), "");
  EXPECT_EQ(refusal(64, 1 << 30), "");
  EXPECT_EQ(refusal(65, 36),
            "prompt of 65 tokens exceeds the 64 that a sequence of unlimited output holds");
  EXPECT_EQ(refusal(10, INT64_MAX), "max_tokens 9223372036854775807 not <= 1099511627776");
  const GenerateRequest requests[] = {Harness::Request(20, 281, 1), Harness::Request(64, 70, 2),
                                      Harness::Request(30, 40, 3)};
  for (const GenerateRequest& request : requests) harness.Add(request);
  harness.Step();
  EXPECT_EQ(harness.scheduler->stats().blocks_used, 10);  // the third waits
  harness.Run();
  harness.ExpectClean();
  EXPECT_EQ(harness.clients[0].num_dropped, 240);  // 300 went through
  EXPECT_EQ(harness.clients[1].num_dropped, 80);   // 133
  EXPECT_EQ(harness.clients[2].num_dropped, 0);
  EXPECT_EQ(harness.scheduler->stats().num_dropped, 320);
}

TEST(AdmissionTest, RefusesWhatCanNeverRunAndNamesTheLimit) {
  HarnessOptions options = Blocks(4, 40);
  options.scheduler.context_length = 2000;
  Harness harness(options);
  const Refusal refusals[] = {
      {"stream is missing", [](GenerateRequest& r) { r.stream = nullptr; }},
      {"the prompt has no tokens", [](GenerateRequest& r) { r.token_ids.clear(); }},
      {"n 0 not >= 1", [](GenerateRequest& r) { r.num_outputs = 0; }},
      {"n -3 not >= 1", [](GenerateRequest& r) { r.num_outputs = -3; }},
      {"max_tokens -1 not >= 0", [](GenerateRequest& r) { r.max_tokens = -1; }},
      {"n 2 not 1 while max_tokens is 0",
       [](GenerateRequest& r) { r.max_tokens = 0, r.num_outputs = 2; }},
      {"priority 101 not in [-100, 100]", [](GenerateRequest& r) { r.priority = 101; }},
      {"priority -101 not in [-100, 100]", [](GenerateRequest& r) { r.priority = -101; }},
      {"prompt_logprobs 21 not in [-1, 20]", [](GenerateRequest& r) { r.prompt_logprobs = 21; }},
      {"prompt_logprobs -2 not in [-1, 20]", [](GenerateRequest& r) { r.prompt_logprobs = -2; }},
      {"65 stop token ids, at most 64", [](GenerateRequest& r) { r.stop_token_ids.resize(65); }},
      {"2 find_stop callbacks for 1 outputs", [](GenerateRequest& r) { r.find_stop.resize(2); }},
      {"prompt of 10 tokens and max_tokens 1991 exceed the context of 2000",
       [](GenerateRequest& r) { r.max_tokens = 1991; }},
      {"prompt of 10 tokens and max_tokens 9223372036854775807 exceed the context of 2000",
       [](GenerateRequest& r) { r.max_tokens = INT64_MAX; }},
      {"prompt of 2001 tokens and max_tokens 0 exceed the context of 2000",
       [](GenerateRequest& r) { r.token_ids.resize(2001), r.max_tokens = 0; }},
      {"1 sequence(s) of 641 tokens (prompt and max_tokens) need 1 state slots and 41 KV blocks "
       "each; the server has 4 and 40",
       [](GenerateRequest& r) { r.max_tokens = 631; }},
      {"5 sequence(s) of 20 tokens (prompt and max_tokens) need 5 state slots and 2 KV blocks "
       "each; "
       "the server has 4 and 40",
       [](GenerateRequest& r) { r.num_outputs = 5; }},
  };
  for (const Refusal& refusal : refusals) {
    Client client;
    GenerateRequest request = Harness::Request(10, 10);
    request.stream = client.stream;
    refusal.change(request);
    const absl::Status status = harness.scheduler->Add(std::move(request), 0);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message(), refusal.text);
    client.Read();
    EXPECT_EQ(client.num_done, 0);
  }
  EXPECT_TRUE(harness.scheduler->idle());
}

TEST(AdmissionTest, AcceptsExactlyWhatFits) {
  HarnessOptions options = Blocks(4, 40);
  options.scheduler.context_length = 640;
  Harness harness(options);
  const GenerateRequest request = Harness::Request(10, 630);
  harness.Add(request);
  GenerateRequest four = Harness::Request(10, 150);
  four.num_outputs = 4;
  harness.Add(four);
  harness.Run();
  harness.ExpectReference(harness.clients[0], request);
  harness.ExpectReference(harness.clients[1], four);
  harness.ExpectClean();
}

TEST(AdmissionTest, QueueIsBoundedByRequests) {
  HarnessOptions options = Slots(1);
  options.scheduler.max_waiting = 3;
  Harness harness(options);
  for (int index = 0; index < 3; ++index) harness.Add(Harness::Request(4, 4));
  Client refused;
  GenerateRequest request = Harness::Request(4, 4);
  request.stream = refused.stream;
  const absl::Status status = harness.scheduler->Add(request, 0);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(status.message(), "the queue is full: 3 requests wait, limit 3");
  harness.Step();  // one is admitted
  EXPECT_TRUE(harness.scheduler->Add(request, 0).ok());
  harness.Run();
  refused.Read();
  EXPECT_EQ(refused.num_done, 1);
  harness.ExpectClean();
}

TEST(AdmissionTest, QueueIsBoundedByPromptTokensButTakesALongPromptWhenEmpty) {
  HarnessOptions options = Slots(1);
  options.scheduler.max_waiting_tokens = 1000;
  Harness harness(options);
  harness.Add(Harness::Request(5000, 1));
  Client refused;
  GenerateRequest request = Harness::Request(4, 4);
  request.stream = refused.stream;
  const absl::Status status = harness.scheduler->Add(request, 0);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(status.message(),
            "the queue is full: 5000 prompt tokens wait, 4 more exceed the limit of 1000");
  harness.Run();
  harness.ExpectClean();
}

TEST(AdmissionTest, HigherPriorityFirstThenFirstCome) {
  Harness harness(Slots(1));
  harness.Add(Harness::Request(4, 4));
  harness.Step();
  const Client& low = harness.Add(Urgent(4, 4, -1));
  const Client& first = harness.Add(Urgent(4, 4, 2));
  const Client& second = harness.Add(Urgent(4, 4, 2));
  const Client& high = harness.Add(Urgent(4, 4, 3));
  harness.Run();
  EXPECT_LT(high.timings.admitted, first.timings.admitted);
  EXPECT_LT(first.timings.admitted, second.timings.admitted);
  EXPECT_LT(second.timings.admitted, low.timings.admitted);
  harness.ExpectClean();
}

TEST(AdmissionTest, ARequestThatDoesNotFitIsPassedABoundedNumberOfTimes) {
  Harness harness(Blocks(16, 20));
  harness.Add(Harness::Request(4, 150));  // 10 of 20 blocks for 150 steps
  harness.Step();
  const Client& big = harness.Add(Harness::Request(4, 250));  // 16 blocks
  for (int index = 0; index < 3 * kMaxBypass; ++index) harness.Add(Harness::Request(4, 4));
  harness.Run();
  int num_passed = 0;
  for (size_t index = 2; index < harness.clients.size(); ++index) {
    num_passed += harness.clients[index].timings.admitted < big.timings.admitted;
  }
  EXPECT_EQ(num_passed, kMaxBypass);
  harness.ExpectClean();
}

// A stream of urgent requests that alone fills the server: the low one starts after max_wait and
// what ran at that moment.
TEST(AdmissionTest, LowPriorityStartsWithinMaxWaitAndTheDrainOfRunningOnes) {
  for (int steps_in_flight : {1, 2}) {
    HarnessOptions options = Slots(2);
    options.scheduler.max_wait = 500 * kMillisecond;
    options.scheduler.max_steps_in_flight = steps_in_flight;
    Harness harness(options);
    constexpr int64_t kTokens = 20;
    for (int index = 0; index < 2; ++index) harness.Add(Urgent(4, kTokens, 9));
    const Client& low = harness.Add(Urgent(4, kTokens, -9));
    for (int step = 0; step < 700; ++step) {
      if (step % 5 == 0) harness.Add(Urgent(4, kTokens, 9));
      harness.Step();
    }
    EXPECT_GE(low.timings.admitted, 500 * kMillisecond);
    EXPECT_LE(low.timings.admitted, (500 + kTokens + 2) * kMillisecond);
    EXPECT_EQ(low.num_done, 1);
    harness.Run();
    harness.ExpectClean();
  }
}

// It needs both slots at once, so it has to keep the first one that becomes free.
TEST(AdmissionTest, AnAgedRequestKeepsItsPlaceUntilAllItNeedsIsFree) {
  HarnessOptions options = Slots(2);
  options.scheduler.max_wait = 100 * kMillisecond;
  Harness harness(options);
  harness.Add(Urgent(4, 20, 9));
  GenerateRequest pair = Urgent(4, 10, -9);
  pair.num_outputs = 2;
  const Client& low = harness.Add(pair);
  for (int step = 0; step < 200; ++step) {
    if (step % 7 == 0) harness.Add(Urgent(4, 20, 9));
    harness.Step();
  }
  EXPECT_LE(low.timings.admitted, 122 * kMillisecond);
  harness.Run();
  harness.ExpectClean();
}

TEST(AdmissionTest, ARunningPromptWithoutRowsAges) {
  HarnessOptions options = Slots(3);
  options.scheduler.max_wait = 50 * kMillisecond;
  options.scheduler.max_tokens_per_step = 128;
  Harness harness(options);
  const Client& low = harness.Add(Urgent(640, 1, 0));
  harness.Step();
  harness.Add(Urgent(100'000, 1, 9));
  for (int step = 0; step < 60; ++step) harness.Step();
  EXPECT_EQ(low.num_done, 1);
  harness.Run();
  harness.ExpectClean();
}

TEST(AdmissionTest, FailsTheFirstRequestWhenNothingRunsAndItDoesNotFit) {
  Harness harness(Slots(1));
  absl::StatusOr<CacheLease> foreign = harness.caches->Reserve(10);
  ASSERT_TRUE(foreign.ok());
  const Client& client = harness.Add(Harness::Request(4, 4));
  EXPECT_FALSE(harness.Step());
  EXPECT_EQ(client.num_done, 1);
  EXPECT_EQ(client.status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(
      client.status.message(),
      "nothing runs and the request does not fit: 1 sequence(s) of 8 tokens, free are 0 state "
      "slots and 0 KV blocks");
  EXPECT_TRUE(harness.scheduler->idle());
  foreign->Release();
  harness.ExpectClean();
}

}  // namespace
}  // namespace godwit
