#include "engine/cache_pool.h"

#include <algorithm>
#include <cassert>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/ops.h"

namespace godwit {
namespace {

constexpr int64_t kBaseBytes = 256;
constexpr int64_t kWindowRowBytes = 24;
constexpr int64_t kHeadBytes = 10;
constexpr int64_t kKvRowBytes = 4 * kHeadBytes;  // two heads' keys, two heads' values

CacheGeometry Geometry() {
  return {.components = {{.name = "layers.0.lightning",
                          .base_bytes = kBaseBytes,
                          .row_bytes = kWindowRowBytes,
                          .block = kWindow},
                         {.name = "layers.1.kv",
                          .row_bytes = kKvRowBytes,
                          .retain = kRetainAll,
                          .head_bytes = kHeadBytes,
                          .element_bytes = 2},
                         {.name = "penalties", .base_bytes = 64}},
          .window_rows = 47,
          .num_slots = 4,
          .num_blocks = 12,
          .swap_bytes = 1 << 20,
          .store_bytes = 1 << 20};
}

// A pool on the CPU, whose memory the test reads and writes itself.
class CachePoolTest : public testing::Test {
 protected:
  CachePoolTest() {
    backend_ = *CreateCpuBackend({.num_threads = 1});
    manager_ = *CacheManager::Create(Geometry());
    pool_ = *CachePool::Create(*backend_, Geometry());
  }

  CacheLease Reserve(int64_t num_tokens) { return *manager_->Reserve(num_tokens); }

  // Every byte that a state at `position` occupies, in a fixed order.
  std::vector<std::pair<char*, int64_t>> Ranges(const CacheLease& lease, int64_t position) const {
    const int64_t window_bytes = 47 * kWindowRowBytes;
    std::vector<std::pair<char*, int64_t>> ranges = {
        {static_cast<char*>(pool_->bases(0)) + lease.slot() * kBaseBytes, kBaseBytes},
        {static_cast<char*>(pool_->windows(0)) + lease.slot() * window_bytes,
         std::min<int64_t>(position, 47) * kWindowRowBytes},
        {static_cast<char*>(pool_->bases(2)) + lease.slot() * 64, 64}};
    for (int64_t block = 0; block * kPagedBlock < position; ++block) {
      const int64_t block_bytes = kPagedBlock * kKvRowBytes;
      ranges.emplace_back(static_cast<char*>(pool_->blocks(1)) +
                              lease.blocks()[static_cast<size_t>(block)] * block_bytes,
                          block_bytes);
    }
    return ranges;
  }

  void Fill(const CacheLease& lease, int64_t position, uint64_t seed) {
    std::mt19937_64 random(seed);
    for (const auto& [data, num_bytes] : Ranges(lease, position)) {
      for (int64_t byte = 0; byte < num_bytes; ++byte) data[byte] = static_cast<char>(random());
    }
  }

  std::string Bytes(const CacheLease& lease, int64_t position) const {
    std::string bytes;
    for (const auto& [data, num_bytes] : Ranges(lease, position))
      bytes.append(data, static_cast<size_t>(num_bytes));
    return bytes;
  }

  std::unique_ptr<Backend, BackendDeleter> backend_;
  std::unique_ptr<CacheManager> manager_;
  std::unique_ptr<CachePool> pool_;
};

TEST_F(CachePoolTest, ZeroSlotsClearsTheirBasesAndNoOthers) {
  CacheLease first = Reserve(50), second = Reserve(50), third = Reserve(50);
  Fill(first, 50, 1);
  Fill(second, 50, 2);
  const std::string kept = Bytes(second, 50);
  Fill(third, 50, 3);
  ASSERT_TRUE(pool_->ZeroSlots(std::vector<int32_t>{first.slot(), third.slot()}).ok());
  EXPECT_EQ(Bytes(first, 50).substr(0, kBaseBytes), std::string(kBaseBytes, '\0'));
  EXPECT_EQ(Bytes(third, 50).substr(0, kBaseBytes), std::string(kBaseBytes, '\0'));
  EXPECT_EQ(Bytes(second, 50), kept);
  bool debug_build = false;
  assert((debug_build = true));
  if (debug_build) {
    EXPECT_EQ(Bytes(first, 50)[kBaseBytes], '\xff') << "the window is filled with NaN";
  }
}

TEST_F(CachePoolTest, ForkCopiesAllBytesOfTheState) {
  for (const int64_t position : {0, 1, 16, 33, 47, 60}) {
    CacheLease from = Reserve(64), to = Reserve(64);
    Fill(from, position, 3);
    Fill(to, position, 4);
    const int64_t num_blocks = manager_->geometry().blocks_for(position);
    const CacheCopy copy = {
        .kind = CacheCopy::Kind::kFork,
        .from_slot = from.slot(),
        .to_slot = to.slot(),
        .from_blocks = {from.blocks().begin(), from.blocks().begin() + num_blocks},
        .to_blocks = {to.blocks().begin(), to.blocks().begin() + num_blocks},
        .position = position};
    ASSERT_TRUE(pool_->Copy(copy).ok());
    EXPECT_EQ(Bytes(to, position), Bytes(from, position)) << position;
  }
}

TEST_F(CachePoolTest, SwappedOutAndInHasTheSameBytesElsewhere) {
  CacheLease lease = Reserve(64);
  Fill(lease, 53, 5);
  lease.set_position(53);
  const std::string before = Bytes(lease, 53);
  const int32_t old_slot = lease.slot();
  const int64_t swap_bytes = manager_->SwapBytes(lease);
  EXPECT_EQ(swap_bytes, std::ssize(before));
  ASSERT_TRUE(pool_->Copy(*manager_->SwapOut(lease)).ok());
  EXPECT_EQ(pool_->num_host_copies(), 1);
  CacheLease other = Reserve(100);
  Fill(other, 100, 6);
  ASSERT_TRUE(pool_->Copy(*manager_->SwapIn(lease)).ok());
  EXPECT_NE(lease.slot(), old_slot);
  EXPECT_EQ(Bytes(lease, 53), before);
  EXPECT_EQ(pool_->num_host_copies(), 0);
}

// The CPU keeps a head's keys [head_dim, kPagedBlock]; what leaves the device has a token's
// together.
TEST_F(CachePoolTest, AStoredStateHasOneLayoutWhateverTheDevices) {
  CacheLease lease = Reserve(64), other = Reserve(64);
  Fill(lease, 53, 5);
  Fill(other, 53, 6);
  lease.set_position(53);
  const std::string before = Bytes(lease, 53);
  auto saved = manager_->Save(lease, 53);
  ASSERT_TRUE(saved.ok() && pool_->Copy(saved->copy).ok());
  const CachePool::HostCopy& host = pool_->host_copy(saved->state.host_id());
  ASSERT_EQ(host.num_bytes, std::ssize(before));
  const char* image = host.bytes.get() + kBaseBytes + 47 * kWindowRowBytes;
  for (int block = 0; block < 4; ++block) {
    const char* device = static_cast<const char*>(pool_->blocks(1)) +
                         lease.blocks()[static_cast<size_t>(block)] * kPagedBlock * kKvRowBytes;
    for (int head = 0; head < 4; ++head) {  // 2 and 3: values
      for (int token = 0; token < kPagedBlock; ++token) {
        for (int d = 0; d < 5; ++d, image += 2) {
          const int element = head < 2 ? d * kPagedBlock + token : token * 5 + d;
          const char* const expected = device + head * kPagedBlock * kHeadBytes + element * 2;
          ASSERT_EQ(std::string(image, 2), std::string(expected, 2))
              << "block " << block << " head " << head << " token " << token << " d " << d;
        }
      }
    }
  }
  ASSERT_TRUE(pool_->Copy(manager_->Load(saved->state, other)).ok());
  EXPECT_EQ(Bytes(other, 53), before);
}

TEST_F(CachePoolTest, DropsTheHostCopyOfAReleasedLease) {
  CacheLease lease = Reserve(64);
  lease.set_position(10);
  ASSERT_TRUE(pool_->Copy(*manager_->SwapOut(lease)).ok());
  lease.Release();
  pool_->DropHostCopies(manager_->TakeReleasedHostIds());
  EXPECT_EQ(pool_->num_host_copies(), 0);
}

TEST_F(CachePoolTest, TooLargeAPoolNamesItsParts) {
  CacheGeometry geometry = Geometry();
  geometry.components[0].base_bytes = int64_t{1} << 45;
  const auto pool = CachePool::Create(*backend_, geometry);
  EXPECT_EQ(pool.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(pool.status().message(), testing::HasSubstr("lightning 32.0 TiB"));
}

}  // namespace
}  // namespace godwit
