#pragma once
// The bytes of all sequence states on one device, and the host copies of swapped and stored ones.

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/cache_manager.h"
#include "kernels/backend.h"

namespace godwit {

class CachePool {
 public:
  // Allocates everything at once; RESOURCE_EXHAUSTED names the bytes by component.
  static absl::StatusOr<std::unique_ptr<CachePool>> Create(Backend& backend, const CacheGeometry& geometry);
  ~CachePool();

  const CacheGeometry& geometry() const { return geometry_; }

  // Storage of component i (index into geometry.components). The slots of snapshots follow those of
  // sequences.
  void* bases(int component) const;    // [num_slots, base_bytes]
  void* windows(int component) const;  // [num_slots, window_rows, row_bytes]
  void* blocks(int component) const;   // [num_blocks, kPagedBlock * row_bytes]

  // Bases; in debug builds windows are filled with NaN.
  absl::Status ZeroSlots(std::span<const int32_t> slots);

  // Bases, rows that were written, blocks. A swap-out or save keeps the bytes under host_id until swapped in or dropped;
  // RESOURCE_EXHAUSTED without host memory for them. A swapped state comes back to this pool and keeps the device's layout;
  // what a save keeps and a load reads is the same on every device (StateImage).
  absl::Status Copy(const CacheCopy& copy);
  // The bytes under a host id, shared with whoever keeps them; and the other way, bytes of that many tokens made elsewhere.
  struct HostCopy {
    std::shared_ptr<const char[]> bytes;
    int64_t num_bytes = 0;
  };
  const HostCopy& host_copy(int64_t host_id) const;
  // What a state holds in a component's rows: those of tokens [begin, end).
  struct HeldRows {
    int64_t begin = 0, end = 0;
  };
  // Zeros all rows but those held (one HeldRows a component) in what a kSave just copied: the others are never read, but
  // may be rejected drafts or another sequence's, and the copy may leave the engine. Before anyone shares the bytes.
  void ZeroRowsNotHeld(const CacheCopy& copy, std::span<const HeldRows> held);
  void Adopt(int64_t host_id, HostCopy copy) { host_copies_[host_id] = std::move(copy); }
  int64_t num_host_copies() const { return static_cast<int64_t>(host_copies_.size()); }
  void DropHostCopies(std::span<const int64_t> host_ids);

 private:
  struct Storage;
  CachePool(Backend& backend, const CacheGeometry& geometry);

  // One range of the device that a state occupies.
  struct Range {
    char* data = nullptr;
    int64_t num_bytes = 0;
    const StateComponent* block_of = nullptr;  // a KV block of this component
  };
  // Calls visit(range) for each that a state at `position` occupies, in one fixed order.
  template <typename Visit>
  absl::Status ForEachRange(int32_t slot, std::span<const int32_t> blocks, int64_t position, const Visit& visit) const;
  absl::Status Fork(const CacheCopy& copy);
  absl::Status ToHost(const CacheCopy& copy);
  absl::Status FromHost(const CacheCopy& copy);

  Backend& backend_;
  CacheGeometry geometry_;
  // Keys of a block are [head_dim, kPagedBlock] a head, as the CPU keeps them (kernels/cpu/paged_attention.cc); else they
  // are [kPagedBlock, head_dim], as values are everywhere and as keys are in an image.
  bool keys_by_column_;
  std::vector<char> turned_block_;  // scratch of one
  std::vector<Storage> storage_;              // per component
  std::vector<ByteRange> zeroed_;             // of ZeroSlots: kept for its memory
  std::vector<char> poison_;                  // NaNs for one window; empty in release builds
  std::map<int64_t, HostCopy> host_copies_;
};

}  // namespace godwit
