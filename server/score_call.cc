#include "server/score_call.h"

#include <cmath>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "godwit/v1/inference.pb.h"
#include "server/event_encoder.h"
#include "server/intake.h"
#include "server/request_run.h"
#include "server/request_validation.h"

namespace godwit {
namespace {

constexpr RpcName kScore = {"godwit.v1.Inference", "Score", "unary"};

class ScoreReactor final : public grpc::ServerUnaryReactor,
                           public std::enable_shared_from_this<ScoreReactor> {
 public:
  ScoreReactor(const ServiceContext& services, grpc::CallbackServerContext* context,
               grpc::ByteBuffer* response_bytes)
      : services_(services),
        context_(context),
        response_bytes_(response_bytes),
        record_(services.metrics, kScore) {}

  void Start(const grpc::ByteBuffer& bytes) {
    self_ = shared_from_this();
    const Arrival arrival = ArrivalOf(*context_, record_.begin());
    auto request = ReadRequest<v1::ScoreRequest>(services_, *context_, bytes);
    if (!request.ok()) return Reject(request.status());
    const size_t num_text_bytes = request->prompt().size() + request->continuation_text().size();
    const absl::Status status = RunIntake(
        services_, num_text_bytes,
        [self = self_, request = *std::move(request), arrival] { self->Accept(request, arrival); });
    if (!status.ok()) Reject(status);
  }

  void OnCancel() override {
    std::lock_guard<std::mutex> lock(mutex_);
    abandoned_ = true;
    if (run_ != nullptr) run_->Cancel();
  }

  void OnDone() override { self_.reset(); }

 private:
  void Accept(const v1::ScoreRequest& request, const Arrival& arrival) {
    auto prepared = PrepareScore(request, services_.model, arrival);
    if (!prepared.ok()) return Reject(prepared.status());
    first_scored_ = prepared->first_scored;
    auto on_events = [weak = weak_from_this()] {
      if (const std::shared_ptr<ScoreReactor> self = weak.lock()) self->Collect();
    };
    auto run = RequestRun::Start(services_, std::move(prepared->request), on_events);
    if (!run.ok()) return Reject(run.status());
    {
      std::lock_guard<std::mutex> lock(mutex_);
      run_ = *std::move(run);
      if (abandoned_) run_->Cancel();
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
      if (finished_ || run_ == nullptr) return;
      for (TokenEvent& event : run_->Drain()) {
        if (event.kind == TokenEvent::Kind::kPrompt) scores_ = std::move(event.tokens);
        if (event.kind != TokenEvent::Kind::kDone) continue;
        finished_ = true;
        status =
            event.status.ok() ? MakeResponse(event.timings) : RunError(event.status, event.phase);
      }
      if (!finished_) return;
    }
    End(status);
  }

  absl::Status MakeResponse(const RequestTimings& timings) {
    const int64_t num_tokens = run_->num_prompt_tokens();
    if (std::ssize(scores_) != num_tokens - 1) {
      return absl::InternalError(
          absl::StrCat(scores_.size(), " scores of a prompt of ", num_tokens, " tokens"));
    }
    v1::ScoreResponse response;
    response.set_request_id(run_->id());
    double total = 0;
    for (int64_t token = first_scored_; token < num_tokens; ++token) {
      const SampledToken& score = scores_[token - 1];
      total += score.logprob;
      *response.add_logprobs() = EncodeLogprob(services_.model, score);
    }
    response.set_total_logprob(total);
    response.set_perplexity(std::exp(-total / static_cast<double>(num_tokens - first_scored_)));
    response.mutable_usage()->set_prompt_tokens(num_tokens);
    response.mutable_usage()->set_total_tokens(num_tokens);
    *response.mutable_timings() = EncodeTimings(timings, 0);
    response.set_model(services_.model.name());
    *response_bytes_ = SerializeAnswer(response);
    return absl::OkStatus();
  }

  const ServiceContext services_;
  grpc::CallbackServerContext* const context_;
  grpc::ByteBuffer* const response_bytes_;
  RpcRecord record_;
  std::shared_ptr<ScoreReactor> self_;  // until OnDone
  int64_t first_scored_ = 1;

  std::mutex mutex_;  // guards the rest
  std::shared_ptr<RequestRun> run_;
  std::vector<SampledToken> scores_;  // of every prompt token but the first
  bool finished_ = false, abandoned_ = false;
};

}  // namespace

grpc::ServerUnaryReactor* StartScore(const ServiceContext& services,
                                     grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request, grpc::ByteBuffer* response) {
  const auto reactor = std::make_shared<ScoreReactor>(services, context, response);
  reactor->Start(*request);
  return reactor.get();
}

}  // namespace godwit
