#include "engine/memory_plan.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/ops.h"

namespace godwit {
namespace {

constexpr int64_t kMiB = 1 << 20;

MemoryPlan Plan(int64_t free_bytes) {
  MemoryPlan plan = {.weight_bytes = 100 * kMiB,
                     .workspace_bytes = 10 * kMiB,
                     .step_bytes = kMiB,
                     .free_bytes = free_bytes};
  plan.geometry.components = {
      {.name = "layers.0.lightning", .base_bytes = kMiB, .row_bytes = 1024, .block = kWindow},
      {.name = "layers.1.lightning", .base_bytes = kMiB, .row_bytes = 1024, .block = kWindow},
      {.name = "layers.2.kv", .row_bytes = 4096, .retain = kRetainAll},
      {.name = "penalties", .base_bytes = 4096}};
  plan.geometry.window_rows = 47;
  plan.geometry.num_slots = 8;
  return plan;
}

TEST(MemoryPlanTest, FormatsBytes) {
  EXPECT_EQ(FormatBytes(0), "0 B");
  EXPECT_EQ(FormatBytes(1023), "1023 B");
  EXPECT_EQ(FormatBytes(1536), "1.5 KiB");
  EXPECT_EQ(FormatBytes(62 * kMiB), "62.0 MiB");
  EXPECT_EQ(FormatBytes(int64_t{3} << 50), "3072.0 TiB");
}

TEST(MemoryPlanTest, KvTakesWhatIsAskedForInWholeBlocks) {
  const auto plan = PlanMemory(Plan(1000 * kMiB), 10 * kMiB + 1);
  ASSERT_TRUE(plan.ok());
  EXPECT_EQ(plan->geometry.num_blocks, 10 * kMiB / (16 * 4096));
}

TEST(MemoryPlanTest, KvDefaultsToHalfOfWhatIsFreeButAtMostOneGiB) {
  const auto small = PlanMemory(Plan(100 * kMiB), 0);
  ASSERT_TRUE(small.ok());
  const int64_t left = 100 * kMiB - kMiB - small->state_bytes();
  EXPECT_EQ(small->geometry.num_blocks, left / 2 / (16 * 4096));
  const auto large = PlanMemory(Plan(int64_t{100} << 30), 0);
  ASSERT_TRUE(large.ok());
  EXPECT_EQ(large->kv_bytes(), kDefaultKvBytes);
}

TEST(MemoryPlanTest, WithoutSoftmaxLayersThereAreNoBlocks) {
  MemoryPlan plan = Plan(100 * kMiB);
  plan.geometry.components.erase(plan.geometry.components.begin() + 2);
  const auto planned = PlanMemory(std::move(plan), 0);
  ASSERT_TRUE(planned.ok());
  EXPECT_EQ(planned->geometry.num_blocks, 0);
}

TEST(MemoryPlanTest, RefusesWhatDoesNotFitWithThePlanInWords) {
  const auto states = PlanMemory(Plan(10 * kMiB), 0);
  EXPECT_EQ(states.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(
      states.status().message(),
      testing::AllOf(testing::HasSubstr("weights 100.0 MiB"),
                     testing::HasSubstr("8 state slots of 2.1 MiB"),
                     testing::HasSubstr("lightning 2.1 MiB"), testing::HasSubstr("10.0 MiB free")));
  const auto kv = PlanMemory(Plan(100 * kMiB), 90 * kMiB);
  EXPECT_EQ(kv.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(kv.status().message(), testing::HasSubstr("1440 KV blocks"));
}

TEST(MemoryPlanTest, RefusesLessThanOneKvBlock) {
  const auto plan = PlanMemory(Plan(100 * kMiB), 16 * 4096 - 1);
  EXPECT_EQ(plan.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(plan.status().message(), testing::HasSubstr("65536 bytes"));
}

}  // namespace
}  // namespace godwit
