#pragma once
// The gRPC server of one model: wires tokenizer, engine, engine loop, services, health and metrics.

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "engine/backend_loader.h"
#include "engine/engine.h"
#include "scheduler/prefix_cache.h"
#include "server/limits.h"
#include "server/session_limits.h"
#include "tokenizer/tokenizer.h"

namespace godwit {

struct ServerOptions {
  // The model and its memory. engine.model_folder is required.
  EngineOptions engine;
  BackendChoice backend;
  std::string model_name;  // as clients and metrics name it; "": last component of the folder

  RequestLimits limits;
  SessionLimits sessions;

  // The queue. More waiting requests, or more prompt tokens in them, are RESOURCE_EXHAUSTED.
  int64_t max_waiting = 256;
  int64_t max_waiting_tokens = 1 << 20;
  int64_t max_wait_ms = 30'000;  // a request that waits longer runs before any priority

  // Where states of prompts are kept, with engine.prefix_cache_bytes.
  PrefixCachePolicy prefix_cache;

  // gRPC. HOST:PORT, [IPV6]:PORT or unix:PATH; port 0: any free one, see Server::port().
  std::string listen = "127.0.0.1:50051";
  bool insecure = false;    // allow an address that is not loopback without TLS
  bool reflection = false;  // grpc.reflection.v1 and v1alpha

  // TLS: PEM files, both or none. With a client CA, clients must show a certificate it signed
  // (mTLS).
  std::string tls_cert_file;
  std::string tls_key_file;
  std::string tls_client_ca_file;
  // Bearer tokens, one a line (1 to 256 bytes; empty lines and lines that begin with # are
  // skipped). Then every method but grpc.health.v1 needs "authorization: Bearer TOKEN".
  std::string token_file;

  int max_streams_per_connection = 256;
  int keepalive_ms = 60'000;  // ping of a connection that is silent for so long
  int max_connection_age_ms =
      30 * 60'000;  // then the client is told to reconnect; calls in flight go on
  int64_t grpc_memory_bytes = 1 << 30;  // resource quota of gRPC's own buffers

  // Prometheus, plain HTTP on GET /metrics. HOST:PORT; port 0: any free one; "": no metrics port.
  std::string metrics_listen = "127.0.0.1:9464";

  int64_t drain_timeout_ms = 30'000;  // Shutdown waits so long for accepted requests
  int64_t liveness_timeout_ms =
      60'000;  // engine thread silent for so long: "liveness" is NOT_SERVING
};

// What Create() loads. Tests put a fake in its place; `model_folder` and `backend` are then unused.
struct ServerParts {
  ModelCard card;
  StepExecutor* executor = nullptr;            // outlives the server
  CacheManager* caches = nullptr;              // outlives the server
  std::shared_ptr<const Tokenizer> tokenizer;  // null: token ids only
  std::string model_fingerprint, draft_fingerprint;  // StateLayout's
};

class Server {
 public:
  // Loads the model and starts to serve; when it returns OK, health is SERVING. INVALID_ARGUMENT:
  // an option (named, with the reason); the status of the engine when the model or the back end
  // cannot be loaded; UNAVAILABLE: an address is in use.
  // `*notes` receives lines for the operator (no GPU and why, no tokenizer).
  static absl::StatusOr<std::unique_ptr<Server>> Create(const ServerOptions& options,
                                                        std::string* notes);
  static absl::StatusOr<std::unique_ptr<Server>> CreateWithParts(const ServerOptions& options,
                                                                 const ServerParts& parts);
  ~Server();  // Shutdown()

  // Health becomes NOT_SERVING and new requests are UNAVAILABLE; accepted ones run until they end
  // or drain_timeout_ms is over (then they end with UNAVAILABLE); then the server stops. Any
  // thread, any number of times; returns when all is stopped.
  void Shutdown();

  int port() const;          // of the gRPC listener; 0 for unix:
  int metrics_port() const;  // 0 without one
  const std::string& model_name() const;
  const ModelCard& card() const;
  // The device is lost: health is NOT_SERVING and every request ends with UNAVAILABLE. Shut down
  // and exit with an error.
  bool device_lost() const;
  std::string device_lost_cause() const;  // for the operator; "" while it is not

 private:
  struct Impl;
  explicit Server(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace godwit
