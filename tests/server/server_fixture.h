#pragma once
// A real gRPC server on a free port over the fake engine, and clients for it.

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "godwit/v1/inference.grpc.pb.h"
#include "godwit/v1/models.grpc.pb.h"
#include "godwit/v1/tokenizer.grpc.pb.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "server/server.h"
#include "tests/server/fake_engine.h"

namespace godwit {

// No sleep for a time, but until `condition` holds; false after 20 s.
template <typename Condition>
bool Eventually(Condition condition) {
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > give_up) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

// The google.rpc.Status of the trailer holds this detail; copies it.
template <typename Detail>
bool GetDetail(const grpc::Status& status, Detail* detail) {
  google::rpc::Status rich;
  if (!rich.ParseFromString(status.error_details())) return false;
  for (const auto& any : rich.details()) {
    if (any.Is<Detail>()) return any.UnpackTo(detail);
  }
  return false;
}
// First violated field; "" when there is no BadRequest.
std::string ViolatedField(const grpc::Status& status);
// ErrorInfo.reason; "" when there is none.
std::string ReasonOfStatus(const grpc::Status& status);

// The unary answer that the events of a stream add up to.
v1::GenerateResponse Concatenate(const std::vector<v1::GenerateEvent>& events);

struct TestServerOptions {
  FakeEngineOptions engine;
  ServerOptions server;
  bool with_tokenizer = true;
};

class TestServer {
 public:
  TestServer() : TestServer(TestServerOptions()) {}
  explicit TestServer(TestServerOptions options);
  ~TestServer();

  FakeEngine& engine() { return engine_; }
  Server& server() { return *server_; }
  std::string address() const { return "127.0.0.1:" + std::to_string(server_->port()); }
  const std::shared_ptr<grpc::Channel>& channel() { return channel_; }
  std::unique_ptr<v1::Inference::Stub> inference() { return v1::Inference::NewStub(channel_); }

  grpc::Status Generate(const v1::GenerateRequest& request, v1::GenerateResponse* response);
  grpc::Status Stream(const v1::GenerateRequest& request, std::vector<v1::GenerateEvent>* events);
  grpc::Status Score(const v1::ScoreRequest& request, v1::ScoreResponse* response);
  // grpc.health.v1 Check; SERVICE_UNKNOWN when there is no such service.
  grpc::health::v1::HealthCheckResponse::ServingStatus Health(const std::string& service);

  // Shuts down; true when every slot came back.
  bool ShutdownLeavesNoSlot();

 private:
  FakeEngine engine_;
  std::unique_ptr<Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
};

// A request for `max_tokens` tokens after "Hi" with seed 1.
v1::GenerateRequest SimpleRequest(int64_t max_tokens);

}  // namespace godwit
