#pragma once
// One RPC in the grpc_server_* metrics.

#include <string_view>

#include "absl/status/status.h"
#include "server/clock.h"
#include "server/metrics.h"

namespace godwit {

struct RpcName {
  std::string_view service;         // "godwit.v1.Inference"
  std::string_view method;          // "Generate"
  std::string_view type = "unary";  // or "server_stream", "bidi_stream"
};

class RpcRecord {
 public:
  RpcRecord(Metrics& metrics, RpcName name) : metrics_(metrics), name_(name), begin_(SteadyNow()) {}
  TimeNs begin() const { return begin_; }
  // Once, with what the client is told.
  void Handled(absl::StatusCode code) {
    metrics_.OnHandled(name_.service, name_.method, name_.type, code, SteadyNow() - begin_);
  }

 private:
  Metrics& metrics_;
  RpcName name_;
  TimeNs begin_;
};

}  // namespace godwit
