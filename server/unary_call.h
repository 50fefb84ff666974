#pragma once
// A unary method that is answered at once, on gRPC's thread: authenticate, parse, handle, answer.

#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include "absl/status/status.h"
#include "server/rpc_record.h"
#include "server/service_context.h"
#include "server/status_mapping.h"
#include "server/wire_message.h"

namespace godwit {

// handle: absl::Status(const Request&, Answer*)
template <typename Request, typename Answer, typename Handle>
grpc::ServerUnaryReactor* AnswerAtOnce(const ServiceContext& services, RpcName name,
                                       grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* bytes,
                                       grpc::ByteBuffer* answer_bytes, Handle handle) {
  RpcRecord record(services.metrics, name);
  Request request;
  Answer answer;
  absl::Status status = services.authenticator.Check(*context);
  if (status.ok()) status = ParseRequest(*bytes, &request);
  if (status.ok()) status = handle(request, &answer);
  if (status.ok()) *answer_bytes = SerializeAnswer(answer);
  if (!status.ok()) services.metrics.OnRejected(status);
  record.Handled(status.code());
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status, context));
  return reactor;
}

}  // namespace godwit
