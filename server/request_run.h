#pragma once
// One accepted request between the engine thread and the reactor that answers it.

#include <grpcpp/server_context.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "scheduler/request.h"
#include "server/request_validation.h"
#include "server/service_context.h"

namespace godwit {

// A prompt of more bytes than this is split on an intake thread: 64 KiB take a few milliseconds.
inline constexpr int64_t kInlinePromptBytes = 64 << 10;

// The engine stops this much before the client does, so that the status with its details arrives;
// at most a tenth of the time.
inline constexpr TimeNs kDeadlineMargin = 20'000'000;

// When this RPC arrived (now) and when the engine should give up.
Arrival ArrivalOf(const grpc::CallbackServerContext& context, TimeNs now);

class RequestRun {
 public:
  // Registers the id and submits. on_events runs on a delivery thread when events have arrived,
  // perhaps before Start returns and after the run is gone. Errors carry details: ALREADY_EXISTS,
  // RESOURCE_EXHAUSTED, UNAVAILABLE, INVALID_ARGUMENT.
  static absl::StatusOr<std::shared_ptr<RequestRun>> Start(const ServiceContext& services,
                                                           GenerateRequest request,
                                                           std::function<void()> on_events);
  ~RequestRun();

  // New events. After the one of kind kDone the id is free, and the request is in the metrics.
  std::vector<TokenEvent> Drain();

  // The engine looks at the next step boundary; kDone follows.
  void Cancel();

  const std::string& id() const { return id_; }
  int64_t num_prompt_tokens() const { return stats_.num_prompt_tokens; }
  uint64_t seed() const { return seed_; }

 private:
  RequestRun(const ServiceContext& services, const GenerateRequest& request,
             std::function<void()> on_events);
  void OnNotify();  // engine thread
  void Measure(const std::vector<TokenEvent>& events);
  void MeasureGaps(const TokenEvent& event);

  const ServiceContext services_;
  const std::string id_;
  const uint64_t seed_;
  const TimeNs submitted_;
  std::shared_ptr<TokenStream> stream_;
  std::function<void()> on_events_;
  // Of the thread that drains.
  RequestStats stats_;
  std::vector<TimeNs> last_token_;  // by output index; kNever: none yet
  bool done_ = false;
};

}  // namespace godwit
