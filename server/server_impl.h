#pragma once
// What a Server owns. Members are destroyed in reverse order, after Shutdown().

#include <grpcpp/impl/service_type.h>
#include <grpcpp/server.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "scheduler/engine_loop.h"
#include "server/authenticator.h"
#include "server/metrics.h"
#include "server/request_registry.h"
#include "server/served_model.h"
#include "server/server.h"
#include "server/service_context.h"
#include "server/session_registry.h"
#include "server/work_queue.h"

namespace godwit {

// INVALID_ARGUMENT naming the option. Reads the TLS files too, so that a wrong path costs no model
// load.
absl::Status ValidateServerOptions(const ServerOptions& options);

struct Server::Impl {
  Impl(const ServerOptions& options, const ServerParts& parts, Authenticator authenticator);
  ~Impl();

  absl::Status Start();
  void Shutdown();
  void SetServing(bool serving);
  void Monitor();

  const ServerOptions options;
  std::unique_ptr<Engine> engine;  // when Create() loaded it
  ServedModel model;
  Authenticator authenticator;
  Metrics metrics;
  RequestRegistry registry;
  WorkQueue delivery, intake, workers;
  EngineLoop loop;
  std::unique_ptr<SessionRegistry> sessions;
  ServiceContext context;
  std::vector<std::unique_ptr<grpc::Service>> services;
  std::unique_ptr<grpc::Server> grpc_server;
  int port = 0, metrics_port = 0;

  std::mutex shutdown_mutex;  // guards stopped; held during Shutdown
  bool stopped = false;
  std::mutex mutex;  // guards stopping
  std::condition_variable wake_monitor;
  bool stopping = false;
  std::thread monitor;
};

}  // namespace godwit
