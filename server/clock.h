#pragma once
// The clock of requests: std::chrono::steady_clock, which the engine loop reads too.

#include <chrono>

#include "scheduler/request.h"

namespace godwit {

inline TimeNs SteadyNow() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

inline double ToMs(TimeNs ns) { return static_cast<double>(ns) / 1e6; }
inline double ToSeconds(TimeNs ns) { return static_cast<double>(ns) / 1e9; }

}  // namespace godwit
