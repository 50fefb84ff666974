#pragma once
// The gRPC services of godwit.v1. Requests are read from the wire by hand: wire_message.h says why.

#include <grpcpp/impl/service_type.h>

#include <memory>
#include <string>
#include <vector>

#include "server/service_context.h"

namespace godwit {

// `context` outlives the services.
std::unique_ptr<grpc::Service> NewInferenceService(const ServiceContext& context);
std::unique_ptr<grpc::Service> NewTokenizerService(const ServiceContext& context);
std::unique_ptr<grpc::Service> NewModelsService(const ServiceContext& context);
std::unique_ptr<grpc::Service> NewSessionsService(const ServiceContext& context);
// grpc.reflection.v1alpha and v1, about `service_names` and all they use. (gRPC's own knows v1alpha
// only, and asks for no token.)
std::vector<std::unique_ptr<grpc::Service>> NewReflectionServices(
    const ServiceContext& context, std::vector<std::string> service_names);

}  // namespace godwit
