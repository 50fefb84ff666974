#include "server/generate_call.h"

#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "godwit/v1/inference.pb.h"
#include "kernels/base/status.h"
#include "server/event_encoder.h"
#include "server/intake.h"
#include "server/request_run.h"
#include "server/request_validation.h"
#include "server/session_call.h"
#include "server/worker_call.h"

namespace godwit {
namespace {

constexpr RpcName kGenerate = {"godwit.v1.Inference", "Generate", "unary"};
constexpr RpcName kGenerateStream = {"godwit.v1.Inference", "GenerateStream", "server_stream"};

// An accepted request with its encoder.
struct Running {
  std::shared_ptr<RequestRun> run;
  std::unique_ptr<EventEncoder> encoder;
  std::shared_ptr<SessionCall> session;  // null without one

  // What has arrived, as messages.
  std::vector<v1::GenerateEvent> Take() {
    std::vector<TokenEvent> events = run->Drain();
    if (session != nullptr) events = session->Take(std::move(events));
    std::vector<v1::GenerateEvent> messages;
    encoder->Encode(std::move(events), &messages);
    return messages;
  }
};

absl::StatusOr<Running> Begin(const ServiceContext& services,
                              const grpc::CallbackServerContext& context,
                              const v1::GenerateRequest& request, const Arrival& arrival,
                              std::function<void()> on_events) {
  Running running;
  ASSIGN_OR_RETURN(running.session,
                   SessionCall::Open(services, services.authenticator.TenantOf(context),
                                     request.state(), on_events));
  SessionStart start;
  if (running.session != nullptr) start = running.session->start();
  ASSIGN_OR_RETURN(PreparedGenerate prepared,
                   PrepareGenerate(request, services.model, arrival,
                                   running.session != nullptr ? &start : nullptr));
  if (running.session != nullptr) running.session->Begin(prepared);
  running.encoder = std::make_unique<EventEncoder>(services.model, prepared);
  ASSIGN_OR_RETURN(running.run,
                   RequestRun::Start(services, std::move(prepared.request), std::move(on_events)));
  return running;
}

// gRPC's calls (StartWrite, Finish) are made without the lock; the flags make sure that one thread
// makes them. The object lives until gRPC is done with it and no delivery is under way.
class StreamReactor final : public grpc::ServerWriteReactor<grpc::ByteBuffer>,
                            public std::enable_shared_from_this<StreamReactor> {
 public:
  StreamReactor(const ServiceContext& services, grpc::CallbackServerContext* context)
      : services_(services), context_(context), record_(services.metrics, kGenerateStream) {}

  void Start(const grpc::ByteBuffer& bytes) {
    self_ = shared_from_this();
    const Arrival arrival = ArrivalOf(*context_, record_.begin());
    auto request = ReadRequest<v1::GenerateRequest>(services_, *context_, bytes);
    if (!request.ok()) return Reject(request.status());
    const size_t num_text_bytes = request->prompt().size();
    const bool waits = UsesSession(*request);
    auto accept = [self = self_, request = *std::move(request), arrival] {
      self->Accept(request, arrival);
    };
    const absl::Status status = waits ? PostToWorkers(services_, std::move(accept))
                                      : RunIntake(services_, num_text_bytes, std::move(accept));
    if (!status.ok()) Reject(status);
  }

  void OnWriteDone(bool ok) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      writing_ = false;
      if (!ok) Abandon();
    }
    Pump();
  }

  void OnCancel() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      Abandon();
    }
    Pump();
  }

  void OnDone() override { self_.reset(); }

 private:
  void Accept(const v1::GenerateRequest& request, const Arrival& arrival) {
    auto on_events = [weak = weak_from_this()] {
      if (const std::shared_ptr<StreamReactor> self = weak.lock()) self->Pump();
    };
    auto running = Begin(services_, *context_, request, arrival, on_events);
    if (!running.ok()) return Reject(running.status());
    {
      std::lock_guard<std::mutex> lock(mutex_);
      running_ = *std::move(running);
      if (abandoned_) running_.run->Cancel();
    }
    Pump();
  }

  // The client is gone: nothing more is written, and the engine stops at its next step.
  void Abandon() {
    if (abandoned_) return;
    abandoned_ = true;
    out_.clear();
    if (running_.run != nullptr) running_.run->Cancel();
  }

  void Reject(const absl::Status& status) {
    services_.metrics.OnRejected(status);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      finished_ = true;
    }
    End(status);
  }

  void End(const absl::Status& status) {
    record_.Handled(status.code());
    Finish(ToGrpcStatus(status, context_));
  }

  // Takes what the engine has pushed, once what was taken before is written. A slow client's tokens
  // wait in the mailbox, merged.
  void TakeEvents() {
    const std::vector<v1::GenerateEvent> events = running_.Take();
    if (abandoned_) return;
    for (const v1::GenerateEvent& event : events) out_.push_back(SerializeAnswer(event));
  }

  // Any thread, at any time: makes the one call that is due, if any.
  void Pump() {
    std::optional<absl::Status> end;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (writing_ || finished_ || running_.run == nullptr) return;
      if (out_.empty() && !running_.encoder->done()) TakeEvents();
      if (!out_.empty()) {
        writing_ = true;
        current_ = std::move(out_.front());
        out_.pop_front();
      } else if (running_.encoder->done()) {
        finished_ = true;
        end = running_.encoder->status();
      } else {
        return;
      }
    }
    if (end.has_value()) return End(*end);
    // No buffer hint: the first write carries the initial metadata, and would not complete until
    // somebody flushes it.
    StartWrite(&current_);
  }

  const ServiceContext services_;
  grpc::CallbackServerContext* const context_;
  RpcRecord record_;
  std::shared_ptr<StreamReactor> self_;  // until OnDone
  grpc::ByteBuffer current_;             // being written

  std::mutex mutex_;  // guards the rest
  Running running_;
  std::deque<grpc::ByteBuffer>
      out_;  // of one Drain: at most n * (max_tokens / kMaxTokensPerDelta + 2) + 2
  bool writing_ = false, finished_ = false, abandoned_ = false;
};

class UnaryReactor final : public grpc::ServerUnaryReactor,
                           public std::enable_shared_from_this<UnaryReactor> {
 public:
  UnaryReactor(const ServiceContext& services, grpc::CallbackServerContext* context,
               grpc::ByteBuffer* response_bytes)
      : services_(services),
        context_(context),
        response_bytes_(response_bytes),
        record_(services.metrics, kGenerate) {}

  void Start(const grpc::ByteBuffer& bytes) {
    self_ = shared_from_this();
    const Arrival arrival = ArrivalOf(*context_, record_.begin());
    auto request = ReadRequest<v1::GenerateRequest>(services_, *context_, bytes);
    if (!request.ok()) return Reject(request.status());
    const size_t num_text_bytes = request->prompt().size();
    const bool waits = UsesSession(*request);
    auto accept = [self = self_, request = *std::move(request), arrival] {
      self->Accept(request, arrival);
    };
    const absl::Status status = waits ? PostToWorkers(services_, std::move(accept))
                                      : RunIntake(services_, num_text_bytes, std::move(accept));
    if (!status.ok()) Reject(status);
  }

  void OnCancel() override {
    std::lock_guard<std::mutex> lock(mutex_);
    abandoned_ = true;
    if (running_.run != nullptr) running_.run->Cancel();
  }

  void OnDone() override { self_.reset(); }

 private:
  void Accept(const v1::GenerateRequest& request, const Arrival& arrival) {
    auto on_events = [weak = weak_from_this()] {
      if (const std::shared_ptr<UnaryReactor> self = weak.lock()) self->Collect();
    };
    auto running = Begin(services_, *context_, request, arrival, on_events);
    if (!running.ok()) return Reject(running.status());
    {
      std::lock_guard<std::mutex> lock(mutex_);
      running_ = *std::move(running);
      if (abandoned_) running_.run->Cancel();
    }
    Collect();
  }

  void Reject(const absl::Status& status) {
    services_.metrics.OnRejected(status);
    End(status);
  }

  void End(const absl::Status& status) {
    record_.Handled(status.code());
    Finish(ToGrpcStatus(status, context_));
  }

  void Collect() {
    absl::Status status;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (finished_ || running_.run == nullptr) return;
      for (const v1::GenerateEvent& event : running_.Take()) AppendEvent(event, &response_);
      if (!running_.encoder->done()) return;
      finished_ = true;
      status = running_.encoder->status();
    }
    if (status.ok()) *response_bytes_ = SerializeAnswer(response_);
    End(status);
  }

  const ServiceContext services_;
  grpc::CallbackServerContext* const context_;
  grpc::ByteBuffer* const response_bytes_;
  RpcRecord record_;
  std::shared_ptr<UnaryReactor> self_;  // until OnDone

  std::mutex mutex_;  // guards the rest
  Running running_;
  v1::GenerateResponse response_;
  bool finished_ = false, abandoned_ = false;
};

}  // namespace

grpc::ServerUnaryReactor* StartGenerate(const ServiceContext& services,
                                        grpc::CallbackServerContext* context,
                                        const grpc::ByteBuffer* request,
                                        grpc::ByteBuffer* response) {
  const auto reactor = std::make_shared<UnaryReactor>(services, context, response);
  reactor->Start(*request);
  return reactor.get();
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* StartGenerateStream(
    const ServiceContext& services, grpc::CallbackServerContext* context,
    const grpc::ByteBuffer* request) {
  const auto reactor = std::make_shared<StreamReactor>(services, context);
  reactor->Start(*request);
  return reactor.get();
}

}  // namespace godwit
