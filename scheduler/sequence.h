#pragma once
// The engine thread's record of one output of one request. Owned and changed by the scheduler only.

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/cache_manager.h"
#include "scheduler/request.h"

namespace godwit {

struct RequestGroup;  // the request and its n sequences

struct Sequence {
  RequestGroup* group = nullptr;
  int32_t output_index = 0;
  Phase phase = Phase::kWaiting;
  CacheLease lease;
  int64_t num_computed = 0;        // prompt tokens submitted so far, then position after the last submitted step
  int64_t num_output = 0;          // confirmed output tokens
  int64_t num_output_submitted = 0;  // draws submitted, confirmed or in flight
  int steps_in_flight = 0;         // its lease may not be swapped or released while > 0
  bool stopped = false;            // finished; results still in flight are dropped
};

}  // namespace godwit
