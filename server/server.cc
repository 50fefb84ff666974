#include "server/server.h"

#include <grpcpp/ext/health_check_service_server_builder_option.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"
#include "scheduler/engine_loop.h"
#include "server/clock.h"
#include "server/server_impl.h"
#include "server/services.h"
#include "server/transport.h"

namespace godwit {
namespace {

constexpr const char* kServiceNames[] = {"godwit.v1.Inference", "godwit.v1.Tokenizer",
                                         "godwit.v1.Models", "godwit.v1.Sessions"};
constexpr const char* kLiveness = "liveness";

// After the engine has ended every request: time for slow clients to read what is left.
constexpr std::chrono::seconds kDeliveryGrace(5);
constexpr std::chrono::milliseconds kMonitorPeriod(500);
constexpr int kDeliveryThreads = 2;
constexpr int kIntakeThreads = 1;
constexpr size_t kMaxDeliveries = 1 << 20;  // each request is there once or twice
constexpr size_t kMaxIntake = 256;
constexpr int kWorkers = 4;
constexpr size_t kMaxWork = 4096;

absl::Status AtLeast(const char* option, int64_t value, int64_t min) {
  if (value >= min) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(option, " ", value, " is less than ", min));
}

SchedulerOptions MakeSchedulerOptions(const ServerOptions& options, const ModelCard& card) {
  return {.max_tokens_per_step = card.max_tokens_per_step,
          .max_waiting = options.max_waiting,
          .max_waiting_tokens = options.max_waiting_tokens,
          .max_wait = options.max_wait_ms * 1'000'000,
          .max_steps_in_flight = card.max_steps_in_flight,
          .prefix_cache = options.prefix_cache,
          .context_length = card.context_length,
          .may_drop_sessions = options.sessions.folder.empty()};
}

}  // namespace

absl::Status ValidateServerOptions(const ServerOptions& options) {
  const RequestLimits& limits = options.limits;
  RETURN_IF_ERROR(AtLeast("max_tokens", limits.max_tokens, 1));
  RETURN_IF_ERROR(AtLeast("default_max_tokens", limits.default_max_tokens, 1));
  RETURN_IF_ERROR(AtLeast("max_n", limits.max_n, 1));
  RETURN_IF_ERROR(AtLeast("max_sessions", options.sessions.max_sessions, 1));
  RETURN_IF_ERROR(AtLeast("session_ttl_ms", options.sessions.ttl_ms, 1000));
  RETURN_IF_ERROR(AtLeast("session_disk_bytes", options.sessions.disk_bytes, 0));
  if (!(limits.max_rope_factor == 0 || limits.max_rope_factor >= 1)) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_rope_factor ", limits.max_rope_factor, " is neither 0 nor >= 1"));
  }
  RETURN_IF_ERROR(AtLeast("max_prompt_bytes", limits.max_prompt_bytes, 1));
  RETURN_IF_ERROR(AtLeast("max_message_bytes", limits.max_message_bytes, 1024));
  RETURN_IF_ERROR(AtLeast("max_waiting", options.max_waiting, 1));
  RETURN_IF_ERROR(AtLeast("max_waiting_tokens", options.max_waiting_tokens, 1));
  RETURN_IF_ERROR(AtLeast("max_wait_ms", options.max_wait_ms, 1));
  RETURN_IF_ERROR(AtLeast("max_streams_per_connection", options.max_streams_per_connection, 1));
  RETURN_IF_ERROR(AtLeast("keepalive_ms", options.keepalive_ms, 1000));
  RETURN_IF_ERROR(AtLeast("max_connection_age_ms", options.max_connection_age_ms, 1000));
  RETURN_IF_ERROR(AtLeast("grpc_memory_bytes", options.grpc_memory_bytes, 16 << 20));
  RETURN_IF_ERROR(AtLeast("drain_timeout_ms", options.drain_timeout_ms, 0));
  RETURN_IF_ERROR(AtLeast("liveness_timeout_ms", options.liveness_timeout_ms, 2000));
  if (options.engine.max_tokens_per_step != 0) {
    RETURN_IF_ERROR(
        AtLeast("max_tokens_per_step", options.engine.max_tokens_per_step, kMinTokensPerStep));
  }
  if (limits.max_draft_tokens < 1 || limits.max_draft_tokens > kMaxDraftTokens) {
    return absl::InvalidArgumentError(absl::StrCat("max_draft_tokens ", limits.max_draft_tokens,
                                                   " not in [1, ", kMaxDraftTokens, "]"));
  }
  if (!(limits.draft_threshold >= 0 && limits.draft_threshold <= 1)) {
    return absl::InvalidArgumentError(
        absl::StrCat("draft_threshold ", limits.draft_threshold, " not in [0, 1]"));
  }
  if (limits.default_max_tokens > limits.max_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("default_max_tokens ", limits.default_max_tokens,
                                                   " is more than max_tokens ", limits.max_tokens));
  }
  if (limits.max_message_bytes > INT32_MAX) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_message_bytes ", limits.max_message_bytes, " is more than ", INT32_MAX));
  }
  return MakeCredentials(options).status();
}

Server::Impl::Impl(const ServerOptions& from, const ServerParts& parts, Authenticator checked)
    : options(from),
      model(options.model_name, parts.card, parts.tokenizer, options.limits),
      authenticator(std::move(checked)),
      metrics(options.model_name, parts.card),
      delivery(kDeliveryThreads, kMaxDeliveries),
      intake(kIntakeThreads, kMaxIntake),
      workers(kWorkers, kMaxWork),
      loop({.scheduler = MakeSchedulerOptions(options, parts.card),
            .on_step = [this](const StepReport& report) { metrics.OnStep(report); }},
           *parts.executor, *parts.caches),
      sessions(std::make_unique<SessionRegistry>(
          options.sessions,
          MakeStateLayout(parts.card, parts.model_fingerprint, parts.draft_fingerprint), loop,
          model)),
      context{model, authenticator, loop, registry, metrics, delivery, intake, workers, *sessions} {
  metrics.WatchLoop(&loop);
  metrics.WatchSessions(sessions.get());
}

Server::Impl::~Impl() { Shutdown(); }

absl::Status Server::Impl::Start() {
  ASSIGN_OR_RETURN(std::shared_ptr<grpc::ServerCredentials> credentials, MakeCredentials(options));
  RETURN_IF_ERROR(sessions->Start());
  services.push_back(NewInferenceService(context));
  services.push_back(NewTokenizerService(context));
  services.push_back(NewModelsService(context));
  services.push_back(NewSessionsService(context));
  if (options.reflection) {
    std::vector<std::string> names(std::begin(kServiceNames), std::end(kServiceNames));
    names.push_back("grpc.health.v1.Health");
    for (auto& service : NewReflectionServices(context, names))
      services.push_back(std::move(service));
  }
  grpc::EnableDefaultHealthCheckService(true);
  grpc::ServerBuilder builder;
  ConfigureTransport(options, builder);
  builder.AddListeningPort(options.listen, credentials, &port);
  for (const std::unique_ptr<grpc::Service>& service : services)
    builder.RegisterService(service.get());
  grpc_server = builder.BuildAndStart();
  const bool is_unix = options.listen.starts_with("unix:");
  if (grpc_server == nullptr || (port == 0 && !is_unix)) {
    return absl::UnavailableError(absl::StrCat(
        "cannot listen on ", options.listen,
        options.tls_cert_file.empty()
            ? ": address in use or not of this machine"
            : ": address in use or not of this machine, or certificate and key do not fit"));
  }
  if (is_unix) port = 0;
  if (!options.metrics_listen.empty()) {
    ASSIGN_OR_RETURN(metrics_port, metrics.Listen(options.metrics_listen));
  }
  SetServing(true);
  grpc_server->GetHealthCheckService()->SetServingStatus(kLiveness, true);
  monitor = std::thread([this] { Monitor(); });
  return absl::OkStatus();
}

void Server::Impl::SetServing(bool serving) {
  grpc::HealthCheckServiceInterface* health = grpc_server->GetHealthCheckService();
  health->SetServingStatus("", serving);
  for (const char* name : kServiceNames) health->SetServingStatus(name, serving);
}

// Keeps the health services true: ready, and alive.
void Server::Impl::Monitor() {
  std::unique_lock<std::mutex> lock(mutex);
  while (!stopping) {
    wake_monitor.wait_for(lock, kMonitorPeriod, [this] { return stopping; });
    if (stopping) return;
    const bool lost = loop.device_lost();
    const TimeNs silent = SteadyNow() - loop.last_heartbeat();
    const bool alive = !lost && silent < options.liveness_timeout_ms * 1'000'000;
    if (lost) SetServing(false);
    grpc_server->GetHealthCheckService()->SetServingStatus(kLiveness, alive);
  }
}

void Server::Impl::Shutdown() {
  std::lock_guard<std::mutex> once(shutdown_mutex);
  if (stopped) return;
  stopped = true;
  {
    std::lock_guard<std::mutex> lock(mutex);
    stopping = true;
  }
  wake_monitor.notify_all();
  if (monitor.joinable()) monitor.join();
  if (grpc_server != nullptr) {
    SetServing(false);
    loop.Drain(options.drain_timeout_ms * 1'000'000);
    grpc_server->Shutdown(std::chrono::system_clock::now() + kDeliveryGrace);
    grpc_server->Wait();
  }
  // No reactor is left, so nothing is posted any more.
  intake.Stop();
  workers.Stop();
  metrics.WatchSessions(nullptr);
  sessions.reset();
  loop.Stop();
  delivery.Stop();
  metrics.StopListening();
  metrics.WatchLoop(nullptr);
}

Server::Server(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Server::~Server() = default;

absl::StatusOr<std::unique_ptr<Server>> Server::CreateWithParts(const ServerOptions& options,
                                                                const ServerParts& parts) {
  RETURN_IF_ERROR(ValidateServerOptions(options));
  if (parts.card.max_draft_tokens > 0 && !parts.card.has_acceptance_head &&
      options.limits.draft_policy == DraftPolicy::kSpecDecPP) {
    return absl::FailedPreconditionError(
        absl::StrCat("draft policy specdecpp, but the draft model ", options.engine.draft_folder,
                     " has no acceptance head"));
  }
  GODWIT_CHECK(parts.executor != nullptr);
  GODWIT_CHECK(parts.caches != nullptr);
  Authenticator authenticator;
  if (!options.token_file.empty()) {
    ASSIGN_OR_RETURN(authenticator, Authenticator::FromFile(options.token_file));
  }
  ServerOptions named = options;
  if (named.model_name.empty()) named.model_name = "model";
  auto impl = std::make_unique<Impl>(named, parts, std::move(authenticator));
  RETURN_IF_ERROR(impl->Start());
  return std::unique_ptr<Server>(new Server(std::move(impl)));
}

void Server::Shutdown() { impl_->Shutdown(); }
int Server::port() const { return impl_->port; }
int Server::metrics_port() const { return impl_->metrics_port; }
const std::string& Server::model_name() const { return impl_->model.name(); }
const ModelCard& Server::card() const { return impl_->model.card(); }
std::string Server::device_lost_cause() const { return impl_->loop.device_lost_cause(); }
bool Server::device_lost() const { return impl_->loop.device_lost(); }

}  // namespace godwit
