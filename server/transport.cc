#include "server/transport.h"

#include <grpcpp/resource_quota.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "kernels/base/status.h"

namespace godwit {
namespace {

absl::StatusOr<std::string> ReadPem(const char* what, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file)
    return absl::InvalidArgumentError(absl::StrCat(what, " ", path, ": ", std::strerror(errno)));
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (!absl::StrContains(text, "-----BEGIN ")) {
    return absl::InvalidArgumentError(absl::StrCat(what, " ", path, ": not a PEM file"));
  }
  return text;
}

bool IsLoopbackV4(absl::string_view host) {
  if (!absl::ConsumePrefix(&host, "127.")) return false;
  int num_dots = 0;
  for (const char c : host) {
    if (c == '.')
      ++num_dots;
    else if (c < '0' || c > '9')
      return false;  // 127.0.0.1.example.org
  }
  return num_dots == 2;
}

}  // namespace

absl::StatusOr<bool> IsLoopback(const std::string& address) {
  if (absl::StartsWith(address, "unix:")) return true;
  const size_t colon = address.rfind(':');
  int port = -1;
  const bool has_port = colon != std::string::npos &&
                        absl::SimpleAtoi(address.substr(colon + 1), &port) && port >= 0 &&
                        port <= 65535;
  const std::string host = has_port ? address.substr(0, colon) : "";
  const bool bracketed = absl::StartsWith(host, "[") && absl::EndsWith(host, "]");
  if (host.empty() || (absl::StrContains(host, ":") && !bracketed)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "listen address \"", address, "\" is not HOST:PORT, [IPV6]:PORT or unix:PATH"));
  }
  return host == "localhost" || host == "[::1]" || IsLoopbackV4(host);
}

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeCredentials(
    const ServerOptions& options) {
  ASSIGN_OR_RETURN(const bool is_loopback, IsLoopback(options.listen));
  const bool has_cert = !options.tls_cert_file.empty();
  if (has_cert != !options.tls_key_file.empty()) {
    return absl::InvalidArgumentError(
        "TLS needs a certificate file and a key file, not one of them");
  }
  if (!has_cert) {
    if (!options.tls_client_ca_file.empty()) {
      return absl::InvalidArgumentError("a client CA needs a TLS certificate and key");
    }
    if (!is_loopback && !options.insecure) {
      return absl::InvalidArgumentError(absl::StrCat(
          "listen address ", options.listen,
          " is not loopback: give a TLS certificate and key, or allow plaintext with --insecure"));
    }
    return grpc::InsecureServerCredentials();
  }
  const bool mutual = !options.tls_client_ca_file.empty();
  grpc::SslServerCredentialsOptions ssl(
      mutual ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
             : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE);
  grpc::SslServerCredentialsOptions::PemKeyCertPair pair;
  ASSIGN_OR_RETURN(pair.cert_chain, ReadPem("TLS certificate", options.tls_cert_file));
  ASSIGN_OR_RETURN(pair.private_key, ReadPem("TLS key", options.tls_key_file));
  ssl.pem_key_cert_pairs.push_back(std::move(pair));
  if (mutual) {
    ASSIGN_OR_RETURN(ssl.pem_root_certs, ReadPem("client CA", options.tls_client_ca_file));
  }
  return grpc::SslServerCredentials(ssl);
}

void ConfigureTransport(const ServerOptions& options, grpc::ServerBuilder& builder) {
  builder.SetMaxReceiveMessageSize(static_cast<int>(options.limits.max_message_bytes));
  grpc::ResourceQuota quota("godwit");
  quota.Resize(static_cast<size_t>(options.grpc_memory_bytes));
  builder.SetResourceQuota(quota);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT,
                             0);  // a port in use is an error, not a second server behind it
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, options.max_streams_per_connection);
  builder.AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, kMaxMetadataBytes);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, options.keepalive_ms);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                             kMinPingIntervalMs);
  // Clients come back through the load balancer; calls in flight finish on the old connection.
  builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_MS, options.max_connection_age_ms);
}

}  // namespace godwit
