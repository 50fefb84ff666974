#pragma once
// Bearer tokens. Every method of every service asks here first; grpc.health.v1 alone is open,
// because probes carry no token and its answer is only whether the server serves.

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace grpc {
class ServerContextBase;
}

namespace godwit {

inline constexpr size_t kMaxTokenBytes = 256;
inline constexpr size_t kMaxTokens = 1024;

class Authenticator {
 public:
  Authenticator() = default;  // everybody may

  // One token a line; empty lines and lines that begin with # are skipped. INVALID_ARGUMENT: none,
  // too long, too many, a byte that is not visible ASCII; the status of the file when it cannot be
  // read. Tokens are never part of a message.
  static absl::StatusOr<Authenticator> FromFile(const std::string& path);

  bool enabled() const { return !tokens_.empty(); }

  // UNAUTHENTICATED with a reason. `authorization` is the header's value. Takes the same time
  // wherever a token differs.
  absl::Status Check(std::string_view authorization) const;
  absl::Status Check(const grpc::ServerContextBase& context) const;
  // Whose sessions and snapshots a call that passed Check may see: a digest of its token, or
  // "public" where everybody may.
  std::string TenantOf(const grpc::ServerContextBase& context) const;

 private:
  std::vector<std::string> tokens_;  // each padded with zeros to kMaxTokenBytes
};

}  // namespace godwit
