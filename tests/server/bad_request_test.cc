// Every request that can be refused: the exact code, the field, and that nobody else notices.

#include <grpcpp/generic/generic_stub.h>

#include <cmath>
#include <functional>
#include <limits>

#include "tests/server/server_fixture.h"

namespace godwit {
namespace {

using grpc::StatusCode;
using v1::GenerateRequest;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

struct BadRequestCase {
  const char* name;
  std::function<void(GenerateRequest&)> spoil;  // of a valid request
  StatusCode code;
  const char* field;        // of the first BadRequest violation; "" : none
  const char* reason = "";  // of ErrorInfo
};

// `set` of a group of the request.
auto Sampling(std::function<void(v1::SamplingOptions&)> set) {
  return [set](GenerateRequest& request) { set(*request.mutable_sampling()); };
}
auto Stopping(std::function<void(v1::StoppingOptions&)> set) {
  return [set](GenerateRequest& request) { set(*request.mutable_stopping()); };
}
auto Response(std::function<void(v1::ResponseOptions&)> set) {
  return [set](GenerateRequest& request) { set(*request.mutable_response()); };
}

const std::vector<BadRequestCase>& Cases() {
  constexpr StatusCode kInvalid = StatusCode::INVALID_ARGUMENT;
  constexpr StatusCode kUnimplemented = StatusCode::UNIMPLEMENTED;
  static const std::vector<BadRequestCase> cases = {
      // Input.
      {"NoInput", [](auto& r) { r.clear_prompt(); }, kInvalid, "input"},
      {"PromptNotUtf8", [](auto& r) { r.set_prompt("a\xFFz"); }, kInvalid, "prompt",
       "MALFORMED_MESSAGE"},
      {"PromptLoneSurrogate", [](auto& r) { r.set_prompt("\xED\xA0\x80"); }, kInvalid, "prompt",
       "MALFORMED_MESSAGE"},
      {"PromptCutCharacter", [](auto& r) { r.set_prompt("\xE4\xB8"); }, kInvalid, "prompt",
       "MALFORMED_MESSAGE"},
      {"PromptIsContext", [](auto& r) { r.set_prompt(std::string(4095, 'x')); }, kInvalid,
       "stopping.max_tokens", "CONTEXT_LENGTH_EXCEEDED"},
      {"PromptAboveContextWithoutMaxTokens",
       [](auto& r) {
         r.set_prompt(std::string(5000, 'x'));
         r.mutable_stopping()->clear_max_tokens();
       },
       kInvalid, "input", "CONTEXT_LENGTH_EXCEEDED"},
      {"PromptTooManyBytes", [](auto& r) { r.set_prompt(std::string(70'000, 'x')); }, kInvalid,
       "prompt"},
      {"OneMillionNewlines", [](auto& r) { r.set_prompt(std::string(1'000'000, '\n')); }, kInvalid,
       "prompt"},
      {"TokenIdsEmpty", [](auto& r) { r.mutable_token_ids(); }, kInvalid, "token_ids.ids"},
      {"TokenIdIsVocab", [](auto& r) { r.mutable_token_ids()->add_ids(ByteTokenizer::kVocab); },
       kInvalid, "token_ids.ids[0]"},
      {"TokenIdNegative",
       [](auto& r) {
         r.mutable_token_ids()->add_ids(1);
         r.mutable_token_ids()->add_ids(-1);
       },
       kInvalid, "token_ids.ids[1]"},
      {"TokenId2To32Minus1",
       [](auto& r) { r.mutable_token_ids()->add_ids(static_cast<int32_t>(0xFFFFFFFFu)); }, kInvalid,
       "token_ids.ids[0]"},
      // Names.
      {"UnknownModel", [](auto& r) { r.set_model("other"); }, StatusCode::NOT_FOUND, ""},
      {"RequestIdTooLong", [](auto& r) { r.set_request_id(std::string(129, 'x')); }, kInvalid,
       "request_id"},
      {"RequestIdWithNewline", [](auto& r) { r.set_request_id("a\nb"); }, kInvalid, "request_id"},
      {"RequestIdNotAscii", [](auto& r) { r.set_request_id("é"); }, kInvalid, "request_id"},
      {"RequestIdNotUtf8", [](auto& r) { r.set_request_id("\xFF"); }, kInvalid, "request_id",
       "MALFORMED_MESSAGE"},
      // Sampling.
      {"TemperatureNan", Sampling([](auto& s) { s.set_temperature(kNan); }), kInvalid,
       "sampling.temperature"},
      {"TemperatureInf", Sampling([](auto& s) { s.set_temperature(kInf); }), kInvalid,
       "sampling.temperature"},
      {"TemperatureNegative", Sampling([](auto& s) { s.set_temperature(-1); }), kInvalid,
       "sampling.temperature"},
      {"TemperatureHuge", Sampling([](auto& s) { s.set_temperature(1e30f); }), kInvalid,
       "sampling.temperature"},
      {"TopKNegative", Sampling([](auto& s) { s.set_top_k(-1); }), kInvalid, "sampling.top_k"},
      {"TopPZero", Sampling([](auto& s) { s.set_top_p(0); }), kInvalid, "sampling.top_p"},
      {"TopPAboveOne", Sampling([](auto& s) { s.set_top_p(1.0001f); }), kInvalid, "sampling.top_p"},
      {"TopPNan", Sampling([](auto& s) { s.set_top_p(kNan); }), kInvalid, "sampling.top_p"},
      {"MinPNegative", Sampling([](auto& s) { s.set_min_p(-0.1f); }), kInvalid, "sampling.min_p"},
      {"MinPAboveOne", Sampling([](auto& s) { s.set_min_p(1.5f); }), kInvalid, "sampling.min_p"},
      {"RepetitionZero", Sampling([](auto& s) { s.set_repetition_penalty(0); }), kInvalid,
       "sampling.repetition_penalty"},
      {"RepetitionNan", Sampling([](auto& s) { s.set_repetition_penalty(kNan); }), kInvalid,
       "sampling.repetition_penalty"},
      {"RepetitionHuge", Sampling([](auto& s) { s.set_repetition_penalty(1e9f); }), kInvalid,
       "sampling.repetition_penalty"},
      {"PresenceOutOfRange", Sampling([](auto& s) { s.set_presence_penalty(2.5f); }), kInvalid,
       "sampling.presence_penalty"},
      {"FrequencyOutOfRange", Sampling([](auto& s) { s.set_frequency_penalty(-kInf); }), kInvalid,
       "sampling.frequency_penalty"},
      {"NZero", Sampling([](auto& s) { s.set_n(0); }), kInvalid, "sampling.n"},
      {"NNegative", Sampling([](auto& s) { s.set_n(-3); }), kInvalid, "sampling.n"},
      {"NBillion", Sampling([](auto& s) { s.set_n(1'000'000'000); }), kInvalid, "sampling.n"},
      {"NAboveSlots", Sampling([](auto& s) { s.set_n(5); }), kInvalid, "sampling.n"},
      {"LogitBiasUnknownId", Sampling([](auto& s) { (*s.mutable_logit_bias())[260] = 1; }),
       kInvalid, "sampling.logit_bias[260]"},
      {"LogitBiasNegativeId", Sampling([](auto& s) { (*s.mutable_logit_bias())[-1] = 1; }),
       kInvalid, "sampling.logit_bias[-1]"},
      {"LogitBiasNan", Sampling([](auto& s) { (*s.mutable_logit_bias())[7] = kNan; }), kInvalid,
       "sampling.logit_bias[7]"},
      {"LogitBiasMinusInf", Sampling([](auto& s) { (*s.mutable_logit_bias())[7] = -kInf; }),
       kInvalid, "sampling.logit_bias[7]"},
      {"LogitBiasTooMany", Sampling([](auto& s) {
         for (int id = 0; id < 1025; ++id) (*s.mutable_logit_bias())[id] = 1;
       }),
       kInvalid, "sampling.logit_bias"},
      // Stopping.
      {"MaxTokensZero", Stopping([](auto& s) { s.set_max_tokens(0); }), kInvalid,
       "stopping.max_tokens"},
      {"MaxTokensNegative", Stopping([](auto& s) { s.set_max_tokens(-1); }), kInvalid,
       "stopping.max_tokens"},
      {"MaxTokensAboveCap", Stopping([](auto& s) { s.set_max_tokens((1 << 20) + 1); }), kInvalid,
       "stopping.max_tokens"},
      {"MaxTokensAboveContext", Stopping([](auto& s) { s.set_max_tokens(4094); }), kInvalid,
       "stopping.max_tokens", "CONTEXT_LENGTH_EXCEEDED"},
      {"MaxTokensOverflow",
       Stopping([](auto& s) { s.set_max_tokens(std::numeric_limits<int64_t>::max()); }), kInvalid,
       "stopping.max_tokens"},
      {"MinTokensAboveMax", Stopping([](auto& s) { s.set_min_tokens(11); }), kInvalid,
       "stopping.min_tokens"},
      {"MinTokensNegative", Stopping([](auto& s) { s.set_min_tokens(-1); }), kInvalid,
       "stopping.min_tokens"},
      {"StopEmpty", Stopping([](auto& s) { s.add_stop(""); }), kInvalid, "stopping.stop[0]"},
      {"StopTooLong", Stopping([](auto& s) {
         s.add_stop("ok");
         s.add_stop(std::string(257, 'x'));
       }),
       kInvalid, "stopping.stop[1]"},
      {"StopOneMegabyte", Stopping([](auto& s) { s.add_stop(std::string(1 << 20, 'x')); }),
       kInvalid, "stopping.stop[0]"},
      {"StopTenThousand", Stopping([](auto& s) {
         for (int at = 0; at < 10'000; ++at) s.add_stop("x");
       }),
       kInvalid, "stopping.stop"},
      {"StopNotUtf8", Stopping([](auto& s) {
         s.add_stop("ok");
         s.add_stop("\xC3");
       }),
       kInvalid, "stopping.stop[1]", "MALFORMED_MESSAGE"},
      {"StopTokenUnknown", Stopping([](auto& s) { s.add_stop_token_ids(1000); }), kInvalid,
       "stopping.stop_token_ids[0]"},
      {"StopTokensTooMany", Stopping([](auto& s) {
         for (int at = 0; at < 65; ++at) s.add_stop_token_ids(1);
       }),
       kInvalid, "stopping.stop_token_ids"},
      {"TimeLimitZero", Stopping([](auto& s) { s.set_time_limit_ms(0); }), kInvalid,
       "stopping.time_limit_ms"},
      {"TimeLimitHuge", Stopping([](auto& s) { s.set_time_limit_ms(int64_t{1} << 40); }), kInvalid,
       "stopping.time_limit_ms"},
      // Response.
      {"TopLogprobsWithoutLogprobs", Response([](auto& o) { o.set_top_logprobs(1); }), kInvalid,
       "response.top_logprobs"},
      {"TopLogprobsTooMany", Response([](auto& o) {
         o.set_logprobs(true);
         o.set_top_logprobs(21);
       }),
       kInvalid, "response.top_logprobs"},
      {"TopLogprobsNegative", Response([](auto& o) {
         o.set_logprobs(true);
         o.set_top_logprobs(-1);
       }),
       kInvalid, "response.top_logprobs"},
      {"PromptLogprobsTooMany", Response([](auto& o) { o.set_prompt_logprobs(1000); }), kInvalid,
       "response.prompt_logprobs"},
      {"PromptLogprobsNegative", Response([](auto& o) { o.set_prompt_logprobs(-1); }), kInvalid,
       "response.prompt_logprobs"},
      // Scheduling.
      {"PriorityTooHigh", [](auto& r) { r.mutable_scheduling()->set_priority(101); }, kInvalid,
       "scheduling.priority"},
      {"PriorityTooLow", [](auto& r) { r.mutable_scheduling()->set_priority(-101); }, kInvalid,
       "scheduling.priority"},
      {"QueueTimeout", [](auto& r) { r.mutable_scheduling()->set_queue_timeout_ms(1); },
       kUnimplemented, "scheduling.queue_timeout_ms", "FIELD_NOT_IMPLEMENTED"},
      {"TtftSlo", [](auto& r) { r.mutable_scheduling()->set_ttft_slo_ms(1); }, kUnimplemented,
       "scheduling.ttft_slo_ms", "FIELD_NOT_IMPLEMENTED"},
      {"TpotSlo", [](auto& r) { r.mutable_scheduling()->set_tpot_slo_ms(0); }, kUnimplemented,
       "scheduling.tpot_slo_ms", "FIELD_NOT_IMPLEMENTED"},
      // Groups that are not implemented.
      {"StateParent", [](auto& r) { r.mutable_state()->set_parent_snapshot("s"); }, kUnimplemented,
       "state.parent_snapshot", "FIELD_NOT_IMPLEMENTED"},
      {"StateSaveAs", [](auto& r) { r.mutable_state()->set_save_as("a/b"); }, kInvalid, "name"},
      {"StateKeep", [](auto& r) { r.mutable_state()->set_keep_state(true); }, kInvalid,
       "state.keep_state"},
      {"StateExpected", [](auto& r) { r.mutable_state()->set_expected_position(1); }, kInvalid,
       "state.expected_position"},
      {"CacheSalt", [](auto& r) { r.mutable_state()->set_cache_salt(std::string(257, 's')); },
       kInvalid, "state.cache_salt"},
      {"CacheBoundary", [](auto& r) { r.mutable_state()->add_cache_boundaries(0); }, kInvalid,
       "state.cache_boundaries[0]"},
      {"SpeculationMode",
       [](auto& r) { r.mutable_speculation()->set_mode(v1::SpeculationOptions::MODE_ON); },
       grpc::StatusCode::FAILED_PRECONDITION, "", "NO_DRAFT_MODEL"},
      {"SpeculationDraft", [](auto& r) { r.mutable_speculation()->set_max_draft_tokens(2); },
       grpc::StatusCode::FAILED_PRECONDITION, "", "NO_DRAFT_MODEL"},
      {"SpeculationPolicy",
       [](auto& r) {
         r.mutable_speculation()->set_policy(v1::SpeculationOptions::POLICY_SPECDECPP);
       },
       grpc::StatusCode::FAILED_PRECONDITION, "", "NO_DRAFT_MODEL"},
      {"GuidedSchema", [](auto& r) { r.mutable_guided()->set_json_schema("{}"); }, kUnimplemented,
       "guided.json_schema", "FIELD_NOT_IMPLEMENTED"},
      {"GuidedRegex", [](auto& r) { r.mutable_guided()->set_regex("(a+)+"); }, kUnimplemented,
       "guided.regex", "FIELD_NOT_IMPLEMENTED"},
      {"GuidedChoice", [](auto& r) { r.mutable_guided()->mutable_choice(); }, kUnimplemented,
       "guided.choice", "FIELD_NOT_IMPLEMENTED"},
  };
  return cases;
}

class BadRequestTest : public testing::Test {
 protected:
  static TestServerOptions Options() {
    TestServerOptions options;
    options.server.limits.max_prompt_bytes = 65'536;
    return options;
  }
  // Sends bytes as a request of `method`; the message of the status is in *status.
  grpc::Status SendRaw(const std::string& method, const std::string& bytes) {
    grpc::GenericStub stub(server_.channel());
    grpc::Slice slice(bytes);
    grpc::ByteBuffer request(&slice, 1), response;
    grpc::ClientContext context;
    grpc::Status status;
    bool done = false;
    stub.UnaryCall(&context, method, grpc::StubOptions(), &request, &response,
                   [&](grpc::Status result) {
                     std::lock_guard<std::mutex> lock(mutex_);
                     status = std::move(result);
                     done = true;
                     wake_.notify_one();
                   });
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return done; });
    return status;
  }
  TestServer server_{Options()};
  std::mutex mutex_;
  std::condition_variable wake_;
};

TEST_F(BadRequestTest, MatrixHasAtLeast60Cases) { EXPECT_GE(Cases().size(), 60u); }

// One long stream runs beside the whole matrix; its text is what it is alone.
TEST_F(BadRequestTest, EachIsRefusedWithCodeAndFieldAndNobodyElseNotices) {
  v1::GenerateResponse alone;
  ASSERT_TRUE(server_.Generate(SimpleRequest(4000), &alone).ok());
  server_.engine().set_step_time_us(300);
  std::vector<v1::GenerateEvent> events;
  grpc::Status stream_status;
  std::thread stream([&] { stream_status = server_.Stream(SimpleRequest(4000), &events); });

  for (const BadRequestCase& bad : Cases()) {
    SCOPED_TRACE(bad.name);
    GenerateRequest request = SimpleRequest(10);
    bad.spoil(request);
    v1::GenerateResponse response;
    const grpc::Status unary = server_.Generate(request, &response);
    EXPECT_EQ(unary.error_code(), bad.code) << unary.error_message();
    EXPECT_EQ(ViolatedField(unary), bad.field) << unary.error_message();
    EXPECT_EQ(ReasonOfStatus(unary), bad.reason);
    EXPECT_FALSE(unary.error_message().empty());
    std::vector<v1::GenerateEvent> none;
    const grpc::Status streamed = server_.Stream(request, &none);
    EXPECT_EQ(streamed.error_code(), bad.code);
    EXPECT_EQ(streamed.error_message(), unary.error_message());
    EXPECT_EQ(streamed.error_details(), unary.error_details());
    EXPECT_TRUE(none.empty());
  }
  stream.join();
  EXPECT_TRUE(stream_status.ok()) << stream_status.error_message();
  EXPECT_EQ(Concatenate(events).outputs(0).text(), alone.outputs(0).text());
  EXPECT_TRUE(server_.ShutdownLeavesNoSlot());
}

TEST_F(BadRequestTest, TheEdgesAreAccepted) {
  const std::vector<std::pair<const char*, std::function<void(GenerateRequest&)>>> good = {
      {"TemperatureZero", Sampling([](auto& s) { s.set_temperature(0); })},
      {"TemperatureTiny", Sampling([](auto& s) { s.set_temperature(1e-40f); })},
      {"Temperature100", Sampling([](auto& s) { s.set_temperature(100); })},
      {"TopKHuge", Sampling([](auto& s) { s.set_top_k(std::numeric_limits<int32_t>::max()); })},
      {"TopPOne", Sampling([](auto& s) { s.set_top_p(1); })},
      {"MinPOne", Sampling([](auto& s) { s.set_min_p(1); })},
      {"NIsSlots", Sampling([](auto& s) { s.set_n(4); })},
      {"LogitBiasEdge", Sampling([](auto& s) { (*s.mutable_logit_bias())[259] = -100; })},
      {"PromptOfOneNul", [](auto& r) { r.set_prompt(std::string(1, '\0')); }},
      {"PromptEmptyWithBos", [](auto& r) { r.set_prompt(""); }},
      {"LastTokenId", [](auto& r) { r.mutable_token_ids()->add_ids(259); }},
      {"ContextExactlyFull", [](auto& r) { r.set_prompt(std::string(4085, 'x')); }},
      {"MinTokensIsMax", Stopping([](auto& s) { s.set_min_tokens(10); })},
      {"StopOf256Bytes", Stopping([](auto& s) { s.add_stop(std::string(256, 'x')); })},
      {"SixteenStops", Stopping([](auto& s) {
         for (int at = 0; at < 16; ++at) s.add_stop("\x01");
       })},
      {"PriorityEdge", [](auto& r) { r.mutable_scheduling()->set_priority(-100); }},
      {"ModelByName", [](auto& r) { r.set_model("fake"); }},
      {"RequestIdOf128", [](auto& r) { r.set_request_id(std::string(128, '~')); }},
  };
  for (const auto& [name, change] : good) {
    SCOPED_TRACE(name);
    GenerateRequest request = SimpleRequest(10);
    change(request);
    v1::GenerateResponse response;
    const grpc::Status status = server_.Generate(request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    EXPECT_EQ(response.outputs(0).token_ids_size(), 10);
  }
}

TEST_F(BadRequestTest, AllViolationsAreToldAtOnce) {
  GenerateRequest request = SimpleRequest(10);
  request.mutable_sampling()->set_temperature(-1);
  request.mutable_sampling()->set_top_p(2);
  request.mutable_stopping()->add_stop("");
  v1::GenerateResponse response;
  google::rpc::BadRequest detail;
  ASSERT_TRUE(GetDetail(server_.Generate(request, &response), &detail));
  ASSERT_EQ(detail.field_violations_size(), 3);
  EXPECT_EQ(detail.field_violations(1).field(), "sampling.top_p");
  EXPECT_EQ(detail.field_violations(1).description(), "2 not in (0, 1]");
}

TEST_F(BadRequestTest, ContextErrorsTellLimitAndGot) {
  GenerateRequest request = SimpleRequest(4094);
  v1::GenerateResponse response;
  google::rpc::ErrorInfo info;
  ASSERT_TRUE(GetDetail(server_.Generate(request, &response), &info));
  EXPECT_EQ(info.domain(), "godwit");
  EXPECT_EQ(info.metadata().at("limit"), "4096");
  EXPECT_EQ(info.metadata().at("got"), "4097");
}

TEST_F(BadRequestTest, BytesThatAreNoMessageAreRefused) {
  for (const char* method : {"/godwit.v1.Inference/Generate", "/godwit.v1.Inference/Score",
                             "/godwit.v1.Tokenizer/Tokenize", "/godwit.v1.Tokenizer/Detokenize",
                             "/godwit.v1.Models/GetModel", "/godwit.v1.Models/ListModels"}) {
    const grpc::Status status = SendRaw(method, "\xFF\xFF\xFF\xFF");
    EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT)
        << method << ": " << status.error_message();
    EXPECT_EQ(ReasonOfStatus(status), "MALFORMED_MESSAGE");
  }
}

TEST_F(BadRequestTest, UnknownMethodsAreUnimplemented) {
  EXPECT_EQ(SendRaw("/godwit.v1.Inference/Chat", "").error_code(), StatusCode::UNIMPLEMENTED);
  EXPECT_EQ(SendRaw("/nothing/here", "").error_code(), StatusCode::UNIMPLEMENTED);
}

TEST_F(BadRequestTest, AMessageAboveTheLimitIsRefused) {
  TestServerOptions options;
  options.server.limits.max_message_bytes = 1 << 20;
  TestServer server(options);
  GenerateRequest request = SimpleRequest(1);
  request.set_prompt(std::string(2 << 20, 'x'));
  v1::GenerateResponse response;
  EXPECT_EQ(server.Generate(request, &response).error_code(), StatusCode::RESOURCE_EXHAUSTED);
}

// 64 MiB of the same letter, 64 KiB on the wire.
TEST_F(BadRequestTest, ACompressedMessageThatUnpacksAboveTheLimitIsRefused) {
  GenerateRequest request = SimpleRequest(1);
  request.set_prompt(std::string(64 << 20, 'x'));
  v1::GenerateResponse response;
  grpc::ClientContext context;
  context.set_compression_algorithm(GRPC_COMPRESS_GZIP);
  const grpc::Status status = server_.inference()->Generate(&context, request, &response);
  EXPECT_EQ(status.error_code(), StatusCode::RESOURCE_EXHAUSTED) << status.error_message();
}

TEST_F(BadRequestTest, MetadataAboveTheLimitIsRefused) {
  grpc::ClientContext context;
  context.AddMetadata("x-large", std::string(100'000, 'x'));
  v1::GenerateResponse response;
  const grpc::Status status = server_.inference()->Generate(&context, SimpleRequest(1), &response);
  EXPECT_FALSE(status.ok());
  v1::GenerateResponse after;
  // The client's own connection may be closed for it.
  EXPECT_TRUE(Eventually([&] { return server_.Generate(SimpleRequest(1), &after).ok(); }));
}

TEST_F(BadRequestTest, AnEmptyPromptNeedsABos) {
  TestServer server({.engine = {.add_bos = false}});
  GenerateRequest request = SimpleRequest(1);
  request.set_prompt("");
  v1::GenerateResponse response;
  const grpc::Status status = server.Generate(request, &response);
  EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(ViolatedField(status), "prompt");
}

TEST_F(BadRequestTest, WithoutATokenizerTextIsAFailedPrecondition) {
  TestServer server({.with_tokenizer = false});
  v1::GenerateResponse response;
  grpc::Status status = server.Generate(SimpleRequest(1), &response);
  EXPECT_EQ(status.error_code(), StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(ReasonOfStatus(status), "NO_TOKENIZER");
  GenerateRequest request = SimpleRequest(1);
  request.mutable_token_ids()->add_ids(1);
  request.mutable_stopping()->add_stop("x");
  status = server.Generate(request, &response);
  EXPECT_EQ(ViolatedField(status), "stopping.stop");
  const auto stub = v1::Tokenizer::NewStub(server.channel());
  v1::TokenizeResponse tokens;
  grpc::ClientContext first;
  EXPECT_EQ(stub->Tokenize(&first, {}, &tokens).error_code(), StatusCode::FAILED_PRECONDITION);
}

TEST_F(BadRequestTest, ScoreIsCheckedToo) {
  struct Case {
    std::function<void(v1::ScoreRequest&)> spoil;
    StatusCode code;
    const char* field;
  };
  const std::vector<Case> cases = {
      {[](auto& r) { r.clear_prompt(); }, StatusCode::INVALID_ARGUMENT, "input"},
      {[](auto& r) { r.set_prompt(""); }, StatusCode::INVALID_ARGUMENT, "input"},  // BOS alone
      {[](auto& r) { r.set_prompt("\xFF"); }, StatusCode::INVALID_ARGUMENT, "prompt"},
      {[](auto& r) { r.set_prompt(std::string(4096, 'x')); }, StatusCode::INVALID_ARGUMENT,
       "input"},
      {[](auto& r) { r.mutable_token_ids()->add_ids(1); }, StatusCode::INVALID_ARGUMENT, "input"},
      {[](auto& r) { r.mutable_token_ids()->add_ids(777); }, StatusCode::INVALID_ARGUMENT,
       "token_ids.ids[0]"},
      {[](auto& r) { r.set_top_logprobs(21); }, StatusCode::INVALID_ARGUMENT, "top_logprobs"},
      {[](auto& r) { r.set_continuation_text(""); }, StatusCode::INVALID_ARGUMENT,
       "continuation_text"},
      {[](auto& r) { r.mutable_continuation_token_ids()->add_ids(1); },
       StatusCode::INVALID_ARGUMENT, "continuation_token_ids"},
      {[](auto& r) {
         r.mutable_token_ids()->add_ids(1);
         r.set_continuation_text("x");
       },
       StatusCode::INVALID_ARGUMENT, "continuation_text"},
      {[](auto& r) { r.set_model("other"); }, StatusCode::NOT_FOUND, ""},
      {[](auto& r) { r.mutable_scheduling()->set_ttft_slo_ms(5); }, StatusCode::UNIMPLEMENTED,
       "scheduling.ttft_slo_ms"},
  };
  for (const Case& bad : cases) {
    v1::ScoreRequest request;
    request.set_prompt("Hey");
    bad.spoil(request);
    v1::ScoreResponse response;
    const grpc::Status status = server_.Score(request, &response);
    EXPECT_EQ(status.error_code(), bad.code)
        << request.ShortDebugString() << status.error_message();
    EXPECT_EQ(ViolatedField(status), bad.field)
        << request.ShortDebugString() << status.error_message();
  }
}

TEST_F(BadRequestTest, TokenizerAndModelsAreCheckedToo) {
  const auto tokenizer = v1::Tokenizer::NewStub(server_.channel());
  v1::DetokenizeRequest ids;
  ids.add_token_ids(1000);
  v1::DetokenizeResponse text;
  grpc::ClientContext first;
  EXPECT_EQ(ViolatedField(tokenizer->Detokenize(&first, ids, &text)), "token_ids[0]");
  v1::TokenizeRequest long_text;
  long_text.set_text(std::string(65'537, 'x'));
  v1::TokenizeResponse tokens;
  grpc::ClientContext second;
  EXPECT_EQ(ViolatedField(tokenizer->Tokenize(&second, long_text, &tokens)), "text");
  v1::GetModelRequest model;
  model.set_model("other");
  v1::ModelCard card;
  grpc::ClientContext third;
  const grpc::Status status =
      v1::Models::NewStub(server_.channel())->GetModel(&third, model, &card);
  EXPECT_EQ(status.error_code(), StatusCode::NOT_FOUND);
  google::rpc::ResourceInfo resource;
  ASSERT_TRUE(GetDetail(status, &resource));
  EXPECT_EQ(resource.resource_type(), "model");
  EXPECT_EQ(resource.resource_name(), "other");
}

}  // namespace
}  // namespace godwit
