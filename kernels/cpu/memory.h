#pragma once
// Pages from the system: zeroed, aligned to 2 MiB (large) or 4 KiB, in huge pages where the kernel
// grants them, because a matvec that streams weights through 4 KiB pages waits for the page walker.

#include <cstdint>

namespace godwit {

// Null when the system refuses. num_bytes > 0.
void* AcquireMemory(int64_t num_bytes);
// num_bytes as it was acquired. A null `data` does nothing.
void ReleaseMemory(void* data, int64_t num_bytes);

struct MemoryInfo {
  int64_t total_bytes = 0;  // of this machine, or the limit of this control group
  int64_t free_bytes = 0;   // what can be acquired without swapping
  int64_t used_bytes = 0;   // resident, of this process
};
MemoryInfo ReadMemoryInfo();

}  // namespace godwit
