#include "scheduler/session_table.h"

#include <algorithm>
#include <set>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace godwit {

int64_t SessionTable::position(SessionKey key) const {
  const auto found = sessions_.find(key);
  return found == sessions_.end() ? 0 : found->second->position;
}

SessionTable::Place SessionTable::place(SessionKey key) const {
  const auto found = sessions_.find(key);
  if (found == sessions_.end()) return Place::kNone;
  if (found->second->lease) return Place::kDevice;
  return found->second->stored ? Place::kHost : Place::kLost;
}

absl::StatusOr<SessionTable::Value*> SessionTable::Find(SessionKey key) {
  const auto found = sessions_.find(key);
  if (found == sessions_.end()) return absl::NotFoundError("the session has no state");
  Value& value = *found->second;
  if (!value.lease && !value.stored) {
    return absl::DataLossError("the session's state was given up: device and host memory are full");
  }
  value.last_use = next_use_++;
  return &value;
}

absl::Status SessionTable::Fork(SessionKey from, SessionKey to) {
  GODWIT_CHECK(!Has(to));
  RETURN_IF_ERROR(Find(from).status());
  sessions_[to] = sessions_.at(from);
  return absl::OkStatus();
}

SessionTable::Value* SessionTable::Oldest(bool on_device) const {
  Value* oldest = nullptr;
  for (const auto& [key, value] : sessions_) {
    if (!(on_device ? static_cast<bool>(value->lease) : static_cast<bool>(value->stored))) continue;
    // Not one that stays on the device for want of a place that is large enough.
    const bool fits = caches_.StateBytes(value->position) <= caches_.geometry().store_bytes;
    if (on_device && !may_drop_ && !fits) continue;
    if (oldest == nullptr || value->last_use < oldest->last_use) oldest = value.get();
  }
  return oldest;
}

// Room is made by giving up what was used longest ago, if that may be.
absl::StatusOr<StoredState> SessionTable::Store(int64_t position) {
  while (true) {
    absl::StatusOr<StoredState> stored = caches_.Store(position);
    if (stored.ok() || !may_drop_) return stored;
    if (caches_.StateBytes(position) > caches_.geometry().store_bytes) return stored;
    Value* oldest = Oldest(/*on_device=*/false);
    if (oldest == nullptr) return stored;
    oldest->stored.Release();
    ++counts_.num_dropped;
  }
}

absl::StatusOr<std::shared_ptr<const StateImage>> SessionTable::Export(SessionKey key,
                                                                       StepExecutor& executor) {
  ASSIGN_OR_RETURN(Value * value, Find(key));
  RETURN_IF_ERROR(Flush(executor));
  if (value->stored) return executor.ExportState(value->stored.host_id());
  // For the time of the copy only: the image outlives it.
  ASSIGN_OR_RETURN(StoredState stored, Store(value->position));
  const CacheCopy copy = caches_.SaveTo(stored, value->lease);
  RETURN_IF_ERROR(executor.Copy(std::span(&copy, 1)));
  return executor.ExportState(stored.host_id());
}

absl::Status SessionTable::Import(SessionKey key, int64_t position,
                                  std::shared_ptr<const StateImage> image, StepExecutor& executor) {
  ASSIGN_OR_RETURN(StoredState stored, Store(position));
  RETURN_IF_ERROR(executor.ImportState(stored.host_id(), std::move(image)));
  auto value = std::make_shared<Value>();
  value->position = position;
  value->stored = std::move(stored);
  value->last_use = next_use_++;
  sessions_[key] = std::move(value);
  return absl::OkStatus();
}

bool SessionTable::Begin(SessionKey key, CacheLease& lease, std::vector<CacheCopy>& copies) {
  const absl::StatusOr<Value*> found = Find(key);
  if (!found.ok()) return false;
  Value& value = **found;
  ++(value.lease ? counts_.num_from_device : counts_.num_from_host);
  copies.push_back(value.lease ? caches_.Fork(value.lease, lease)
                               : caches_.Load(value.stored, lease));
  return true;
}

void SessionTable::Keep(SessionKey key, CacheLease lease, int64_t position, int32_t next_token,
                        std::vector<int32_t> dropped) {
  copies_.push_back(caches_.Trim(lease, position, next_token, std::move(dropped)));
  auto value = std::make_shared<Value>();
  value->position = position;
  value->lease = std::move(lease);
  value->last_use = next_use_++;
  sessions_[key] = std::move(value);
  ++counts_.num_kept;
}

bool SessionTable::Evict(std::vector<CacheCopy>& copies) {
  Value* oldest = Oldest(/*on_device=*/true);
  if (oldest == nullptr) return false;
  absl::StatusOr<StoredState> stored = Store(oldest->position);
  wanted_bytes_ = stored.ok() || may_drop_ ? 0 : caches_.StateBytes(oldest->position);
  if (stored.ok()) {
    copies.push_back(caches_.SaveTo(*stored, oldest->lease));
    oldest->stored = *std::move(stored);
    ++counts_.num_to_host;
  } else if (may_drop_) {
    ++counts_.num_dropped;
  } else {
    return false;
  }
  oldest->lease.Release();
  return true;
}

void SessionTable::Lose(std::span<const CacheCopy> copies) {
  std::set<int64_t> host_ids;
  std::set<int32_t> slots;
  for (const CacheCopy& copy : copies) {
    if (copy.kind == CacheCopy::Kind::kSave) host_ids.insert(copy.host_id);
    if (copy.kind == CacheCopy::Kind::kTrim) slots.insert(copy.from_slot);
  }
  for (const auto& [key, value] : sessions_) {
    if (value->stored && host_ids.contains(value->stored.host_id())) value->stored.Release();
    if (value->lease && slots.contains(value->lease.slot())) value->lease.Release();
  }
}

absl::Status SessionTable::Flush(StepExecutor& executor) {
  if (copies_.empty()) return absl::OkStatus();
  const std::vector<CacheCopy> copies = TakeCopies();
  absl::Status status = executor.Copy(copies);
  if (!status.ok()) Lose(copies);
  return status;
}

SessionStats SessionTable::stats() const {
  SessionStats stats = counts_;
  stats.num_sessions = std::ssize(sessions_);
  stats.store_bytes_total = caches_.geometry().store_bytes;
  stats.store_bytes_wanted = wanted_bytes_;
  std::set<const Value*> seen;
  for (const auto& [key, value] : sessions_) {
    if (!seen.insert(value.get()).second) continue;
    stats.num_on_device += static_cast<bool>(value->lease);
    stats.num_on_host += static_cast<bool>(value->stored);
    stats.store_bytes_used += value->stored.num_bytes();
  }
  return stats;
}

}  // namespace godwit
