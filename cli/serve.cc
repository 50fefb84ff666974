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
#include "engine/draft_policy.h"
#include "server/server.h"

namespace godwit::cli {
namespace {

struct ServeFlags {
  ModelFlags model;
  ServerOptions server;
  std::string speculation = "on", draft_policy = "throughput";
  double kv_gib = 0, swap_gib = 0;
  double session_gib = 1, session_disk_gib = 64, session_ttl_s = 3600;
  double max_wait_s = 30, drain_timeout_s = 30;
};

volatile std::sig_atomic_t g_num_signals = 0;  // SIGTERM or SIGINT: 1 drains, 2 exits at once

void OnSignal(int) {
  g_num_signals = g_num_signals + 1;
  if (g_num_signals >= 2) std::_Exit(kFailed);
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
  if (geometry.num_snapshots > 0) {
    absl::StrAppendFormat(&line, ", %d prefix states", geometry.num_snapshots);
  } else {
    absl::StrAppend(&line, ", no prefix cache: ",
                    options.engine.prefix_cache_bytes == 0 ? "--prefix-cache-bytes 0"
                                                           : "its memory holds no state");
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
  // CLI11 has checked it. off: --speculation off; a request may still turn it on.
  const std::optional<DraftPolicy> policy = ParseDraftPolicy(flags.draft_policy);
  flags.server.limits.draft_policy = policy.value_or(DraftPolicy::kThroughput);
  flags.server.limits.speculate = flags.speculation == "on" && policy.has_value();
  flags.server.engine.kv_bytes = Bytes(flags.kv_gib);
  flags.server.engine.deterministic = flags.model.deterministic;
  flags.server.engine.swap_bytes = Bytes(flags.swap_gib);
  flags.server.engine.store_bytes = Bytes(flags.session_gib);
  flags.server.sessions.disk_bytes = Bytes(flags.session_disk_gib);
  flags.server.sessions.ttl_ms = std::llround(flags.session_ttl_s * 1e3);
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
      ->check(CLI::IsMember({"fixed", "margin", "throughput", "specdecpp", "off"}));
  command
      .add_option("--draft-threshold", flags.server.limits.draft_threshold,
                  "margin, specdecpp: the probability of a rejection at which they stop")
      ->check(CLI::Range(0.0, 1.0));
  command
      .add_option("--max-draft-tokens", flags.server.limits.max_draft_tokens,
                  "proposed in a step, of a request that does not say")
      ->check(CLI::Range(1, kMaxDraftTokens));
}

void AddPrefixCacheFlags(CLI::App& command, ServerOptions& server) {
  server.engine.prefix_cache_bytes = kAutoPrefixCache;
  command
      .add_option("--prefix-cache-bytes", server.engine.prefix_cache_bytes,
                  "device memory for states of prompts that later ones start from; 0: none; -1: "
                  "128 MiB, on a GPU a 16th of what the weights leave")
      ->check(CLI::Range(kAutoPrefixCache, int64_t{1} << 50));
  command
      .add_option(
          "--prefix-cache-interval", server.prefix_cache.interval,
          "a state is kept every so many prompt tokens; 0: only at the end of a prompt, where "
          "it leaves an earlier one, and where requests say")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 31));
  command
      .add_option("--prefix-cache-min-tokens", server.prefix_cache.min_tokens,
                  "and where it saves so many over the one before it")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 31));
  command.add_flag("--prefix-cache-across-tenants", server.limits.share_prefixes,
                   "requests with different bearer tokens share prompts too");
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
      .add_option("--session-memory", flags.session_gib,
                  "GiB of host memory for states of idle sessions")
      ->check(CLI::Range(0.0, 1e5));
  command
      .add_option("--session-dir", flags.server.sessions.folder,
                  "folder for snapshots, and for idle sessions when memory is short")
      ->type_name("DIR");
  command.add_option("--session-disk", flags.session_disk_gib, "GiB of files there")
      ->check(CLI::Range(0.0, 1e6));
  command
      .add_option("--session-ttl", flags.session_ttl_s,
                  "seconds after which an idle session is deleted")
      ->check(CLI::Range(1.0, 1e9));
  command.add_option("--max-sessions", flags.server.sessions.max_sessions, "sessions at once")
      ->check(CLI::Range(1, 1 << 20));
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
  AddPrefixCacheFlags(*command, flags->server);
  command->callback([flags, &exit_code] { exit_code = RunServe(*flags); });
}

}  // namespace godwit::cli
