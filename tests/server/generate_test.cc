// What a valid request gets: events, texts, ids, log-probabilities, usage.

#include <cmath>

#include "tests/server/server_fixture.h"

namespace godwit {
namespace {

using v1::GenerateEvent;
using v1::GenerateRequest;
using v1::GenerateResponse;

// Timings differ between two runs.
void ClearTimings(GenerateResponse& response) { response.mutable_summary()->clear_timings(); }

class GenerateTest : public testing::Test {
 protected:
  std::vector<GenerateEvent> StreamOk(const GenerateRequest& request) {
    std::vector<GenerateEvent> events;
    const grpc::Status status = server_.Stream(request, &events);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return events;
  }
  GenerateResponse GenerateOk(const GenerateRequest& request) {
    GenerateResponse response;
    const grpc::Status status = server_.Generate(request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response;
  }
  TestServer server_;
};

TEST_F(GenerateTest, UnaryIsTheConcatenationOfTheStream) {
  GenerateRequest request = SimpleRequest(40);
  request.set_request_id("same");
  request.mutable_sampling()->set_n(3);
  request.mutable_response()->set_echo(true);
  request.mutable_response()->set_logprobs(true);
  request.mutable_response()->set_top_logprobs(2);
  request.mutable_response()->set_prompt_logprobs(1);
  request.mutable_stopping()->add_stop("q");
  request.mutable_stopping()->add_stop("zz");
  GenerateResponse unary = GenerateOk(request);
  GenerateResponse concatenated = Concatenate(StreamOk(request));
  ClearTimings(unary);
  ClearTimings(concatenated);
  EXPECT_EQ(unary.SerializeAsString(), concatenated.SerializeAsString()) << unary.DebugString();
  EXPECT_EQ(unary.outputs_size(), 3);
}

TEST_F(GenerateTest, AStreamIsPromptThenDeltasThenFinishedThenOneSummary) {
  const std::vector<GenerateEvent> events = StreamOk(SimpleRequest(5));
  ASSERT_GE(events.size(), 4u);
  EXPECT_TRUE(events.front().has_prompt());
  EXPECT_EQ(events.front().prompt().num_tokens(), 3);  // BOS, H, i
  EXPECT_EQ(events.front().prompt().text(), "");
  for (size_t at = 1; at + 2 < events.size(); ++at) EXPECT_TRUE(events[at].has_delta());
  EXPECT_TRUE(events[events.size() - 2].has_finished());
  EXPECT_TRUE(events.back().has_summary());
  for (const GenerateEvent& event : events)
    EXPECT_EQ(event.request_id(), events.front().request_id());
  EXPECT_FALSE(events.front().request_id().empty());
}

TEST_F(GenerateTest, CountsUsageAndTimings) {
  GenerateRequest request = SimpleRequest(10);
  request.mutable_sampling()->set_n(2);
  const v1::Summary summary = GenerateOk(request).summary();
  EXPECT_EQ(summary.usage().prompt_tokens(), 3);
  EXPECT_EQ(summary.usage().completion_tokens(), 20);
  EXPECT_EQ(summary.usage().total_tokens(), 23);
  EXPECT_EQ(summary.model(), "fake");
  EXPECT_GE(summary.timings().total_ms(), summary.timings().time_to_first_token_ms());
  EXPECT_GE(summary.timings().time_to_first_token_ms(), summary.timings().prefill_ms());
  EXPECT_GE(summary.timings().queue_ms(), 0);
}

TEST_F(GenerateTest, ASeedIsHonouredOrDrawnAndReturned) {
  GenerateRequest request = SimpleRequest(20);
  request.mutable_sampling()->set_seed(0);  // 0 is a seed
  const GenerateResponse zero = GenerateOk(request);
  EXPECT_EQ(zero.summary().seed(), 0u);
  request.mutable_sampling()->set_seed(~uint64_t{0});
  EXPECT_EQ(GenerateOk(request).summary().seed(), ~uint64_t{0});
  request.mutable_sampling()->clear_seed();
  const GenerateResponse first = GenerateOk(request), second = GenerateOk(request);
  EXPECT_NE(first.summary().seed(), second.summary().seed());
  request.mutable_sampling()->set_seed(first.summary().seed());
  EXPECT_EQ(GenerateOk(request).outputs(0).text(), first.outputs(0).text());
}

TEST_F(GenerateTest, MaxTokensAbsentIsTheDefaultAndEndsWithLength) {
  GenerateRequest request = SimpleRequest(1);
  request.mutable_stopping()->clear_max_tokens();
  const GenerateResponse response = GenerateOk(request);
  EXPECT_EQ(response.outputs(0).token_ids_size(), 256);
  EXPECT_EQ(response.outputs(0).finished().reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(response.outputs(0).finished().num_tokens(), 256);
  EXPECT_EQ(response.outputs(0).finished().stop_match_case(), v1::Finished::STOP_MATCH_NOT_SET);
}

TEST_F(GenerateTest, DefaultMaxTokensIsWhatIsLeftOfTheContext) {
  GenerateRequest request;
  request.mutable_token_ids()->mutable_ids()->Resize(4090, 'a');
  const GenerateResponse response = GenerateOk(request);
  EXPECT_EQ(response.outputs(0).token_ids_size(), 6);
}

TEST_F(GenerateTest, EosEndsTheOutputAndIsNamed) {
  server_.engine().set_next_token(
      [](uint64_t, int32_t, int64_t index) { return index == 3 ? ByteTokenizer::kEos : 'x'; });
  const GenerateResponse response = GenerateOk(SimpleRequest(10));
  EXPECT_EQ(response.outputs(0).text(), "xxx");
  EXPECT_EQ(response.outputs(0).finished().reason(), v1::FINISH_REASON_STOP_EOS);
  EXPECT_EQ(response.outputs(0).finished().eos_token_id(), ByteTokenizer::kEos);
  EXPECT_EQ(response.summary().usage().completion_tokens(), 3);
}

TEST_F(GenerateTest, IgnoreEosGoesOn) {
  server_.engine().set_next_token([](uint64_t, int32_t, int64_t) { return ByteTokenizer::kEos; });
  GenerateRequest request = SimpleRequest(4);
  request.mutable_stopping()->set_ignore_eos(true);
  const GenerateResponse response = GenerateOk(request);
  EXPECT_EQ(response.outputs(0).token_ids_size(), 4);
  EXPECT_EQ(response.outputs(0).text(), "");
}

TEST_F(GenerateTest, AStopTokenEndsTheOutputAndIsNamed) {
  server_.engine().set_next_token(
      [](uint64_t, int32_t, int64_t index) { return 'a' + static_cast<int32_t>(index); });
  GenerateRequest request = SimpleRequest(10);
  request.mutable_stopping()->add_stop_token_ids('c');
  const GenerateResponse response = GenerateOk(request);
  EXPECT_EQ(response.outputs(0).text(), "ab");
  EXPECT_EQ(response.outputs(0).finished().reason(), v1::FINISH_REASON_STOP_TOKEN);
  EXPECT_EQ(response.outputs(0).finished().stop_token_id(), 'c');
}

TEST_F(GenerateTest, AStopStringIsCutUnlessAskedFor) {
  server_.engine().set_next_token(
      [](uint64_t, int32_t, int64_t index) { return 'a' + static_cast<int32_t>(index); });
  GenerateRequest request = SimpleRequest(10);
  request.mutable_stopping()->add_stop("xyz");
  request.mutable_stopping()->add_stop("cde");
  GenerateResponse response = GenerateOk(request);
  EXPECT_EQ(response.outputs(0).text(), "ab");
  EXPECT_EQ(response.outputs(0).token_ids_size(), 5);
  EXPECT_EQ(response.outputs(0).finished().reason(), v1::FINISH_REASON_STOP_STRING);
  EXPECT_EQ(response.outputs(0).finished().stop_text(), "cde");
  EXPECT_EQ(response.outputs(0).finished().num_tokens(), 5);
  request.mutable_stopping()->set_include_stop_in_output(true);
  response = GenerateOk(request);
  EXPECT_EQ(response.outputs(0).text(), "abcde");
}

TEST_F(GenerateTest, TextIsWholeUtf8InEveryDelta) {
  const std::string text = "é世🦆";
  server_.engine().set_next_token([text](uint64_t, int32_t, int64_t index) {
    return static_cast<uint8_t>(text[static_cast<size_t>(index) % text.size()]);
  });
  std::string shown;
  for (const GenerateEvent& event : StreamOk(SimpleRequest(18))) {
    if (!event.has_delta()) continue;
    shown += event.delta().text();
    std::string bytes;  // of the same tokens
    for (int32_t id : event.delta().token_ids()) bytes += static_cast<char>(id);
    EXPECT_EQ(bytes, event.delta().text());
  }
  EXPECT_EQ(shown, text + text);
}

TEST_F(GenerateTest, DropsTheSpaceBeforeTheFirstWordOfAText) {
  server_.engine().set_next_token([](uint64_t, int32_t, int64_t) { return ByteTokenizer::kThe; });
  GenerateRequest request = SimpleRequest(2);
  EXPECT_EQ(GenerateOk(request).outputs(0).text(), " the the");
  request.set_prompt("");
  EXPECT_EQ(GenerateOk(request).outputs(0).text(), "the the");
}

TEST_F(GenerateTest, EchoGivesThePromptBack) {
  GenerateRequest request = SimpleRequest(1);
  request.mutable_response()->set_echo(true);
  v1::PromptEvent prompt = GenerateOk(request).prompt();
  EXPECT_EQ(prompt.text(), "Hi");
  EXPECT_EQ(std::vector<int32_t>(prompt.token_ids().begin(), prompt.token_ids().end()),
            (std::vector<int32_t>{ByteTokenizer::kBos, 'H', 'i'}));
  request.mutable_token_ids()->add_ids('Z');
  prompt = GenerateOk(request).prompt();
  EXPECT_EQ(prompt.text(), "Z");
  EXPECT_EQ(prompt.num_tokens(), 1);
}

TEST_F(GenerateTest, LogprobsComeWithTheirTokens) {
  GenerateRequest request = SimpleRequest(6);
  request.mutable_response()->set_logprobs(true);
  request.mutable_response()->set_top_logprobs(3);
  request.mutable_response()->set_prompt_logprobs(2);
  for (const GenerateEvent& event : StreamOk(request)) {
    if (event.has_prompt()) {
      ASSERT_EQ(event.prompt().logprobs_size(), 3);
      EXPECT_FALSE(event.prompt().logprobs(0).has_logprob());
      EXPECT_EQ(event.prompt().logprobs(1).token_id(), 'H');
      EXPECT_EQ(event.prompt().logprobs(1).piece(), "H");
      EXPECT_FLOAT_EQ(event.prompt().logprobs(1).logprob(), -0.25f * ('H' % 16));
      EXPECT_EQ(event.prompt().logprobs(2).top_size(), 2);
    }
    if (!event.has_delta()) continue;
    ASSERT_EQ(event.delta().logprobs_size(), event.delta().token_ids_size());
    for (int at = 0; at < event.delta().token_ids_size(); ++at) {
      const v1::TokenLogprob& logprob = event.delta().logprobs(at);
      EXPECT_EQ(logprob.token_id(), event.delta().token_ids(at));
      EXPECT_FLOAT_EQ(logprob.logprob(), -0.125f * static_cast<float>(logprob.token_id() % 8));
      EXPECT_EQ(logprob.top_size(), 3);
    }
  }
}

TEST_F(GenerateTest, WithoutLogprobsThereAreNone) {
  const GenerateResponse response = GenerateOk(SimpleRequest(3));
  EXPECT_EQ(response.outputs(0).logprobs_size(), 0);
  EXPECT_EQ(response.prompt().logprobs_size(), 0);
}

TEST_F(GenerateTest, TimeLimitEndsWithOk) {
  server_.engine().set_step_time_us(1000);
  GenerateRequest request = SimpleRequest(4000);
  request.mutable_stopping()->set_time_limit_ms(50);
  const GenerateResponse response = GenerateOk(request);
  EXPECT_EQ(response.outputs(0).finished().reason(), v1::FINISH_REASON_TIME_LIMIT);
  EXPECT_GT(response.outputs(0).token_ids_size(), 0);
  EXPECT_LT(response.outputs(0).token_ids_size(), 4000);
}

TEST_F(GenerateTest, TimeLimitInTheQueueStillGivesPromptAndSummary) {
  server_.engine().AllowSteps(
      1);  // the second step is held until the limit of the second request is over
  std::thread holder([this] {
    GenerateResponse response;
    server_.Generate(SimpleRequest(3), &response);
  });
  ASSERT_TRUE(Eventually([this] { return server_.engine().num_steps() == 1; }));
  GenerateRequest request = SimpleRequest(4);
  request.mutable_sampling()->set_n(4);  // all slots: does not start beside the first
  request.mutable_stopping()->set_time_limit_ms(1);
  std::thread release([this] {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    server_.engine().AllowSteps(-1);
  });
  const std::vector<GenerateEvent> events = StreamOk(request);
  holder.join();
  release.join();
  ASSERT_EQ(events.size(), 6u);
  EXPECT_TRUE(events.front().has_prompt());
  for (int output = 0; output < 4; ++output) {
    EXPECT_EQ(events[1 + output].finished().reason(), v1::FINISH_REASON_TIME_LIMIT);
  }
  EXPECT_TRUE(events.back().has_summary());
}

TEST_F(GenerateTest, UnknownFieldsAreAccepted) {
  GenerateRequest request = SimpleRequest(2);
  request.GetReflection()->MutableUnknownFields(&request)->AddVarint(999, 1);
  EXPECT_EQ(GenerateOk(request).outputs(0).token_ids_size(), 2);
}

TEST_F(GenerateTest, ALongPromptIsSplitOnAnotherThread) {
  TestServer server({.engine = {.context_length = 1 << 20}});
  GenerateRequest request = SimpleRequest(2);
  request.set_prompt(std::string(300'000, 'x'));
  GenerateResponse response;
  const grpc::Status status = server.Generate(request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.summary().usage().prompt_tokens(), 300'001);
}

TEST_F(GenerateTest, WithoutATokenizerIdsGoInAndComeOut) {
  TestServer server({.with_tokenizer = false});
  GenerateRequest request = SimpleRequest(4);
  request.mutable_token_ids()->add_ids(5);
  request.mutable_response()->set_logprobs(true);
  GenerateResponse response;
  ASSERT_TRUE(server.Generate(request, &response).ok());
  EXPECT_EQ(response.outputs(0).text(), "");
  EXPECT_EQ(response.outputs(0).token_ids_size(), 4);
  EXPECT_EQ(response.outputs(0).logprobs(0).piece(), "");
}

TEST_F(GenerateTest, ManyClientsAtOnceGetWhatTheyGetAlone) {
  std::vector<std::string> alone;
  for (int client = 0; client < 24; ++client) {
    GenerateRequest request = SimpleRequest(30);
    request.mutable_sampling()->set_seed(client);
    alone.push_back(GenerateOk(request).outputs(0).text());
  }
  std::vector<std::string> together(alone.size());
  std::vector<std::thread> clients;
  for (size_t client = 0; client < alone.size(); ++client) {
    clients.emplace_back([&, client] {
      GenerateRequest request = SimpleRequest(30);
      request.mutable_sampling()->set_seed(client);
      together[client] = Concatenate(StreamOk(request)).outputs(0).text();
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(together, alone);
}

TEST_F(GenerateTest, ScoresTheTokensOfAPrompt) {
  v1::ScoreRequest request;
  request.set_prompt("Hey");
  request.set_top_logprobs(2);
  v1::ScoreResponse response;
  ASSERT_TRUE(server_.Score(request, &response).ok());
  ASSERT_EQ(response.logprobs_size(), 3);
  double total = 0;
  for (int at = 0; at < 3; ++at) {
    EXPECT_EQ(response.logprobs(at).token_id(), "Hey"[at]);
    EXPECT_EQ(response.logprobs(at).top_size(), 2);
    total += response.logprobs(at).logprob();
  }
  EXPECT_DOUBLE_EQ(response.total_logprob(), total);
  EXPECT_NEAR(response.perplexity(), std::exp(-total / 3), 1e-9);
  EXPECT_EQ(response.usage().prompt_tokens(), 4);
  EXPECT_EQ(response.usage().completion_tokens(), 0);
}

TEST_F(GenerateTest, ScoresAContinuationOnly) {
  v1::ScoreRequest request;
  request.set_prompt("He");
  request.set_continuation_text("y!");
  v1::ScoreResponse response;
  ASSERT_TRUE(server_.Score(request, &response).ok());
  ASSERT_EQ(response.logprobs_size(), 2);
  EXPECT_EQ(response.logprobs(0).token_id(), 'y');
  request.Clear();
  request.mutable_token_ids()->add_ids(1);
  request.mutable_continuation_token_ids()->add_ids(2);
  ASSERT_TRUE(server_.Score(request, &response).ok());
  ASSERT_EQ(response.logprobs_size(), 1);
  EXPECT_EQ(response.logprobs(0).token_id(), 2);
}

TEST_F(GenerateTest, TokenizesAndDetokenizes) {
  const auto stub = v1::Tokenizer::NewStub(server_.channel());
  v1::TokenizeRequest request;
  request.set_text("Hé");
  request.set_return_pieces(true);
  v1::TokenizeResponse response;
  grpc::ClientContext first;
  ASSERT_TRUE(stub->Tokenize(&first, request, &response).ok());
  EXPECT_EQ(std::vector<int32_t>(response.token_ids().begin(), response.token_ids().end()),
            (std::vector<int32_t>{ByteTokenizer::kBos, 'H', 0xC3, 0xA9}));
  EXPECT_EQ(response.pieces(0), "");
  EXPECT_EQ(response.pieces(1), "H");
  request.set_add_bos(false);
  grpc::ClientContext second;
  ASSERT_TRUE(stub->Tokenize(&second, request, &response).ok());
  EXPECT_EQ(response.token_ids_size(), 3);

  v1::DetokenizeRequest ids;
  for (int32_t id : {ByteTokenizer::kBos, int32_t{'H'}, 0xC3, 0xA9, 0xFF}) ids.add_token_ids(id);
  v1::DetokenizeResponse text;
  grpc::ClientContext third;
  ASSERT_TRUE(stub->Detokenize(&third, ids, &text).ok());
  EXPECT_EQ(text.text(), "Hé\uFFFD");
}

TEST_F(GenerateTest, TheCardTellsCostsAndLimits) {
  const auto stub = v1::Models::NewStub(server_.channel());
  v1::ListModelsResponse list;
  grpc::ClientContext first;
  ASSERT_TRUE(stub->ListModels(&first, {}, &list).ok());
  ASSERT_EQ(list.models_size(), 1);
  v1::GetModelRequest request;
  request.set_model("fake");
  v1::ModelCard card;
  grpc::ClientContext second;
  ASSERT_TRUE(stub->GetModel(&second, request, &card).ok());
  EXPECT_EQ(card.SerializeAsString(), list.models(0).SerializeAsString());
  EXPECT_EQ(card.name(), "fake");
  EXPECT_EQ(card.num_parameters(), 1234);
  EXPECT_EQ(card.context_length(), 4096);
  EXPECT_EQ(card.slots_total(), 4);
  EXPECT_EQ(card.limits().max_n(), 4);  // no more than slots
  EXPECT_EQ(card.state_bytes_per_sequence(), server_.engine().caches().geometry().slot_bytes());
  int64_t sum = 0;
  for (const auto& component : card.components()) sum += component.bytes_per_sequence();
  EXPECT_EQ(sum, card.state_bytes_per_sequence());
  EXPECT_EQ(card.kv_bytes_per_token(), 0);
  EXPECT_TRUE(card.has_tokenizer());
}

}  // namespace
}  // namespace godwit
