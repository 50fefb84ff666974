#include "server/authenticator.h"

#include <grpcpp/server_context.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/state_file.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"
#include "server/status_mapping.h"

namespace godwit {
namespace {

constexpr absl::string_view kScheme = "bearer ";

std::string Padded(std::string_view token) {
  std::string padded(token);
  padded.resize(kMaxTokenBytes, '\0');
  return padded;
}

// All bytes are read, equal or not.
bool EqualInConstantTime(const std::string& a, const std::string& b) {
  unsigned difference = 0;
  for (size_t at = 0; at < kMaxTokenBytes; ++at) {
    difference |= static_cast<unsigned char>(a[at]) ^ static_cast<unsigned char>(b[at]);
  }
  return difference == 0;
}

absl::Status Unauthenticated(const char* message, const char* reason) {
  return WithErrorInfo(absl::UnauthenticatedError(message), reason);
}

absl::Status CheckTokenLine(const std::string& token, const std::string& where) {
  if (token.size() > kMaxTokenBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": token of ", token.size(), " bytes, at most ", kMaxTokenBytes));
  }
  if (!std::all_of(token.begin(), token.end(),
                   [](unsigned char c) { return absl::ascii_isgraph(c); })) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": a byte that is not visible ASCII"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Authenticator> Authenticator::FromFile(const std::string& path) {
  std::ifstream file(path);
  if (!file)
    return absl::InvalidArgumentError(
        absl::StrCat("token file ", path, ": ", std::strerror(errno)));
  Authenticator authenticator;
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    const std::string token(absl::StripAsciiWhitespace(line));
    if (token.empty() || token.front() == '#') continue;
    RETURN_IF_ERROR(CheckTokenLine(token, absl::StrCat("token file ", path, " line ", number)));
    authenticator.tokens_.push_back(Padded(token));
    if (authenticator.tokens_.size() > kMaxTokens) {
      return absl::InvalidArgumentError(
          absl::StrCat("token file ", path, ": more than ", kMaxTokens, " tokens"));
    }
  }
  if (authenticator.tokens_.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("token file ", path, ": has no token"));
  }
  return authenticator;
}

absl::Status Authenticator::Check(std::string_view authorization) const {
  if (!enabled()) return absl::OkStatus();
  if (authorization.empty()) return Unauthenticated("no authorization header", "TOKEN_MISSING");
  if (!absl::StartsWithIgnoreCase(absl::string_view(authorization.data(), authorization.size()),
                                  kScheme)) {
    return Unauthenticated("authorization is not \"Bearer TOKEN\"", "TOKEN_INVALID");
  }
  authorization.remove_prefix(kScheme.size());
  const bool fits = !authorization.empty() && authorization.size() <= kMaxTokenBytes;
  const std::string presented = Padded(fits ? authorization : std::string_view());
  bool known = false;
  for (const std::string& token : tokens_) known |= EqualInConstantTime(presented, token);
  if (known && fits) return absl::OkStatus();
  return Unauthenticated("unknown token", "TOKEN_INVALID");
}

absl::Status Authenticator::Check(const grpc::ServerContextBase& context) const {
  if (!enabled()) return absl::OkStatus();
  const auto& metadata = context.client_metadata();
  const auto header = metadata.find("authorization");
  if (header == metadata.end()) return Check(std::string_view());
  return Check(std::string_view(header->second.data(), header->second.size()));
}

std::string Authenticator::TenantOf(const grpc::ServerContextBase& context) const {
  if (!enabled()) return "public";
  const auto& metadata = context.client_metadata();
  const auto header = metadata.find("authorization");
  GODWIT_CHECK(header != metadata.end());
  const absl::string_view value(header->second.data(), header->second.size());
  return FingerprintText(absl::StrCat("tenant ", value.substr(kScheme.size())));
}

}  // namespace godwit
