#pragma once
// What the reactors of Generate, GenerateStream and Score have in common: from the bytes of a
// request to a RequestRun.

#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>

#include <functional>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/request_run.h"
#include "server/rpc_record.h"
#include "server/service_context.h"
#include "server/status_mapping.h"
#include "server/wire_message.h"

namespace godwit {

// Authenticates and parses. Request is a message type.
template <typename Request>
absl::StatusOr<Request> ReadRequest(const ServiceContext& services,
                                    const grpc::CallbackServerContext& context,
                                    const grpc::ByteBuffer& bytes) {
  absl::Status status = services.authenticator.Check(context);
  if (!status.ok()) return status;
  Request request;
  status = ParseRequest(bytes, &request);
  if (!status.ok()) return status;
  return request;
}

// Runs `work` here when the text is short, else on an intake thread. RESOURCE_EXHAUSTED when too
// many wait there.
absl::Status RunIntake(const ServiceContext& services, size_t num_text_bytes,
                       std::function<void()> work);

}  // namespace godwit
