#pragma once
// What sessions may take.

#include <cstdint>
#include <string>

namespace godwit {

struct SessionLimits {
  int64_t max_sessions = 1024;
  int64_t ttl_ms = 3'600'000;
  // Where snapshots lie, and idle sessions for which host memory is short; "": nowhere.
  std::string folder;
  int64_t disk_bytes = int64_t{64} << 30;  // of all files there
};

}  // namespace godwit
