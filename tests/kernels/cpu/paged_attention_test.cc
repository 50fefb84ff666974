#include <sys/mman.h>

#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/ref/ref_backend.h"
#include "tests/kernels/device_arena.h"
#include "tests/kernels/paged_run.h"

namespace godwit {
namespace {

class CpuPagedAttentionTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    std::string reason;
    backend_ = MakeCpuBackend(GetParam(), 2, &reason);
    if (backend_ == nullptr) GTEST_SKIP() << reason;
  }
  Backend& backend() { return *backend_; }
  BackendPtr backend_;
};

std::vector<float> RunReference(const PagedShape& shape, int64_t num_tokens) {
  BackendPtr ref = CreateRefBackend();
  PagedRun run(*ref, shape, num_tokens);
  run.Step({{0, 0, static_cast<int>(num_tokens), true}});
  return run.output(0);
}

TEST_P(CpuPagedAttentionTest, MatchesSoftmaxOverAllKeys) {
  struct Case {
    int heads, kv_heads, head_dim, pairs;
    PairLayout layout;
    DType act;
    int64_t num_tokens;
  };
  const Case cases[] = {
      {1, 1, 1, 0, PairLayout::kHalfSplit, DType::kF32, 40},
      {4, 2, 16, 8, PairLayout::kHalfSplit, DType::kF32, 100},
      {4, 1, 20, 10, PairLayout::kInterleaved, DType::kF32, 77},
      {6, 3, 64, 32, PairLayout::kHalfSplit, DType::kBF16, 130},
      {5, 5, 33, 16, PairLayout::kInterleaved, DType::kBF16, 65},
      {8, 2, 96, 24, PairLayout::kHalfSplit, DType::kF32, 50},  // columns from 48 on pass through
      {2, 1, 8, 4, PairLayout::kHalfSplit, DType::kF32, 2100},  // three ranges of keys
  };
  for (const Case& c : cases) {
    PagedShape shape{c.heads, c.kv_heads, c.head_dim, c.pairs, c.layout, c.act};
    const std::vector<float> expected = RunReference(shape, c.num_tokens);
    PagedRun run(backend(), shape, c.num_tokens);
    const int prefill = static_cast<int>(c.num_tokens * 2 / 3);
    run.Step({{0, 0, prefill, true}});
    for (int64_t t = prefill; t < c.num_tokens; t += 3) {
      run.Step({{0, t, static_cast<int>(std::min<int64_t>(3, c.num_tokens - t)), false}});
    }
    EXPECT_TRUE(Within(run.output(0), expected, run.Tolerance(0)))
        << c.heads << " " << c.kv_heads << " " << c.head_dim << " " << c.num_tokens;
  }
}

// Blocks beyond 2^32 bytes and 2^31 elements of the cache: an offset of 32 bits overflowed in one
// server with limits of a million tokens. Only the blocks that are used are ever touched.
TEST_P(CpuPagedAttentionTest, BlocksAtTheFarEndOfALargeCacheHaveTheSameBits) {
  constexpr int64_t kHeads = 2, kHeadDim = 16, kTokens = 40, kWidth = 3 * kHeads * kHeadDim;
  constexpr int64_t kBlockBytes = 2 * kHeads * kPagedBlock * kHeadDim * int64_t{sizeof(float)};
  constexpr int64_t kNumBlocks = (int64_t{12} << 30) / kBlockBytes;
  static_assert(kNumBlocks * kBlockBytes / int64_t{sizeof(float)} > int64_t{1} << 31);
  void* const cache = mmap(nullptr, kNumBlocks * kBlockBytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (cache == MAP_FAILED) GTEST_SKIP() << "no 12 GiB of addresses";
  DeviceArena arena(backend());
  const TensorView fused =
      arena.Floats(DType::kF32, {kTokens, kWidth}, RandomValues(3, kTokens * kWidth));
  const auto run = [&](const std::vector<int32_t>& table) {
    std::vector<float> outputs;
    for (const StepRow& row :
         {StepRow{.num_tokens = 30, .is_prefill = 1}, StepRow{.num_tokens = 10, .position = 30}}) {
      const TensorView tokens = RowRange(fused, row.position, row.num_tokens);
      const TensorView o = arena.Output(DType::kF32, {row.num_tokens, kHeads * kHeadDim});
      const OpStatus status = backend().PagedAttention(
          {.q = ColumnRange(tokens, 0, kHeads * kHeadDim),
           .k = ColumnRange(tokens, kHeads * kHeadDim, kHeads * kHeadDim),
           .v = ColumnRange(tokens, 2 * kHeads * kHeadDim, kHeads * kHeadDim),
           .num_heads = kHeads,
           .num_kv_heads = kHeads,
           .head_dim = kHeadDim,
           .scale = 0.25f,
           .blocks = MakeView(cache, DType::kF32, kNumBlocks, 2, kHeads, kPagedBlock * kHeadDim),
           .block_tables = arena.UploadArray(table),
           .rows = arena.UploadArray(std::vector<StepRow>{row}),
           .num_rows = 1,
           .num_decode_rows = row.is_prefill != 0 ? 0 : 1,
           .num_decode_tokens = row.is_prefill != 0 ? 0 : row.num_tokens,
           .o = o});
      EXPECT_TRUE(status.ok()) << status.text;
      const std::vector<float> values = arena.Download(o);
      outputs.insert(outputs.end(), values.begin(), values.end());
    }
    return outputs;
  };
  const std::vector<float> near = run({0, 1, 2});
  const auto last = static_cast<int32_t>(kNumBlocks - 1);
  EXPECT_EQ(run({last, last - 1, last - 2}), near);
  EXPECT_EQ(run({3, last - 3, 4}), near);
  munmap(cache, kNumBlocks * kBlockBytes);
}

TEST_P(CpuPagedAttentionTest, CutsBatchAndPhaseDoNotChangeBits) {
  for (const DType act : {DType::kF32, DType::kBF16}) {
    PagedShape shape{6, 2, 24, 12, PairLayout::kHalfSplit, act};
    const int64_t n = 150;
    PagedRun whole(backend(), shape, n);
    whole.Step({{0, 0, static_cast<int>(n), true}});
    for (const int64_t cut : {1, 5, 16, 64}) {
      for (const bool prefill : {false, true}) {
        PagedRun run(backend(), shape, n);
        for (int64_t t = 0; t < n; t += cut) {
          const int count = static_cast<int>(std::min(cut, n - t));
          // Another sequence beside it, ahead or behind in the order of rows.
          PagedPiece mine{0, t, count, prefill}, other{1, t, count, prefill};
          if (t % 2 == 0) std::swap(mine, other);
          run.Step({mine, other});
        }
        EXPECT_TRUE(SameBits(run.output(0), whole.output(0))) << cut << " " << prefill;
      }
    }
  }
}

TEST_P(CpuPagedAttentionTest, RangesOfKeysMergeToTheSameBitsInBothPhases) {
  const PagedShape shape{4, 2, 16, 8, PairLayout::kHalfSplit, DType::kBF16};
  const int64_t n = 3 * kAttentionSplit + 20;
  PagedRun whole(backend(), shape, n);
  whole.Step({{0, 0, static_cast<int>(n), true}});
  PagedRun run(backend(), shape, n);
  run.Step({{0, 0, kAttentionSplit - 3, true}, {1, 0, 40, true}});
  // Decode rows that cross the edge of a range, beside one that has a single range.
  for (int64_t t = kAttentionSplit - 3; t < kAttentionSplit + 10; t += 4) {
    run.Step({{0, t, 4, false}, {1, 40, 1, false}});
  }
  run.Step({{0, kAttentionSplit + 9, static_cast<int>(n - kAttentionSplit - 9 - 5), true}});
  run.Step({{1, 40, 1, false}, {0, n - 5, 5, false}});
  EXPECT_TRUE(SameBits(run.output(0), whole.output(0)));
}

TEST_P(CpuPagedAttentionTest, RolledBackRowsLeaveNoTrace) {
  const PagedShape shape{4, 2, 16, 8, PairLayout::kHalfSplit, DType::kF32};
  PagedRun straight(backend(), shape, 60), rolled(backend(), shape, 60);
  straight.Step({{0, 0, 60, true}});
  rolled.Step({{0, 0, 30, true}});
  for (int64_t t = 30; t < 60; t += 2)
    rolled.Step({{0, t, static_cast<int>(std::min<int64_t>(9, 60 - t)), false}});
  EXPECT_TRUE(SameBits(rolled.output(0), straight.output(0)));
}

TEST_P(CpuPagedAttentionTest, NumberOfThreadsDoesNotChangeBits) {
  const PagedShape shape{4, 2, 16, 8, PairLayout::kHalfSplit, DType::kBF16};
  std::vector<std::vector<float>> outputs;
  for (const int threads : {1, 2, 5}) {
    std::string reason;
    BackendPtr backend = MakeCpuBackend(GetParam(), threads, &reason);
    PagedRun run(*backend, shape, 1200);
    run.Step({{0, 0, 1190, true}});
    for (int64_t t = 1190; t < 1200; ++t) run.Step({{0, t, 1, false}});
    outputs.push_back(run.output(0));
    EXPECT_TRUE(SameBits(outputs.back(), outputs[0])) << threads;
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, CpuPagedAttentionTest, ::testing::ValuesIn(kCpuIsaNames),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace godwit
