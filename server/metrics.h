#pragma once
// Prometheus metrics: vLLM's names, types and the label model_name, with the prefix godwit_ and
// finer inter-token buckets; grpc_server_* as go-grpc-prometheus names them. docs/operations.md
// lists them. Thread-safe.
//
// Where it differs from vLLM: iteration_tokens (there iteration_tokens_total, a name that promtool
// refuses for a histogram), and all that begins with state_, step_ or request_rejected.

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "scheduler/engine_loop.h"
#include "scheduler/request.h"

namespace godwit {

class SessionRegistry;

// A request that ended, accepted before.
struct RequestStats {
  int64_t num_prompt_tokens = 0;
  int64_t num_output_tokens = 0;  // of all outputs
  int64_t max_tokens = 0;         // 0: Score
  int32_t num_outputs = 1;
  RequestTimings timings;
  absl::Status status;
  Phase phase = Phase::kFinished;  // where an error happened
};

class Metrics {
 public:
  Metrics(const std::string& model_name, const ModelCard& card);
  ~Metrics();

  // Engine thread, once a step.
  void OnStep(const StepReport& report);
  // Gauges and totals are read from `loop` at each scrape; null before it is destroyed.
  void WatchLoop(const EngineLoop* loop);
  void WatchSessions(const SessionRegistry* sessions);

  void OnFirstToken(TimeNs since_arrival);
  void OnInterTokenGap(TimeNs gap);
  void OnOutputFinished(FinishReason reason);
  void OnRequestEnded(const RequestStats& stats);
  // Refused before it was accepted.
  void OnRejected(const absl::Status& status);
  // service "godwit.v1.Inference", method "Generate", type "unary" or "server_stream".
  void OnHandled(std::string_view service, std::string_view method, std::string_view type,
                 absl::StatusCode code, TimeNs duration);

  // The page that /metrics answers.
  std::string Text() const;

  // Serves Text() on HOST:PORT (port 0: any); returns the port. UNAVAILABLE: the address cannot be
  // had.
  absl::StatusOr<int> Listen(const std::string& address);
  void StopListening();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace godwit
