#pragma once
// Addresses, credentials and connection settings of the gRPC listener.

#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server_builder.h>

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/server.h"

namespace godwit {

inline constexpr int kMaxMetadataBytes = 16 << 10;
inline constexpr int kKeepaliveTimeoutMs = 20'000;  // no answer to a ping: the connection is dead
inline constexpr int kMinPingIntervalMs = 10'000;   // clients that ping more often are sent away

// True for 127.0.0.0/8, [::1], localhost and unix:. INVALID_ARGUMENT when `address` is none of the
// forms in ServerOptions.
absl::StatusOr<bool> IsLoopback(const std::string& address);

// INVALID_ARGUMENT: an address that others can reach without TLS and without options.insecure;
// files that cannot be read.
absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeCredentials(
    const ServerOptions& options);

void ConfigureTransport(const ServerOptions& options, grpc::ServerBuilder& builder);

}  // namespace godwit
