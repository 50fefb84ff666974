#include "kernels/cpu/linear.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "tests/kernels/cpu/cpu_test_util.h"

namespace godwit {
namespace {

constexpr uint64_t kSeed = 20240611;

float RoundTo(DType dtype, float x) { return dtype == DType::kF32 ? x : ToF32(ToBF16(x)); }

struct Shape {
  int64_t rows, n, k;
};

// The formed input in double, rounded as the op says.
std::vector<double> FormedRow(const RowInput& input, const HostTensor& x, const HostTensor* gate,
                              DType act, int64_t row) {
  const int64_t k = x.view().shape[1];
  double sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += double{x.At(row, i)} * x.At(row, i);
  const double scale = 1 / std::sqrt(sum / static_cast<double>(k) + input.norm.epsilon);
  std::vector<double> result(static_cast<size_t>(k));
  for (int64_t i = 0; i < k; ++i) {
    double value = x.At(row, i);
    if (input.norm.kind == NormKind::kRms) {
      value *= scale;
      if (input.norm.weight) value *= input.norm.weight_offset + input.norm.weight.row<float>(i)[0];
    }
    if (gate != nullptr) value *= gate->At(row, i);
    result[static_cast<size_t>(i)] = RoundTo(act, static_cast<float>(value));
  }
  return result;
}

double Dot(const std::vector<double>& x, const HostTensor& w, DType dtype, int64_t row) {
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i)
    sum += x[i] * RoundTo(dtype, w.At(row, static_cast<int64_t>(i)));
  return sum;
}

// Unit-scale data: x and sqrt(k) w are standard normal, so that y is too. The error of an f32 sum
// of k terms grows as sqrt(k) 2^-24 at random; where the input is rounded to BF16 after f32
// arithmetic, a term may fall on the other side of a tie: 2^-9 of one term, whose size is 1 /
// sqrt(k).
double SumTolerance(int64_t k, bool formed_bf16) {
  const double root = std::sqrt(static_cast<double>(k));
  return 1e-6 * std::max(4.0, root / 4) + (formed_bf16 ? 0.02 / root + 5e-4 : 0);
}

class LinearTest : public testing::TestWithParam<std::tuple<std::string, DType>> {
 protected:
  std::string isa() const { return std::get<0>(GetParam()); }
  DType dtype() const { return std::get<1>(GetParam()); }
};

TEST_P(LinearTest, MatchesDoubleSumOnOddShapes) {
  CpuOps ops(isa(), 2);
  for (const Shape& shape :
       {Shape{1, 1, 1}, Shape{1, 1, 20000}, Shape{3, 33, 31}, Shape{5, 95, 33}, Shape{16, 64, 64},
        Shape{13, 129, 514}, Shape{7, 192, 1030}, Shape{65, 200, 600}, Shape{300, 40, 96}}) {
    SCOPED_TRACE(testing::Message() << "seed " << kSeed << " shape " << shape.rows << " " << shape.n
                                    << " " << shape.k);
    std::mt19937_64 random(kSeed);
    HostTensor x(dtype(), shape.rows, shape.k, 3);
    HostTensor w(DType::kF32, shape.n, shape.k);
    HostTensor y(DType::kF32, shape.rows, shape.n, 5);
    x.FillNormal(random);
    w.FillNormal(random, 1 / std::sqrt(static_cast<float>(shape.k)));
    PackedMatrix packed(ops.context(), w, dtype());
    const LinearArgs args = {.input = {.x = x.view()}, .w = packed.view(), .y = y.view()};
    ASSERT_TRUE(CpuLinear(ops.context(), args).ok());
    double worst = 0;
    for (int64_t row = 0; row < shape.rows; ++row) {
      const std::vector<double> formed = FormedRow(args.input, x, nullptr, dtype(), row);
      for (int64_t n = 0; n < shape.n; ++n)
        worst = std::max(worst, std::abs(Dot(formed, w, dtype(), n) - y.At(row, n)));
    }
    EXPECT_LE(worst, SumTolerance(shape.k, false));
  }
}

// Row r of a product over M rows has the bits that it has alone, for every M, every position and
// every cut.
TEST_P(LinearTest, RowBitsDoNotDependOnTheNumberOfRows) {
  constexpr int64_t kMaxRows = 256;
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{72, 200}, {160, 1100}}) {
    std::mt19937_64 random(kSeed);
    HostTensor x(DType::kF32, kMaxRows, k);
    HostTensor w(DType::kF32, n, k);
    HostTensor alone(DType::kF32, kMaxRows, n);
    x.FillNormal(random);
    w.FillNormal(random, 1 / std::sqrt(static_cast<float>(k)));
    CpuOps one(isa(), 1);
    PackedMatrix packed(one.context(), w, dtype());
    for (int64_t row = 0; row < kMaxRows; ++row) {
      ASSERT_TRUE(CpuLinear(one.context(), {.input = {.x = RowRange(x.view(), row, 1)},
                                            .w = packed.view(),
                                            .y = RowRange(alone.view(), row, 1),
                                            .num_decode_tokens = 1})
                      .ok());
    }
    std::vector<int64_t> counts;
    for (int64_t count = 1; count <= 33; ++count) counts.push_back(count);
    counts.insert(counts.end(), {64, 100, 256});
    for (int num_threads : {1, 2, 3}) {
      CpuOps ops(isa(), num_threads);
      for (int64_t count : counts) {
        for (int64_t first : {int64_t{0}, (kMaxRows - count) / 2, kMaxRows - count}) {
          HostTensor y(DType::kF32, count, n);
          ASSERT_TRUE(CpuLinear(ops.context(), {.input = {.x = RowRange(x.view(), first, count)},
                                                .w = packed.view(),
                                                .y = y.view()})
                          .ok());
          for (int64_t row = 0; row < count; ++row) {
            ASSERT_TRUE(y.SameRow(row, alone, first + row))
                << "threads " << num_threads << " rows " << count << " row " << row << " n " << n
                << " k " << k;
          }
        }
      }
    }
  }
}

TEST_P(LinearTest, RowBitsSurviveMoreRowsThanOnePass) {
  constexpr int64_t kRows = 700, kN = 48, kK = 96;
  std::mt19937_64 random(kSeed);
  HostTensor x(DType::kF32, kRows, kK), w(DType::kF32, kN, kK), y(DType::kF32, kRows, kN),
      cut(DType::kF32, kRows, kN);
  x.FillNormal(random);
  w.FillNormal(random);
  CpuOps ops(isa(), 2);
  PackedMatrix packed(ops.context(), w, dtype());
  ASSERT_TRUE(
      CpuLinear(ops.context(), {.input = {.x = x.view()}, .w = packed.view(), .y = y.view()}).ok());
  for (int64_t begin = 0; begin < kRows; begin += 64) {
    const int64_t count = std::min<int64_t>(64, kRows - begin);
    ASSERT_TRUE(CpuLinear(ops.context(), {.input = {.x = RowRange(x.view(), begin, count)},
                                          .w = packed.view(),
                                          .y = RowRange(cut.view(), begin, count)})
                    .ok());
  }
  for (int64_t row = 0; row < kRows; ++row) ASSERT_TRUE(y.SameRow(row, cut, row)) << row;
}

TEST_P(LinearTest, FormsInputWithNormGateAndAdds) {
  for (const Shape& shape : {Shape{1, 40, 70}, Shape{4, 65, 2048}, Shape{50, 33, 192}}) {
    for (DType x_dtype : {DType::kF32, dtype()}) {
      for (bool weighted : {false, true}) {
        std::mt19937_64 random(kSeed);
        HostTensor x(x_dtype, shape.rows, shape.k, 7), gate(dtype(), shape.rows, shape.k, 9);
        HostTensor w(DType::kF32, shape.n, shape.k), norm(DType::kF32, shape.k, 1);
        HostTensor y(DType::kF32, shape.rows, shape.n, 1), before(DType::kF32, shape.rows, shape.n);
        x.FillNormal(random, 3);
        gate.FillNormal(random);
        w.FillNormal(random, 1 / std::sqrt(static_cast<float>(shape.k)));
        norm.FillNormal(random, 0.1f);
        before.FillNormal(random);
        for (int64_t row = 0; row < shape.rows; ++row) {
          for (int64_t n = 0; n < shape.n; ++n) y.Set(row, n, before.At(row, n));
        }
        CpuOps ops(isa(), 2);
        PackedMatrix packed(ops.context(), w, dtype());
        RowInput input = {.x = x.view(),
                          .norm = {.kind = NormKind::kRms, .epsilon = 1e-5f, .weight_offset = 1},
                          .gate = gate.view()};
        if (weighted) input.norm.weight = MakeView(norm.view().data, DType::kF32, shape.k);
        ASSERT_TRUE(
            CpuLinear(
                ops.context(),
                {.input = input, .w = packed.view(), .epilogue = Epilogue::kAdd, .y = y.view()})
                .ok());
        for (int64_t row = 0; row < shape.rows; ++row) {
          const std::vector<double> formed = FormedRow(input, x, &gate, dtype(), row);
          for (int64_t n = 0; n < shape.n; ++n) {
            ASSERT_NEAR(before.At(row, n) + Dot(formed, w, dtype(), n), y.At(row, n),
                        4 * SumTolerance(shape.k, dtype() == DType::kBF16));
          }
        }
      }
    }
  }
}

TEST_P(LinearTest, WritesOnlyItsColumnsOfAStridedView) {
  constexpr int64_t kRows = 9, kN = 37, kK = 64, kWidth = 120, kFirst = 41;
  std::mt19937_64 random(kSeed);
  HostTensor x(DType::kF32, kRows, kWidth), w(DType::kF32, kN, kK), y(dtype(), kRows, kWidth),
      dense(dtype(), kRows, kN);
  x.FillNormal(random);
  w.FillNormal(random);
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t n = 0; n < kWidth; ++n) y.Set(row, n, 7);
  }
  CpuOps ops(isa(), 2);
  PackedMatrix packed(ops.context(), w, dtype());
  const TensorView input = ColumnRange(x.view(), 50, kK);
  ASSERT_TRUE(
      CpuLinear(ops.context(),
                {.input = {.x = input}, .w = packed.view(), .y = ColumnRange(y.view(), kFirst, kN)})
          .ok());
  ASSERT_TRUE(
      CpuLinear(ops.context(), {.input = {.x = input}, .w = packed.view(), .y = dense.view()})
          .ok());
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t n = 0; n < kWidth; ++n) {
      const bool inside = n >= kFirst && n < kFirst + kN;
      ASSERT_EQ(y.At(row, n), inside ? dense.At(row, n - kFirst) : 7) << row << " " << n;
    }
  }
}

TEST_P(LinearTest, GatedProductMatchesDoubleSumAndItself) {
  for (const Shape& shape : {Shape{1, 70, 100}, Shape{6, 33, 1030}, Shape{80, 257, 128}}) {
    for (Activation activation : {Activation::kNone, Activation::kSilu}) {
      std::mt19937_64 random(kSeed);
      HostTensor x(dtype(), shape.rows, shape.k), gate(DType::kF32, shape.n, shape.k),
          up(DType::kF32, shape.n, shape.k);
      HostTensor y(dtype(), shape.rows, shape.n, 3), single(dtype(), shape.rows, shape.n);
      x.FillNormal(random);
      gate.FillNormal(random, 1 / std::sqrt(static_cast<float>(shape.k)));
      up.FillNormal(random, 1 / std::sqrt(static_cast<float>(shape.k)));
      CpuOps ops(isa(), 2);
      PackedMatrix packed_gate(ops.context(), gate, dtype()), packed_up(ops.context(), up, dtype());
      GatedLinearArgs args = {.input = {.x = x.view()},
                              .gate = packed_gate.view(),
                              .up = packed_up.view(),
                              .activation = activation,
                              .y = y.view()};
      ASSERT_TRUE(CpuGatedLinear(ops.context(), args).ok());
      for (int64_t row = 0; row < shape.rows; ++row) {
        args.input.x = RowRange(x.view(), row, 1);
        args.y = RowRange(single.view(), row, 1);
        ASSERT_TRUE(CpuGatedLinear(ops.context(), args).ok());
        ASSERT_TRUE(y.SameRow(row, single, row)) << row;
        const std::vector<double> formed = FormedRow(args.input, x, nullptr, dtype(), row);
        for (int64_t n = 0; n < shape.n; ++n) {
          const double a = Dot(formed, gate, dtype(), n);
          const double expected = (activation == Activation::kSilu ? a / (1 + std::exp(-a)) : a) *
                                  Dot(formed, up, dtype(), n);
          const double rounding = dtype() == DType::kBF16 ? std::abs(expected) / 256 : 0;
          ASSERT_NEAR(expected, y.At(row, n), rounding + 20 * SumTolerance(shape.k, false))
              << row << " " << n;
        }
      }
    }
  }
}

TEST_P(LinearTest, NoRowsIsNoWork) {
  CpuOps ops(isa(), 2);
  HostTensor w(DType::kF32, 4, 4), x(DType::kF32, 1, 4), y(DType::kF32, 1, 4);
  PackedMatrix packed(ops.context(), w, dtype());
  y.Set(0, 0, 5);
  EXPECT_TRUE(CpuLinear(ops.context(), {.input = {.x = RowRange(x.view(), 0, 0)},
                                        .w = packed.view(),
                                        .y = RowRange(y.view(), 0, 0)})
                  .ok());
  EXPECT_EQ(y.At(0, 0), 5);
}

INSTANTIATE_TEST_SUITE_P(Isas, LinearTest,
                         testing::Combine(testing::ValuesIn(IsasOfThisMachine()),
                                          testing::Values(DType::kBF16, DType::kF32)),
                         [](const auto& info) {
                           return std::get<0>(info.param) +
                                  (std::get<1>(info.param) == DType::kBF16 ? "_bf16" : "_f32");
                         });

}  // namespace
}  // namespace godwit
