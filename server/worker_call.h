#pragma once
// A unary method that waits for the engine or the disk: it runs on a worker, so that gRPC's threads
// stay free.

#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "server/rpc_record.h"
#include "server/service_context.h"
#include "server/status_mapping.h"
#include "server/wire_message.h"

namespace godwit {

// RESOURCE_EXHAUSTED when too many wait there.
inline absl::Status PostToWorkers(const ServiceContext& services, std::function<void()> work) {
  if (services.workers.Post(std::move(work))) return absl::OkStatus();
  return SubmitError(absl::ResourceExhaustedError("too many session calls wait"));
}

// handle: absl::Status(const std::string& tenant, const Request&, Answer*)
template <typename Request, typename Answer, typename Handle>
grpc::ServerUnaryReactor* AnswerOnWorker(const ServiceContext& services, RpcName name,
                                         grpc::CallbackServerContext* context,
                                         const grpc::ByteBuffer* bytes,
                                         grpc::ByteBuffer* answer_bytes, Handle handle) {
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  const auto record = std::make_shared<RpcRecord>(services.metrics, name);
  const auto end = [&services, context, reactor, record](const absl::Status& status) {
    if (!status.ok()) services.metrics.OnRejected(status);
    record->Handled(status.code());
    reactor->Finish(ToGrpcStatus(status, context));
  };
  Request request;
  absl::Status status = services.authenticator.Check(*context);
  if (status.ok()) status = ParseRequest(*bytes, &request);
  if (status.ok()) {
    status = PostToWorkers(services, [tenant = services.authenticator.TenantOf(*context),
                                      request = std::move(request), handle, end, answer_bytes] {
      Answer answer;
      const absl::Status handled = handle(tenant, request, &answer);
      if (handled.ok()) *answer_bytes = SerializeAnswer(answer);
      end(handled);
    });
  }
  if (!status.ok()) end(status);
  return reactor;
}

}  // namespace godwit
