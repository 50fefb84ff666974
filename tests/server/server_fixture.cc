#include "tests/server/server_fixture.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>

#include "server/event_encoder.h"

namespace godwit {

std::string ViolatedField(const grpc::Status& status) {
  google::rpc::BadRequest detail;
  if (!GetDetail(status, &detail) || detail.field_violations().empty()) return "";
  return detail.field_violations(0).field();
}

std::string ReasonOfStatus(const grpc::Status& status) {
  google::rpc::ErrorInfo detail;
  return GetDetail(status, &detail) ? detail.reason() : "";
}

v1::GenerateResponse Concatenate(const std::vector<v1::GenerateEvent>& events) {
  v1::GenerateResponse response;
  for (const v1::GenerateEvent& event : events) AppendEvent(event, &response);
  return response;
}

TestServer::TestServer(TestServerOptions options) : engine_(options.engine) {
  ServerOptions server = options.server;
  server.listen = "127.0.0.1:0";
  if (server.model_name.empty()) server.model_name = "fake";
  if (server.metrics_listen == ServerOptions().metrics_listen) server.metrics_listen = "";
  ServerParts parts = {.card = engine_.card(), .executor = &engine_, .caches = &engine_.caches()};
  if (options.with_tokenizer) parts.tokenizer = std::make_shared<ByteTokenizer>();
  auto created = Server::CreateWithParts(server, parts);
  if (!created.ok()) {
    ADD_FAILURE() << created.status();
    std::abort();
  }
  server_ = *std::move(created);
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  channel_ = grpc::CreateCustomChannel(address(), grpc::InsecureChannelCredentials(), arguments);
}

TestServer::~TestServer() {
  engine_.AllowSteps(-1);
  engine_.set_step_time_us(0);
  server_.reset();
}

grpc::Status TestServer::Generate(const v1::GenerateRequest& request,
                                  v1::GenerateResponse* response) {
  grpc::ClientContext context;
  return inference()->Generate(&context, request, response);
}

grpc::Status TestServer::Stream(const v1::GenerateRequest& request,
                                std::vector<v1::GenerateEvent>* events) {
  grpc::ClientContext context;
  const auto stub = inference();
  const auto reader = stub->GenerateStream(&context, request);
  v1::GenerateEvent event;
  while (reader->Read(&event)) events->push_back(event);
  return reader->Finish();
}

grpc::Status TestServer::Score(const v1::ScoreRequest& request, v1::ScoreResponse* response) {
  grpc::ClientContext context;
  return inference()->Score(&context, request, response);
}

grpc::health::v1::HealthCheckResponse::ServingStatus TestServer::Health(
    const std::string& service) {
  grpc::ClientContext context;
  grpc::health::v1::HealthCheckRequest request;
  request.set_service(service);
  grpc::health::v1::HealthCheckResponse response;
  const auto stub = grpc::health::v1::Health::NewStub(channel_);
  if (!stub->Check(&context, request, &response).ok()) {
    return grpc::health::v1::HealthCheckResponse::SERVICE_UNKNOWN;
  }
  return response.status();
}

bool TestServer::ShutdownLeavesNoSlot() {
  server_->Shutdown();  // ends the engine thread, which owns the caches
  return engine_.caches().free_slots() == engine_.caches().geometry().num_slots;
}

v1::GenerateRequest SimpleRequest(int64_t max_tokens) {
  v1::GenerateRequest request;
  request.set_prompt("Hi");
  request.mutable_sampling()->set_seed(1);
  request.mutable_stopping()->set_max_tokens(max_tokens);
  return request;
}

}  // namespace godwit
