// What operators see: metrics, and reflection.

#include <arpa/inet.h>
#include <google/protobuf/descriptor.pb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>

#include "grpc/reflection/v1/reflection.grpc.pb.h"
#include "grpc/reflection/v1alpha/reflection.grpc.pb.h"
#include "tests/server/server_fixture.h"
#include "tests/server/test_certificates.h"

namespace godwit {
namespace {

// GET /metrics over a plain socket.
std::string Scrape(int port) {
  const int connection = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  std::string page;
  if (connect(connection, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0) {
    const std::string request = "GET /metrics HTTP/1.0\r\n\r\n";
    if (write(connection, request.data(), request.size()) > 0) {
      char buffer[4096];
      for (ssize_t size; (size = read(connection, buffer, sizeof buffer)) > 0;)
        page.append(buffer, size);
    }
  }
  close(connection);
  const size_t body = page.find("\r\n\r\n");
  return body == std::string::npos ? "" : page.substr(body + 4);
}

// The value of the series whose line begins with `series`; NaN when there is none.
double Value(const std::string& page, const std::string& series) {
  std::istringstream lines(page);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with(series + " ")) return std::stod(line.substr(series.size() + 1));
  }
  return std::nan("");
}

class MetricsTest : public testing::Test {
 protected:
  static TestServerOptions Options() {
    TestServerOptions options;
    options.server.metrics_listen = "127.0.0.1:0";
    return options;
  }
  std::string Page() { return Scrape(server_.server().metrics_port()); }
  TestServer server_{Options()};
};

TEST_F(MetricsTest, TellWhatHappened) {
  v1::GenerateRequest request = SimpleRequest(20);
  request.mutable_sampling()->set_n(2);
  std::vector<v1::GenerateEvent> events;
  ASSERT_TRUE(server_.Stream(request, &events).ok());
  v1::GenerateResponse response;
  ASSERT_TRUE(server_.Generate(SimpleRequest(5), &response).ok());
  request.mutable_sampling()->set_temperature(-1);
  EXPECT_FALSE(server_.Generate(request, &response).ok());
  request.set_model("other");
  EXPECT_FALSE(server_.Generate(request, &response).ok());
  const std::string model = "{model_name=\"fake\"}";
  ASSERT_TRUE(
      Eventually([&] { return Value(Page(), "godwit_generation_tokens_total" + model) == 45; }));
  const std::string page = Page();
  EXPECT_EQ(Value(page, "godwit_prompt_tokens_total" + model), 6);
  EXPECT_EQ(Value(page, "godwit_num_requests_running" + model), 0);
  EXPECT_EQ(Value(page, "godwit_num_requests_waiting" + model), 0);
  EXPECT_EQ(Value(page, "godwit_state_slots" + model), 4);
  EXPECT_EQ(Value(page, "godwit_state_slots_used" + model), 0);
  EXPECT_EQ(Value(page, "godwit_kv_cache_usage_perc" + model), 0);
  EXPECT_EQ(
      Value(page, "godwit_request_success_total{finished_reason=\"length\",model_name=\"fake\"}"),
      3);
  EXPECT_EQ(Value(page, "godwit_request_prompt_tokens_count" + model), 2);
  EXPECT_EQ(Value(page, "godwit_request_generation_tokens_sum" + model), 45);
  EXPECT_EQ(Value(page, "godwit_time_to_first_token_seconds_count" + model), 2);
  EXPECT_EQ(Value(page, "godwit_e2e_request_latency_seconds_count" + model), 2);
  EXPECT_EQ(Value(page, "godwit_inter_token_latency_seconds_count" + model), 2 * 19 + 4);
  // The gaps of an output add up to its decode time; the first request had two outputs.
  EXPECT_GE(Value(page, "godwit_inter_token_latency_seconds_sum" + model),
            0.999 * Value(page, "godwit_request_decode_time_seconds_sum" + model));
  EXPECT_EQ(Value(page, "godwit_request_params_n_sum" + model), 3);
  EXPECT_EQ(Value(page, "godwit_iteration_tokens_sum" + model), 6 + 2 * 19 + 4);
  EXPECT_EQ(Value(page, "godwit_step_overhead_seconds_count" + model),
            server_.engine().num_steps());
  EXPECT_EQ(Value(page,
                  "godwit_request_rejected_total{code=\"INVALID_ARGUMENT\",model_name=\"fake\","
                  "reason=\"invalid_argument\"}"),
            1);
  EXPECT_EQ(Value(page,
                  "godwit_request_rejected_total{code=\"NOT_FOUND\",model_name=\"fake\",reason="
                  "\"not_found\"}"),
            1);
  EXPECT_EQ(Value(page,
                  "grpc_server_handled_total{grpc_code=\"OK\",grpc_method=\"GenerateStream\","
                  "grpc_service=\"godwit.v1.Inference\",grpc_type=\"server_stream\"}"),
            1);
  EXPECT_EQ(
      Value(page,
            "grpc_server_handled_total{grpc_code=\"INVALID_ARGUMENT\",grpc_method=\"Generate\","
            "grpc_service=\"godwit.v1.Inference\",grpc_type=\"unary\"}"),
      1);
  EXPECT_NE(page.find("godwit_build_info{backend=\"fake\""), std::string::npos);
}

TEST_F(MetricsTest, CountFailuresByPhase) {
  server_.engine().set_step_time_us(1000);
  // A machine that stalls for longer than the server's margin lets the client's own deadline win,
  // which counts as cancelled: then once more.
  EXPECT_TRUE(Eventually([&] {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(300));
    v1::GenerateResponse response;
    EXPECT_EQ(server_.inference()->Generate(&context, SimpleRequest(4000), &response).error_code(),
              grpc::StatusCode::DEADLINE_EXCEEDED);
    return Value(Page(),
                 "godwit_request_failed_total{code=\"DEADLINE_EXCEEDED\",model_name=\"fake\","
                 "phase=\"decoding\"}") >= 1;
  }));
}

TEST_F(MetricsTest, PromtoolFindsNothing) {
  if (std::system("promtool --version > /dev/null 2>&1") != 0)
    GTEST_SKIP() << "promtool is not installed";
  v1::GenerateResponse response;
  ASSERT_TRUE(server_.Generate(SimpleRequest(5), &response).ok());
  v1::GenerateRequest bad = SimpleRequest(0);
  EXPECT_FALSE(server_.Generate(bad, &response).ok());
  const TestFile page(Page());
  const TestFile out("");
  const std::string command =
      "promtool check metrics < " + page.path() + " > " + out.path() + " 2>&1";
  const int result = std::system(command.c_str());
  std::ifstream file(out.path());
  const std::string findings((std::istreambuf_iterator<char>(file)), {});
  EXPECT_EQ(result, 0) << findings;
  EXPECT_EQ(findings, "");
}

TEST(MetricsAddressTest, AnAddressInUseIsToldAtOnce) {
  TestServerOptions options;
  options.server.metrics_listen = "127.0.0.1:0";
  TestServer first(options);
  FakeEngine engine({});
  ServerParts parts = {.card = engine.card(), .executor = &engine, .caches = &engine.caches()};
  ServerOptions second;
  second.listen = "127.0.0.1:0";
  second.metrics_listen = "127.0.0.1:" + std::to_string(first.server().metrics_port());
  const absl::Status status = Server::CreateWithParts(second, parts).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
}

template <typename Reflection, typename Request, typename Response>
std::vector<Response> Ask(TestServer& server, const std::vector<Request>& requests) {
  const auto stub = Reflection::NewStub(server.channel());
  grpc::ClientContext context;
  const auto stream = stub->ServerReflectionInfo(&context);
  std::vector<Response> responses(requests.size());
  for (size_t at = 0; at < requests.size(); ++at) {
    EXPECT_TRUE(stream->Write(requests[at]));
    EXPECT_TRUE(stream->Read(&responses[at]));
  }
  stream->WritesDone();
  EXPECT_TRUE(stream->Finish().ok());
  return responses;
}

template <typename Reflection, typename Request, typename Response>
void CheckReflection(TestServer& server) {
  std::vector<Request> requests(5);
  requests[0].set_list_services("*");
  requests[1].set_file_containing_symbol("godwit.v1.Inference.GenerateStream");
  requests[2].set_file_by_filename("google/rpc/error_details.proto");
  requests[3].set_file_containing_symbol("no.such.Thing");
  const auto responses = Ask<Reflection, Request, Response>(server, requests);
  std::set<std::string> names;
  for (const auto& service : responses[0].list_services_response().service())
    names.insert(service.name());
  EXPECT_EQ(names,
            (std::set<std::string>{"godwit.v1.Inference", "godwit.v1.Tokenizer", "godwit.v1.Models",
                                   "godwit.v1.Sessions", "grpc.health.v1.Health",
                                   "grpc.reflection.v1.ServerReflection",
                                   "grpc.reflection.v1alpha.ServerReflection"}));
  google::protobuf::FileDescriptorProto file;
  ASSERT_GE(responses[1].file_descriptor_response().file_descriptor_proto_size(), 1);
  ASSERT_TRUE(
      file.ParseFromString(responses[1].file_descriptor_response().file_descriptor_proto(0)));
  EXPECT_EQ(file.name(), "godwit/v1/inference.proto");
  EXPECT_GE(responses[2].file_descriptor_response().file_descriptor_proto_size(),
            2);  // and duration.proto
  EXPECT_EQ(responses[3].error_response().error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(responses[4].error_response().error_code(), grpc::StatusCode::INVALID_ARGUMENT);
}

TEST(ReflectionTest, BothVersionsDescribeTheServices) {
  TestServerOptions options;
  options.server.reflection = true;
  TestServer server(options);
  namespace v1 = grpc::reflection::v1;
  namespace v1alpha = grpc::reflection::v1alpha;
  CheckReflection<v1::ServerReflection, v1::ServerReflectionRequest, v1::ServerReflectionResponse>(
      server);
  CheckReflection<v1alpha::ServerReflection, v1alpha::ServerReflectionRequest,
                  v1alpha::ServerReflectionResponse>(server);
}

TEST(ReflectionTest, IsOffByDefault) {
  TestServer server;
  const auto stub = grpc::reflection::v1::ServerReflection::NewStub(server.channel());
  grpc::ClientContext context;
  const auto stream = stub->ServerReflectionInfo(&context);
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::UNIMPLEMENTED);
}

}  // namespace
}  // namespace godwit
