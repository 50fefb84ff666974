#pragma once
// Connecting to a server: flags shared by complete, health and bench serve.

#include <CLI/CLI.hpp>
#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace godwit::cli {

struct ClientFlags {
  std::string server = "127.0.0.1:50051";
  bool tls = false;
  std::string tls_ca, tls_cert, tls_key;  // PEM files
  std::string token_file;                 // bearer token, first line
};

void AddClientFlags(CLI::App& command, ClientFlags& flags);

// A channel and what every call needs. Thread-safe.
struct Client {
  std::shared_ptr<grpc::Channel> channel;
  std::string token;

  void Prepare(grpc::ClientContext& context) const {
    if (!token.empty()) context.AddMetadata("authorization", "Bearer " + token);
  }
};

// INVALID_ARGUMENT / NOT_FOUND name the file. Does not connect yet.
absl::StatusOr<Client> Connect(const ClientFlags& flags);

// "RESOURCE_EXHAUSTED: queue is full (256 requests)"
std::string Describe(const grpc::Status& status);

}  // namespace godwit::cli
