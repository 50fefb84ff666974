#pragma once
// What a Generate has to do with a session: starts from it, keeps its state, saves it under a name.

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "godwit/v1/inference.pb.h"
#include "scheduler/request.h"
#include "server/request_validation.h"
#include "server/service_context.h"
#include "server/session_registry.h"

namespace godwit {

// Whether the request belongs on a worker: opening a session may wait for the disk.
bool UsesSession(const v1::GenerateRequest& request);

class SessionCall : public std::enable_shared_from_this<SessionCall> {
 public:
  // Null for a request that uses no session. on_events: as RequestRun's, when a snapshot is
  // written. Errors: SessionRegistry::Acquire's, and INVALID_ARGUMENT.
  static absl::StatusOr<std::shared_ptr<SessionCall>> Open(const ServiceContext& services,
                                                           const std::string& tenant,
                                                           const v1::StateOptions& state,
                                                           std::function<void()> on_events);

  SessionStart start() const;
  // A valid request; what it decided for an empty session holds from now on.
  void Begin(const PreparedGenerate& prepared);

  // The events that the client may have now: the last waits until the state is kept, and on disk
  // where it is to be saved. Gives the session back before it returns that.
  std::vector<TokenEvent> Take(std::vector<TokenEvent> events);

 private:
  SessionCall(const ServiceContext& services, std::string tenant, std::function<void()> on_events);
  void Save();

  const ServiceContext& services_;
  const std::string tenant_;
  const std::function<void()> on_events_;
  bool keeps_ = true;
  bool named_ = false;  // the client's session; else of this request only
  std::string save_as_;

  std::mutex mutex_;  // guards the rest
  std::shared_ptr<SessionUse> use_;
  std::vector<TokenEvent> held_;
  std::optional<absl::Status> saved_;
};

}  // namespace godwit
