#include "engine/cache_manager.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"
#include "kernels/ops.h"

namespace godwit {
namespace {

// Ids first + n - 1 .. first, so that the lowest id is handed out first.
std::vector<int32_t> DescendingIds(int64_t count, int64_t first = 0) {
  std::vector<int32_t> ids(static_cast<size_t>(count));
  for (int64_t index = 0; index < count; ++index) {
    ids[static_cast<size_t>(index)] = static_cast<int32_t>(first + count - 1 - index);
  }
  return ids;
}

// count * each <= limit without overflow.
bool ProductFits(int64_t count, int64_t each, int64_t limit) {
  return each == 0 || count <= limit / each;
}

// The blocks that hold something, in the order in which they are copied.
std::vector<int32_t> BlocksInUse(const CacheLease& lease, const CacheGeometry& geometry) {
  const int64_t held = lease.position() - lease.dropped();
  const auto table = static_cast<std::ptrdiff_t>(geometry.blocks_for(held));
  std::vector<int32_t> blocks(lease.blocks().begin(), lease.blocks().begin() + table);
  if (lease.dropped() > 0) blocks.push_back(lease.blocks().back());
  return blocks;
}

std::vector<int32_t> FirstBlocks(const std::vector<int32_t>& blocks, int64_t count) {
  GODWIT_CHECK(count <= static_cast<int64_t>(blocks.size()));
  return {blocks.begin(), blocks.begin() + count};
}

}  // namespace

int64_t WindowRows(int max_steps_in_flight, int max_draft_tokens) {
  GODWIT_CHECK(max_steps_in_flight >= 1 && max_steps_in_flight <= kMaxStepsInFlight);
  GODWIT_CHECK(max_draft_tokens >= 0 && max_draft_tokens <= kMaxDraftTokens);
  return kWindow - 1 + int64_t{max_steps_in_flight + 1} * (max_draft_tokens + 1);
}

bool CacheGeometry::has_paged() const {
  return std::any_of(components.begin(), components.end(),
                     [](const StateComponent& component) { return component.paged(); });
}

int64_t CacheGeometry::slot_bytes() const {
  int64_t bytes = 0;
  for (const StateComponent& component : components) {
    bytes += component.base_bytes;
    if (component.windowed()) bytes += window_rows * component.row_bytes;
  }
  return bytes;
}

int64_t CacheGeometry::kv_bytes_per_token() const {
  int64_t bytes = 0;
  for (const StateComponent& component : components) {
    if (component.paged()) bytes += component.row_bytes;
  }
  return bytes;
}

int64_t CacheGeometry::block_bytes() const { return kPagedBlock * kv_bytes_per_token(); }

int64_t CacheGeometry::blocks_for(int64_t num_tokens) const {
  if (!has_paged()) return 0;
  if (bounds(num_tokens)) return bound_tokens / kPagedBlock + 1;
  return num_tokens / kPagedBlock + (num_tokens % kPagedBlock != 0);
}

int64_t CacheGeometry::BoundFor(int64_t window) {
  return (window + kPagedBlock - 1) / kPagedBlock * kPagedBlock + 2 * kPagedBlock;
}

int64_t CacheGeometry::dropped_after(int64_t num_tokens) const {
  const int64_t beyond = std::max<int64_t>(num_tokens - bound_tokens, 0);
  return (beyond + kPagedBlock - 1) / kPagedBlock * kPagedBlock;
}

int64_t CacheGeometry::bytes_per_sequence(int64_t num_tokens) const {
  return slot_bytes() + blocks_for(num_tokens) * block_bytes();
}

CacheLease::CacheLease(CacheLease&& other) noexcept { *this = std::move(other); }

CacheLease& CacheLease::operator=(CacheLease&& other) noexcept {
  if (this == &other) return *this;
  Release();
  manager_ = std::exchange(other.manager_, nullptr);
  slot_ = std::exchange(other.slot_, -1);
  fresh_ = std::exchange(other.fresh_, false);
  blocks_ = std::exchange(other.blocks_, {});
  reserved_tokens_ = std::exchange(other.reserved_tokens_, 0);
  position_ = std::exchange(other.position_, 0);
  bound_tokens_ = std::exchange(other.bound_tokens_, 0);
  dropped_ = std::exchange(other.dropped_, 0);
  host_id_ = std::exchange(other.host_id_, -1);
  host_bytes_ = std::exchange(other.host_bytes_, 0);
  return *this;
}

void CacheLease::Release() {
  if (manager_ == nullptr) return;
  manager_->Return(*this);
  manager_ = nullptr;
  fresh_ = false;
  reserved_tokens_ = 0;
  position_ = 0;
  bound_tokens_ = dropped_ = 0;
}

std::optional<SinkTurn> CacheLease::MakeRoom(int64_t position) {
  GODWIT_CHECK(bounded() && resident());
  if (position - dropped_ < bound_tokens_) return std::nullopt;
  if (dropped_ == 0) std::swap(blocks_.front(), blocks_.back());
  std::rotate(blocks_.begin() + 1, blocks_.begin() + 2, blocks_.end() - 1);
  dropped_ += kPagedBlock;
  GODWIT_CHECK(position - dropped_ < bound_tokens_);
  return SinkTurn{.from_block = blocks_.back(), .to_block = blocks_.front(), .delta = dropped_};
}

StoredState::StoredState(StoredState&& other) noexcept { *this = std::move(other); }

StoredState& StoredState::operator=(StoredState&& other) noexcept {
  if (this == &other) return *this;
  Release();
  manager_ = std::exchange(other.manager_, nullptr);
  host_id_ = std::exchange(other.host_id_, -1);
  position_ = std::exchange(other.position_, 0);
  num_bytes_ = std::exchange(other.num_bytes_, 0);
  return *this;
}

void StoredState::Release() {
  if (manager_ == nullptr) return;
  std::exchange(manager_, nullptr)->Return(*this);
  position_ = 0;
}

CacheSnapshot::CacheSnapshot(CacheSnapshot&& other) noexcept { *this = std::move(other); }

CacheSnapshot& CacheSnapshot::operator=(CacheSnapshot&& other) noexcept {
  if (this == &other) return *this;
  Release();
  manager_ = std::exchange(other.manager_, nullptr);
  slot_ = std::exchange(other.slot_, -1);
  blocks_ = std::exchange(other.blocks_, {});
  position_ = std::exchange(other.position_, 0);
  return *this;
}

void CacheSnapshot::Release() {
  if (manager_ == nullptr) return;
  std::exchange(manager_, nullptr)->Return(*this);
}

absl::StatusOr<std::unique_ptr<CacheManager>> CacheManager::Create(CacheGeometry geometry) {
  if (geometry.num_slots < 1 || geometry.num_slots > std::numeric_limits<int32_t>::max()) {
    return absl::InvalidArgumentError(
        absl::StrCat("number of state slots ", geometry.num_slots, " not in [1, 2^31 - 1]"));
  }
  if (geometry.num_blocks < 0 || geometry.num_blocks > std::numeric_limits<int32_t>::max()) {
    return absl::InvalidArgumentError(
        absl::StrCat("number of KV blocks ", geometry.num_blocks, " not in [0, 2^31 - 1]"));
  }
  if (geometry.has_paged() && geometry.num_blocks == 0) {
    return absl::InvalidArgumentError("a model with a KV cache needs at least 1 KV block, found 0");
  }
  if (geometry.bound_tokens != 0 &&
      (geometry.bound_tokens % kPagedBlock != 0 || geometry.bound_tokens < 3 * kPagedBlock ||
       geometry.bound_tokens > geometry.bound_beyond || !geometry.has_paged())) {
    return absl::InvalidArgumentError(
        absl::StrCat("bound of ", geometry.bound_tokens, " tokens beyond ", geometry.bound_beyond,
                     ": not a multiple of ", kPagedBlock, " in [", 3 * kPagedBlock, ", ",
                     geometry.bound_beyond, "], or no KV cache"));
  }
  if (geometry.swap_bytes < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("swap bytes ", geometry.swap_bytes, " not >= 0"));
  }
  if (geometry.store_bytes < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("store bytes ", geometry.store_bytes, " not >= 0"));
  }
  if (geometry.num_snapshots < 0 ||
      geometry.num_snapshots > std::numeric_limits<int32_t>::max() - geometry.num_slots) {
    return absl::InvalidArgumentError(absl::StrCat("number of snapshots ", geometry.num_snapshots,
                                                   " not in [0, 2^31 - 1 - ", geometry.num_slots,
                                                   " slots]"));
  }
  return std::unique_ptr<CacheManager>(new CacheManager(std::move(geometry)));
}

CacheManager::CacheManager(CacheGeometry geometry)
    : geometry_(std::move(geometry)),
      free_slots_(DescendingIds(geometry_.num_slots)),
      free_blocks_(DescendingIds(geometry_.has_paged() ? geometry_.num_blocks : 0)),
      free_snapshots_(DescendingIds(geometry_.num_snapshots, geometry_.num_slots)),
      block_users_(free_blocks_.size()) {}

bool CacheManager::Fits(int64_t num_tokens, int64_t count, int64_t num_shared) const {
  GODWIT_CHECK(num_tokens >= 0 && count >= 0 && num_shared >= 0);
  return count <= free_slots() &&
         ProductFits(count, geometry_.blocks_for(num_tokens), free_blocks() + num_shared);
}

bool CacheManager::FitsEver(int64_t num_tokens, int64_t count) const {
  GODWIT_CHECK(num_tokens >= 0 && count >= 0);
  return count <= geometry_.num_slots &&
         ProductFits(count, geometry_.blocks_for(num_tokens), geometry_.num_blocks);
}

void CacheManager::AddUsers(int32_t block, BlockUsers change) {
  BlockUsers& users = block_users_[static_cast<size_t>(block)];
  const bool was_idle = IsIdle(block);
  users.num_leases += change.num_leases;
  users.num_snapshots += change.num_snapshots;
  GODWIT_CHECK(users.num_leases >= 0 && users.num_snapshots >= 0);
  num_idle_blocks_ += static_cast<int64_t>(IsIdle(block)) - static_cast<int64_t>(was_idle);
}

int64_t CacheManager::NumUsers(int32_t block) const {
  return int64_t{users(block).num_leases} + users(block).num_snapshots;
}

bool CacheManager::IsIdle(int32_t block) const {
  return users(block).num_leases == 0 && users(block).num_snapshots > 0;
}

int64_t CacheManager::NumOwnBlocks(const CacheLease& lease) const {
  return std::count_if(lease.blocks().begin(), lease.blocks().end(),
                       [&](int32_t block) { return users(block).num_leases == 1; });
}

absl::Status CacheManager::Take(const std::vector<int32_t>& shared, int64_t num_blocks,
                                CacheLease& lease) {
  if (free_slots_.empty()) {
    return absl::ResourceExhaustedError(
        absl::StrCat("all ", geometry_.num_slots, " state slots are in use"));
  }
  if (num_blocks > free_blocks()) {
    return absl::ResourceExhaustedError(absl::StrCat("needs ", num_blocks, " KV blocks, ",
                                                     free_blocks(), " of ", geometry_.num_blocks,
                                                     " are free"));
  }
  lease.slot_ = free_slots_.back();
  free_slots_.pop_back();
  lease.blocks_ = shared;
  lease.blocks_.insert(lease.blocks_.end(), free_blocks_.rbegin(),
                       free_blocks_.rbegin() + num_blocks);
  free_blocks_.resize(free_blocks_.size() - static_cast<size_t>(num_blocks));
  for (const int32_t block : lease.blocks_) AddUsers(block, {.num_leases = 1});
  return absl::OkStatus();
}

absl::StatusOr<CacheLease> CacheManager::Reserve(int64_t num_tokens) {
  GODWIT_CHECK(num_tokens >= 0);
  CacheLease lease;
  RETURN_IF_ERROR(Take({}, geometry_.blocks_for(num_tokens), lease));
  lease.manager_ = this;
  lease.fresh_ = true;
  lease.reserved_tokens_ = num_tokens;
  lease.bound_tokens_ = geometry_.bounds(num_tokens) ? geometry_.bound_tokens : 0;
  return lease;
}

absl::StatusOr<CacheManager::Snapshot> CacheManager::TakeSnapshot(const CacheLease& lease,
                                                                  int64_t position) {
  GODWIT_CHECK(lease.manager_ == this);
  GODWIT_CHECK(lease.resident());
  GODWIT_CHECK(position > 0 && position % kPagedBlock == 0);
  GODWIT_CHECK(position >= lease.position_ && position <= lease.reserved_tokens_);
  GODWIT_CHECK(!lease.bounded());
  if (free_snapshots_.empty()) {
    return absl::ResourceExhaustedError(
        absl::StrCat("all ", geometry_.num_snapshots, " snapshots are in use"));
  }
  Snapshot taken;
  CacheSnapshot& snapshot = taken.snapshot;
  snapshot.manager_ = this;
  snapshot.slot_ = free_snapshots_.back();
  free_snapshots_.pop_back();
  snapshot.blocks_ = FirstBlocks(lease.blocks_, geometry_.blocks_for(position));
  for (const int32_t block : snapshot.blocks_) AddUsers(block, {.num_snapshots = 1});
  snapshot.position_ = position;
  taken.copy = {.kind = CacheCopy::Kind::kFork,
                .from_slot = lease.slot_,
                .to_slot = snapshot.slot_,
                .position = position};
  return taken;
}

absl::StatusOr<CacheManager::Started> CacheManager::ReserveFrom(const CacheSnapshot& snapshot,
                                                                int64_t num_tokens) {
  GODWIT_CHECK(snapshot.manager_ == this);
  GODWIT_CHECK(num_tokens > snapshot.position_ && !geometry_.bounds(num_tokens));
  Started started;
  const int64_t num_own = geometry_.blocks_for(num_tokens) - std::ssize(snapshot.blocks_);
  RETURN_IF_ERROR(Take(snapshot.blocks_, num_own, started.lease));
  started.lease.manager_ = this;
  started.lease.reserved_tokens_ = num_tokens;
  started.lease.position_ = snapshot.position_;
  started.copy = {.kind = CacheCopy::Kind::kFork,
                  .from_slot = snapshot.slot_,
                  .to_slot = started.lease.slot_,
                  .position = snapshot.position_};
  return started;
}

int64_t CacheManager::StateBytes(int64_t position) const {
  return StateBytes(geometry_.blocks_for(position), position);
}

int64_t CacheManager::SwapBytes(const CacheLease& lease) const {
  const int64_t held = lease.position() - lease.dropped();
  return StateBytes(geometry_.blocks_for(held) + (lease.dropped() > 0), lease.position());
}

int64_t CacheManager::StateBytes(int64_t num_blocks, int64_t position) const {
  int64_t bytes = num_blocks * geometry_.block_bytes();
  const int64_t live_rows = std::min(position, geometry_.window_rows);
  for (const StateComponent& component : geometry_.components) {
    bytes += component.base_bytes;
    if (component.windowed()) bytes += live_rows * component.row_bytes;
  }
  return bytes;
}

absl::StatusOr<CacheCopy> CacheManager::SwapOut(CacheLease& lease) {
  GODWIT_CHECK(lease.manager_ == this);
  GODWIT_CHECK(lease.resident());
  const int64_t bytes = SwapBytes(lease);
  if (bytes > free_swap_bytes()) {
    return absl::ResourceExhaustedError(
        absl::StrCat("needs ", bytes, " bytes of host memory for a preempted sequence, ",
                     free_swap_bytes(), " of ", geometry_.swap_bytes, " are free"));
  }
  CacheCopy copy{.kind = CacheCopy::Kind::kSwapOut,
                 .from_slot = lease.slot_,
                 .from_blocks = BlocksInUse(lease, geometry_),
                 .host_id = next_host_id_++,
                 .position = lease.position_};
  ReturnDeviceIds(lease);
  lease.host_id_ = copy.host_id;
  lease.host_bytes_ = bytes;
  used_swap_bytes_ += bytes;
  return copy;
}

absl::StatusOr<CacheCopy> CacheManager::SwapIn(CacheLease& lease) {
  GODWIT_CHECK(lease.manager_ == this);
  GODWIT_CHECK(lease.swapped());
  RETURN_IF_ERROR(Take({}, geometry_.blocks_for(lease.reserved_tokens_), lease));
  CacheCopy copy{.kind = CacheCopy::Kind::kSwapIn,
                 .to_slot = lease.slot_,
                 .to_blocks = BlocksInUse(lease, geometry_),
                 .host_id = std::exchange(lease.host_id_, -1),
                 .position = lease.position_};
  used_swap_bytes_ -= std::exchange(lease.host_bytes_, 0);
  return copy;
}

absl::StatusOr<StoredState> CacheManager::Store(int64_t position) {
  GODWIT_CHECK(position >= 1);
  const int64_t bytes = StateBytes(position);
  if (bytes > free_store_bytes()) {
    return absl::ResourceExhaustedError(
        absl::StrCat("needs ", bytes, " bytes of host memory for a stored state, ",
                     free_store_bytes(), " of ", geometry_.store_bytes, " are free"));
  }
  StoredState state;
  state.manager_ = this;
  state.host_id_ = next_host_id_++;
  state.position_ = position;
  state.num_bytes_ = bytes;
  used_store_bytes_ += bytes;
  return state;
}

absl::StatusOr<CacheManager::Saved> CacheManager::Save(const CacheLease& lease, int64_t position) {
  GODWIT_CHECK(lease.manager_ == this);
  GODWIT_CHECK(lease.resident());
  GODWIT_CHECK(position <= lease.reserved_tokens_);
  if (lease.dropped_ > 0) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the sequence has dropped ", lease.dropped_,
        " tokens (unlimited output): its state is not that of its text and is not saved"));
  }
  ASSIGN_OR_RETURN(StoredState state, Store(position));
  CacheCopy copy = SaveTo(state, lease);
  return Saved{std::move(state), std::move(copy)};
}

CacheCopy CacheManager::SaveTo(const StoredState& state, const CacheLease& lease) {
  GODWIT_CHECK(state.manager_ == this && lease.manager_ == this);
  GODWIT_CHECK(lease.dropped_ == 0);
  GODWIT_CHECK(lease.resident());
  return {.kind = CacheCopy::Kind::kSave,
          .from_slot = lease.slot_,
          .from_blocks = FirstBlocks(lease.blocks_, geometry_.blocks_for(state.position_)),
          .host_id = state.host_id_,
          .position = state.position_};
}

CacheCopy CacheManager::Fork(const CacheLease& from, CacheLease& lease) {
  GODWIT_CHECK(from.manager_ == this && lease.manager_ == this);
  GODWIT_CHECK(from.resident() && lease.resident() && lease.fresh_);
  GODWIT_CHECK(!from.bounded() && !lease.bounded());
  GODWIT_CHECK(from.position_ >= 1 && from.position_ <= lease.reserved_tokens_);
  lease.fresh_ = false;
  lease.position_ = from.position_;
  const int64_t num_blocks = geometry_.blocks_for(from.position_);
  return {.kind = CacheCopy::Kind::kFork,
          .from_slot = from.slot_,
          .to_slot = lease.slot_,
          .from_blocks = FirstBlocks(from.blocks_, num_blocks),
          .to_blocks = FirstBlocks(lease.blocks_, num_blocks),
          .position = from.position_};
}

CacheCopy CacheManager::Trim(CacheLease& lease, int64_t position, int32_t next_token,
                             std::vector<int32_t> dropped_tokens) {
  GODWIT_CHECK(lease.manager_ == this && lease.resident() && !lease.bounded());
  GODWIT_CHECK(position >= 1 && position <= lease.reserved_tokens_);
  const auto num_blocks = static_cast<size_t>(geometry_.blocks_for(position));
  ReturnBlocksAfter(num_blocks, lease);
  lease.reserved_tokens_ = position;
  lease.position_ = position;
  return {.kind = CacheCopy::Kind::kTrim,
          .from_slot = lease.slot_,
          .position = position,
          .next_token = next_token,
          .dropped_tokens = std::move(dropped_tokens)};
}

CacheCopy CacheManager::Load(const StoredState& state, CacheLease& lease) {
  GODWIT_CHECK(state.manager_ == this && lease.manager_ == this);
  GODWIT_CHECK(lease.resident() && lease.fresh_);
  GODWIT_CHECK(state.position_ <= lease.reserved_tokens_);
  GODWIT_CHECK(!lease.bounded() || state.position_ <= lease.bound_tokens_);
  lease.fresh_ = false;
  lease.position_ = state.position_;
  return {.kind = CacheCopy::Kind::kLoad,
          .to_slot = lease.slot_,
          .to_blocks = FirstBlocks(lease.blocks_, geometry_.blocks_for(state.position_)),
          .host_id = state.host_id_,
          .position = state.position_};
}

std::vector<int64_t> CacheManager::TakeReleasedHostIds() {
  return std::exchange(released_host_ids_, {});
}

void CacheManager::ReturnBlocksAfter(size_t num_kept, CacheLease& lease) {
  while (lease.blocks_.size() > num_kept) {
    const int32_t block = lease.blocks_.back();
    lease.blocks_.pop_back();
    AddUsers(block, {.num_leases = -1});
    if (NumUsers(block) == 0) free_blocks_.push_back(block);
  }
}

void CacheManager::ReturnDeviceIds(CacheLease& lease) {
  free_slots_.push_back(std::exchange(lease.slot_, -1));
  ReturnBlocksAfter(0, lease);
  GODWIT_CHECK(free_slots() <= geometry_.num_slots);
  GODWIT_CHECK(free_blocks() <= geometry_.num_blocks);
}

void CacheManager::Return(CacheLease& lease) {
  if (lease.resident()) {
    ReturnDeviceIds(lease);
    return;
  }
  used_swap_bytes_ -= std::exchange(lease.host_bytes_, 0);
  GODWIT_CHECK(used_swap_bytes_ >= 0);
  released_host_ids_.push_back(std::exchange(lease.host_id_, -1));
}

void CacheManager::Return(StoredState& state) {
  used_store_bytes_ -= std::exchange(state.num_bytes_, 0);
  GODWIT_CHECK(used_store_bytes_ >= 0);
  released_host_ids_.push_back(std::exchange(state.host_id_, -1));
}

void CacheManager::Return(CacheSnapshot& snapshot) {
  free_snapshots_.push_back(std::exchange(snapshot.slot_, -1));
  for (auto block = snapshot.blocks_.rbegin(); block != snapshot.blocks_.rend(); ++block) {
    AddUsers(*block, {.num_snapshots = -1});
    if (NumUsers(*block) == 0) free_blocks_.push_back(*block);
  }
  snapshot.blocks_.clear();
  snapshot.position_ = 0;
  GODWIT_CHECK(free_snapshots() <= geometry_.num_snapshots);
  GODWIT_CHECK(free_blocks() <= geometry_.num_blocks);
}

}  // namespace godwit
