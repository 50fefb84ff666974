// How outputs finish by themselves, and failed steps.

#include <gtest/gtest.h>

#include <algorithm>

#include "scheduler/scheduler.h"
#include "tests/scheduler/harness.h"

namespace godwit {
namespace {

HarnessOptions Options(int steps_in_flight) {
  HarnessOptions options;
  options.geometry = FakeGeometry(4, true, 256);
  options.scheduler.max_steps_in_flight = steps_in_flight;
  return options;
}

// The plain run's tokens, to place stops among them.
std::vector<int32_t> Tokens(const GenerateRequest& request, int32_t output_index = 0) {
  return FakeExecutor::ReferenceTokens(request, output_index, 1000, true);
}

// Stops after `count` tokens in all, as a stop string that those tokens complete would.
FindStop StopAfter(int64_t count, int32_t stop_index) {
  return [count, stop_index, seen = int64_t{0}](
             std::span<const SampledToken> tokens) mutable -> std::optional<StopMatch> {
    const int64_t before = seen;
    seen += std::ssize(tokens);
    if (seen < count) return std::nullopt;
    return StopMatch{.last_token = count - before - 1, .stop_index = stop_index};
  };
}

// Steps in flight, and drafts of a step.
class FinishTest : public testing::TestWithParam<std::pair<int, int>> {
 protected:
  HarnessOptions options() const { return Options(GetParam().first); }
  static GenerateRequest Request(int64_t num_prompt, int64_t max_tokens, uint64_t seed) {
    GenerateRequest request = Harness::Request(num_prompt, max_tokens, seed);
    request.max_draft_tokens = GetParam().second;
    return request;
  }
};

TEST_P(FinishTest, EosEndsTheOutputAndIsNotDelivered) {
  GenerateRequest request = Request(70, 50, 3);
  const std::vector<int32_t> plain = Tokens(request);
  request.eos_token_ids = {-5, plain[20]};
  request.stop_token_ids = {plain[20]};  // EOS is looked at first
  const auto first = std::find(plain.begin(), plain.end(), plain[20]);
  Harness harness(options());
  const Client& client = harness.Add(request);
  harness.Run();
  EXPECT_EQ(client.tokens[0], std::vector<int32_t>(plain.begin(), first));
  EXPECT_EQ(client.finishes[0][0].reason, FinishReason::kEos);
  EXPECT_EQ(client.finishes[0][0].stop_token_id, plain[20]);
  EXPECT_EQ(harness.scheduler->stats().generation_tokens, first - plain.begin());
  harness.ExpectClean();
}

TEST_P(FinishTest, StopTokenEndsTheOutputAndIsNotDelivered) {
  GenerateRequest request = Request(70, 50, 4);
  const std::vector<int32_t> plain = Tokens(request);
  request.eos_token_ids = {-5};
  request.stop_token_ids = {-7, plain[0]};  // the very first token
  Harness harness(options());
  const Client& client = harness.Add(request);
  harness.Run();
  EXPECT_TRUE(client.tokens[0].empty());
  EXPECT_EQ(client.finishes[0][0].reason, FinishReason::kStopToken);
  EXPECT_EQ(client.finishes[0][0].stop_token_id, plain[0]);
  EXPECT_EQ(client.timings.first_token, kNever);
  harness.ExpectClean();
}

TEST_P(FinishTest, StopStringKeepsUpToItsLastTokenAndDropsTheRest) {
  for (int64_t count : {1, 2, 13, 49, 50}) {
    GenerateRequest request = Request(70, 50, 5);
    const std::vector<int32_t> plain = Tokens(request);
    request.find_stop = {StopAfter(count, 2)};
    Harness harness(options());
    const Client& client = harness.Add(request);
    harness.Run();
    EXPECT_EQ(client.tokens[0], std::vector<int32_t>(plain.begin(), plain.begin() + count));
    EXPECT_EQ(client.finishes[0][0].reason, FinishReason::kStopString);
    EXPECT_EQ(client.finishes[0][0].stop_index, 2);
    EXPECT_EQ(harness.scheduler->stats().generation_tokens, count);
    harness.ExpectClean();
  }
}

TEST_P(FinishTest, FindStopNeverSeesTheEosOrWhatFollows) {
  GenerateRequest request = Request(70, 50, 6);
  const std::vector<int32_t> plain = Tokens(request);
  request.eos_token_ids = {plain[10]};
  std::vector<int32_t> seen;
  request.find_stop = {[&seen](std::span<const SampledToken> tokens) -> std::optional<StopMatch> {
    for (const SampledToken& token : tokens) seen.push_back(token.token_id);
    return std::nullopt;
  }};
  Harness harness(options());
  const Client& client = harness.Add(request);
  harness.Run();
  EXPECT_EQ(seen, client.tokens[0]);
  EXPECT_EQ(client.finishes[0][0].reason, FinishReason::kEos);
  harness.ExpectClean();
}

TEST_P(FinishTest, EachOutputEndsOnItsOwn) {
  GenerateRequest request = Request(130, 40, 8);
  request.num_outputs = 4;
  request.eos_token_ids = {Tokens(request, 1)[5]};
  for (int32_t output : {0, 2, 3}) ASSERT_EQ(Tokens(request, output).size(), 40u);
  ASSERT_EQ(Tokens(request, 1).size(), 6u);
  request.find_stop = {StopAfter(3, 0), nullptr, StopAfter(100, 0), StopAfter(30, 1)};
  Harness harness(options());
  const Client& client = harness.Add(request);
  harness.Run();
  harness.ExpectReference(client, request);
  EXPECT_EQ(client.finishes[0][0].reason, FinishReason::kStopString);
  EXPECT_EQ(client.tokens[0].size(), 3u);
  EXPECT_EQ(client.finishes[1][0].reason, FinishReason::kEos);
  EXPECT_EQ(client.tokens[1].size(), 5u);
  EXPECT_EQ(client.finishes[2][0].reason, FinishReason::kLength);
  EXPECT_EQ(client.finishes[3][0].reason, FinishReason::kStopString);
  EXPECT_EQ(client.tokens[3].size(), 30u);
  harness.ExpectClean();
}

// Drafts stop one before max_tokens, and what was proposed and accepted is told.
TEST_P(FinishTest, DraftsAreCountedAndEndWithTheOutput) {
  Harness harness(options());
  const GenerateRequest request = Request(70, 50, 9);
  const Client& client = harness.Add(request);
  harness.Run();
  harness.ExpectReference(client, request);
  EXPECT_EQ(std::ssize(client.tokens[0]), 50);
  const SpeculationStats& stats = client.speculation;
  EXPECT_EQ(stats.num_drafts > 0, request.max_draft_tokens > 0);
  EXPECT_EQ(harness.scheduler->stats().speculation.num_drafts, stats.num_drafts);
  int64_t drafts = 0, accepted = 0;
  for (size_t place = 0; place < kMaxDraftTokens; ++place) {
    drafts += stats.drafted_at[place];
    accepted += stats.accepted_at[place];
    EXPECT_LE(stats.accepted_at[place], stats.drafted_at[place]);
  }
  EXPECT_EQ(drafts, stats.num_drafts);
  EXPECT_EQ(accepted, stats.num_accepted);
  EXPECT_LE(stats.drafted_at[0], stats.num_rounds);
  int64_t rows = 0, ended = 0;
  for (const int64_t count : stats.rounds_of_length) rows += count;
  for (const int64_t count : stats.stops) ended += count;
  EXPECT_EQ(rows, ended);
  EXPECT_EQ(rows - stats.rounds_of_length[0], stats.num_rounds);
  EXPECT_EQ(stats.stops[static_cast<size_t>(DraftStop::kMaxTokens)] > 0,
            request.max_draft_tokens > 0);
  EXPECT_EQ(stats.num_wasted(), stats.num_drafts - stats.num_accepted);
  harness.ExpectClean();
}

INSTANTIATE_TEST_SUITE_P(All, FinishTest,
                         testing::Values(std::pair(1, 0), std::pair(2, 0), std::pair(1, 3),
                                         std::pair(2, 3), std::pair(1, 15)));

TEST(ApplyTest, AFailedStepEndsItsRequestsAndNoOthers) {
  for (const char* planted : {"submit", "collect"}) {
    for (int steps_in_flight : {1, 2}) {
      HarnessOptions options = Options(steps_in_flight);
      options.geometry = FakeGeometry(2, true, 256);
      options.executor.fault = [planted](const std::string& call, int64_t count) {
        return call == planted && count == 4 ? absl::InternalError("planted") : absl::OkStatus();
      };
      Harness harness(options);
      std::vector<GenerateRequest> requests;
      for (uint64_t seed = 0; seed < 4; ++seed) {
        requests.push_back(Harness::Request(10, 20, seed));
        harness.Add(requests.back());
      }
      harness.Run();
      for (size_t index = 0; index < 4; ++index) {
        const Client& client = harness.clients[index];
        EXPECT_EQ(client.status.code(),
                  index < 2 ? absl::StatusCode::kInternal : absl::StatusCode::kOk);
        if (index < 2) {
          EXPECT_EQ(client.phase, Phase::kDecoding);
        }
        harness.ExpectReference(client, requests[index]);
      }
      harness.ExpectClean();
    }
  }
}

}  // namespace
}  // namespace godwit
