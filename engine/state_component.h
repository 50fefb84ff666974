#pragma once
// What a model declares about the state of one sequence (docs/architecture.md §3.1). CacheManager, admission, fork, preemption
// and the model card follow from this list alone.

#include <cstdint>
#include <limits>
#include <string>

namespace godwit {

enum class ShardAxis { kNone, kHeads };

inline constexpr int64_t kRetainAll = std::numeric_limits<int64_t>::max();

// A sequence holds, per component: a *base*, a value at position block * (floor(p / block) - lag), advanced by the op only
// over committed rows; and *rows*, one per token, for [base, p + reserve) and at least the last `retain` of them.
struct StateComponent {
  std::string name;           // "layers.3.lightning", "layers.0.kv", "penalties"
  int64_t base_bytes = 0;     // 0: no base
  int64_t row_bytes = 0;      // 0: no rows
  int block = 0;              // 0: no base, or a base without a position (penalty counts)
  int lag = 0;
  int64_t retain = 0;         // kRetainAll: every row is kept, in paged blocks of kPagedBlock rows
  ShardAxis shard = ShardAxis::kNone;
  // Of paged rows: keys of some heads, then their values, of so many bytes a head; and the bytes of
  // one element. What a back end may lay out in a way of its own (CachePool).
  int64_t head_bytes = 0, element_bytes = 0;

  bool paged() const { return row_bytes > 0 && retain == kRetainAll; }
  bool windowed() const { return row_bytes > 0 && retain != kRetainAll; }
};

}  // namespace godwit
