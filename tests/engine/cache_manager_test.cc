#include "engine/cache_manager.h"

#include <algorithm>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/ops.h"

namespace godwit {
namespace {

constexpr int64_t kBaseBytes = 1000;
constexpr int64_t kWindowRowBytes = 8;
constexpr int64_t kKvRowBytes = 32;

StateComponent Lightning() {
  return {.name = "layers.0.lightning",
          .base_bytes = kBaseBytes,
          .row_bytes = kWindowRowBytes,
          .block = kWindow};
}
StateComponent Kv(const char* name) {
  return {.name = name, .row_bytes = kKvRowBytes, .retain = kRetainAll};
}

CacheGeometry HybridGeometry() {
  return {.components = {Lightning(), Kv("layers.1.kv"), Kv("layers.2.kv")},
          .window_rows = WindowRows(2, kMaxDraftTokens),
          .num_slots = 4,
          .num_blocks = 20,
          .swap_bytes = 100'000};
}

CacheGeometry SoftmaxGeometry() {
  return {
      .components = {Kv("layers.0.kv")}, .num_slots = 4, .num_blocks = 20, .swap_bytes = 100'000};
}

std::unique_ptr<CacheManager> MakeManager(CacheGeometry geometry) {
  auto manager = CacheManager::Create(std::move(geometry));
  EXPECT_TRUE(manager.ok()) << manager.status();
  return *std::move(manager);
}

CacheLease MustReserve(CacheManager& manager, int64_t num_tokens) {
  auto lease = manager.Reserve(num_tokens);
  EXPECT_TRUE(lease.ok()) << lease.status();
  return *std::move(lease);
}

TEST(CacheGeometryTest, WindowHoldsOpenBlockAndRowsInFlight) {
  EXPECT_EQ(WindowRows(1, 15), 15 + 2 * 16);
  EXPECT_EQ(WindowRows(2, 15), 15 + 3 * 16);
  EXPECT_EQ(WindowRows(1, 0), 15 + 2);
}

TEST(CacheGeometryTest, BytesFollowFromComponents) {
  const CacheGeometry geometry = HybridGeometry();
  EXPECT_EQ(geometry.slot_bytes(), kBaseBytes + geometry.window_rows * kWindowRowBytes);
  EXPECT_EQ(geometry.kv_bytes_per_token(), 2 * kKvRowBytes);
  EXPECT_EQ(geometry.block_bytes(), 16 * 2 * kKvRowBytes);
  EXPECT_EQ(geometry.blocks_for(0), 0);
  EXPECT_EQ(geometry.blocks_for(1), 1);
  EXPECT_EQ(geometry.blocks_for(16), 1);
  EXPECT_EQ(geometry.blocks_for(17), 2);
  EXPECT_EQ(geometry.bytes_per_sequence(17), geometry.slot_bytes() + 2 * geometry.block_bytes());
}

TEST(CacheGeometryTest, RecurrentModelNeedsNoBlocksAtAnyLength) {
  const CacheGeometry geometry = {.components = {Lightning()}, .window_rows = 63, .num_slots = 1};
  EXPECT_EQ(geometry.blocks_for(1'000'000'000), 0);
  EXPECT_EQ(geometry.bytes_per_sequence(1), geometry.bytes_per_sequence(1'000'000'000));
}

TEST(CacheManagerTest, CreateRefusesNoSlotsNoBlocksAndNegativeSwap) {
  CacheGeometry geometry = HybridGeometry();
  geometry.num_slots = 0;
  EXPECT_EQ(CacheManager::Create(geometry).status().code(), absl::StatusCode::kInvalidArgument);
  geometry = HybridGeometry();
  geometry.num_blocks = 0;
  EXPECT_EQ(CacheManager::Create(geometry).status().code(), absl::StatusCode::kInvalidArgument);
  geometry.num_blocks = -1;
  EXPECT_EQ(CacheManager::Create(geometry).status().code(), absl::StatusCode::kInvalidArgument);
  geometry = HybridGeometry();
  geometry.swap_bytes = -1;
  EXPECT_EQ(CacheManager::Create(geometry).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(CacheManagerTest, ReserveTakesOneSlotAndTheBlocksOfAllTokens) {
  auto manager = MakeManager(HybridGeometry());
  CacheLease lease = MustReserve(*manager, 33);
  EXPECT_TRUE(lease.resident());
  EXPECT_TRUE(lease.fresh());
  EXPECT_EQ(lease.reserved_tokens(), 33);
  EXPECT_EQ(lease.position(), 0);
  EXPECT_EQ(lease.blocks().size(), 3u);
  EXPECT_EQ(manager->free_slots(), 3);
  EXPECT_EQ(manager->free_blocks(), 17);
  lease.Release();
  EXPECT_FALSE(lease);
  EXPECT_EQ(manager->free_slots(), 4);
  EXPECT_EQ(manager->free_blocks(), 20);
  lease.Release();
  EXPECT_EQ(manager->free_slots(), 4);
}

TEST(CacheManagerTest, LeaseReturnsItsIdsWhenDestroyedOrAssigned) {
  auto manager = MakeManager(HybridGeometry());
  {
    CacheLease first = MustReserve(*manager, 16);
    CacheLease moved = std::move(first);
    EXPECT_FALSE(first);  // NOLINT: the state after a move is part of the contract
    EXPECT_FALSE(first.resident());
    EXPECT_TRUE(moved);
    moved = MustReserve(*manager, 32);
    EXPECT_EQ(manager->free_slots(), 3);
    EXPECT_EQ(manager->free_blocks(), 18);
  }
  EXPECT_EQ(manager->free_slots(), 4);
  EXPECT_EQ(manager->free_blocks(), 20);
}

TEST(CacheManagerTest, RefusedReservationChangesNothing) {
  auto manager = MakeManager(HybridGeometry());
  CacheLease lease = MustReserve(*manager, 16 * 18);
  const auto refused = manager->Reserve(16 * 2 + 1);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(refused.status().message(), testing::HasSubstr("needs 3 KV blocks, 2 of 20"));
  EXPECT_EQ(manager->free_slots(), 3);
  EXPECT_EQ(manager->free_blocks(), 2);
  std::vector<CacheLease> others;
  for (int i = 0; i < 3; ++i) others.push_back(MustReserve(*manager, 0));
  EXPECT_EQ(manager->Reserve(0).status().code(), absl::StatusCode::kResourceExhausted);
}

// A bounded sequence: 4 blocks of table and one behind them.
TEST(CacheManagerTest, ABoundedSequenceReusesItsBlocksAndKeepsTheFirst) {
  CacheGeometry geometry = SoftmaxGeometry();
  geometry.bound_tokens = 64;
  geometry.bound_beyond = 100;
  const auto manager = *CacheManager::Create(geometry);
  EXPECT_FALSE(MustReserve(*manager, 100).bounded());
  EXPECT_EQ(geometry.blocks_for(100), 7);
  EXPECT_EQ(geometry.blocks_for(101), 5);
  EXPECT_EQ(geometry.blocks_for(int64_t{1} << 40), 5);
  CacheLease lease = MustReserve(*manager, 1000);
  ASSERT_TRUE(lease.bounded());
  const std::vector<int32_t> first = lease.blocks();
  ASSERT_EQ(first.size(), 5u);
  for (int64_t position = 0; position < 64; ++position) {
    EXPECT_FALSE(lease.MakeRoom(position).has_value());
  }
  std::vector<int32_t> window = {first[1], first[2], first[3]};
  for (int64_t position = 64; position < 200; ++position) {
    const auto turn = lease.MakeRoom(position);
    EXPECT_EQ(turn.has_value(), position % 16 == 0) << position;
    EXPECT_EQ(lease.dropped(), position / 16 * 16 - 48) << position;
    if (!turn) continue;
    std::rotate(window.begin(), window.begin() + 1, window.end());
    EXPECT_EQ(turn->from_block, first[0]);
    EXPECT_EQ(turn->to_block, first[4]);
    EXPECT_EQ(turn->delta, lease.dropped());
    EXPECT_EQ(lease.blocks(),
              (std::vector<int32_t>{first[4], window[0], window[1], window[2], first[0]}));
    EXPECT_FALSE(lease.MakeRoom(position).has_value()) << "asked again";
  }
  lease.set_position(200);  // 56 are held: 4 blocks of table, and the first as it was
  const int64_t bytes = manager->SwapBytes(lease);
  const auto out = manager->SwapOut(lease);
  ASSERT_TRUE(out.ok());
  EXPECT_EQ(out->from_blocks.size(), 5u);
  EXPECT_EQ(out->from_blocks.back(), first[0]);
  EXPECT_EQ(bytes, 5 * geometry.block_bytes() + geometry.slot_bytes());
  const auto in = manager->SwapIn(lease);
  ASSERT_TRUE(in.ok());
  EXPECT_EQ(in->to_blocks, lease.blocks());
  EXPECT_EQ(lease.dropped(), 144);
}

TEST(CacheManagerTest, ABoundThatHoldsNoWindowIsRefused) {
  for (const auto& [tokens, beyond] : {std::pair(32, 100), {65, 100}, {112, 100}}) {
    CacheGeometry geometry = SoftmaxGeometry();
    geometry.bound_tokens = tokens;
    geometry.bound_beyond = beyond;
    EXPECT_EQ(CacheManager::Create(geometry).status().code(), absl::StatusCode::kInvalidArgument);
  }
}

TEST(CacheManagerTest, FitsIsExactAndFitsEverIgnoresWhatIsHeld) {
  auto manager = MakeManager(HybridGeometry());
  EXPECT_TRUE(manager->FitsEver(320, 1));
  EXPECT_FALSE(manager->FitsEver(321, 1));
  EXPECT_TRUE(manager->FitsEver(80, 4));
  EXPECT_FALSE(manager->FitsEver(81, 4));
  EXPECT_FALSE(manager->FitsEver(1, 5));
  EXPECT_FALSE(manager->FitsEver(std::numeric_limits<int64_t>::max(), 4));
  CacheLease lease = MustReserve(*manager, 160);
  EXPECT_TRUE(manager->Fits(160));
  EXPECT_FALSE(manager->Fits(161));
  EXPECT_TRUE(manager->Fits(48, 3));
  EXPECT_FALSE(manager->Fits(49, 3));
  EXPECT_FALSE(manager->Fits(1, 4));
  EXPECT_TRUE(manager->FitsEver(320));
}

TEST(CacheManagerTest, SwapOutFreesDeviceIdsAndCountsOnlyLiveBytes) {
  auto manager = MakeManager(HybridGeometry());
  CacheLease lease = MustReserve(*manager, 100);
  const std::vector<int32_t> blocks = lease.blocks();
  const int32_t slot = lease.slot();
  lease.set_position(20);
  const int64_t bytes = kBaseBytes + 20 * kWindowRowBytes + 2 * manager->geometry().block_bytes();
  EXPECT_EQ(manager->SwapBytes(lease), bytes);
  auto copy = manager->SwapOut(lease);
  ASSERT_TRUE(copy.ok());
  EXPECT_EQ(copy->kind, CacheCopy::Kind::kSwapOut);
  EXPECT_EQ(copy->from_slot, slot);
  EXPECT_THAT(copy->from_blocks, testing::ElementsAre(blocks[0], blocks[1]));
  EXPECT_EQ(copy->position, 20);
  EXPECT_TRUE(lease.swapped());
  EXPECT_FALSE(lease.resident());
  EXPECT_EQ(manager->free_slots(), 4);
  EXPECT_EQ(manager->free_blocks(), 20);
  EXPECT_EQ(manager->free_swap_bytes(), 100'000 - bytes);

  CacheLease other = MustReserve(*manager, 10);
  auto back = manager->SwapIn(lease);
  ASSERT_TRUE(back.ok());
  EXPECT_EQ(back->kind, CacheCopy::Kind::kSwapIn);
  EXPECT_EQ(back->host_id, copy->host_id);
  EXPECT_EQ(back->to_slot, lease.slot());
  EXPECT_NE(lease.slot(), other.slot());
  EXPECT_EQ(lease.blocks().size(), 7u);
  EXPECT_EQ(back->to_blocks.size(), 2u);
  EXPECT_EQ(lease.position(), 20);
  EXPECT_EQ(manager->free_swap_bytes(), 100'000);
  EXPECT_TRUE(manager->TakeReleasedHostIds().empty());
}

TEST(CacheManagerTest, SwapOutBeyondTheBudgetAndSwapInWithoutRoomChangeNothing) {
  CacheGeometry geometry = HybridGeometry();
  geometry.swap_bytes = kBaseBytes + 100 * kWindowRowBytes;
  auto manager = MakeManager(geometry);
  CacheLease lease = MustReserve(*manager, 320);
  lease.set_position(320);
  EXPECT_EQ(manager->SwapOut(lease).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(lease.resident());
  EXPECT_EQ(manager->free_blocks(), 0);
  lease.set_position(0);
  ASSERT_TRUE(manager->SwapOut(lease).ok());
  CacheLease other = MustReserve(*manager, 1);
  EXPECT_EQ(manager->SwapIn(lease).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(lease.swapped());
  EXPECT_EQ(manager->free_slots(), 3);
}

TEST(CacheManagerTest, SavedStateHasABudgetOfItsOwnAndTheLeaseKeepsAll) {
  CacheGeometry geometry = HybridGeometry();
  geometry.store_bytes = 5000;
  const auto manager = MakeManager(std::move(geometry));
  CacheLease lease = MustReserve(*manager, 40);
  lease.set_position(20);
  auto saved = manager->Save(lease, 20);
  ASSERT_TRUE(saved.ok());
  EXPECT_EQ(saved->state.num_bytes(), manager->SwapBytes(lease));
  EXPECT_EQ(saved->state.position(), 20);
  EXPECT_EQ(saved->copy.from_slot, lease.slot());
  EXPECT_EQ(saved->copy.from_blocks.size(), 2u);
  EXPECT_TRUE(lease.resident());
  EXPECT_EQ(lease.blocks().size(), 3u);
  EXPECT_EQ(manager->free_store_bytes(), 5000 - saved->state.num_bytes());
  EXPECT_EQ(manager->free_swap_bytes(), 100'000);

  auto refused = manager->Save(lease, 40);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(manager->free_store_bytes(), 5000 - saved->state.num_bytes());

  CacheLease other = MustReserve(*manager, 30);
  const CacheCopy load = manager->Load(saved->state, other);
  EXPECT_EQ(load.to_slot, other.slot());
  EXPECT_EQ(load.to_blocks.size(), 2u);
  EXPECT_EQ(load.host_id, saved->copy.host_id);
  EXPECT_FALSE(other.fresh());
  EXPECT_EQ(other.position(), 20);

  StoredState moved = std::move(saved->state);
  EXPECT_TRUE(manager->TakeReleasedHostIds().empty());
  moved.Release();
  EXPECT_FALSE(moved);
  EXPECT_EQ(manager->free_store_bytes(), 5000);
  EXPECT_THAT(manager->TakeReleasedHostIds(), testing::ElementsAre(load.host_id));
}

TEST(CacheManagerTest, ReleasedSwappedLeaseNamesItsHostIdOnce) {
  auto manager = MakeManager(HybridGeometry());
  CacheLease lease = MustReserve(*manager, 16);
  auto copy = manager->SwapOut(lease);
  ASSERT_TRUE(copy.ok());
  lease.Release();
  EXPECT_EQ(manager->free_swap_bytes(), 100'000);
  EXPECT_THAT(manager->TakeReleasedHostIds(), testing::ElementsAre(copy->host_id));
  EXPECT_TRUE(manager->TakeReleasedHostIds().empty());
}

// A model of what must hold, kept beside the manager under random operations.
class RandomOperations {
 public:
  explicit RandomOperations(uint64_t seed)
      : random_(seed), manager_(MakeManager(HybridGeometry())) {}

  void Step() {
    switch (Draw(0, 4)) {
      case 0:
      case 1:
        Reserve();
        break;
      case 2:
        Release();
        break;
      case 3:
        Swap();
        break;
      case 4:
        Advance();
        break;
    }
    Check();
  }

 private:
  int64_t Draw(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }

  void Reserve() {
    const int64_t num_tokens = Draw(0, 150);
    const bool fits = manager_->Fits(num_tokens);
    auto lease = manager_->Reserve(num_tokens);
    ASSERT_EQ(lease.ok(), fits);
    if (lease.ok()) leases_.push_back(*std::move(lease));
  }

  void Release() {
    if (leases_.empty()) return;
    std::swap(leases_[static_cast<size_t>(Draw(0, std::ssize(leases_) - 1))], leases_.back());
    leases_.pop_back();
  }

  void Swap() {
    if (leases_.empty()) return;
    CacheLease& lease = leases_[static_cast<size_t>(Draw(0, std::ssize(leases_) - 1))];
    if (lease.resident()) {
      const bool fits = manager_->SwapBytes(lease) <= manager_->free_swap_bytes();
      ASSERT_EQ(manager_->SwapOut(lease).ok(), fits);
    } else {
      const bool fits = manager_->Fits(lease.reserved_tokens());
      ASSERT_EQ(manager_->SwapIn(lease).ok(), fits);
    }
  }

  void Advance() {
    if (leases_.empty()) return;
    CacheLease& lease = leases_[static_cast<size_t>(Draw(0, std::ssize(leases_) - 1))];
    if (lease.resident()) lease.set_position(Draw(lease.position(), lease.reserved_tokens()));
  }

  void Check() {
    std::set<int32_t> slots, blocks;
    int64_t num_slots = 0, num_blocks = 0, swap_bytes = 0;
    for (const CacheLease& lease : leases_) {
      ASSERT_NE(lease.resident(), lease.swapped());
      if (lease.swapped()) swap_bytes += manager_->SwapBytes(lease);
      if (!lease.resident()) continue;
      ++num_slots;
      slots.insert(lease.slot());
      num_blocks += std::ssize(lease.blocks());
      blocks.insert(lease.blocks().begin(), lease.blocks().end());
      ASSERT_EQ(std::ssize(lease.blocks()), (lease.reserved_tokens() + 15) / 16);
    }
    ASSERT_EQ(std::ssize(slots), num_slots);
    ASSERT_EQ(std::ssize(blocks), num_blocks);
    const CacheGeometry& geometry = manager_->geometry();
    ASSERT_EQ(num_slots + manager_->free_slots(), geometry.num_slots);
    ASSERT_EQ(num_blocks + manager_->free_blocks(), geometry.num_blocks);
    ASSERT_EQ(swap_bytes + manager_->free_swap_bytes(), geometry.swap_bytes);
    if (leases_.empty()) {
      const int64_t num_tokens = Draw(0, 400), count = Draw(1, 5);
      ASSERT_EQ(manager_->Fits(num_tokens, count), manager_->FitsEver(num_tokens, count));
    }
  }

  std::mt19937_64 random_;
  std::unique_ptr<CacheManager> manager_;
  std::vector<CacheLease> leases_;
};

TEST(CacheManagerTest, RandomOperationsNeverHandOutAnIdTwiceAndConserveTotals) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    RandomOperations operations(seed);
    for (int step = 0; step < 2000; ++step) {
      operations.Step();
      if (testing::Test::HasFatalFailure()) return;
    }
  }
}

CacheGeometry GeometryWithSnapshots(int64_t num_snapshots) {
  CacheGeometry geometry = HybridGeometry();
  geometry.num_snapshots = num_snapshots;
  return geometry;
}

TEST(CacheSnapshotTest, SharesWholeBlocksAndHasASlotBehindThoseOfSequences) {
  const auto manager = MakeManager(GeometryWithSnapshots(2));
  CacheLease lease = MustReserve(*manager, 100);
  const std::vector<int32_t> blocks = lease.blocks();
  auto taken = manager->TakeSnapshot(lease, 64);
  ASSERT_TRUE(taken.ok()) << taken.status();
  EXPECT_EQ(taken->snapshot.position(), 64);
  EXPECT_EQ(taken->snapshot.slot(), 4);
  EXPECT_EQ(taken->copy.kind, CacheCopy::Kind::kFork);
  EXPECT_EQ(taken->copy.from_slot, lease.slot());
  EXPECT_EQ(taken->copy.to_slot, 4);
  EXPECT_EQ(taken->copy.position, 64);
  EXPECT_TRUE(taken->copy.from_blocks.empty() && taken->copy.to_blocks.empty());
  EXPECT_EQ(taken->snapshot.blocks(), std::vector<int32_t>(blocks.begin(), blocks.begin() + 4));
  EXPECT_EQ(manager->free_snapshots(), 1);
  EXPECT_EQ(manager->free_blocks(), 20 - 7);
  EXPECT_EQ(manager->NumOwnBlocks(lease), 7);  // those of the snapshot would be idle
  EXPECT_EQ(manager->idle_blocks(), 0);

  // What the sequence shares outlives it.
  lease.Release();
  EXPECT_EQ(manager->free_blocks(), 20 - 4);
  EXPECT_EQ(manager->idle_blocks(), 4);

  auto started = manager->ReserveFrom(taken->snapshot, 90);
  ASSERT_TRUE(started.ok()) << started.status();
  EXPECT_FALSE(started->lease.fresh());
  EXPECT_EQ(started->lease.position(), 64);
  EXPECT_EQ(started->lease.reserved_tokens(), 90);
  EXPECT_EQ(started->copy.from_slot, 4);
  EXPECT_EQ(started->copy.to_slot, started->lease.slot());
  ASSERT_EQ(std::ssize(started->lease.blocks()), 6);
  EXPECT_TRUE(std::equal(blocks.begin(), blocks.begin() + 4, started->lease.blocks().begin()));
  EXPECT_EQ(manager->NumUsers(started->lease.blocks()[3]), 2);
  EXPECT_EQ(manager->NumUsers(started->lease.blocks()[4]), 1);  // the next token goes there
  EXPECT_EQ(manager->idle_blocks(), 0);
  EXPECT_EQ(manager->free_blocks(), 20 - 6);
  auto second = manager->ReserveFrom(taken->snapshot, 65);
  ASSERT_TRUE(second.ok());
  EXPECT_EQ(manager->NumOwnBlocks(started->lease), 2);
  second->lease.Release();

  taken->snapshot.Release();
  EXPECT_EQ(manager->free_snapshots(), 2);
  EXPECT_EQ(manager->free_blocks(), 20 - 6);
  started->lease.Release();
  EXPECT_EQ(manager->free_blocks(), 20);
}

TEST(CacheSnapshotTest, WithoutRoomNothingChanges) {
  const auto manager = MakeManager(GeometryWithSnapshots(1));
  CacheLease lease = MustReserve(*manager, 160);
  auto taken = manager->TakeSnapshot(lease, 128);
  ASSERT_TRUE(taken.ok());
  EXPECT_TRUE(absl::IsResourceExhausted(manager->TakeSnapshot(lease, 144).status()));
  // 10 blocks are free, 8 shared.
  EXPECT_FALSE(manager->Fits(18 * 16 + 1, 1, 8));
  EXPECT_TRUE(
      absl::IsResourceExhausted(manager->ReserveFrom(taken->snapshot, 18 * 16 + 1).status()));
  EXPECT_EQ(manager->free_slots(), 3);
  EXPECT_EQ(manager->free_blocks(), 10);
  EXPECT_TRUE(manager->Fits(18 * 16, 1, 8));
  EXPECT_FALSE(manager->Fits(18 * 16));
  EXPECT_TRUE(manager->ReserveFrom(taken->snapshot, 18 * 16).ok());
}

TEST(CacheSnapshotTest, ASwappedLeaseGivesUpItsShareAndComesBackWithBlocksOfItsOwn) {
  const auto manager = MakeManager(GeometryWithSnapshots(1));
  CacheLease lease = MustReserve(*manager, 80);
  lease.set_position(64);
  auto taken = manager->TakeSnapshot(lease, 64);
  ASSERT_TRUE(taken.ok());
  const auto out = manager->SwapOut(lease);
  ASSERT_TRUE(out.ok());
  EXPECT_EQ(out->from_blocks, taken->snapshot.blocks());
  EXPECT_EQ(manager->idle_blocks(), 4);
  EXPECT_EQ(manager->free_blocks(), 16);
  ASSERT_TRUE(manager->SwapIn(lease).ok());
  for (const int32_t block : lease.blocks()) EXPECT_EQ(manager->NumUsers(block), 1);
  EXPECT_EQ(manager->free_blocks(), 11);
}

// Against a count of who holds which block.
TEST(CacheSnapshotTest, RandomSharingConservesBlocks) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937_64 random(seed);
    const auto draw = [&](int64_t low, int64_t high) {
      return low + static_cast<int64_t>(random() % static_cast<uint64_t>(high - low + 1));
    };
    CacheGeometry geometry = GeometryWithSnapshots(3);
    geometry.num_blocks = 40;
    geometry.swap_bytes = 1 << 20;
    const auto manager = MakeManager(geometry);
    std::vector<CacheLease> leases;
    std::vector<CacheSnapshot> snapshots;
    const auto take_out = [&](auto& from) {
      std::swap(from[static_cast<size_t>(draw(0, std::ssize(from) - 1))], from.back());
      from.pop_back();
    };
    for (int step = 0; step < 3000; ++step) {
      const int64_t what = draw(0, 6);
      if (what == 0) {
        if (auto lease = manager->Reserve(draw(1, 300)); lease.ok()) {
          leases.push_back(*std::move(lease));
        }
      } else if (what == 1 && !leases.empty()) {
        take_out(leases);
      } else if (what == 2 && !leases.empty()) {
        const CacheLease& lease = leases[static_cast<size_t>(draw(0, std::ssize(leases) - 1))];
        const int64_t most = lease.reserved_tokens() / 16 * 16;
        if (!lease.resident() || most < std::max<int64_t>(lease.position(), 16)) continue;
        const int64_t position =
            draw((std::max<int64_t>(lease.position(), 1) + 15) / 16, most / 16) * 16;
        if (auto taken = manager->TakeSnapshot(lease, position); taken.ok()) {
          snapshots.push_back(std::move(taken->snapshot));
        }
      } else if (what == 3 && !snapshots.empty()) {
        take_out(snapshots);
      } else if (what == 4 && !snapshots.empty()) {
        const CacheSnapshot& from =
            snapshots[static_cast<size_t>(draw(0, std::ssize(snapshots) - 1))];
        const int64_t num_tokens = from.position() + draw(1, 100);
        const auto num_shared = std::ssize(from.blocks());
        const bool fits = manager->Fits(num_tokens, 1, num_shared);
        auto started = manager->ReserveFrom(from, num_tokens);
        ASSERT_EQ(started.ok(), fits);
        if (started.ok()) leases.push_back(std::move(started->lease));
      } else if (what == 5 && !leases.empty()) {
        CacheLease& lease = leases[static_cast<size_t>(draw(0, std::ssize(leases) - 1))];
        ASSERT_TRUE(!lease.swapped() || manager->SwapIn(lease).ok() ||
                    !manager->Fits(lease.reserved_tokens()));
      } else if (what == 6 && !leases.empty()) {
        CacheLease& lease = leases[static_cast<size_t>(draw(0, std::ssize(leases) - 1))];
        ASSERT_TRUE(!lease.resident() || manager->SwapOut(lease).ok());
      }
      std::vector<int> num_leases(40), num_snapshots(40);
      for (const CacheLease& lease : leases) {
        for (const int32_t block : lease.blocks()) ++num_leases[static_cast<size_t>(block)];
      }
      for (const CacheSnapshot& snapshot : snapshots) {
        for (const int32_t block : snapshot.blocks()) ++num_snapshots[static_cast<size_t>(block)];
      }
      int64_t num_free = 0, num_idle = 0;
      for (size_t block = 0; block < 40; ++block) {
        const int users = num_leases[block] + num_snapshots[block];
        ASSERT_EQ(manager->NumUsers(static_cast<int32_t>(block)), users);
        num_free += users == 0;
        num_idle += num_leases[block] == 0 && num_snapshots[block] > 0;
      }
      ASSERT_EQ(manager->free_blocks(), num_free);
      ASSERT_EQ(manager->idle_blocks(), num_idle);
      ASSERT_EQ(manager->free_snapshots(), 3 - std::ssize(snapshots));
    }
  }
}

}  // namespace
}  // namespace godwit
