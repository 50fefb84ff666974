#pragma once
// The reactors of Generate and GenerateStream.

#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include "server/service_context.h"

namespace godwit {

grpc::ServerUnaryReactor* StartGenerate(const ServiceContext& services,
                                        grpc::CallbackServerContext* context,
                                        const grpc::ByteBuffer* request,
                                        grpc::ByteBuffer* response);

grpc::ServerWriteReactor<grpc::ByteBuffer>* StartGenerateStream(
    const ServiceContext& services, grpc::CallbackServerContext* context,
    const grpc::ByteBuffer* request);

}  // namespace godwit
