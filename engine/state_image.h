#pragma once
// A stored state as bytes, apart from engine and device: what a snapshot file holds (state_file.h).

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/cache_manager.h"

namespace godwit {

// What the draft model's bookkeeping knows of a sequence (SpeculativeDecoder).
struct DraftImage {
  int64_t position = 0;         // tokens that the draft has read
  int64_t base = 0;             // of its lightning state
  std::vector<int32_t> unread;  // tokens after that which it has not
};

// Immutable once made; shared between threads.
struct StateImage {
  int64_t position = 0;     // tokens in the state
  int64_t base = 0;         // where the lightning bases stand, a multiple of kWindow
  int32_t last_token = -1;  // drawn, not in the state; -1: none
  std::optional<DraftImage> draft;
  // Component by component in the order of the geometry: base, rows of the ring up to the position
  // or the ring's end, blocks (StateBytes of the manager in all). What an engine exports has zeros
  // in rows of no token in [base, position), the draft's in [its base, its position). The same
  // layout on every device: a block is [2, num_kv_heads, kPagedBlock, head_dim], keys, then values.
  std::shared_ptr<const char[]> bytes;
  int64_t num_bytes = 0;
};

}  // namespace godwit
