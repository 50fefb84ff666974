#include "server/request_run.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "kernels/base/status.h"
#include "scheduler/engine_loop.h"
#include "server/clock.h"
#include "server/status_mapping.h"

namespace godwit {

Arrival ArrivalOf(const grpc::CallbackServerContext& context, TimeNs now) {
  using SystemClock = std::chrono::system_clock;
  Arrival arrival{.now = now};
  // As a key it is hashed before it goes anywhere.
  const auto& metadata = context.client_metadata();
  if (const auto token = metadata.find("authorization"); token != metadata.end()) {
    arrival.tenant = std::string(token->second.data(), token->second.size());
  }
  const SystemClock::time_point deadline = context.deadline();
  if (deadline == SystemClock::time_point::max()) return arrival;
  const TimeNs left =
      std::chrono::duration_cast<std::chrono::nanoseconds>(deadline - SystemClock::now()).count();
  // Beyond a year it is no deadline, and the sum could overflow.
  constexpr TimeNs kYear = TimeNs{365} * 24 * 3600 * 1'000'000'000;
  if (left > kYear) return arrival;
  arrival.deadline = now + left - std::clamp<TimeNs>(left / 10, 0, kDeadlineMargin);
  return arrival;
}

RequestRun::RequestRun(const ServiceContext& services, const GenerateRequest& request,
                       std::function<void()> on_events)
    : services_(services),
      id_(request.id),
      seed_(request.seed),
      submitted_(SteadyNow()),
      on_events_(std::move(on_events)),
      last_token_(static_cast<size_t>(request.num_outputs), kNever) {
  stats_.num_prompt_tokens = std::ssize(request.token_ids);
  stats_.max_tokens = request.max_tokens;
  stats_.num_outputs = request.num_outputs;
}

RequestRun::~RequestRun() {
  if (!done_) services_.registry.Remove(id_);
}

absl::StatusOr<std::shared_ptr<RequestRun>> RequestRun::Start(const ServiceContext& services,
                                                              GenerateRequest request,
                                                              std::function<void()> on_events) {
  RETURN_IF_ERROR(services.registry.Add(request.id));
  std::shared_ptr<RequestRun> run(new RequestRun(services, request, std::move(on_events)));
  run->stream_ = std::make_shared<TokenStream>([weak = std::weak_ptr<RequestRun>(run)] {
    if (const std::shared_ptr<RequestRun> locked = weak.lock()) locked->OnNotify();
  });
  request.stream = run->stream_;
  if (const absl::Status status = services.loop.Submit(std::move(request)); !status.ok()) {
    return SubmitError(status);
  }
  return run;
}

void RequestRun::OnNotify() { services_.delivery.Post(on_events_); }

void RequestRun::Cancel() {
  stream_->Cancel();
  services_.loop.Wake();
}

std::vector<TokenEvent> RequestRun::Drain() {
  std::vector<TokenEvent> events = stream_->Drain();
  Measure(events);
  if (!events.empty() && events.back().kind == TokenEvent::Kind::kDone) {
    done_ = true;
    services_.registry.Remove(id_);
  }
  return events;
}

void RequestRun::Measure(const std::vector<TokenEvent>& events) {
  for (const TokenEvent& event : events) {
    if (event.kind == TokenEvent::Kind::kTokens) {
      MeasureGaps(event);
    } else if (event.kind == TokenEvent::Kind::kFinished) {
      services_.metrics.OnOutputFinished(event.finish.reason);
    } else if (event.kind == TokenEvent::Kind::kDone) {
      stats_.timings = event.timings;
      stats_.status = event.status;
      stats_.phase = event.phase;
      services_.metrics.OnRequestEnded(stats_);
    }
  }
}

// The engine's pace, whatever the client's: the scheduler says when it confirmed each token.
void RequestRun::MeasureGaps(const TokenEvent& event) {
  TimeNs& last = last_token_[static_cast<size_t>(event.output_index)];
  for (const TimeNs time : event.times) {
    if (stats_.num_output_tokens++ == 0) services_.metrics.OnFirstToken(time - submitted_);
    if (last != kNever) services_.metrics.OnInterTokenGap(time - last);
    last = time;
  }
}

}  // namespace godwit
