#include "server/session_call.h"

#include <utility>

#include "kernels/base/status.h"
#include "server/status_mapping.h"
#include "server/worker_call.h"

namespace godwit {

bool UsesSession(const v1::GenerateRequest& request) {
  return request.state().has_session_id() || request.state().has_save_as();
}

SessionCall::SessionCall(const ServiceContext& services, std::string tenant,
                         std::function<void()> on_events)
    : services_(services), tenant_(std::move(tenant)), on_events_(std::move(on_events)) {}

absl::StatusOr<std::shared_ptr<SessionCall>> SessionCall::Open(const ServiceContext& services,
                                                               const std::string& tenant,
                                                               const v1::StateOptions& state,
                                                               std::function<void()> on_events) {
  if (state.has_save_as()) RETURN_IF_ERROR(services.sessions.files().Check(state.save_as()));
  if (state.has_expected_position() && !state.has_session_id()) {
    return InvalidFields({{"state.expected_position", "needs state.session_id"}});
  }
  if (state.has_keep_state() && !state.has_session_id()) {
    return InvalidFields({{"state.keep_state", "needs state.session_id"}});
  }
  if (state.has_save_as() && state.has_keep_state() && !state.keep_state()) {
    return InvalidFields({{"state.save_as", "needs the state that state.keep_state drops"}});
  }
  if (!state.has_session_id() && !state.has_save_as()) return std::shared_ptr<SessionCall>();
  std::shared_ptr<SessionCall> call(new SessionCall(services, tenant, std::move(on_events)));
  call->keeps_ = !state.has_keep_state() || state.keep_state();
  call->save_as_ = state.save_as();
  call->named_ = state.has_session_id();
  if (call->named_) {
    const std::optional<int64_t> expected = state.has_expected_position()
                                                ? std::optional<int64_t>(state.expected_position())
                                                : std::nullopt;
    ASSIGN_OR_RETURN(call->use_, services.sessions.Acquire(tenant, state.session_id(), expected));
  } else {
    ASSIGN_OR_RETURN(call->use_, services.sessions.AcquireAnonymous(tenant));
  }
  return call;
}

SessionStart SessionCall::start() const {
  return {.session_id = named_ ? use_->id() : "",
          .key = use_->key(),
          .position = use_->position(),
          .pending_token = use_->pending_token(),
          .rope = use_->rope(),
          .keeps = keeps_};
}

void SessionCall::Begin(const PreparedGenerate& prepared) {
  if (use_->position() == 0) use_->FixRope(prepared.request.rope, prepared.rope_notes);
}

std::vector<TokenEvent> SessionCall::Take(std::vector<TokenEvent> events) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!held_.empty()) {
    if (!saved_) return {};
    std::vector<TokenEvent> held = std::exchange(held_, {});
    held.back().status = *saved_;
    use_.reset();
    return held;
  }
  if (events.empty() || events.back().kind != TokenEvent::Kind::kDone) return events;
  TokenEvent& done = events.back();
  const bool kept = done.status.ok() && done.kept_position >= 0;
  if (kept) use_->Kept(done.kept_position, done.kept_token);
  if (save_as_.empty() || !done.status.ok()) {
    use_.reset();
    return events;
  }
  if (!kept) {
    done.status = absl::FailedPreconditionError("the request ended before it had a state to save");
    use_.reset();
    return events;
  }
  held_.push_back(std::move(done));
  events.pop_back();
  const absl::Status posted =
      PostToWorkers(services_, [self = shared_from_this()] { self->Save(); });
  if (posted.ok()) return events;
  events.push_back(std::move(held_.back()));
  held_.clear();
  events.back().status = posted;
  use_.reset();
  return events;
}

void SessionCall::Save() {
  const absl::Status saved = services_.sessions.Snapshot(*use_, tenant_, save_as_).status();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    saved_ = saved;
  }
  services_.delivery.Post(on_events_);
}

}  // namespace godwit
