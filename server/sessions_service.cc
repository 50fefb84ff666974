#include <fcntl.h>
#include <unistd.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "godwit/v1/sessions.grpc.pb.h"
#include "kernels/base/status.h"
#include "server/services.h"
#include "server/session_registry.h"
#include "server/worker_call.h"

namespace godwit {
namespace {

constexpr int64_t kChunkBytes = 1 << 20;

template <typename T>
std::optional<int64_t> Ttl(const T& request) {
  return request.has_ttl_ms() ? std::optional<int64_t>(request.ttl_ms()) : std::nullopt;
}

template <typename T>
std::optional<int64_t> ExpectedPosition(const T& request) {
  return request.has_expected_position() ? std::optional<int64_t>(request.expected_position())
                                         : std::nullopt;
}

void Encode(const SessionView& view, v1::Session* session) {
  session->set_session_id(view.id);
  session->set_state_position(view.position);
  session->set_has_pending_token(view.pending_token >= 0);
  session->set_idle_ms(view.idle_ms);
  session->set_ttl_ms(view.ttl_ms);
  session->set_busy(view.busy);
  if (view.position == 0) return;
  session->set_location(view.on_disk ? v1::Session::LOCATION_DISK : v1::Session::LOCATION_MEMORY);
}

void Encode(const SessionFiles::Snapshot& view, v1::Snapshot* snapshot) {
  snapshot->set_name(view.name);
  snapshot->set_num_bytes(view.num_bytes);
  snapshot->set_state_position(view.position);
}

// The file of a snapshot, a chunk at a time. It stays whole when it is replaced meanwhile: the open
// file is the old one.
class ExportReactor final : public grpc::ServerWriteReactor<grpc::ByteBuffer> {
 public:
  ExportReactor(const ServiceContext& services, grpc::CallbackServerContext* context)
      : services_(services),
        context_(context),
        record_(services.metrics, {"godwit.v1.Sessions", "ExportSnapshot", "server_stream"}) {}
  ~ExportReactor() override {
    if (fd_ >= 0) close(fd_);
  }

  void Start(const grpc::ByteBuffer& bytes) {
    v1::ExportSnapshotRequest request;
    absl::Status status = services_.authenticator.Check(*context_);
    if (status.ok()) status = ParseRequest(bytes, &request);
    if (status.ok()) {
      const auto path = services_.sessions.files().Path(services_.authenticator.TenantOf(*context_),
                                                        request.name());
      status = path.status();
      if (path.ok()) fd_ = open(path->c_str(), O_RDONLY | O_CLOEXEC);
      if (path.ok() && fd_ < 0) {
        status = absl::NotFoundError(absl::StrCat("there is no snapshot ", request.name()));
      }
    }
    if (status.ok()) status = PostToWorkers(services_, [this] { WriteNext(); });
    if (!status.ok()) End(status);
  }

  void OnWriteDone(bool ok) override {
    if (!ok) return End(absl::CancelledError("the client is gone"));
    const absl::Status status = PostToWorkers(services_, [this] { WriteNext(); });
    if (!status.ok()) End(status);
  }
  void OnDone() override { delete this; }

 private:
  void WriteNext() {
    v1::SnapshotChunk chunk;
    std::string& data = *chunk.mutable_data();
    data.resize(kChunkBytes);
    const ssize_t count = read(fd_, data.data(), data.size());
    if (count < 0) return End(absl::InternalError("a snapshot cannot be read"));
    if (count == 0) return End(absl::OkStatus());
    data.resize(static_cast<size_t>(count));
    current_ = SerializeAnswer(chunk);
    StartWrite(&current_);
  }
  void End(const absl::Status& status) {
    if (!status.ok()) services_.metrics.OnRejected(status);
    record_.Handled(status.code());
    Finish(ToGrpcStatus(status, context_));
  }

  const ServiceContext& services_;
  grpc::CallbackServerContext* const context_;
  RpcRecord record_;
  int fd_ = -1;
  grpc::ByteBuffer current_;  // being written
};

// Receives a file beside the snapshots; it becomes one when all of it is there and right.
class ImportReactor final : public grpc::ServerReadReactor<grpc::ByteBuffer> {
 public:
  ImportReactor(const ServiceContext& services, grpc::CallbackServerContext* context,
                grpc::ByteBuffer* answer)
      : services_(services),
        context_(context),
        answer_(answer),
        record_(services.metrics, {"godwit.v1.Sessions", "ImportSnapshot", "client_stream"}) {}
  ~ImportReactor() override {
    if (fd_ >= 0) close(fd_);
    if (!path_.empty()) unlink(path_.c_str());
  }

  void Start() {
    const absl::Status status = Open();
    if (!status.ok()) return End(status);
    StartRead(&current_);
  }

  void OnReadDone(bool ok) override {
    const absl::Status status =
        PostToWorkers(services_, ok ? std::function<void()>([this] { Take(); })
                                    : std::function<void()>([this] { Complete(); }));
    if (!status.ok()) End(status);
  }
  void OnDone() override { delete this; }

 private:
  absl::Status Open() {
    RETURN_IF_ERROR(services_.authenticator.Check(*context_));
    tenant_ = services_.authenticator.TenantOf(*context_);
    ASSIGN_OR_RETURN(path_, services_.sessions.files().ImportPath());
    fd_ = open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd_ < 0) return absl::InternalError("the session folder cannot be written to");
    max_bytes_ = services_.sessions.files().free_bytes();
    return absl::OkStatus();
  }
  void Take() {
    const absl::Status status = Append();
    if (!status.ok()) return End(status);
    StartRead(&current_);
  }
  absl::Status Append() {
    v1::ImportSnapshotRequest request;
    RETURN_IF_ERROR(ParseRequest(current_, &request));
    if (!named_) {
      RETURN_IF_ERROR(SessionFiles::CheckName(request.name()));
      name_ = request.name();
      named_ = true;
    } else if (!request.name().empty() && request.name() != name_) {
      return InvalidFields({{"name", "is not that of the first message"}});
    }
    num_bytes_ += std::ssize(request.data());
    if (num_bytes_ > max_bytes_) {
      return absl::ResourceExhaustedError(
          absl::StrCat("more than the ", max_bytes_, " bytes that are free for snapshots"));
    }
    for (size_t at = 0; at < request.data().size();) {
      const ssize_t count = write(fd_, request.data().data() + at, request.data().size() - at);
      if (count < 0) return absl::ResourceExhaustedError("the session folder cannot be written to");
      at += static_cast<size_t>(count);
    }
    return absl::OkStatus();
  }
  // The client has sent all, or is gone: then the answer goes nowhere, and half a file is refused.
  void Complete() {
    if (context_->IsCancelled()) return End(absl::CancelledError("the client is gone"));
    if (!named_) return End(InvalidFields({{"name", "is missing: there was no message"}}));
    const auto imported = services_.sessions.Import(tenant_, name_, path_);
    if (!imported.ok()) return End(imported.status());
    v1::Snapshot snapshot;
    Encode(*imported, &snapshot);
    *answer_ = SerializeAnswer(snapshot);
    End(absl::OkStatus());
  }
  void End(const absl::Status& status) {
    if (!status.ok()) services_.metrics.OnRejected(status);
    record_.Handled(status.code());
    Finish(ToGrpcStatus(status, context_));
  }

  const ServiceContext& services_;
  grpc::CallbackServerContext* const context_;
  grpc::ByteBuffer* const answer_;
  RpcRecord record_;
  std::string tenant_, path_, name_;
  bool named_ = false;
  int64_t num_bytes_ = 0, max_bytes_ = 0;
  int fd_ = -1;
  grpc::ByteBuffer current_;  // being read
};

using S = v1::Sessions;
using Base = S::WithRawCallbackMethod_CreateSession<S::WithRawCallbackMethod_GetSession<
    S::WithRawCallbackMethod_ListSessions<S::WithRawCallbackMethod_DeleteSession<
        S::WithRawCallbackMethod_ForkSession<S::WithRawCallbackMethod_SnapshotSession<
            S::WithRawCallbackMethod_RestoreSession<S::WithRawCallbackMethod_ListSnapshots<
                S::WithRawCallbackMethod_DeleteSnapshot<S::WithRawCallbackMethod_ExportSnapshot<
                    S::WithRawCallbackMethod_ImportSnapshot<S::Service>>>>>>>>>>>;

class SessionsService final : public Base {
 public:
  explicit SessionsService(const ServiceContext& context)
      : services_(context), sessions_(context.sessions) {}

  grpc::ServerUnaryReactor* CreateSession(grpc::CallbackServerContext* context,
                                          const grpc::ByteBuffer* request,
                                          grpc::ByteBuffer* answer) override {
    return Answer<v1::CreateSessionRequest, v1::Session>(
        "CreateSession", context, request, answer,
        [this](const std::string& tenant, const auto& from, auto* to) {
          return EncodeSession(sessions_.CreateSession(tenant, Ttl(from)), to);
        });
  }
  grpc::ServerUnaryReactor* GetSession(grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* answer) override {
    return Answer<v1::GetSessionRequest, v1::Session>(
        "GetSession", context, request, answer,
        [this](const std::string& tenant, const auto& from, auto* to) {
          return EncodeSession(sessions_.Get(tenant, from.session_id()), to);
        });
  }
  grpc::ServerUnaryReactor* ListSessions(grpc::CallbackServerContext* context,
                                         const grpc::ByteBuffer* request,
                                         grpc::ByteBuffer* answer) override {
    return Answer<v1::ListSessionsRequest, v1::ListSessionsResponse>(
        "ListSessions", context, request, answer,
        [this](const std::string& tenant, const auto&, auto* to) {
          for (const SessionView& view : sessions_.List(tenant)) Encode(view, to->add_sessions());
          return absl::OkStatus();
        });
  }
  grpc::ServerUnaryReactor* DeleteSession(grpc::CallbackServerContext* context,
                                          const grpc::ByteBuffer* request,
                                          grpc::ByteBuffer* answer) override {
    return Answer<v1::DeleteSessionRequest, v1::DeleteSessionResponse>(
        "DeleteSession", context, request, answer,
        [this](const std::string& tenant, const auto& from, auto*) {
          return sessions_.Delete(tenant, from.session_id());
        });
  }
  grpc::ServerUnaryReactor* ForkSession(grpc::CallbackServerContext* context,
                                        const grpc::ByteBuffer* request,
                                        grpc::ByteBuffer* answer) override {
    return Answer<v1::ForkSessionRequest, v1::Session>(
        "ForkSession", context, request, answer,
        [this](const std::string& tenant, const auto& from, auto* to) {
          return EncodeSession(
              sessions_.Fork(tenant, from.session_id(), ExpectedPosition(from), Ttl(from)), to);
        });
  }
  grpc::ServerUnaryReactor* SnapshotSession(grpc::CallbackServerContext* context,
                                            const grpc::ByteBuffer* request,
                                            grpc::ByteBuffer* answer) override {
    return Answer<v1::SnapshotSessionRequest, v1::Snapshot>(
        "SnapshotSession", context, request, answer,
        [this](const std::string& tenant, const auto& from, auto* to) -> absl::Status {
          ASSIGN_OR_RETURN(const std::shared_ptr<SessionUse> use,
                           sessions_.Acquire(tenant, from.session_id(), ExpectedPosition(from)));
          ASSIGN_OR_RETURN(const auto snapshot, sessions_.Snapshot(*use, tenant, from.name()));
          Encode(snapshot, to);
          return absl::OkStatus();
        });
  }
  grpc::ServerUnaryReactor* RestoreSession(grpc::CallbackServerContext* context,
                                           const grpc::ByteBuffer* request,
                                           grpc::ByteBuffer* answer) override {
    return Answer<v1::RestoreSessionRequest, v1::Session>(
        "RestoreSession", context, request, answer,
        [this](const std::string& tenant, const auto& from, auto* to) {
          return EncodeSession(sessions_.Restore(tenant, from.name(), Ttl(from)), to);
        });
  }
  grpc::ServerUnaryReactor* ListSnapshots(grpc::CallbackServerContext* context,
                                          const grpc::ByteBuffer* request,
                                          grpc::ByteBuffer* answer) override {
    return Answer<v1::ListSnapshotsRequest, v1::ListSnapshotsResponse>(
        "ListSnapshots", context, request, answer,
        [this](const std::string& tenant, const auto&, auto* to) -> absl::Status {
          ASSIGN_OR_RETURN(const auto views, sessions_.files().List(tenant));
          for (const auto& view : views) Encode(view, to->add_snapshots());
          return absl::OkStatus();
        });
  }
  grpc::ServerUnaryReactor* DeleteSnapshot(grpc::CallbackServerContext* context,
                                           const grpc::ByteBuffer* request,
                                           grpc::ByteBuffer* answer) override {
    return Answer<v1::DeleteSnapshotRequest, v1::DeleteSnapshotResponse>(
        "DeleteSnapshot", context, request, answer,
        [this](const std::string& tenant, const auto& from, auto*) {
          return sessions_.files().Delete(tenant, from.name());
        });
  }
  grpc::ServerWriteReactor<grpc::ByteBuffer>* ExportSnapshot(
      grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) override {
    auto* reactor = new ExportReactor(services_, context);  // deletes itself
    reactor->Start(*request);
    return reactor;
  }
  grpc::ServerReadReactor<grpc::ByteBuffer>* ImportSnapshot(grpc::CallbackServerContext* context,
                                                            grpc::ByteBuffer* answer) override {
    auto* reactor = new ImportReactor(services_, context, answer);  // deletes itself
    reactor->Start();
    return reactor;
  }

 private:
  template <typename Request, typename Reply, typename Handle>
  grpc::ServerUnaryReactor* Answer(const char* method, grpc::CallbackServerContext* context,
                                   const grpc::ByteBuffer* request, grpc::ByteBuffer* answer,
                                   Handle handle) {
    return AnswerOnWorker<Request, Reply>(services_, {"godwit.v1.Sessions", method}, context,
                                          request, answer, std::move(handle));
  }
  static absl::Status EncodeSession(const absl::StatusOr<SessionView>& view, v1::Session* to) {
    if (view.ok()) Encode(*view, to);
    return view.status();
  }

  const ServiceContext& services_;
  SessionRegistry& sessions_;
};

}  // namespace

std::unique_ptr<grpc::Service> NewSessionsService(const ServiceContext& context) {
  return std::make_unique<SessionsService>(context);
}

}  // namespace godwit
