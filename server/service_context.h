#pragma once
// What the services share. All outlive the gRPC server.

#include "server/authenticator.h"
#include "server/metrics.h"
#include "server/request_registry.h"
#include "server/served_model.h"
#include "server/work_queue.h"

namespace godwit {

class EngineLoop;
class SessionRegistry;

struct ServiceContext {
  const ServedModel& model;
  const Authenticator& authenticator;
  EngineLoop& loop;
  RequestRegistry& registry;
  Metrics& metrics;
  WorkQueue& delivery;  // tokens to messages
  WorkQueue& intake;    // long prompts to tokens
  WorkQueue& workers;   // calls that wait for the engine or the disk
  SessionRegistry& sessions;
};

}  // namespace godwit
