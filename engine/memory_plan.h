#pragma once
// How the engine divides a device's memory, before it allocates any of it.

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "engine/cache_manager.h"

namespace godwit {

inline constexpr int64_t kDefaultKvBytes = int64_t{1} << 30;

struct MemoryPlan {
  int64_t weight_bytes = 0;     // allocated already when the plan is made
  int64_t workspace_bytes = 0;  // of the model; allocated already
  int64_t step_bytes = 0;       // logits, step arrays, results
  int64_t free_bytes = 0;       // what weights and workspace left
  bool owns_memory = false;     // DeviceInfo's
  CacheGeometry geometry;

  int64_t state_bytes() const {
    return (geometry.num_slots + geometry.num_snapshots) * geometry.slot_bytes();
  }
  int64_t kv_bytes() const { return geometry.num_blocks * geometry.block_bytes(); }
};

// Fills geometry.num_blocks: kv_bytes / block, or with kv_bytes 0 all that states and step leave
// free where the memory is ours alone, else the smaller of kDefaultKvBytes and half of it.
// RESOURCE_EXHAUSTED with the plan in words when it exceeds free_bytes; INVALID_ARGUMENT when
// kv_bytes is less than one block.
absl::StatusOr<MemoryPlan> PlanMemory(MemoryPlan plan, int64_t kv_bytes);

// "weights 13.7 GiB, workspace 210.0 MiB, 64 state slots of 62.0 MiB = 3.9 GiB, ...", one line.
std::string Describe(const MemoryPlan& plan);

// The cache's part, by kind of component: "64 slots of 62.5 MiB (lightning 62.0 MiB, penalties
// 512.0 KiB) = ..."
std::string Describe(const CacheGeometry& geometry);

std::string FormatBytes(int64_t num_bytes);  // "512 B", "1.5 KiB", "62.0 MiB"

}  // namespace godwit
