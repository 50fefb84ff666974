#pragma once
// The reactor of Score.

#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include "server/service_context.h"

namespace godwit {

grpc::ServerUnaryReactor* StartScore(const ServiceContext& services,
                                     grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request, grpc::ByteBuffer* response);

}  // namespace godwit
