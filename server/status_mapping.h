#pragma once
// The only place where an absl::Status becomes a grpc::Status. Details (google.rpc messages) travel
// as payloads of the absl::Status and leave in the trailer grpc-status-details-bin; docs/api.md
// lists them.

#include <grpcpp/support/status.h>

#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "scheduler/request.h"

namespace grpc {
class CallbackServerContext;
}

namespace godwit {

// After a full queue and while draining: when to try again.
inline constexpr std::chrono::milliseconds kQueueFullRetryDelay{1'000};
inline constexpr std::chrono::milliseconds kDrainingRetryDelay{5'000};

// INVALID_ARGUMENT with one BadRequest violation per (field, description); at least one.
using FieldViolations = std::vector<std::pair<std::string, std::string>>;
absl::Status InvalidFields(const FieldViolations& violations);
// UNIMPLEMENTED with the field as a BadRequest violation.
absl::Status UnimplementedField(std::string_view field);

// Attach a detail. ErrorInfo's domain is "godwit".
using ErrorMetadata = std::map<std::string, std::string>;
absl::Status WithErrorInfo(absl::Status status, std::string_view reason,
                           const ErrorMetadata& metadata = {});
absl::Status WithRetryDelay(absl::Status status, std::chrono::milliseconds delay);
absl::Status WithResource(absl::Status status, std::string_view type, std::string_view name);

// What EngineLoop::Submit refused, with details: the queue is full, draining, can never run.
absl::Status SubmitError(const absl::Status& status);
// What ended a request that had been accepted: the details say in which phase.
absl::Status RunError(const absl::Status& status, Phase phase);

// Name of a phase in details and metrics: "waiting", "prefilling", "decoding", "swapped",
// "finished".
std::string_view PhaseName(Phase phase);
// "INVALID_ARGUMENT"
std::string_view CodeName(absl::StatusCode code);
// ErrorInfo.reason, or the code's name in lower case where there is none: a label for metrics.
std::string ReasonOf(const absl::Status& status);

// INTERNAL and UNKNOWN become opaque: the client gets an id, the log gets id and text. With
// RetryInfo the trailer grpc-retry-pushback-ms is added to `context` (may be null).
grpc::Status ToGrpcStatus(const absl::Status& status, grpc::CallbackServerContext* context);

}  // namespace godwit
