#pragma once
// The bytes of all sequence states on one device, and the host copies of swapped ones.

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/cache_manager.h"
#include "kernels/backend.h"

namespace godwit {

class CachePool {
 public:
  // Allocates everything at once; RESOURCE_EXHAUSTED names the bytes by component.
  static absl::StatusOr<std::unique_ptr<CachePool>> Create(Backend& backend, const CacheGeometry& geometry);
  ~CachePool();

  // Storage of component i (index into geometry.components).
  void* bases(int component) const;    // [num_slots, base_bytes]
  void* windows(int component) const;  // [num_slots, window_rows, row_bytes]
  void* blocks(int component) const;   // [num_blocks, kPagedBlock * row_bytes]

  absl::Status ZeroSlot(int32_t slot);            // bases; in debug builds windows are filled with NaN
  absl::Status Copy(const CacheCopy& copy);       // base + live rows + blocks
  void DropHostCopies(std::span<const int64_t> host_ids);

 private:
  struct Storage;
  CachePool(Backend& backend, const CacheGeometry& geometry);
  Backend& backend_;
  CacheGeometry geometry_;
  std::vector<Storage> storage_;
  std::map<int64_t, std::vector<char>> host_copies_;
};

}  // namespace godwit
