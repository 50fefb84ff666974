#include "engine/cache_pool.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <new>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/device_buffer.h"
#include "engine/memory_plan.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"
#include "kernels/ops.h"

namespace godwit {
namespace {

// All ones is a NaN in bf16 and in f32: a row that is read before it is written shows in the first
// output.
constexpr int kPoison = 0xff;

template <typename Element>
void Transpose(const char* from, int64_t rows, int64_t columns, char* to) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      std::memcpy(to + (column * rows + row) * int64_t{sizeof(Element)},
                  from + (row * columns + column) * int64_t{sizeof(Element)}, sizeof(Element));
    }
  }
}

// A block with its keys transposed, a head at a time; its values as they are. To columns: from
// [kPagedBlock, head_dim] to [head_dim, kPagedBlock].
void TurnBlock(const StateComponent& component, const char* from, bool to_columns, char* to) {
  const int64_t head_dim = component.head_bytes / component.element_bytes;
  const int64_t rows = to_columns ? kPagedBlock : head_dim;
  const int64_t columns = to_columns ? head_dim : kPagedBlock;
  const int64_t plane_bytes = kPagedBlock * component.head_bytes;
  const int64_t half_bytes = kPagedBlock * component.row_bytes / 2;
  for (int64_t at = 0; at < half_bytes; at += plane_bytes) {
    if (component.element_bytes == 2) Transpose<uint16_t>(from + at, rows, columns, to + at);
    if (component.element_bytes == 4) Transpose<uint32_t>(from + at, rows, columns, to + at);
  }
  std::memcpy(to + half_bytes, from + half_bytes, static_cast<size_t>(half_bytes));
}

// Rows of a block in an image: a head's lie together, keys and values alike.
void ZeroBlockFrom(int64_t first_row, const StateComponent& component, char* block) {
  const int64_t plane_bytes = kPagedBlock * component.head_bytes;
  const int64_t begin = first_row * component.head_bytes;
  for (int64_t at = 0; at < kPagedBlock * component.row_bytes; at += plane_bytes) {
    std::memset(block + at + begin, 0, static_cast<size_t>(plane_bytes - begin));
  }
}

bool PoisonsWindows() {
  bool debug_build = false;
  assert((debug_build = true));
  return debug_build;
}

}  // namespace

struct CachePool::Storage {
  DeviceBuffer bases, windows, blocks;
};

CachePool::CachePool(Backend& backend, const CacheGeometry& geometry)
    : backend_(backend),
      geometry_(geometry),
      keys_by_column_(std::string_view(backend.Info().name) == "cpu") {}

CachePool::~CachePool() = default;

absl::StatusOr<std::unique_ptr<CachePool>> CachePool::Create(Backend& backend,
                                                             const CacheGeometry& geometry) {
  std::unique_ptr<CachePool> pool(new CachePool(backend, geometry));
  const auto allocate = [&](int64_t num_bytes, DeviceBuffer& buffer) -> absl::Status {
    absl::StatusOr<DeviceBuffer> allocated = DeviceBuffer::Allocate(backend, num_bytes);
    if (allocated.ok()) {
      buffer = *std::move(allocated);
      return absl::OkStatus();
    }
    return absl::Status(
        allocated.status().code(),
        absl::StrCat("sequence states (", Describe(geometry), "): ", allocated.status().message()));
  };
  const int64_t num_slots = geometry.num_slots + geometry.num_snapshots;
  for (const StateComponent& component : geometry.components) {
    if (component.paged()) {
      GODWIT_CHECK(component.element_bytes == 2 || component.element_bytes == 4);
      GODWIT_CHECK(component.head_bytes > 0 && component.head_bytes % component.element_bytes == 0);
      GODWIT_CHECK(component.row_bytes % (2 * component.head_bytes) == 0);
    }
    Storage& storage = pool->storage_.emplace_back();
    RETURN_IF_ERROR(allocate(num_slots * component.base_bytes, storage.bases));
    if (component.windowed()) {
      RETURN_IF_ERROR(
          allocate(num_slots * geometry.window_rows * component.row_bytes, storage.windows));
    }
    if (component.paged()) {
      RETURN_IF_ERROR(
          allocate(geometry.num_blocks * kPagedBlock * component.row_bytes, storage.blocks));
    }
  }
  if (PoisonsWindows()) {
    int64_t most = 0;
    for (const StateComponent& component : geometry.components) {
      if (component.windowed()) most = std::max(most, geometry.window_rows * component.row_bytes);
    }
    pool->poison_.assign(static_cast<size_t>(most), static_cast<char>(kPoison));
  }
  return pool;
}

void* CachePool::bases(int component) const {
  return storage_[static_cast<size_t>(component)].bases.bytes();
}
void* CachePool::windows(int component) const {
  return storage_[static_cast<size_t>(component)].windows.bytes();
}
void* CachePool::blocks(int component) const {
  return storage_[static_cast<size_t>(component)].blocks.bytes();
}

absl::Status CachePool::ZeroSlots(std::span<const int32_t> slots) {
  zeroed_.clear();
  for (const int32_t slot : slots) {
    GODWIT_CHECK(slot >= 0 && slot < geometry_.num_slots);
    for (size_t index = 0; index < storage_.size(); ++index) {
      const StateComponent& component = geometry_.components[index];
      if (component.base_bytes > 0) {
        zeroed_.push_back(
            {storage_[index].bases.bytes() + slot * component.base_bytes, component.base_bytes});
      }
      if (component.windowed() && !poison_.empty()) {
        const int64_t num_bytes = geometry_.window_rows * component.row_bytes;
        RETURN_IF_ERROR(backend_.CopyFromHost(storage_[index].windows.bytes() + slot * num_bytes,
                                              poison_.data(), num_bytes));
      }
    }
  }
  if (zeroed_.empty()) return absl::OkStatus();
  return ToStatus(backend_.FillZero(zeroed_.data(), std::ssize(zeroed_)));
}

template <typename Visit>
absl::Status CachePool::ForEachRange(int32_t slot, std::span<const int32_t> blocks,
                                     int64_t position, const Visit& visit) const {
  // Position p lies in ring row p % window_rows: up to a full ring, what was written is a prefix of
  // it.
  const int64_t live_rows = std::min(position, geometry_.window_rows);
  for (size_t index = 0; index < storage_.size(); ++index) {
    const StateComponent& component = geometry_.components[index];
    const Storage& storage = storage_[index];
    if (component.base_bytes > 0) {
      RETURN_IF_ERROR(
          visit(Range{storage.bases.bytes() + slot * component.base_bytes, component.base_bytes}));
    }
    if (component.windowed() && live_rows > 0) {
      RETURN_IF_ERROR(
          visit(Range{storage.windows.bytes() + slot * geometry_.window_rows * component.row_bytes,
                      live_rows * component.row_bytes}));
    }
    if (!component.paged()) continue;
    const int64_t block_bytes = kPagedBlock * component.row_bytes;
    for (const int32_t block : blocks) {
      RETURN_IF_ERROR(
          visit(Range{storage.blocks.bytes() + block * block_bytes, block_bytes, &component}));
    }
  }
  return absl::OkStatus();
}

absl::Status CachePool::Fork(const CacheCopy& copy) {
  std::vector<CopyRange> ranges;
  RETURN_IF_ERROR(
      ForEachRange(copy.from_slot, copy.from_blocks, copy.position, [&](const Range& range) {
        ranges.push_back({.from = range.data, .num_bytes = range.num_bytes});
        return absl::OkStatus();
      }));
  size_t next = 0;
  RETURN_IF_ERROR(
      ForEachRange(copy.to_slot, copy.to_blocks, copy.position, [&](const Range& range) {
        CopyRange& copied = ranges[next++];
        GODWIT_CHECK(copied.num_bytes == range.num_bytes);
        copied.to = range.data;
        return absl::OkStatus();
      }));
  return ToStatus(backend_.CopyRanges(ranges.data(), std::ssize(ranges)));
}

absl::Status CachePool::ToHost(const CacheCopy& copy) {
  int64_t total = 0;
  const auto count = [&](const Range& range) {
    total += range.num_bytes;
    return absl::OkStatus();
  };
  RETURN_IF_ERROR(ForEachRange(copy.from_slot, copy.from_blocks, copy.position, count));
  std::shared_ptr<char[]> bytes(new (std::nothrow) char[static_cast<size_t>(total)]);
  if (bytes == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no host memory for a state of ", FormatBytes(total)));
  }
  int64_t offset = 0;
  std::vector<Range> blocks_to_turn;
  const auto fetch = [&](const Range& range) {
    char* to = bytes.get() + std::exchange(offset, offset + range.num_bytes);
    if (range.block_of != nullptr && keys_by_column_ && copy.kind == CacheCopy::Kind::kSave) {
      blocks_to_turn.push_back({to, range.num_bytes, range.block_of});
    }
    return ToStatus(backend_.CopyToHost(to, range.data, range.num_bytes));
  };
  RETURN_IF_ERROR(ForEachRange(copy.from_slot, copy.from_blocks, copy.position, fetch));
  RETURN_IF_ERROR(backend_.Synchronize());
  for (const Range& range : blocks_to_turn) {
    turned_block_.assign(range.data, range.data + range.num_bytes);
    TurnBlock(*range.block_of, turned_block_.data(), false, range.data);
  }
  host_copies_[copy.host_id] = {.bytes = std::move(bytes), .num_bytes = total};
  return absl::OkStatus();
}

void CachePool::ZeroRowsNotHeld(const CacheCopy& copy, std::span<const HeldRows> held) {
  GODWIT_CHECK(std::ssize(held) == std::ssize(geometry_.components));
  const HostCopy& host = host_copy(copy.host_id);
  GODWIT_CHECK(host.bytes.use_count() == 1);
  char* at = std::const_pointer_cast<char[]>(host.bytes).get();
  const int64_t num_rows = std::min(copy.position, geometry_.window_rows);
  for (size_t index = 0; index < held.size(); ++index) {
    const StateComponent& component = geometry_.components[index];
    const auto& [begin, end] = held[index];
    GODWIT_CHECK(0 <= begin && begin <= end && end <= copy.position);
    at += component.base_bytes;
    if (component.windowed()) {
      GODWIT_CHECK(end - begin <= geometry_.window_rows);
      for (int64_t row = 0; row < num_rows; ++row, at += component.row_bytes) {
        // `begin` lies in row begin % window_rows, the tokens after it in those that follow.
        const int64_t place = row - begin % geometry_.window_rows;
        const int64_t offset = place < 0 ? place + geometry_.window_rows : place;
        if (offset >= end - begin) std::memset(at, 0, static_cast<size_t>(component.row_bytes));
      }
    }
    if (!component.paged()) continue;
    for (int64_t block = 0; block < std::ssize(copy.from_blocks); ++block) {
      const int64_t num_held = std::clamp<int64_t>(end - block * kPagedBlock, 0, kPagedBlock);
      if (num_held < kPagedBlock) ZeroBlockFrom(num_held, component, at);
      at += kPagedBlock * component.row_bytes;
    }
  }
  GODWIT_CHECK(at == host.bytes.get() + host.num_bytes);
}

absl::Status CachePool::FromHost(const CacheCopy& copy) {
  const auto found = host_copies_.find(copy.host_id);
  GODWIT_CHECK(found != host_copies_.end());
  const HostCopy& host = found->second;
  int64_t offset = 0;
  RETURN_IF_ERROR(
      ForEachRange(copy.to_slot, copy.to_blocks, copy.position, [&](const Range& range) {
        const char* from = host.bytes.get() + std::exchange(offset, offset + range.num_bytes);
        GODWIT_CHECK(offset <= host.num_bytes);
        if (range.block_of != nullptr && keys_by_column_ && copy.kind == CacheCopy::Kind::kLoad) {
          turned_block_.resize(static_cast<size_t>(range.num_bytes));
          TurnBlock(*range.block_of, from, true, turned_block_.data());
          from = turned_block_.data();  // read before CopyFromHost returns
        }
        return ToStatus(backend_.CopyFromHost(range.data, from, range.num_bytes));
      }));
  GODWIT_CHECK(offset == host.num_bytes);
  return absl::OkStatus();
}

absl::Status CachePool::Copy(const CacheCopy& copy) {
  switch (copy.kind) {
    case CacheCopy::Kind::kFork:
      return Fork(copy);
    case CacheCopy::Kind::kSwapOut:
    case CacheCopy::Kind::kSave:
      return ToHost(copy);
    case CacheCopy::Kind::kSwapIn:
      RETURN_IF_ERROR(FromHost(copy));
      host_copies_.erase(copy.host_id);
      return absl::OkStatus();
    case CacheCopy::Kind::kLoad:
      return FromHost(copy);
    case CacheCopy::Kind::kTrim:
      break;
  }
  return absl::OkStatus();
}

const CachePool::HostCopy& CachePool::host_copy(int64_t host_id) const {
  const auto found = host_copies_.find(host_id);
  GODWIT_CHECK(found != host_copies_.end());
  return found->second;
}

void CachePool::DropHostCopies(std::span<const int64_t> host_ids) {
  for (const int64_t host_id : host_ids) host_copies_.erase(host_id);
}

}  // namespace godwit
