#include "kernels/cpu/packed_matrix.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/cpu/embed_tokens.h"
#include "tests/kernels/cpu/cpu_test_util.h"

namespace godwit {
namespace {

constexpr uint64_t kSeed = 7;

TEST(PackedMatrixTest, PairsOfKLieSideBySideAndPaddingIsZero) {
  CpuOps ops("portable", 1);
  HostTensor source(DType::kBF16, 2, 3);
  for (int64_t row = 0; row < 2; ++row) {
    for (int64_t k = 0; k < 3; ++k) source.Set(row, k, static_cast<float>(10 * row + k + 1));
  }
  PackedMatrix packed(ops.context(), source, DType::kBF16);
  ASSERT_EQ(PackedBytes(packed.view()), 16 * 32 * 2);
  std::vector<float> expected(16 * 32, 0);
  expected[0] = 1, expected[1] = 2, expected[2] = 11, expected[3] = 12, expected[32] = 3,
  expected[34] = 13;
  const BF16* const data = static_cast<const BF16*>(packed.view().data);
  for (size_t i = 0; i < expected.size(); ++i) ASSERT_EQ(ToF32(data[i]), expected[i]) << i;
}

TEST(PackedMatrixTest, EveryRowIsReadBackThroughEmbedTokens) {
  CpuOps ops("portable", 2);
  for (DType from : {DType::kF32, DType::kBF16}) {
    for (DType to : {DType::kF32, DType::kBF16}) {
      constexpr int64_t kRows = 53, kColumns = 75;
      std::mt19937_64 random(kSeed);
      HostTensor source(from, kRows, kColumns, 3);
      source.FillNormal(random);
      PackedMatrix packed(ops.context(), source, to);
      std::vector<int32_t> ids(kRows);
      for (int64_t row = 0; row < kRows; ++row)
        ids[static_cast<size_t>(row)] = static_cast<int32_t>(kRows - 1 - row);
      HostTensor y(DType::kF32, kRows, kColumns, 5);
      ASSERT_TRUE(
          CpuEmbedTokens(ops.context(), {.table = packed.view(),
                                         .token_ids = MakeView(ids.data(), DType::kI32, kRows),
                                         .scale = 3,
                                         .y = y.view()})
              .ok());
      for (int64_t row = 0; row < kRows; ++row) {
        for (int64_t k = 0; k < kColumns; ++k) {
          const float value = source.At(kRows - 1 - row, k);
          ASSERT_EQ(y.At(row, k), 3 * (to == DType::kF32 ? value : ToF32(ToBF16(value))));
        }
      }
    }
  }
}

// Rows come in pieces that cut panels, from a mapped file whose tensors begin at odd multiples of 2
// bytes.
TEST(PackedMatrixTest, PiecesFromUnalignedSourcesEqualTheWhole) {
  constexpr int64_t kRows = 70, kColumns = 41;
  for (DType from : {DType::kF32, DType::kBF16}) {
    CpuOps ops("portable", 2);
    std::mt19937_64 random(kSeed);
    HostTensor source(from, kRows, kColumns);
    source.FillNormal(random);
    PackedMatrix whole(ops.context(), source, DType::kBF16);
    HostTensor zeros(from, kRows, kColumns);
    PackedMatrix pieces(ops.context(), zeros, DType::kBF16);
    const size_t num_bytes = static_cast<size_t>(source.view().elements() * DTypeBytes(from));
    std::vector<char> moved(num_bytes + 2);
    std::memcpy(moved.data() + 2, source.view().data, num_bytes);
    const TensorView unaligned = MakeView(moved.data() + 2, from, kRows, kColumns);
    const int64_t cuts[] = {0, 5, 16, 33, 70};
    for (int piece = 0; piece < 4; ++piece) {
      const int64_t begin = cuts[piece];
      ASSERT_TRUE(CpuPackMatrixRows(ops.context(), pieces.view(), begin,
                                    RowRange(unaligned, begin, cuts[piece + 1] - begin))
                      .ok());
    }
    EXPECT_EQ(std::memcmp(whole.view().data, pieces.view().data,
                          static_cast<size_t>(PackedBytes(whole.view()))),
              0);
  }
}

TEST(PackedMatrixTest, RefusesRowsOutsideAndOtherWidths) {
  CpuOps ops("portable", 1);
  HostTensor source(DType::kF32, 4, 8), narrow(DType::kF32, 4, 7);
  PackedMatrix packed(ops.context(), source, DType::kBF16);
  EXPECT_EQ(CpuPackMatrixRows(ops.context(), packed.view(), 1, source.view()).code,
            OpCode::kInvalidArgument);
  EXPECT_EQ(CpuPackMatrixRows(ops.context(), packed.view(), -1, source.view()).code,
            OpCode::kInvalidArgument);
  const OpStatus status = CpuPackMatrixRows(ops.context(), packed.view(), 0, narrow.view());
  EXPECT_EQ(status.code, OpCode::kInvalidArgument);
  EXPECT_STREQ(status.text, "PackMatrixRows: source [4, 7] of dtype 0 at row 0 of a matrix [4, 8]");
}

}  // namespace
}  // namespace godwit
