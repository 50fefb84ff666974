// `godwit health`: is a server SERVING? The health check of the container image.

#include <chrono>
#include <iostream>

#include "cli/client.h"
#include "cli/command.h"
#include "grpc/health/v1/health.grpc.pb.h"

namespace godwit::cli {
namespace {

struct HealthFlags {
  ClientFlags client;
  std::string service;
  double timeout_s = 3;
};

int RunHealth(const HealthFlags& flags) {
  absl::StatusOr<Client> client = Connect(flags.client);
  if (!client.ok()) return Report(client.status(), kUsage);
  grpc::ClientContext context;
  client->Prepare(context);
  context.set_deadline(std::chrono::system_clock::now() +
                       std::chrono::milliseconds(static_cast<int64_t>(flags.timeout_s * 1e3)));
  grpc::health::v1::HealthCheckRequest request;
  request.set_service(flags.service);
  grpc::health::v1::HealthCheckResponse response;
  const grpc::Status status =
      grpc::health::v1::Health::NewStub(client->channel)->Check(&context, request, &response);
  if (!status.ok()) {
    std::cerr << "godwit: " << Describe(status) << "\n";
    return kFailed;
  }
  std::cout << grpc::health::v1::HealthCheckResponse::ServingStatus_Name(response.status()) << "\n";
  return response.status() == grpc::health::v1::HealthCheckResponse::SERVING ? kDone : kFailed;
}

}  // namespace

void AddHealthCommand(CLI::App& app, int& exit_code) {
  auto flags = std::make_shared<HealthFlags>();
  CLI::App* command = app.add_subcommand("health", "Ask a server whether it is SERVING (exit 0)");
  AddClientFlags(*command, flags->client);
  command->add_option("--service", flags->service, "\"\": the whole server; \"liveness\"; or a service");
  command->add_option("--timeout", flags->timeout_s, "seconds")->check(CLI::Range(0.001, 3600.0));
  command->callback([flags, &exit_code] { exit_code = RunHealth(*flags); });
}

}  // namespace godwit::cli
