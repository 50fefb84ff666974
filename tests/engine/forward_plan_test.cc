#include "engine/forward_plan.h"

#include <algorithm>
#include <bit>
#include <memory>
#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace godwit {
namespace {

using testing::ElementsAre;

constexpr int64_t kVocab = 100;

CacheGeometry Geometry() {
  return {.components =
              {{.name = "layers.0.lightning", .base_bytes = 64, .row_bytes = 8, .block = kWindow},
               {.name = "layers.1.kv", .row_bytes = 8, .retain = kRetainAll}},
          .window_rows = WindowRows(2, kMaxDraftTokens),
          .num_slots = 8,
          .num_blocks = 100};
}

class StepPlannerTest : public testing::Test {
 protected:
  StepPlannerTest()
      : manager_(*CacheManager::Create(Geometry())),
        slots_(8),
        planner_({.max_tokens = 512,
                  .num_slots = 8,
                  .window_rows = Geometry().window_rows,
                  .vocab_size = kVocab}) {}

  // A lease whose slot is at `position`; 0: fresh.
  CacheLease LeaseAt(int64_t position, int32_t last_token = 0) {
    CacheLease lease = *manager_->Reserve(1000 / 4);
    if (position == 0) return lease;
    lease.clear_fresh();
    slots_[static_cast<size_t>(lease.slot())] = {
        .position = position, .base = position / kWindow * kWindow, .last_token = last_token};
    return lease;
  }

  static RowOutput Output(CacheLease& lease) {
    static const SamplingParams sampling;
    return {.lease = &lease, .sampling = &sampling};
  }

  std::unique_ptr<CacheManager> manager_;
  std::vector<SlotState> slots_;
  StepPlanner planner_;
};

TEST_F(StepPlannerTest, DecodeRowsComeFirst) {
  CacheLease prompt = LeaseAt(0), decode = LeaseAt(70, 42);
  const std::vector<int32_t> prompt_ids = {7, 8, 9};
  const RowOutput output = Output(decode);
  const std::vector<BatchRow> rows = {
      {.token_ids = prompt_ids, .lease = &prompt},
      {.confirmed_position = 70, .lease = &decode, .outputs = std::span(&output, 1)}};
  ASSERT_TRUE(planner_.Check(rows, slots_).ok());
  const StepArrays& arrays = planner_.Plan(rows, slots_);
  EXPECT_THAT(arrays.token_ids, ElementsAre(42, 7, 8, 9));
  EXPECT_THAT(arrays.positions, ElementsAre(70, 0, 1, 2));
  EXPECT_THAT(arrays.row_of_batch, ElementsAre(1, 0));
  EXPECT_EQ(arrays.num_decode_tokens, 1);
  ASSERT_EQ(arrays.rows.size(), 2u);
  EXPECT_EQ(arrays.rows[0].slot, decode.slot());
  EXPECT_EQ(arrays.rows[0].is_prefill, 0);
  EXPECT_EQ(arrays.rows[1].first_token, 1);
  EXPECT_EQ(arrays.rows[1].num_tokens, 3);
  EXPECT_EQ(arrays.rows[1].is_prefill, 1);
  // 71 tokens are in 5 blocks, 3 tokens in one.
  EXPECT_EQ(arrays.rows[0].block_table, 0);
  EXPECT_EQ(arrays.rows[1].block_table, 5);
  EXPECT_EQ(arrays.block_tables.size(), 6u);
  EXPECT_EQ(arrays.block_tables[4], decode.blocks()[4]);
  EXPECT_EQ(arrays.block_tables[5], prompt.blocks()[0]);
}

TEST_F(StepPlannerTest, OneTokenPromptIsStillPrefill) {
  CacheLease lease = LeaseAt(0);
  const std::vector<int32_t> ids = {5};
  const std::vector<BatchRow> rows = {{.token_ids = ids, .lease = &lease}};
  ASSERT_TRUE(planner_.Check(rows, slots_).ok());
  const StepArrays& arrays = planner_.Plan(rows, slots_);
  EXPECT_EQ(arrays.num_decode_tokens, 0);
  EXPECT_EQ(arrays.rows[0].is_prefill, 1);
}

TEST_F(StepPlannerTest, TokensOfAStepInFlightAreLeftToTheDevice) {
  CacheLease lease = LeaseAt(20);
  slots_[static_cast<size_t>(lease.slot())].pending_step = 6;
  slots_[static_cast<size_t>(lease.slot())].pending_draw = 3;
  const RowOutput output = Output(lease);
  const std::vector<BatchRow> rows = {
      {.confirmed_position = 19, .lease = &lease, .outputs = std::span(&output, 1)}};
  ASSERT_TRUE(planner_.Check(rows, slots_).ok());
  const StepArrays& arrays = planner_.Plan(rows, slots_);
  EXPECT_EQ(arrays.token_ids[0], ~3);
}

// Which rows are in P-form is one function of where prefill began and of the end, for every cut at
// multiples of P.
TEST_F(StepPlannerTest, CutsAtMultiplesOfPLeaveTheSameRowsInPForm) {
  CacheLease lease = LeaseAt(0);
  std::mt19937_64 random(1);
  for (int round = 0; round < 200; ++round) {
    const int64_t begin = std::uniform_int_distribution<int64_t>(0, 70)(random);
    const int64_t end = begin + std::uniform_int_distribution<int64_t>(1, 400)(random);
    std::vector<bool> whole(static_cast<size_t>(end)), in_parts(static_cast<size_t>(end));
    const auto mark = [&](int64_t from, int64_t to, std::vector<bool>& in_p_form) {
      const std::vector<int32_t> ids(static_cast<size_t>(to - from), 1);
      const StepRow row = MakeStepRow({.token_ids = ids, .lease = &lease},
                                      {.position = from, .base = from / 16 * 16});
      EXPECT_EQ(row.base_after, to / 16 * 16);
      EXPECT_EQ(row.p_begin % kPrefillBlock, 0);
      EXPECT_EQ(row.p_end % kPrefillBlock, 0);
      EXPECT_TRUE(row.p_begin == row.p_end || (from <= row.p_begin && row.p_end <= to));
      for (int64_t p = row.p_begin; p < row.p_end; ++p) in_p_form[static_cast<size_t>(p)] = true;
    };
    mark(begin, end, whole);
    int64_t from = begin;
    for (int64_t cut = (begin / 64 + 1) * 64; cut < end; cut += 64) {
      if (random() % 2 == 0) continue;
      mark(from, cut, in_parts);
      from = cut;
    }
    mark(from, end, in_parts);
    EXPECT_EQ(whole, in_parts) << begin << " to " << end;
  }
}

TEST_F(StepPlannerTest, DecodeFoldsOnlyWhatIsConfirmedAndNeverBack) {
  CacheLease lease = LeaseAt(0);
  const auto base_after = [&](int64_t position, int64_t base, int64_t confirmed) {
    return MakeStepRow({.confirmed_position = confirmed, .lease = &lease},
                       {.position = position, .base = base})
        .base_after;
  };
  EXPECT_EQ(base_after(40, 32, 40), 32);
  EXPECT_EQ(base_after(48, 32, 47), 32);
  EXPECT_EQ(base_after(48, 32, 48), 48);
  EXPECT_EQ(base_after(49, 32, 48), 48);
  EXPECT_EQ(base_after(40, 32, 0), 32) << "its prompt is still in flight";
}

TEST_F(StepPlannerTest, TokenOutsideTheVocabularyIsInvalid) {
  CacheLease lease = LeaseAt(0);
  for (const int32_t bad : {-1, 100}) {
    const std::vector<int32_t> ids = {1, bad};
    const std::vector<BatchRow> rows = {{.token_ids = ids, .lease = &lease}};
    const absl::Status status = planner_.Check(rows, slots_);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), testing::HasSubstr("index 1 not in [0, 100)"));
  }
  const std::vector<int32_t> ids = {1, 2}, targets = {2, 100};
  const std::vector<BatchRow> rows = {
      {.token_ids = ids, .lease = &lease, .score_targets = targets}};
  EXPECT_EQ(planner_.Check(rows, slots_).code(), absl::StatusCode::kInvalidArgument);
}

using StepPlannerDeathTest = StepPlannerTest;

TEST(PaddedCoarselyTest, StopsAtPowersOfTwo) {
  for (const int steps : {1, 2}) {
    int64_t before = 0;
    int num_values = 0;
    for (int64_t count = 1; count <= 200; ++count) {
      const int64_t padded = PaddedCoarsely(count, 192, steps);
      EXPECT_GE(padded, std::min<int64_t>(count, 192));
      EXPECT_EQ(padded, PaddedCoarsely(padded, 192, steps)) << "of itself";
      if (std::has_single_bit(static_cast<uint64_t>(count))) {
        EXPECT_EQ(padded, count) << "not past the end of a tile";
      }
      num_values += padded != before;
      before = padded;
    }
    EXPECT_EQ(num_values, steps == 1 ? 9 : 15);
  }
}

TEST_F(StepPlannerDeathTest, OurOwnBugsEndTheProcess) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  CacheLease fresh = LeaseAt(0), used = LeaseAt(10), none;
  const std::vector<int32_t> ids = {1, 2};
  const RowOutput output = Output(used);
  const auto check = [&](const std::vector<BatchRow>& rows) { (void)planner_.Check(rows, slots_); };
  EXPECT_DEATH(check({}), "empty");
  EXPECT_DEATH(check({{.token_ids = ids, .lease = nullptr}}), "nullptr");
  EXPECT_DEATH(check({{.token_ids = ids, .lease = &none}}), "resident");
  EXPECT_DEATH(check({{.token_ids = ids, .first_position = 9, .lease = &used}}), "first_position");
  EXPECT_DEATH(check({{.token_ids = ids, .lease = &fresh}, {.token_ids = ids, .lease = &fresh}}),
               "last_use");
  EXPECT_DEATH(check({{.lease = &fresh, .outputs = std::span(&output, 1)}}), "position > 0");
  EXPECT_DEATH(
      check({{.confirmed_position = 11, .lease = &used, .outputs = std::span(&output, 1)}}),
      "confirmed_position");
  const std::vector<int32_t> many(251, 1);
  EXPECT_DEATH(check({{.token_ids = many, .lease = &fresh}}), "reserved_tokens");
}

}  // namespace
}  // namespace godwit
