// `godwit serve`: the gRPC server.

#include <chrono>
#include <cmath>
#include <csignal>
#include <iostream>
#include <memory>
#include <thread>

#include "absl/strings/str_format.h"
#include "cli/command.h"
#include "cli/model_flags.h"
#include "server/server.h"

namespace godwit::cli {
namespace {

struct ServeFlags {
  ModelFlags model;
  ServerOptions server;
  std::string speculation = "on", draft_policy = "throughput";
  double kv_gib = 0, swap_gib = 0;
  double max_wait_s = 30, drain_timeout_s = 30;
};

volatile std::sig_atomic_t g_num_signals = 0;  // SIGTERM or SIGINT: 1 drains, 2 exits at once

void OnSignal(int) {
  g_num_signals = g_num_signals + 1;
  if (g_num_signals >= 2) std::_Exit(kFailed);
}

DraftPolicy ParseDraftPolicy(const std::string& policy) {  // CLI11 has checked it
  if (policy == "fixed") return DraftPolicy::kFixed;
  return policy == "margin" ? DraftPolicy::kMargin : DraftPolicy::kThroughput;
}

int64_t Bytes(double gib) { return static_cast<int64_t>(gib * 1024.0 * 1024.0 * 1024.0); }

// In one write: who waits for the line finds all of it.
void PrintReady(const Server& server, const ServerOptions& options) {
  const CacheGeometry& geometry = server.card().geometry;
  std::string line = absl::StrFormat(
      "godwit: serving %s (%.2f M parameters, %s: %s) on %s; %d sequences of %.2f MiB state",
      server.model_name(), static_cast<double>(server.card().num_parameters) / 1e6,
      server.card().backend, server.card().device,
      server.port() == 0 ? options.listen : absl::StrFormat("port %d", server.port()),
      geometry.num_slots, static_cast<double>(geometry.slot_bytes()) / (1024.0 * 1024.0));
  if (geometry.has_paged()) {
    absl::StrAppendFormat(&line, ", %d KV blocks of %d tokens", geometry.num_blocks, kPagedBlock);
  }
  if (server.card().max_draft_tokens > 0) {
    absl::StrAppendFormat(&line, ", draft model of %.2f M parameters",
                          static_cast<double>(server.card().draft_num_parameters) / 1e6);
  }
  if (server.metrics_port() != 0) {
    absl::StrAppendFormat(&line, "; /metrics on port %d", server.metrics_port());
  }
  std::cerr << line + "\n" << std::flush;
}

// Signals only set a flag; 50 ms is nothing beside a drain.
template <typename Condition>
void WaitForSignal(const Condition& or_until) {
  while (g_num_signals == 0 && !or_until()) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
}

int RunServe(ServeFlags flags) {
  flags.server.engine.model_folder = flags.model.model;
  flags.server.engine.config_json = ConfigOf(flags.model);
  if (flags.server.model_name.empty()) flags.server.model_name = flags.model.shape;
  flags.server.engine.rope_override = flags.model.rope;
  flags.server.engine.dtype = ParseDType(flags.model.dtype);
  flags.server.engine.draft_folder = flags.model.draft_model;
  flags.server.limits.draft_policy = ParseDraftPolicy(flags.draft_policy);
  flags.server.limits.speculate = flags.speculation == "on";
  flags.server.engine.kv_bytes = Bytes(flags.kv_gib);
  flags.server.engine.deterministic = flags.model.deterministic;
  flags.server.engine.swap_bytes = Bytes(flags.swap_gib);
  flags.server.backend = {flags.model.backend, flags.model.threads};
  flags.server.max_wait_ms = std::llround(flags.max_wait_s * 1e3);
  flags.server.drain_timeout_ms = std::llround(flags.drain_timeout_s * 1e3);
  std::signal(SIGTERM, OnSignal);
  std::signal(SIGINT, OnSignal);

  std::string notes;
  absl::StatusOr<std::unique_ptr<Server>> server = Server::Create(flags.server, &notes);
  if (!notes.empty()) std::cerr << notes << (notes.back() == '\n' ? "" : "\n");
  if (!server.ok()) {
    return Report(server.status(), absl::IsUnavailable(server.status()) ? kFailed : kCannotLoad);
  }
  PrintReady(**server, flags.server);
  WaitForSignal([&] { return (*server)->device_lost(); });
  const bool device_lost = (*server)->device_lost();
  if (device_lost) {
    // Clients and load balancers still learn the reason from it, rather than from a closed port.
    std::cerr << absl::StrFormat("godwit: the device is lost, answering UNAVAILABLE for %g s: %s\n",
                                 flags.drain_timeout_s, (*server)->device_lost_cause());
    const auto end =
        std::chrono::steady_clock::now() + std::chrono::milliseconds(flags.server.drain_timeout_ms);
    WaitForSignal([end] { return std::chrono::steady_clock::now() >= end; });
  } else {
    std::cerr << "godwit: draining" << std::endl;
  }
  (*server)->Shutdown();
  return device_lost ? kFailed : kDone;
}

void AddListenFlags(CLI::App& command, ServerOptions& options) {
  command.add_option("--listen", options.listen, "gRPC address; port 0: any free one")
      ->type_name("HOST:PORT");
  command.add_flag("--insecure", options.insecure,
                   "allow an address that is not loopback without TLS");
  command.add_option("--metrics-listen", options.metrics_listen, "Prometheus /metrics; \"\": none")
      ->type_name("HOST:PORT");
  command.add_flag("--reflection", options.reflection, "serve gRPC reflection");
  command.add_option("--tls-cert", options.tls_cert_file, "server certificate")->type_name("PEM");
  command.add_option("--tls-key", options.tls_key_file, "server key")->type_name("PEM");
  command
      .add_option("--tls-client-ca", options.tls_client_ca_file,
                  "demand client certificates (mTLS)")
      ->type_name("PEM");
  command.add_option("--token-file", options.token_file, "bearer tokens, one a line")
      ->type_name("FILE");
  command
      .add_option("--max-streams", options.max_streams_per_connection,
                  "concurrent calls per connection")
      ->check(CLI::Range(1, 1 << 20));
  command.add_option("--max-message-bytes", options.limits.max_message_bytes, "of one request")
      ->check(CLI::Range(int64_t{1024}, int64_t{1} << 31));
}

void AddSpeculationFlags(CLI::App& command, ServeFlags& flags) {
  AddDraftModelFlag(command, flags.model);
  command.add_option("--speculation", flags.speculation, "of requests that do not say")
      ->check(CLI::IsMember({"on", "off"}));
  command
      .add_option("--draft-policy", flags.draft_policy,
                  "how many drafts a step proposes, of a request that does not say")
      ->check(CLI::IsMember({"fixed", "margin", "throughput"}));
  command
      .add_option("--draft-threshold", flags.server.limits.draft_threshold,
                  "margin: the probability of a rejection at which it stops")
      ->check(CLI::Range(0.0, 1.0));
  command
      .add_option("--max-draft-tokens", flags.server.limits.max_draft_tokens,
                  "proposed in a step, of a request that does not say")
      ->check(CLI::Range(1, kMaxDraftTokens));
}

void AddCapacityFlags(CLI::App& command, ServeFlags& flags) {
  EngineOptions& engine = flags.server.engine;
  command
      .add_option("--max-sequences", engine.max_sequences,
                  "state slots: sequences that run at once; 0: 64, on a GPU up to 256, as many as "
                  "half of what the weights leave holds")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 20));
  command
      .add_option("--max-tokens-per-step", engine.max_tokens_per_step,
                  "decode tokens and prompt tokens of one step; 0: 2048, on a GPU 8192")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 20));
  command
      .add_option("--context-length", engine.context_length,
                  "limit of prompt + output in tokens; 0: the model's")
      ->check(CLI::Range(int64_t{0}, (int64_t{1} << 31) - 1));
  AddUnlimitedOutputFlag(command, engine.unlimited_output);
  command
      .add_option(
          "--kv-memory", flags.kv_gib,
          "GiB for KV blocks of softmax layers; 0: 1, or half of what is free if less; on a "
          "GPU all that is free")
      ->check(CLI::Range(0.0, 1e5));
  command
      .add_option("--swap-memory", flags.swap_gib,
                  "GiB of host memory for preempted sequences; 0: no preemption")
      ->check(CLI::Range(0.0, 1e5));
  command
      .add_option("--steps-in-flight", engine.max_steps_in_flight,
                  "1, or 2: plan a step while one runs; 0: 2 on a GPU, else 1")
      ->check(CLI::Range(0, kMaxStepsInFlight));
  command.add_option("--max-waiting", flags.server.max_waiting, "requests in the queue")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20));
  command
      .add_option("--max-waiting-tokens", flags.server.max_waiting_tokens,
                  "prompt tokens in the queue")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40));
  command
      .add_option("--max-wait", flags.max_wait_s,
                  "seconds; a request that waits longer runs before any priority")
      ->check(CLI::Range(0.0, 86'400.0));
  command
      .add_option("--drain-timeout", flags.drain_timeout_s,
                  "seconds that accepted requests may go on after SIGTERM")
      ->check(CLI::Range(0.0, 86'400.0));
  RequestLimits& limits = flags.server.limits;
  command
      .add_option("--default-max-tokens", limits.default_max_tokens,
                  "of a request that does not say")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 31));
  command.add_option("--max-tokens", limits.max_tokens, "cap per output; more is INVALID_ARGUMENT")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 31));
  command
      .add_option("--max-request-rope-factor", limits.max_rope_factor,
                  "requests may choose their own RoPE scaling up to this factor; 0: they may not")
      ->check(CLI::Range(0.0, 1e6));
  command.add_option("--max-n", limits.max_n, "cap of outputs per request")
      ->check(CLI::Range(1, 1024));
}

}  // namespace

void AddServeCommand(CLI::App& app, int& exit_code) {
  auto flags = std::make_shared<ServeFlags>();
  CLI::App* command =
      app.add_subcommand("serve", "Serve a model over gRPC until SIGTERM or Ctrl-C");
  AddModelOrShape(*command, flags->model);
  AddComputeFlags(*command, flags->model);
  command->add_option("--name", flags->server.model_name,
                      "name of the model for clients and metrics; default: the folder's");
  AddSpeculationFlags(*command, *flags);
  AddListenFlags(*command, flags->server);
  AddCapacityFlags(*command, *flags);
  command->callback([flags, &exit_code] { exit_code = RunServe(*flags); });
}

}  // namespace godwit::cli
