// TLS, client certificates, bearer tokens, and what is refused before the server starts.

#include <google/protobuf/descriptor.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/security/credentials.h>

#include <condition_variable>
#include <mutex>

#include "server/authenticator.h"
#include "tests/server/server_fixture.h"
#include "tests/server/test_certificates.h"

namespace godwit {
namespace {

using grpc::StatusCode;

grpc::Status GenerateOver(const std::shared_ptr<grpc::ChannelCredentials>& credentials,
                          TestServer& server, const std::string& authorization = "") {
  const auto channel = grpc::CreateChannel(server.address(), credentials);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  if (!authorization.empty()) context.AddMetadata("authorization", authorization);
  v1::GenerateResponse response;
  return v1::Inference::NewStub(channel)->Generate(&context, SimpleRequest(2), &response);
}

std::shared_ptr<grpc::ChannelCredentials> Tls(const std::string& roots,
                                              const TestKeyPair& client = {}) {
  return grpc::SslCredentials({.pem_root_certs = roots,
                               .pem_private_key = client.key,
                               .pem_cert_chain = client.certificate});
}

class TlsTest : public testing::Test {
 protected:
  TestServerOptions Options() {
    TestServerOptions options;
    options.server.tls_cert_file = certificate_file_.path();
    options.server.tls_key_file = key_file_.path();
    return options;
  }
  const TestKeyPair authority_ = MakeAuthority("authority"), stranger_ = MakeAuthority("stranger");
  const TestKeyPair server_pair_ = MakeCertificate("server", authority_);
  const TestFile certificate_file_{server_pair_.certificate}, key_file_{server_pair_.key};
  const TestFile authority_file_{authority_.certificate};
};

TEST_F(TlsTest, ServesOverTlsOnly) {
  TestServer server(Options());
  const grpc::Status status = GenerateOver(Tls(authority_.certificate), server);
  EXPECT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(GenerateOver(Tls(stranger_.certificate), server).error_code(), StatusCode::UNAVAILABLE);
  EXPECT_EQ(GenerateOver(grpc::InsecureChannelCredentials(), server).error_code(),
            StatusCode::UNAVAILABLE);
}

TEST_F(TlsTest, ATlsClientAtAPlaintextPortIsRefused) {
  TestServer server;
  EXPECT_EQ(GenerateOver(Tls(authority_.certificate), server).error_code(),
            StatusCode::UNAVAILABLE);
}

TEST_F(TlsTest, MutualTlsWantsACertificateOfTheClientAuthority) {
  TestServerOptions options = Options();
  options.server.tls_client_ca_file = authority_file_.path();
  TestServer server(options);
  const TestKeyPair good = MakeCertificate("client", authority_),
                    bad = MakeCertificate("client", stranger_);
  const grpc::Status status = GenerateOver(Tls(authority_.certificate, good), server);
  EXPECT_TRUE(status.ok()) << status.error_message();
  EXPECT_FALSE(GenerateOver(Tls(authority_.certificate), server).ok());
  EXPECT_FALSE(GenerateOver(Tls(authority_.certificate, bad), server).ok());
}

class RefusedOptionsTest : public TlsTest {
 protected:
  absl::Status Create(const ServerOptions& options) {
    FakeEngine engine({});
    ServerParts parts = {.card = engine.card(), .executor = &engine, .caches = &engine.caches()};
    return Server::CreateWithParts(options, parts).status();
  }
  ServerOptions Base() {
    ServerOptions options;
    options.listen = "127.0.0.1:0";
    options.metrics_listen = "";
    return options;
  }
};

TEST_F(RefusedOptionsTest, PlaintextForOthersNeedsInsecure) {
  for (const char* address :
       {"0.0.0.0:0", "[::]:0", "192.168.1.1:80", "example.org:1", "127.0.0.1.example.org:1"}) {
    ServerOptions options = Base();
    options.listen = address;
    const absl::Status status = Create(options);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << address;
    EXPECT_NE(status.message().find("--insecure"), std::string::npos) << status;
  }
  ServerOptions options = Base();
  options.listen = "0.0.0.0:0";
  options.insecure = true;
  EXPECT_TRUE(Create(options).ok());
}

TEST_F(RefusedOptionsTest, AddressesAreChecked) {
  for (const char* address :
       {"", "50051", "localhost", "localhost:", ":1", "localhost:70000", "::1:50051", "a:-1"}) {
    ServerOptions options = Base();
    options.listen = address;
    EXPECT_EQ(Create(options).code(), absl::StatusCode::kInvalidArgument) << address;
  }
}

TEST_F(RefusedOptionsTest, TlsFilesAreChecked) {
  ServerOptions options = Base();
  options.tls_cert_file = certificate_file_.path();
  EXPECT_EQ(Create(options).code(), absl::StatusCode::kInvalidArgument);  // no key
  options.tls_key_file = "/nonexistent";
  EXPECT_NE(Create(options).message().find("/nonexistent"), std::string::npos);
  const TestFile garbage("hello");
  options.tls_key_file = garbage.path();
  EXPECT_NE(Create(options).message().find("PEM"), std::string::npos);
  options = Base();
  options.tls_client_ca_file = authority_file_.path();
  EXPECT_EQ(Create(options).code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(RefusedOptionsTest, APortInUseIsToldAtOnce) {
  TestServer first;
  ServerOptions options = Base();
  options.listen = first.address();
  const absl::Status status = Create(options);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_NE(status.message().find(first.address()), std::string::npos);
}

TEST_F(RefusedOptionsTest, NumbersAreChecked) {
  const std::vector<std::function<void(ServerOptions&)>> spoilers = {
      [](auto& o) { o.limits.max_tokens = 0; },
      [](auto& o) { o.limits.default_max_tokens = 1 << 30; },
      [](auto& o) { o.limits.max_n = 0; },
      [](auto& o) { o.limits.max_message_bytes = int64_t{1} << 40; },
      [](auto& o) { o.max_waiting = 0; },
      [](auto& o) { o.drain_timeout_ms = -1; },
      [](auto& o) { o.engine.max_tokens_per_step = 1; },
      [](auto& o) { o.max_streams_per_connection = 0; },
  };
  for (const auto& spoil : spoilers) {
    ServerOptions options = Base();
    spoil(options);
    EXPECT_EQ(Create(options).code(), absl::StatusCode::kInvalidArgument);
  }
}

TEST(AuthenticatorTest, TakesOneTokenALine) {
  const TestFile file("# keys\n\nalpha\n  beta  \r\n");
  const auto authenticator = Authenticator::FromFile(file.path());
  ASSERT_TRUE(authenticator.ok()) << authenticator.status();
  EXPECT_TRUE(authenticator->Check("Bearer alpha").ok());
  EXPECT_TRUE(authenticator->Check("bearer beta").ok());
  // Every prefix, an extension, other schemes.
  for (const char* wrong :
       {"", "Bearer ", "Bearer a", "Bearer al", "Bearer alp", "Bearer alph", "Bearer alphaa",
        "Bearer # keys", "Basic alpha", "alpha", "Bearer ALPHA"}) {
    EXPECT_EQ(authenticator->Check(wrong).code(), absl::StatusCode::kUnauthenticated) << wrong;
  }
  EXPECT_FALSE(authenticator->Check("Bearer " + std::string(300, 'a')).ok());
}

TEST(AuthenticatorTest, RefusesBadFilesWithoutShowingTokens) {
  EXPECT_FALSE(Authenticator::FromFile("/nonexistent").ok());
  EXPECT_FALSE(Authenticator::FromFile(TestFile("# none\n").path()).ok());
  const TestFile spaced("two words\n"), longer(std::string(257, 'x'));
  for (const TestFile* file : {&spaced, &longer}) {
    const absl::Status status = Authenticator::FromFile(file->path()).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message().find("words"), std::string::npos);
    EXPECT_NE(status.message().find("line 1"), std::string::npos);
  }
}

// Calls `method` of a streaming or unary RPC with no message and gives its status.
grpc::Status CallAnyMethod(TestServer& server, const std::string& method,
                           const std::string& authorization) {
  grpc::GenericStub stub(server.channel());
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  if (!authorization.empty()) context.AddMetadata("authorization", authorization);
  grpc::CompletionQueue queue;
  const auto call = stub.PrepareCall(&context, method, &queue);
  void* tag = nullptr;
  bool ok = false;
  call->StartCall(nullptr);
  queue.Next(&tag, &ok);
  grpc::Slice empty;
  call->WriteLast(grpc::ByteBuffer(&empty, 1), grpc::WriteOptions(), nullptr);
  queue.Next(&tag, &ok);
  grpc::ByteBuffer response;
  do {
    call->Read(&response, nullptr);
    queue.Next(&tag, &ok);
  } while (ok);
  grpc::Status status;
  call->Finish(&status, nullptr);
  queue.Next(&tag, &ok);
  return status;
}

TEST(TokenAuthTest, EveryMethodOfEveryServiceButHealthWantsAToken) {
  const TestFile file("secret\n");
  TestServerOptions options;
  options.server.token_file = file.path();
  options.server.reflection = true;
  TestServer server(options);
  const auto& pool = *google::protobuf::DescriptorPool::generated_pool();
  int num_methods = 0;
  for (const char* name :
       {"godwit.v1.Inference", "godwit.v1.Tokenizer", "godwit.v1.Models",
        "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"}) {
    const auto* service = pool.FindServiceByName(name);
    ASSERT_NE(service, nullptr) << name;
    for (int at = 0; at < service->method_count(); ++at, ++num_methods) {
      const std::string method = std::string("/") + name + "/" + service->method(at)->name();
      SCOPED_TRACE(method);
      const grpc::Status none = CallAnyMethod(server, method, "");
      EXPECT_EQ(none.error_code(), StatusCode::UNAUTHENTICATED);
      EXPECT_EQ(ReasonOfStatus(none), "TOKEN_MISSING");
      const grpc::Status wrong = CallAnyMethod(server, method, "Bearer secre");
      EXPECT_EQ(wrong.error_code(), StatusCode::UNAUTHENTICATED);
      EXPECT_EQ(ReasonOfStatus(wrong), "TOKEN_INVALID");
      EXPECT_NE(CallAnyMethod(server, method, "Bearer secret").error_code(),
                StatusCode::UNAUTHENTICATED);
    }
  }
  EXPECT_EQ(num_methods, 9);
  EXPECT_EQ(server.Health(""), grpc::health::v1::HealthCheckResponse::SERVING);
}

TEST_F(TlsTest, TokensAndTlsTogether) {
  const TestFile tokens("secret\n");
  TestServerOptions options = Options();
  options.server.token_file = tokens.path();
  TestServer server(options);
  EXPECT_TRUE(GenerateOver(Tls(authority_.certificate), server, "Bearer secret").ok());
  EXPECT_EQ(GenerateOver(Tls(authority_.certificate), server).error_code(),
            StatusCode::UNAUTHENTICATED);
}

}  // namespace
}  // namespace godwit
