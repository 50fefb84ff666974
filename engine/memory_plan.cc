#include "engine/memory_plan.h"

#include <algorithm>
#include <limits>
#include <map>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/ops.h"

namespace godwit {
namespace {

// "layers.3.lightning" -> "lightning": what a reader wants summed over the layers.
std::string Kind(const StateComponent& component) {
  return component.name.substr(component.name.rfind('.') + 1);
}

// Bytes per slot, by kind.
std::map<std::string, int64_t> SlotBytesByKind(const CacheGeometry& geometry) {
  std::map<std::string, int64_t> bytes;
  for (const StateComponent& component : geometry.components) {
    const int64_t rows = component.windowed() ? geometry.window_rows : 0;
    const int64_t slot_bytes = component.base_bytes + rows * component.row_bytes;
    if (slot_bytes > 0) bytes[Kind(component)] += slot_bytes;
  }
  return bytes;
}

}  // namespace

std::string FormatBytes(int64_t num_bytes) {
  constexpr const char* kUnits[] = {"KiB", "MiB", "GiB", "TiB"};
  if (num_bytes < 1024) return absl::StrCat(num_bytes, " B");
  double value = static_cast<double>(num_bytes) / 1024;
  int unit = 0;
  for (; value >= 1024 && unit < 3; ++unit) value /= 1024;
  return absl::StrFormat("%.1f %s", value, kUnits[unit]);
}

std::string Describe(const CacheGeometry& geometry) {
  std::string kinds;
  for (const auto& [kind, bytes] : SlotBytesByKind(geometry)) {
    absl::StrAppend(&kinds, kinds.empty() ? "" : ", ", kind, " ", FormatBytes(bytes));
  }
  std::string text =
      absl::StrCat(geometry.num_slots, " state slots of ", FormatBytes(geometry.slot_bytes()), " (",
                   kinds, ") = ", FormatBytes(geometry.num_slots * geometry.slot_bytes()));
  if (geometry.num_snapshots > 0) {
    absl::StrAppend(&text, ", ", geometry.num_snapshots, " for the prefix cache = ",
                    FormatBytes(geometry.num_snapshots * geometry.slot_bytes()));
  }
  if (geometry.has_paged()) {
    absl::StrAppend(&text, ", ", geometry.num_blocks, " KV blocks of ", kPagedBlock, " tokens, ",
                    FormatBytes(geometry.block_bytes()),
                    " each = ", FormatBytes(geometry.num_blocks * geometry.block_bytes()));
  }
  return text;
}

std::string Describe(const MemoryPlan& plan) {
  return absl::StrCat("weights ", FormatBytes(plan.weight_bytes), ", workspace ",
                      FormatBytes(plan.workspace_bytes), ", step buffers ",
                      FormatBytes(plan.step_bytes), ", ", Describe(plan.geometry));
}

absl::StatusOr<MemoryPlan> PlanMemory(MemoryPlan plan, int64_t kv_bytes) {
  const int64_t block_bytes = plan.geometry.block_bytes();
  const int64_t left = plan.free_bytes - plan.state_bytes() - plan.step_bytes;
  plan.geometry.num_blocks = 0;
  if (plan.geometry.has_paged()) {
    const int64_t wanted = kv_bytes > 0       ? kv_bytes
                           : plan.owns_memory ? left
                                              : std::min(kDefaultKvBytes, left / 2);
    if (kv_bytes > 0 && kv_bytes < block_bytes) {
      return absl::InvalidArgumentError(
          absl::StrCat("KV memory ", kv_bytes, " bytes is less than one block of ", kPagedBlock,
                       " tokens, ", block_bytes, " bytes"));
    }
    // At least one, so that what is missing shows below.
    plan.geometry.num_blocks =
        std::clamp<int64_t>(wanted / block_bytes, 1, std::numeric_limits<int32_t>::max());
  }
  if (plan.kv_bytes() > left) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "memory plan does not fit: ", Describe(plan), "; ", FormatBytes(plan.free_bytes),
        " free after weights and workspace; use fewer sequences, tokens per step or KV bytes"));
  }
  return plan;
}

}  // namespace godwit
