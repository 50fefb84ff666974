#include "cli/client.h"

#include <fstream>
#include <limits>
#include <sstream>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace godwit::cli {
namespace {

absl::StatusOr<std::string> ReadFile(const std::string& flag, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  if (!file || !(content << file.rdbuf())) {
    return absl::NotFoundError(absl::StrCat(flag, ": cannot read ", path));
  }
  return content.str();
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeCredentials(const ClientFlags& flags) {
  if (!flags.tls) {
    if (!flags.tls_ca.empty() || !flags.tls_cert.empty() || !flags.tls_key.empty()) {
      return absl::InvalidArgumentError("--tls-ca, --tls-cert and --tls-key need --tls");
    }
    return grpc::InsecureChannelCredentials();
  }
  grpc::SslCredentialsOptions options;
  if (!flags.tls_ca.empty()) {
    ASSIGN_OR_RETURN(options.pem_root_certs, ReadFile("--tls-ca", flags.tls_ca));
  }
  if (flags.tls_cert.empty() != flags.tls_key.empty()) {
    return absl::InvalidArgumentError("--tls-cert and --tls-key go together");
  }
  if (!flags.tls_cert.empty()) {
    ASSIGN_OR_RETURN(options.pem_cert_chain, ReadFile("--tls-cert", flags.tls_cert));
    ASSIGN_OR_RETURN(options.pem_private_key, ReadFile("--tls-key", flags.tls_key));
  }
  return grpc::SslCredentials(options);
}

const char* CodeName(grpc::StatusCode code) {
  static constexpr const char* kNames[] = {
      "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND",
      "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED",
      "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"};
  return code >= 0 && code <= 16 ? kNames[code] : "UNKNOWN";
}

}  // namespace

void AddClientFlags(CLI::App& command, ClientFlags& flags) {
  command.add_option("--server", flags.server, "where the server listens")->type_name("HOST:PORT");
  command.add_flag("--tls", flags.tls, "connect with TLS");
  command.add_option("--tls-ca", flags.tls_ca, "certificate authority; default: the system's")
      ->type_name("PEM");
  command.add_option("--tls-cert", flags.tls_cert, "client certificate (mTLS)")->type_name("PEM");
  command.add_option("--tls-key", flags.tls_key, "client key (mTLS)")->type_name("PEM");
  command.add_option("--token-file", flags.token_file, "file with the bearer token")
      ->type_name("FILE");
}

absl::StatusOr<Client> Connect(const ClientFlags& flags) {
  Client client;
  ASSIGN_OR_RETURN(auto credentials, MakeCredentials(flags));
  if (!flags.token_file.empty()) {
    ASSIGN_OR_RETURN(std::string content, ReadFile("--token-file", flags.token_file));
    client.token = std::string(absl::StripAsciiWhitespace(content.substr(0, content.find('\n'))));
    if (client.token.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("--token-file: the first line of ", flags.token_file, " is empty"));
    }
  }
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(std::numeric_limits<int>::max());
  client.channel = grpc::CreateCustomChannel(flags.server, credentials, arguments);
  return client;
}

std::string Describe(const grpc::Status& status) {
  return absl::StrCat(CodeName(status.error_code()), ": ", status.error_message());
}

}  // namespace godwit::cli
