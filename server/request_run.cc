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
  const SystemClock::time_point deadline = context.deadline();
  if (deadline == SystemClock::time_point::max()) return {.now = now};
  const TimeNs left =
      std::chrono::duration_cast<std::chrono::nanoseconds>(deadline - SystemClock::now()).count();
  // Beyond a year it is no deadline, and the sum could overflow.
  constexpr TimeNs kYear = TimeNs{365} * 24 * 3600 * 1'000'000'000;
  if (left > kYear) return {.now = now};
  return {.now = now, .deadline = now + left - std::clamp<TimeNs>(left / 10, 0, kDeadlineMargin)};
}

RequestRun::RequestRun(const ServiceContext& services, const GenerateRequest& request,
                       std::function<void()> on_events)
    : services_(services),
      id_(request.id),
      seed_(request.seed),
      submitted_(SteadyNow()),
      on_events_(std::move(on_events)),
      num_live_outputs_(request.num_outputs) {
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

void RequestRun::OnNotify() {
  notified_.store(SteadyNow(), std::memory_order_relaxed);
  services_.delivery.Post(on_events_);
}

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
  int64_t num_tokens = 0;
  for (const TokenEvent& event : events) {
    if (event.kind == TokenEvent::Kind::kTokens) num_tokens += std::ssize(event.tokens);
  }
  if (num_tokens > 0 || last_num_tokens_ > 0) MeasureGaps(num_tokens, events);
  stats_.num_output_tokens += num_tokens;
  for (const TokenEvent& event : events) {
    if (event.kind == TokenEvent::Kind::kFinished) {
      services_.metrics.OnOutputFinished(event.finish.reason);
      num_live_outputs_ = std::max(1, num_live_outputs_ - 1);
    } else if (event.kind == TokenEvent::Kind::kDone) {
      stats_.timings = event.timings;
      stats_.status = event.status;
      stats_.phase = event.phase;
      services_.metrics.OnRequestEnded(stats_);
    }
  }
}

// The engine's pace, whatever the client's: a batch holds what came from one push to an empty
// mailbox until the next, so its tokens share the time between the two.
void RequestRun::MeasureGaps(int64_t num_tokens, const std::vector<TokenEvent>& events) {
  const TimeNs notified = notified_.load(std::memory_order_relaxed);
  if (stats_.num_output_tokens == 0) {
    services_.metrics.OnFirstToken(notified - submitted_);
  } else if (last_num_tokens_ > 0) {
    const int64_t steps = std::max<int64_t>(1, last_num_tokens_ / num_live_outputs_);
    services_.metrics.OnInterTokenGaps((notified - last_notified_) / steps, last_num_tokens_);
  }
  last_notified_ = notified;
  last_num_tokens_ = num_tokens;
  const bool ended = !events.empty() && events.back().kind == TokenEvent::Kind::kDone;
  const int64_t steps = num_tokens / num_live_outputs_;
  if (ended && steps > 1 && events.back().timings.last_token != kNever) {
    const TimeNs rest = std::max<TimeNs>(0, events.back().timings.last_token - notified);
    services_.metrics.OnInterTokenGaps(rest / (steps - 1), num_tokens - num_live_outputs_);
  }
}

}  // namespace godwit
