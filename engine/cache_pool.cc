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
          visit(storage.bases.bytes() + slot * component.base_bytes, component.base_bytes));
    }
    if (component.windowed() && live_rows > 0) {
      RETURN_IF_ERROR(
          visit(storage.windows.bytes() + slot * geometry_.window_rows * component.row_bytes,
                live_rows * component.row_bytes));
    }
    if (!component.paged()) continue;
    const int64_t block_bytes = kPagedBlock * component.row_bytes;
    for (const int32_t block : blocks) {
      RETURN_IF_ERROR(visit(storage.blocks.bytes() + block * block_bytes, block_bytes));
    }
  }
  return absl::OkStatus();
}

absl::Status CachePool::Fork(const CacheCopy& copy) {
  std::vector<CopyRange> ranges;
  RETURN_IF_ERROR(ForEachRange(copy.from_slot, copy.from_blocks, copy.position,
                               [&](char* data, int64_t num_bytes) {
                                 ranges.push_back({.from = data, .num_bytes = num_bytes});
                                 return absl::OkStatus();
                               }));
  size_t next = 0;
  RETURN_IF_ERROR(
      ForEachRange(copy.to_slot, copy.to_blocks, copy.position, [&](char* data, int64_t num_bytes) {
        CopyRange& range = ranges[next++];
        GODWIT_CHECK(range.num_bytes == num_bytes);
        range.to = data;
        return absl::OkStatus();
      }));
  return ToStatus(backend_.CopyRanges(ranges.data(), std::ssize(ranges)));
}

absl::Status CachePool::ToHost(const CacheCopy& copy) {
  int64_t total = 0;
  const auto count = [&](char*, int64_t num_bytes) {
    total += num_bytes;
    return absl::OkStatus();
  };
  RETURN_IF_ERROR(ForEachRange(copy.from_slot, copy.from_blocks, copy.position, count));
  std::shared_ptr<char[]> bytes(new (std::nothrow) char[static_cast<size_t>(total)]);
  if (bytes == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no host memory for a state of ", FormatBytes(total)));
  }
  int64_t offset = 0;
  RETURN_IF_ERROR(ForEachRange(copy.from_slot, copy.from_blocks, copy.position,
                               [&](char* data, int64_t num_bytes) {
                                 char* to = bytes.get() + std::exchange(offset, offset + num_bytes);
                                 return ToStatus(backend_.CopyToHost(to, data, num_bytes));
                               }));
  RETURN_IF_ERROR(backend_.Synchronize());
  host_copies_[copy.host_id] = {.bytes = std::move(bytes), .num_bytes = total};
  return absl::OkStatus();
}

void CachePool::ZeroBlockFrom(int64_t first_row, const StateComponent& component,
                              const HeldRows& held, char* block) const {
  const int64_t plane_bytes = kPagedBlock * held.head_bytes;
  const int64_t num_planes = kPagedBlock * component.row_bytes / plane_bytes;  // keys, then values
  for (int64_t index = 0; index < num_planes; ++index) {
    const bool by_column = keys_by_column_ && index < num_planes / 2;
    const int64_t line_bytes = by_column ? kPagedBlock * held.element_bytes : plane_bytes;
    const int64_t begin = first_row * (by_column ? held.element_bytes : held.head_bytes);
    char* const plane = block + index * plane_bytes;
    for (char* line = plane; line < plane + plane_bytes; line += line_bytes) {
      std::memset(line + begin, 0, static_cast<size_t>(line_bytes - begin));
    }
  }
}

void CachePool::ZeroRowsNotHeld(const CacheCopy& copy, std::span<const HeldRows> held) {
  GODWIT_CHECK(std::ssize(held) == std::ssize(geometry_.components));
  const HostCopy& host = host_copy(copy.host_id);
  GODWIT_CHECK(host.bytes.use_count() == 1);
  char* at = std::const_pointer_cast<char[]>(host.bytes).get();
  const int64_t num_rows = std::min(copy.position, geometry_.window_rows);
  for (size_t index = 0; index < held.size(); ++index) {
    const StateComponent& component = geometry_.components[index];
    const auto& [begin, end, head_bytes, element_bytes] = held[index];
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
      if (num_held < kPagedBlock) ZeroBlockFrom(num_held, component, held[index], at);
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
      ForEachRange(copy.to_slot, copy.to_blocks, copy.position, [&](char* data, int64_t num_bytes) {
        const char* from = host.bytes.get() + std::exchange(offset, offset + num_bytes);
        GODWIT_CHECK(offset <= host.num_bytes);
        return ToStatus(backend_.CopyFromHost(data, from, num_bytes));
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
