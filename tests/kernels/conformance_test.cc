// Every op of every back end against kernels/ref: dtypes x shapes, odd sizes, one row, none, and
// large. A tolerance is what f32 accumulation may lose of the sum of the terms' magnitudes, which
// the reference computes from |inputs|.

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/ref/ref_backend.h"
#include "tests/kernels/backends.h"
#include "tests/kernels/device_arena.h"
#include "tests/kernels/lightning_run.h"
#include "tests/kernels/paged_run.h"

namespace godwit {
namespace {

constexpr double kF32Unit = 5.9604644775390625e-8;  // 2^-24: half the distance of neighbours at 1
constexpr double kBF16Unit = 0.00390625;            // 2^-8

class ConformanceTest : public ::testing::TestWithParam<BackendRow> {
 protected:
  void SetUp() override {
    std::string reason;
    backend_ = GetParam().make(&reason);
    if (backend_ == nullptr) GTEST_SKIP() << reason;
    ref_ = CreateRefBackend();
  }
  BackendPtr backend_;
  BackendPtr ref_;
};

void Absolute(std::vector<float>& values) {
  for (float& x : values) x = std::abs(x);
}

void ExpectOk(const OpStatus& status) {
  EXPECT_TRUE(status.ok()) << (status.text == nullptr ? "" : status.text);
}

std::vector<int32_t> SomeIds(int64_t n, int64_t limit) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < n; ++i) ids.push_back(static_cast<int32_t>((i * 7919 + 3) % limit));
  return ids;
}

TEST_P(ConformanceTest, EmbedTokens) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const int64_t num_tokens : {0, 1, 37}) {
      for (const int64_t width : {1, 33, 384}) {
        const int64_t vocab = 101;
        auto run = [&](Backend& backend) {
          DeviceArena arena(backend);
          EmbedTokensArgs args;
          args.table = arena.Matrix(dtype, vocab, width, RandomValues(1, vocab * width, dtype));
          args.token_ids =
              arena.Upload<int32_t>(DType::kI32, {num_tokens}, SomeIds(num_tokens, vocab));
          args.scale = 19.6f;
          args.y = arena.Output(DType::kF32, {num_tokens, width});
          ExpectOk(backend.EmbedTokens(args));
          return arena.Download(args.y);
        };
        const std::vector<float> expected = run(*ref_);
        std::vector<double> tolerance;
        for (const float y : expected)
          tolerance.push_back(2 * kF32Unit * std::abs(static_cast<double>(y)));
        EXPECT_TRUE(Within(run(*backend_), expected, tolerance)) << num_tokens << " " << width;
      }
    }
  }
}

// A product's shape, and what is formed before and done after it.
struct ProductCase {
  int64_t num_tokens, k, n;
  DType weights = DType::kBF16;
  DType x = DType::kBF16;
  DType y = DType::kF32;
  bool norm = false;
  bool norm_weight = false;
  bool gate = false;
  Epilogue epilogue = Epilogue::kStore;
  int64_t num_decode = 0;
};

std::string Describe(const ProductCase& c) {
  return "T " + std::to_string(c.num_tokens) + " k " + std::to_string(c.k) + " n " +
         std::to_string(c.n) + " weights " + std::to_string(static_cast<int>(c.weights)) + " x " +
         std::to_string(static_cast<int>(c.x)) + " y " + std::to_string(static_cast<int>(c.y)) +
         " norm " + std::to_string(c.norm) + " gate " + std::to_string(c.gate) + " decode " +
         std::to_string(c.num_decode);
}

RowInput MakeInput(DeviceArena& arena, const ProductCase& c, bool magnitude) {
  auto values = [&](uint32_t seed, int64_t n, DType dtype) {
    std::vector<float> result = RandomValues(seed, n, dtype);
    if (magnitude) Absolute(result);
    return result;
  };
  RowInput input;
  input.x = arena.Floats(c.x, {c.num_tokens, c.k}, values(11, c.num_tokens * c.k, c.x));
  if (c.norm) {
    input.norm.kind = NormKind::kRms;
    input.norm.epsilon = 1e-6f;
  }
  if (c.norm_weight) {
    input.norm.weight = arena.Floats(DType::kF32, {c.k}, values(12, c.k, DType::kF32));
    input.norm.weight_offset = magnitude ? 1.0f : -0.25f;
  }
  if (c.gate) {
    input.gate =
        arena.Floats(c.weights, {c.num_tokens, c.k}, values(13, c.num_tokens * c.k, c.weights));
  }
  return input;
}

// Of a product's sum of magnitudes: k products and the k roundings of their sum; forming a row (the
// norm's own sum of k squares, root, quotient and two factors); and one bf16 unit where a formed
// value is rounded to bf16, which a difference of an f32 rounding may tip to the other side.
double ProductError(const ProductCase& c) {
  double error = static_cast<double>(c.k + 2) * kF32Unit;
  if (c.norm || c.gate) error += static_cast<double>(c.k + 6) * kF32Unit;
  if (c.weights == DType::kBF16 && (c.norm || c.gate)) error += kBF16Unit;
  return error;
}
double StoreError(DType y) { return y == DType::kBF16 ? kBF16Unit : kF32Unit; }

std::vector<ProductCase> ProductCases() {
  std::vector<ProductCase> cases;
  for (const int64_t num_tokens : {0, 1, 2, 7, 33, 65}) {
    for (const auto& [k, n] : std::vector<std::pair<int64_t, int64_t>>{
             {1, 1}, {16, 5}, {33, 48}, {130, 129}, {384, 96}}) {
      for (const DType weights : {DType::kF32, DType::kBF16}) {
        ProductCase c{num_tokens, k, n, weights, weights};
        c.num_decode = num_tokens / 2;
        cases.push_back(c);
        c.norm = true;
        c.x = DType::kF32;
        c.y = weights;
        c.num_decode = 0;
        cases.push_back(c);
        c.norm_weight = true;
        c.gate = true;
        c.num_decode = num_tokens;
        cases.push_back(c);
      }
    }
  }
  // Shapes that tensor cores take, every number of rows at which a kernel or a tile may change.
  std::vector<int64_t> numbers_of_rows = {48, 64, 65, 100, 128, 129, 256, 600};
  for (int64_t num_tokens = 1; num_tokens <= 33; ++num_tokens) {
    numbers_of_rows.push_back(num_tokens);
  }
  for (const int64_t num_tokens : numbers_of_rows) {
    ProductCase c{num_tokens, 160, 72, DType::kBF16, DType::kBF16, DType::kBF16};
    c.num_decode = num_tokens % 3 == 0 ? num_tokens / 2 : num_tokens;
    cases.push_back(c);
    c.norm = true;
    c.x = DType::kF32;
    cases.push_back(c);
    c.norm_weight = true;
    c.gate = true;
    c.y = DType::kF32;
    cases.push_back(c);
    c.k = 1056;
    c.n = num_tokens % 2 == 0 ? 24 : 21;
    cases.push_back(c);
  }
  for (const DType weights : {DType::kF32, DType::kBF16}) {
    cases.push_back({300, 1100, 777, weights, DType::kF32, DType::kF32, true, false, false,
                     Epilogue::kStore, 16});
  }
  return cases;
}

TEST_P(ConformanceTest, Linear) {
  for (ProductCase c : ProductCases()) {
    for (const Epilogue epilogue : {Epilogue::kStore, Epilogue::kAdd}) {
      c.epilogue = epilogue;
      if (epilogue == Epilogue::kAdd) c.y = DType::kF32;
      auto run = [&](Backend& backend, bool magnitude) {
        DeviceArena arena(backend);
        LinearArgs args;
        args.input = MakeInput(arena, c, magnitude);
        std::vector<float> w = RandomValues(21, c.n * c.k, c.weights);
        std::vector<float> y = RandomValues(22, c.num_tokens * c.n, c.y);
        if (magnitude) Absolute(w);
        if (magnitude) Absolute(y);
        args.w = arena.Matrix(c.weights, c.n, c.k, w);
        args.epilogue = c.epilogue;
        args.y = arena.Floats(c.y, {c.num_tokens, c.n}, y);
        args.num_decode_tokens = c.num_decode;
        ExpectOk(backend.Linear(args));
        return arena.Download(args.y);
      };
      std::vector<double> tolerance;
      for (const float m : run(*ref_, true)) {
        tolerance.push_back((ProductError(c) + StoreError(c.y)) * static_cast<double>(m));
      }
      ASSERT_TRUE(Within(run(*backend_, false), run(*ref_, false), tolerance)) << Describe(c);
    }
  }
}

TEST_P(ConformanceTest, GatedLinear) {
  for (ProductCase c : ProductCases()) {
    c.y = c.weights;
    for (const Activation activation : {Activation::kNone, Activation::kSilu}) {
      auto run = [&](Backend& backend, bool magnitude) {
        DeviceArena arena(backend);
        GatedLinearArgs args;
        args.input = MakeInput(arena, c, magnitude);
        std::vector<float> gate = RandomValues(31, c.n * c.k, c.weights);
        std::vector<float> up = RandomValues(32, c.n * c.k, c.weights);
        if (magnitude) Absolute(gate);
        if (magnitude) Absolute(up);
        args.gate = arena.Matrix(c.weights, c.n, c.k, gate);
        args.up = arena.Matrix(c.weights, c.n, c.k, up);
        args.activation = magnitude ? Activation::kNone : activation;
        args.y = arena.Output(c.y, {c.num_tokens, c.n});
        args.num_decode_tokens = c.num_decode;
        ExpectOk(backend.GatedLinear(args));
        return arena.Download(args.y);
      };
      // Both factors are off by ProductError; SiLU has a slope below 1.1 and is itself good to 4
      // roundings.
      std::vector<double> tolerance;
      for (const float m : run(*ref_, true)) {
        tolerance.push_back((2.2 * ProductError(c) + 4 * kF32Unit + StoreError(c.y)) * 1.01 *
                            static_cast<double>(m));
      }
      ASSERT_TRUE(Within(run(*backend_, false), run(*ref_, false), tolerance)) << Describe(c);
    }
  }
}

// Rows of a product in one step, and some of them in smaller steps: the same bits, for each phase.
TEST_P(ConformanceTest, ProductRowsAreIndependentOfTheBatch) {
  constexpr int64_t kRows = 260, kColumns = 1056, kFeatures = 72;
  ExpectOk(backend_->Reserve({.max_tokens = kRows,
                              .max_rows = kRows,
                              .max_input_columns = kColumns,
                              .max_gated_columns = kFeatures,
                              .deterministic = true}));
  std::vector<int64_t> numbers_of_rows = {64, 256};
  for (int64_t m = 1; m <= 33; ++m) numbers_of_rows.push_back(m);
  for (const DType act : {DType::kBF16, DType::kF32}) {
    DeviceArena arena(*backend_);
    const ProductCase c{kRows, kColumns, kFeatures, act, DType::kF32, act, true, true, true};
    const RowInput input = MakeInput(arena, c, false);
    const MatrixView w =
        arena.Matrix(act, kFeatures, kColumns, RandomValues(51, kFeatures * kColumns, act));
    const MatrixView up =
        arena.Matrix(act, kFeatures, kColumns, RandomValues(52, kFeatures * kColumns, act));
    auto run = [&](int64_t first, int64_t m, bool gated, bool decode) {
      RowInput rows = input;
      rows.x = RowRange(input.x, first, m);
      rows.gate = RowRange(input.gate, first, m);
      const TensorView y = arena.Output(act, {m, kFeatures});
      const int64_t num_decode = decode ? m : 0;
      if (gated) {
        ExpectOk(backend_->GatedLinear({.input = rows,
                                        .gate = w,
                                        .up = up,
                                        .activation = Activation::kSilu,
                                        .y = y,
                                        .num_decode_tokens = num_decode}));
      } else {
        ExpectOk(
            backend_->Linear({.input = rows, .w = w, .y = y, .num_decode_tokens = num_decode}));
      }
      return arena.Download(y);
    };
    for (const bool gated : {false, true}) {
      for (const bool decode : {false, true}) {
        const std::vector<float> all = run(0, kRows, gated, decode);
        for (const int64_t m : numbers_of_rows) {
          const int64_t first = m % 4;
          const auto begin = all.begin() + first * kFeatures;
          ASSERT_TRUE(SameBits(run(first, m, gated, decode),
                               std::vector<float>(begin, begin + m * kFeatures)))
              << m << " rows, gated " << gated << ", decode " << decode;
        }
      }
    }
  }
}

TEST_P(ConformanceTest, GatherRows) {
  for (const int64_t num_rows : {0, 1, 50}) {
    auto run = [&](Backend& backend) {
      DeviceArena arena(backend);
      GatherRowsArgs args;
      args.x = arena.Floats(DType::kF32, {40, 37}, RandomValues(41, 40 * 37));
      args.rows = arena.Upload<int32_t>(DType::kI32, {num_rows}, SomeIds(num_rows, 40));
      args.y = arena.Output(DType::kF32, {num_rows, 37});
      ExpectOk(backend.GatherRows(args));
      return arena.Download(args.y);
    };
    EXPECT_TRUE(SameBits(run(*backend_), run(*ref_)));
  }
}

TEST_P(ConformanceTest, LightningAttention) {
  for (const DType act : {DType::kF32, DType::kBF16}) {
    for (const Activation activation : {Activation::kNone, Activation::kSilu}) {
      for (const auto& [heads, head_dim] :
           std::vector<std::pair<int, int>>{{1, 1}, {3, 5}, {2, 16}, {6, 64}, {1, 128}}) {
        LightningShape shape;
        shape.heads = heads;
        shape.head_dim = head_dim;
        shape.act = act;
        shape.activation = activation;
        shape.rates = LayerRates(heads, 1, 3);
        auto run = [&](Backend& backend, bool magnitude) {
          LightningShape mine = shape;
          mine.magnitude = magnitude;
          LightningRun lightning(backend, mine, 220);
          lightning.Step({Prefill(0, 1, 0, 64), Prefill(1, 0, 0, 3)});
          lightning.Step({Decode(1, 0, 3, 5, 3, 3), Prefill(0, 1, 64, 201)});
          for (int64_t t = 201; t < 220; ++t) {
            lightning.Step({Decode(0, 1, t, 1, std::max<int64_t>(t - 1, 201), t)});
          }
          std::vector<float> result = lightning.output(0);
          for (const std::vector<float>& more :
               {lightning.Output(1, 0, 8), lightning.State(0), lightning.State(1)}) {
            result.insert(result.end(), more.begin(), more.end());
          }
          return result;
        };
        const std::vector<double> tolerance = LightningTolerance(shape, run(*ref_, true), 220);
        EXPECT_TRUE(Within(run(*backend_, false), run(*ref_, false), tolerance))
            << heads << " " << head_dim;
      }
    }
  }
}

// Decode and verify rows of 1 to 16 tokens, with padding between them, bases that lag by up to a
// window, and a ring that wraps.
TEST_P(ConformanceTest, LightningDecode) {
  struct Case {
    int heads, head_dim;
    bool lrpe;
    DType act, output;
  };
  for (const Case& c :
       {Case{8, 128, false, DType::kBF16, DType::kF32},
        Case{2, 128, true, DType::kBF16, DType::kBF16},
        Case{20, 64, false, DType::kBF16, DType::kBF16},
        Case{40, 64, true, DType::kBF16, DType::kF32}, Case{2, 64, false, DType::kF32, DType::kF32},
        Case{3, 40, true, DType::kBF16, DType::kBF16}}) {
    LightningShape shape;
    shape.heads = c.heads;
    shape.head_dim = c.head_dim;
    shape.lrpe = c.lrpe;
    shape.zero_state = c.lrpe;  // the magnitude run has no bound for a state under rotated queries
    shape.act = c.act;
    shape.output = c.output;
    shape.window_rows = 3 * kWindow - 1 + kWindow;
    shape.rates = LayerRates(c.heads, 1, 3);
    const int64_t n = 100;
    auto run = [&](Backend& backend, bool magnitude) {
      LightningShape mine = shape;
      mine.magnitude = magnitude;
      LightningRun lightning(backend, mine, n);
      lightning.Step({Prefill(0, 1, 0, 19), Prefill(1, 3, 0, 5)});
      int64_t position[2] = {19, 5}, base[2] = {16, 0};
      for (int step = 0; position[0] < n || position[1] < n; ++step) {
        std::vector<LightningPiece> pieces = {Padding()};
        for (int sequence = 0; sequence < 2; ++sequence) {
          int64_t& t = position[sequence];
          const int64_t count = std::min<int64_t>(1 + (7 * step + 3 * sequence) % kWindow, n - t);
          if (count == 0) continue;
          const int64_t confirmed = std::max(t - (step % 3 == 0 ? 0 : kWindow), base[sequence]);
          pieces.push_back(Decode(sequence, sequence == 0 ? 1 : 3, t, static_cast<int>(count),
                                  base[sequence], confirmed));
          pieces.push_back(Padding());
          base[sequence] = FloorTo(confirmed, kWindow);
          t += count;
        }
        lightning.Step(pieces);
      }
      std::vector<float> result = lightning.output(0);
      std::vector<std::vector<float>> more = {lightning.output(1)};
      if (!c.lrpe) {  // whose states have no bound either
        for (const int slot : {0, 1, 3}) more.push_back(lightning.State(slot));
      }
      for (const std::vector<float>& values : more) {
        result.insert(result.end(), values.begin(), values.end());
      }
      return result;
    };
    const std::vector<double> tolerance = LightningTolerance(shape, run(*ref_, true), n);
    EXPECT_TRUE(Within(run(*backend_, false), run(*ref_, false), tolerance))
        << c.heads << " " << c.head_dim << " " << c.lrpe;
  }
}

TEST_P(ConformanceTest, LightningAttentionOfNothing) {
  LightningShape shape;
  shape.rates = {0.1, 0.2};
  LightningRun run(*backend_, shape, 4);
  const std::vector<float> before = run.State(0);
  run.Step({});
  run.Step({Decode(0, 0, 0, 0, 0, 0)});
  run.Step({Padding()});
  EXPECT_TRUE(SameBits(run.State(0), before));
}

// Three tables with other frequencies and attention factors, token by token in turn; each token's
// bits are those of its table alone.
TEST_P(ConformanceTest, Rope) {
  // Positions to 2^30: a product formed in f32 would be off by many turns.
  const std::vector<int64_t> positions = {
      0, 1, 2, 17, 4095, 65535, 1000000, 123456789, int64_t{1} << 30};
  constexpr double kFactors[] = {1.0, 1.20794, 0.875};
  const auto num_tokens = static_cast<int64_t>(positions.size());
  for (const int num_freqs : {1, 5, 32, 64}) {
    auto run = [&](Backend& backend, const std::vector<int32_t>& table_ids, bool sine) {
      DeviceArena arena(backend);
      std::vector<double> tables;
      for (const double factor : kFactors) {
        for (int i = 0; i < num_freqs; ++i)
          tables.push_back(std::pow(10000.0 * factor, -static_cast<double>(i) / num_freqs));
        tables.push_back(factor);
      }
      RopeArgs args;
      args.positions = arena.Upload<int64_t>(DType::kI64, {num_tokens}, positions);
      args.table_ids = arena.Upload<int32_t>(DType::kI32, {num_tokens}, table_ids);
      args.tables = arena.UploadArray(tables);
      args.num_tables = 3;
      args.num_freqs = num_freqs;
      args.cos = arena.Output(DType::kF32, {num_tokens, num_freqs});
      args.sin = arena.Output(DType::kF32, {num_tokens, num_freqs});
      ExpectOk(backend.Rope(args));
      return arena.Download(sine ? args.sin : args.cos);
    };
    const std::vector<int32_t> mixed = {0, 1, 2, 2, 1, 0, 1, 0, 2};
    for (const bool sine : {false, true}) {
      // 3 f32 roundings of the function and the factor; the double product is off by 2^-53 of an
      // angle of at most 2^30.
      const std::vector<float> expected = run(*ref_, mixed, sine);
      const std::vector<double> tolerance(expected.size(),
                                          1.20794 * (6 * kF32Unit + std::ldexp(1.0, 30 - 52)));
      const std::vector<float> values = run(*backend_, mixed, sine);
      EXPECT_TRUE(Within(values, expected, tolerance)) << num_freqs << " sine " << sine;
      for (int32_t table = 0; table < 3; ++table) {
        const std::vector<float> alone =
            run(*backend_, std::vector<int32_t>(positions.size(), table), sine);
        for (size_t index = 0; index < values.size(); ++index) {
          if (mixed[index / static_cast<size_t>(num_freqs)] != table) continue;
          ASSERT_EQ(values[index], alone[index]) << num_freqs << " table " << table;
        }
      }
    }
  }
}

// Seen through attention, since a back end lays out its blocks as it likes.
TEST_P(ConformanceTest, TurnKeys) {
  const PagedShape shapes[] = {{4, 2, 16, 8, PairLayout::kInterleaved, DType::kF32},
                               {6, 2, 40, 10, PairLayout::kHalfSplit, DType::kBF16},
                               {2, 1, 40, 7, PairLayout::kInterleaved, DType::kBF16},
                               {8, 2, 64, 32, PairLayout::kHalfSplit, DType::kBF16},
                               {8, 1, 128, 64, PairLayout::kHalfSplit, DType::kBF16},
                               {2, 2, 256, 128, PairLayout::kHalfSplit, DType::kF32}};
  for (const PagedShape& shape : shapes) {
    for (const int64_t delta : {16, 4080, 1 << 30}) {
      auto run = [&](Backend& backend, bool turned) {
        PagedRun paged(backend, shape, 32);
        paged.Step({{0, 0, 16, true}, {1, 0, 16, true}});
        // Sequence 2 and 3 begin with the turned blocks of 0 and 1; 0 and 1 keep theirs.
        paged.TurnFirstBlocks({{0, 2, turned ? delta : 0}, {1, 3, turned ? 2 * delta : 0}});
        paged.TurnFirstBlocks({});
        paged.Step({{2, 16, 1, false}, {3, 16, 1, false}, {0, 16, 1, false}});
        std::vector<float> outputs;
        for (const int sequence : {2, 3, 0}) {
          const std::vector<float> output = paged.Output(sequence, 16, 17);
          outputs.insert(outputs.end(), output.begin(), output.end());
        }
        return outputs;
      };
      std::vector<double> tolerance = PagedRun(*ref_, shape, 32).Tolerance(0);
      const std::vector<float> expected = run(*ref_, true);
      tolerance.resize(expected.size());
      for (double& value : tolerance) value *= 2;  // keys are rounded twice
      const std::vector<float> actual = run(*backend_, true);
      EXPECT_TRUE(Within(actual, expected, tolerance)) << shape.head_dim << " " << delta;
      // A bound for every rounding of bf16 says little: what a turn changes is far more.
      const std::vector<float> still = run(*ref_, false);
      double error = 0, change = 0;
      for (size_t index = 0; index < expected.size(); ++index) {
        error = std::max(error, std::abs(double{actual[index]} - expected[index]));
        change = std::max(change, std::abs(double{still[index]} - expected[index]));
      }
      EXPECT_LT(error, change / 20) << shape.head_dim << " " << delta;
    }
  }
}

TEST_P(ConformanceTest, PagedAttention) {
  const PagedShape shapes[] = {{1, 1, 1, 0, PairLayout::kHalfSplit, DType::kF32},
                               {4, 2, 16, 8, PairLayout::kInterleaved, DType::kF32},
                               {6, 2, 40, 10, PairLayout::kHalfSplit, DType::kBF16},
                               {8, 1, 64, 32, PairLayout::kHalfSplit, DType::kBF16},
                               {2, 2, 128, 64, PairLayout::kInterleaved, DType::kF32},
                               {1, 1, 256, 128, PairLayout::kHalfSplit, DType::kBF16}};
  for (const PagedShape& shape : shapes) {
    auto run = [&](PagedRun& paged) {
      paged.Step({});
      paged.Step({{0, 0, 1, true}});
      paged.Step({{0, 1, 1, false}, {1, 0, 90, true}});
      paged.Step({{1, 90, 3, false}, {0, 2, 62, true}});
      paged.Step({{0, 64, 16, false}, {1, 93, 1, false}});
      return paged.output(0);
    };
    PagedRun expected(*ref_, shape, 94), actual(*backend_, shape, 94);
    EXPECT_TRUE(Within(run(actual), run(expected), actual.Tolerance(0)))
        << shape.heads << " " << shape.head_dim;
    EXPECT_TRUE(Within(actual.output(1), expected.output(1), actual.Tolerance(1)));
  }
}

// Steps of a few decode and verify rows after `cached` positions.
void DecodeAround(PagedRun& paged, int64_t cached) {
  paged.Cache(0, cached);
  paged.Cache(1, cached);
  paged.Step({{0, cached, 1}, {1, cached, 3}, {2, cached, 0}});
  paged.Step({{0, cached + 1, 1}, {1, cached + 3, 1}});
  paged.Step({{0, cached + 2, 16}, {1, cached + 4, 2}});
  paged.Step({{1, cached + 6, 5}, {0, cached + 18, 1}});
}

// Calls test(shape, cached) for contexts around a block and around the ranges whose results are
// merged, for groups of 1, 4, 8 and 2 heads.
template <typename Test>
void ForEachDecode(const Test& test) {
  for (const int64_t cached : {0, 14, 510, 1010, 1022, 2046, 4094}) {
    for (const auto& [heads, kv_heads, head_dim] :
         std::vector<std::tuple<int, int, int>>{{3, 3, 128}, {8, 2, 64}, {8, 1, 128}, {4, 2, 40}}) {
      PagedShape shape{heads, kv_heads, head_dim, head_dim / 4};
      shape.act = DType::kBF16;
      shape.o = cached % 4 == 0 ? DType::kF32 : DType::kBF16;
      test(shape, cached);
    }
  }
}

TEST_P(ConformanceTest, PagedDecode) {
  ForEachDecode([&](const PagedShape& shape, int64_t cached) {
    PagedRun expected(*ref_, shape, cached + 19), actual(*backend_, shape, cached + 19);
    DecodeAround(expected, cached);
    DecodeAround(actual, cached);
    for (const int sequence : {0, 1}) {
      EXPECT_TRUE(
          Within(actual.output(sequence), expected.output(sequence), actual.Tolerance(sequence)))
          << shape.heads << " " << shape.head_dim << " after " << cached;
    }
  });
}

// More ranges of keys than a device has multiprocessors, long and short: a block that stays takes
// several, one after the other.
TEST_P(ConformanceTest, PagedDecodeOfManyHeads) {
  constexpr int64_t kCached[] = {530, 520, 40, 16};
  for (const int head_dim : {64, 128}) {
    PagedShape shape{68, 34, head_dim, head_dim / 4};
    shape.act = shape.o = DType::kBF16;
    const auto run = [&](PagedRun& paged) {
      for (int sequence = 0; sequence < 4; ++sequence) paged.Cache(sequence, kCached[sequence]);
      paged.Step({{0, 530, 1}, {1, 520, 2}, {2, 40, 1}, {3, 16, 1}});
      paged.Step({{3, 17, 1}, {2, 41, 5}, {1, 522, 1}, {0, 531, 1}});
    };
    PagedRun expected(*ref_, shape, 532), actual(*backend_, shape, 532);
    run(expected);
    run(actual);
    for (int sequence = 0; sequence < 4; ++sequence) {
      EXPECT_TRUE(
          Within(actual.output(sequence), expected.output(sequence), actual.Tolerance(sequence)))
          << head_dim << " after " << kCached[sequence];
    }
  }
}

// The bits of a token depend on its keys alone: not on the rows beside it, nor on how many tokens
// its own row has.
TEST_P(ConformanceTest, PagedDecodeTokenByToken) {
  ForEachDecode([&](const PagedShape& shape, int64_t cached) {
    PagedRun together(*backend_, shape, cached + 19), alone(*backend_, shape, cached + 19);
    DecodeAround(together, cached);
    alone.Cache(0, cached);
    for (int64_t t = cached; t < cached + 19; ++t) alone.Step({{0, t, 1}});
    EXPECT_TRUE(SameBits(together.output(0), alone.output(0)))
        << shape.heads << " " << shape.head_dim << " after " << cached;
  });
}

// Prompts of bf16 in heads of 64 and 128: what matrix units take.
std::vector<PagedShape> PrefillShapes() {
  using enum PairLayout;
  std::vector<PagedShape> shapes = {{2, 2, 128, 0, kHalfSplit, DType::kBF16},
                                    {4, 1, 128, 64, kHalfSplit, DType::kBF16},
                                    {4, 2, 128, 16, kInterleaved, DType::kBF16},
                                    {8, 1, 64, 32, kInterleaved, DType::kBF16},
                                    {4, 4, 64, 8, kHalfSplit, DType::kBF16}};
  for (size_t i = 0; i < shapes.size(); i += 2) shapes[i].o = DType::kBF16;
  return shapes;
}

// n tokens of sequence 0, cut at a multiple of 64 where there is one, and some of sequence 1.
void RunPrompts(PagedRun& run, int n) {
  const int cut = n > 64 ? n / 128 * 64 + 64 : 0;
  if (cut > 0) run.Step({{0, 0, cut, true}, {1, 0, 40, true}});
  run.Step({{1, cut > 0 ? 40 : 0, 17, true}, {0, cut, n - cut, true}});
}

// Tensor cores take q, rotated k and the weights in bf16, 2^-8 off each at most. A score is a sum
// of head_dim products of normal variates times scale = head_dim^-1/2, so that the errors of q and
// k come to a standard deviation of sqrt(2 / 3) 2^-8 = 0.0032; 6 of them are allowed, and the
// weights' own rounding. What is left is a rounding of the output.
std::vector<double> PrefillTolerance(const PagedShape& shape, const std::vector<float>& o,
                                     const std::vector<float>& magnitudes) {
  std::vector<double> tolerance;
  for (size_t i = 0; i < o.size(); ++i) {
    tolerance.push_back((6 * 0.0032 + kBF16Unit) * static_cast<double>(magnitudes[i]) +
                        StoreError(shape.o) * std::abs(static_cast<double>(o[i])) + 1e-6);
  }
  return tolerance;
}

TEST_P(ConformanceTest, PagedPrefill) {
  for (const PagedShape& shape : PrefillShapes()) {
    for (const int n : {1, 16, 63, 64, 65, 128, 130, 257, 300, shape.heads == 2 ? 1100 : 200}) {
      PagedShape exact = shape;
      exact.o = DType::kF32;
      PagedShape magnitude = exact;
      magnitude.magnitude = true;
      const int64_t room = std::max(n, 57);
      PagedRun expected(*ref_, exact, room), magnitudes(*ref_, magnitude, room);
      PagedRun actual(*backend_, shape, room);
      for (PagedRun* run : {&expected, &magnitudes, &actual}) RunPrompts(*run, n);
      for (const int sequence : {0, 1}) {
        const int64_t end = sequence == 0 ? n : n > 64 ? 57 : 17;
        const std::vector<float> o = expected.Output(sequence, 0, end);
        ASSERT_TRUE(Within(actual.Output(sequence, 0, end), o,
                           PrefillTolerance(shape, o, magnitudes.Output(sequence, 0, end))))
            << "heads " << shape.heads << " of " << shape.head_dim << " n " << n << " sequence "
            << sequence;
      }
    }
  }
}

TEST_P(ConformanceTest, PagedPrefillHasTheSameBitsInAnyCutsAndCompany) {
  for (const PagedShape& shape : PrefillShapes()) {
    const int n = 700;
    PagedRun whole(*backend_, shape, n);
    whole.Step({{0, 0, n, true}});
    for (const int cut : {64, 128, 192, 512, 50}) {
      PagedRun cuts(*backend_, shape, n);
      for (int t = 0; t < n; t += cut) {
        PagedPiece mine{0, t, std::min(cut, n - t), true}, other{1, t, std::min(cut, n - t), true};
        if (t / cut % 2 == 0) std::swap(mine, other);
        cuts.Step({mine, other});
      }
      EXPECT_TRUE(SameBits(cuts.output(0), whole.output(0)))
          << "heads " << shape.heads << " of " << shape.head_dim << " cut " << cut;
    }
  }
}

TEST_P(ConformanceTest, ScoreTokens) {
  for (const int64_t vocab : {1, 2, 17, 1000, 50000}) {
    for (const int64_t num_rows : {0, 1, 5}) {
      const int32_t num_top = static_cast<int32_t>(std::min<int64_t>(vocab, 6));
      auto run = [&](Backend& backend) {
        DeviceArena arena(backend);
        std::vector<float> logits = RandomValues(51, num_rows * vocab, DType::kF32, 4);
        if (vocab > 1 && num_rows > 0) logits[1] = -INFINITY;
        std::vector<int32_t> targets = SomeIds(num_rows, vocab);
        if (num_rows > 3) targets[3] = -1;
        ScoreTokensArgs args;
        args.logits = arena.Floats(DType::kF32, {num_rows, vocab}, logits);
        args.targets = arena.Upload<int32_t>(DType::kI32, {num_rows}, targets);
        args.logprobs = arena.Output(DType::kF32, {num_rows});
        args.num_top = num_top;
        args.top_ids =
            arena.Upload<int32_t>(DType::kI32, {num_rows, num_top},
                                  std::vector<int32_t>(static_cast<size_t>(num_rows * num_top)));
        args.top_logprobs = arena.Output(DType::kF32, {num_rows, num_top});
        ExpectOk(backend.ScoreTokens(args));
        std::vector<float> result = arena.Download(args.logprobs);
        for (const TensorView& more : {args.top_ids, args.top_logprobs}) {
          const std::vector<float> values = arena.Download(more);
          result.insert(result.end(), values.begin(), values.end());
        }
        // -inf - -inf is no number: what is compared is that both say -inf.
        for (float& x : result) x = std::isinf(x) ? -1e30f : x;
        return result;
      };
      const std::vector<float> expected = run(*ref_);
      std::vector<double> tolerance;
      // The exponentials are good to 2^-19 of the sum, the result is one rounding of a number
      // below 64. Ids are exact.
      for (const float x : expected)
        tolerance.push_back(std::ldexp(1.0, -18) +
                            2 * kF32Unit * std::min(64.0, std::abs(static_cast<double>(x))));
      EXPECT_TRUE(Within(run(*backend_), expected, tolerance)) << vocab << " " << num_rows;
    }
  }
}

TEST_P(ConformanceTest, Sample) {
  const int64_t vocab = 3001;
  std::vector<SampleRow> rows;
  for (int i = 0; i < 64; ++i) {
    SampleRow row;
    row.logit_row = i % 3;
    row.output_index = i;
    row.seed = 4242;
    row.position = 10 * i;
    row.temperature = 0.25f * static_cast<float>(i % 5);
    row.top_k = i % 4 == 0 ? 20 : 0;
    row.top_p = i % 3 == 0 ? 0.7f : 1;
    row.min_p = i % 7 == 0 ? 0.1f : 0;
    rows.push_back(row);
  }
  auto run = [&](Backend& backend) {
    DeviceArena arena(backend);
    SampleArgs args;
    args.logits =
        arena.Floats(DType::kF32, {3, vocab}, RandomValues(61, 3 * vocab, DType::kF32, 2));
    args.rows = arena.UploadArray(rows);
    args.num_rows = static_cast<int32_t>(rows.size());
    args.tokens =
        arena.Upload<int32_t>(DType::kI32, {args.num_rows}, std::vector<int32_t>(rows.size(), -1));
    ExpectOk(backend.Sample(args));
    return arena.Download(args.tokens);
  };
  const std::vector<float> actual = run(*backend_), expected = run(*ref_);
  int different = 0;
  for (size_t i = 0; i < rows.size(); ++i) different += actual[i] != expected[i];
  // A draw is decided by a rounding where two values lie within 1e-5: 1 in 10,000 draws.
  EXPECT_LE(different, 1);
}

// Rows under every rule at once; among them padding, logits that hold a NaN, ties, and a row that
// bans all.
std::vector<SampleRow> RowsUnderEveryRule(int64_t vocab, const TokenBias* biases,
                                          int32_t num_biases) {
  std::vector<SampleRow> rows(24);
  for (int i = 0; i < std::ssize(rows); ++i) {
    SampleRow& row = rows[static_cast<size_t>(i)];
    row.logit_row = row.slot = row.output_index = i;
    row.seed = 99;
    row.position = 3 * i;
    row.temperature = i % 3 == 0 ? 0 : 0.8f;
    row.top_k = i % 4 == 1 ? 40 : 0;
    row.top_p = i % 5 == 2 ? 0.6f : 1;
    row.min_p = i % 7 == 3 ? 0.05f : 0;
    row.repetition_penalty = i % 4 == 2 ? 1.25f : 1;
    row.presence_penalty = i % 6 == 1 ? 0.5f : 0;
    row.frequency_penalty = i % 6 == 2 ? 0.25f : 0;
    row.num_logprobs = static_cast<int32_t>(std::min<int64_t>(i % 6 - 1, vocab));
    if (i % 2 == 0) row.biases = biases, row.num_biases = num_biases;
  }
  rows[5].slot = -1;
  return rows;
}

std::vector<float> LogitsUnderEveryRule(int64_t num_rows, int64_t vocab) {
  std::vector<float> logits = RandomValues(71, num_rows * vocab, DType::kF32, 3);
  const auto row = [&](int64_t i) { return logits.begin() + i * vocab; };
  row(3)[vocab - 1] = NAN;
  row(4)[0] = INFINITY;
  std::fill(row(7), row(8), -INFINITY);
  std::fill(row(9), row(10), 0.5f);   // top_k cuts ties
  std::fill(row(17), row(18), 1.5f);  // and top_p
  return logits;
}

TEST_P(ConformanceTest, SampleUnderEveryRule) {
  for (const int64_t vocab : {1, 17, 3001, 40000}) {
    std::vector<TokenBias> biases = {{0, 1.5f}};
    if (vocab > 3) biases.insert(biases.end(), {{3, -INFINITY}, {2, -4}});
    std::vector<SampleRow> rows;
    std::vector<float> tokens[2], counts[2], logprobs[2], ids[2], tops[2];
    for (const int which : {0, 1}) {
      Backend& backend = which == 0 ? *ref_ : *backend_;
      DeviceArena arena(backend);
      rows =
          RowsUnderEveryRule(vocab, arena.UploadArray(biases), static_cast<int32_t>(biases.size()));
      const int64_t num_rows = std::ssize(rows), num_top = 5;
      std::vector<uint32_t> initial(static_cast<size_t>(num_rows * vocab));
      for (size_t i = 0; i < initial.size(); i += 3)
        initial[i] = i % 2 == 0 ? kPromptBit | i % 4 : 2;
      SampleArgs args;
      args.logits =
          arena.Floats(DType::kF32, {num_rows, vocab}, LogitsUnderEveryRule(num_rows, vocab));
      args.rows = arena.UploadArray(rows);
      args.num_rows = static_cast<int32_t>(num_rows);
      args.counts = arena.Upload<uint32_t>(DType::kU32, {num_rows, vocab}, initial);
      args.tokens =
          arena.Upload<int32_t>(DType::kI32, {num_rows}, std::vector<int32_t>(rows.size(), -7));
      args.logprobs = arena.Output(DType::kF32, {num_rows});
      args.top_ids = arena.Upload<int32_t>(DType::kI32, {num_rows, num_top},
                                           std::vector<int32_t>(rows.size() * num_top));
      args.top_logprobs = arena.Output(DType::kF32, {num_rows, num_top});
      ExpectOk(backend.Sample(args));
      tokens[which] = arena.Download(args.tokens);
      counts[which] = arena.Download(args.counts);
      logprobs[which] = arena.Download(args.logprobs);
      ids[which] = arena.Download(args.top_ids);
      tops[which] = arena.Download(args.top_logprobs);
    }
    EXPECT_EQ(tokens[1][5], -7) << "padding was written";
    EXPECT_EQ(tokens[1][3], -1);
    EXPECT_EQ(tokens[1][4], -1);
    // -inf - -inf is no number; what is compared is that both say -inf.
    const auto near = [](float a, float b) {
      return std::isinf(a) ? a == b : std::abs(a - b) < 1e-5f;
    };
    int different = 0;
    for (size_t r = 0; r < rows.size(); ++r) {
      different += tokens[0][r] != tokens[1][r];
      if (tokens[0][r] != tokens[1][r] || tokens[0][r] < 0) continue;
      EXPECT_TRUE(std::equal(counts[0].begin() + r * vocab, counts[0].begin() + (r + 1) * vocab,
                             counts[1].begin() + r * vocab));
      if (rows[r].num_logprobs < 0) continue;
      EXPECT_TRUE(near(logprobs[1][r], logprobs[0][r])) << vocab << " row " << r;
      for (size_t i = r * 5; i < r * 5 + static_cast<size_t>(rows[r].num_logprobs); ++i) {
        EXPECT_EQ(ids[1][i], ids[0][i]) << vocab << " row " << r;
        EXPECT_TRUE(near(tops[1][i], tops[0][i])) << vocab << " row " << r;
      }
    }
    EXPECT_LE(different, 1) << vocab;  // as above: decided by a rounding
  }
}

TEST_P(ConformanceTest, SampleProbabilities) {
  const int64_t vocab = 1001;
  std::vector<SampleRow> rows;
  for (int i = 0; i < 12; ++i) {
    SampleRow row;
    row.logit_row = i % 3;
    row.temperature = 0.3f * static_cast<float>(i % 4);
    row.top_k = i % 2 == 0 ? 30 : 0;
    row.min_p = i % 5 == 0 ? 0.05f : 0;
    row.probability_row = i == 7 ? -1 : 11 - i;
    rows.push_back(row);
  }
  auto run = [&](Backend& backend) {
    DeviceArena arena(backend);
    SampleArgs args;
    args.logits =
        arena.Floats(DType::kF32, {3, vocab}, RandomValues(62, 3 * vocab, DType::kF32, 2));
    args.rows = arena.UploadArray(rows);
    args.num_rows = static_cast<int32_t>(rows.size());
    args.tokens =
        arena.Upload<int32_t>(DType::kI32, {args.num_rows}, std::vector<int32_t>(rows.size(), -1));
    args.probabilities = arena.Output(DType::kF32, {12, vocab});
    args.margins = arena.Output(DType::kF32, {12});
    args.certainties = arena.Output(DType::kF32, {12, 2});
    ExpectOk(backend.Sample(args));
    return std::tuple(arena.Download(args.probabilities), arena.Download(args.margins),
                      arena.Download(args.certainties));
  };
  const auto [expected, expected_margins, expected_certainties] = run(*ref_);
  const auto [actual, actual_margins, actual_certainties] = run(*backend_);
  std::vector<double> tolerance;
  for (const float p : expected) tolerance.push_back(std::ldexp(1.0, -17) * static_cast<double>(p));
  EXPECT_TRUE(Within(actual, expected, tolerance));
  EXPECT_TRUE(Within(actual_margins, expected_margins, std::vector<double>(12, 1e-6)));
  // A sum of 1001 terms and a logarithm in f32, of values up to ln(1001).
  EXPECT_TRUE(Within(actual_certainties, expected_certainties, std::vector<double>(24, 1e-5)));
}

// Each kind of layer, with rows out of order and padding between them. What a draw gets is the same
// without the others.
TEST_P(ConformanceTest, AcceptanceHead) {
  struct Case {
    const char* name;
    int64_t n;
    bool x, norm_weight, z, features, writes, readout, in_place;
    int64_t width = 0;  // of x, with a weight
  };
  const Case cases[] = {
      {"linear", 192, true, false, false, true, false, true, false},
      {"linear with norm weight", 33, true, true, false, true, false, true, false},
      {"product before", 64, false, false, true, true, false, true, false},
      {"product of one before", 1, false, false, true, true, false, true, false},
      {"first residual layer", 96, true, true, true, false, true, false, false},
      {"residual layer in place", 130, true, false, true, false, true, false, true},
      {"last residual layer", 4096, true, false, true, false, false, true, false},
      {"both", 5, true, true, true, true, true, true, false},
      {"mlp", 64, true, false, false, true, false, true, false, 192},
      {"mlp with norm weight", 64, true, true, false, true, false, true, false, 512},
      {"mlp of one", 1, true, true, false, true, false, true, false, 1},
      {"mlp of odd sizes", 37, true, true, false, true, true, true, false, 203},
      {"mlp without readout", 64, true, true, false, false, true, false, false, 132},
      {"mlp of many pieces", 130, true, true, false, true, true, true, false, 1100},
  };
  const int32_t logit_rows[] = {2, 0, -1, 1, -1};
  for (const Case& c : cases) {
    SCOPED_TRACE(c.name);
    auto run = [&](Backend& backend, int32_t num_rows = 5) {
      DeviceArena arena(backend);
      std::vector<SampleRow> rows;
      for (const int32_t logit_row : logit_rows) {
        rows.push_back({.logit_row = std::max(logit_row, 0),
                        .slot = logit_row < 0 ? -1 : 0,
                        .temperature = static_cast<float>(logit_row) * 1.5f});
      }
      AcceptanceHeadArgs args;
      const auto some = [&](uint32_t seed, std::vector<int64_t> shape, float scale) {
        int64_t count = 1;
        for (const int64_t size : shape) count *= size;
        return arena.Floats(DType::kF32, std::move(shape),
                            RandomValues(seed, count, DType::kF32, scale));
      };
      const bool activates = c.z || c.width > 0;
      const int64_t width = c.width > 0 ? c.width : c.n;
      const float scale = 1 / std::sqrt(static_cast<float>(c.n));
      if (c.x) args.x = some(1, {3, width}, 2);
      if (c.x && !c.in_place) args.norm = {.kind = NormKind::kRms, .epsilon = 1e-5f};
      if (c.norm_weight) {
        args.norm.weight = some(2, {width}, 1);
        args.norm.weight_offset = 1;
      }
      if (c.z) args.z = some(3, {3, c.n}, 1);
      if (c.width > 0) {
        args.weight = some(8, {c.n, width}, 1 / std::sqrt(static_cast<float>(width)));
      }
      if (activates) args.bias = some(4, {c.n}, 1);
      if (c.features && activates) args.feature_weights = some(5, {kNumHeadFeatures, c.n}, 0.3f);
      if (c.features && !activates) args.readout_features = some(6, {kNumHeadFeatures}, 0.3f);
      if (c.writes) args.y = c.in_place ? args.x : arena.Output(DType::kF32, {3, c.n});
      if (c.readout) args.readout = some(7, {c.n}, scale);
      args.readout_bias = 0.25f;
      args.place = 3;
      args.rows = arena.UploadArray(rows);
      args.num_rows = num_rows;
      args.margins = RowRange(arena.Floats(DType::kF32, {5}, {0.1f, 7, 4, 0, 4}), 0, num_rows);
      args.certainties =
          RowRange(arena.Floats(DType::kF32, {5, 2}, {0.5f, 2, 0.9f, 0.4f, 1, 0, 0.1f, 6, 1, 0}), 0,
                   num_rows);
      const TensorView logits = arena.Output(DType::kF32, {5});
      const TensorView shown_margins = arena.Output(DType::kF32, {5});
      args.logits = RowRange(logits, 0, num_rows);
      if (c.readout) args.shown_margins = RowRange(shown_margins, 0, num_rows);
      ExpectOk(backend.AcceptanceHead(args));
      std::vector<float> values = arena.Download(logits);
      const std::vector<float> shown = arena.Download(shown_margins);
      values.insert(values.end(), shown.begin(), shown.end());
      if (!c.writes) return values;
      const std::vector<float> y = arena.Download(args.y);
      values.insert(values.end(), y.begin(), y.end());
      return values;
    };
    const std::vector<float> expected = run(*ref_);
    // Values of a few units through a norm, an exponential and a sum of n terms.
    const double tolerance = 64 * kF32Unit * std::sqrt(static_cast<double>(c.n)) + 1e-5;
    const std::vector<float> actual = run(*backend_);
    EXPECT_TRUE(Within(actual, expected, std::vector<double>(expected.size(), tolerance)));
    EXPECT_EQ(run(*backend_, 1)[0], actual[0]);
    for (const size_t padding : {2, 4, 7, 9}) {
      EXPECT_EQ(actual[padding], 12345.0f);
      EXPECT_EQ(expected[padding], 12345.0f);
    }
    if (!c.readout) continue;
    EXPECT_EQ(std::vector<float>(actual.begin() + 5, actual.begin() + 10),
              (std::vector<float>{0.1f, 7, 12345, 0, 12345}));
  }
}

// Sequences of both rules, some of whose drafts the target would draw too, one of which failed and
// one of whose logits is no number.
TEST_P(ConformanceTest, VerifyTokens) {
  const int64_t vocab = 203;
  const int num_sequences = 40, max_drafts = 7;
  std::vector<SampleRow> rows;
  std::vector<VerifyRow> verify_rows;
  std::vector<int32_t> drafts;
  std::vector<uint32_t> counts(static_cast<size_t>(num_sequences * vocab));
  std::vector<float> logits, probabilities;
  std::mt19937 random(63);
  std::uniform_int_distribution<int32_t> any_id(0, static_cast<int32_t>(vocab) - 1);
  for (int sequence = 0; sequence < num_sequences; ++sequence) {
    VerifyRow verify;
    verify.first_row = static_cast<int32_t>(rows.size());
    verify.num_drafts = sequence % (max_drafts + 1);
    verify.first_draft = static_cast<int32_t>(drafts.size());
    verify.rule = sequence % 2 == 0 ? AcceptRule::kMatch : AcceptRule::kStandard;
    uint32_t* const count = &counts[static_cast<size_t>(sequence * vocab)];
    for (int i = 0; i < 5; ++i) ++count[any_id(random)];
    count[3] |= kPromptBit;
    for (int i = 0; i <= verify.num_drafts; ++i) {
      SampleRow row;
      row.logit_row = static_cast<int32_t>(rows.size());
      row.slot = sequence;
      row.output_index = sequence % 3;
      row.seed = 77;
      row.position = 100 * sequence + i;
      row.temperature = 0.5f * static_cast<float>(sequence % 3);
      row.top_k = sequence % 5 == 0 ? 20 : 0;
      row.top_p = sequence % 7 == 0 ? 0.8f : 1;
      row.repetition_penalty = sequence % 4 == 0 ? 1.3f : 1;
      row.frequency_penalty = sequence % 3 == 0 ? 0.5f : 0;
      row.num_logprobs = sequence % 2 * 3;
      rows.push_back(row);
      // A peak that the draft mostly hits.
      const int32_t peak = any_id(random);
      std::vector<float> x = RandomValues(static_cast<uint32_t>(1000 + rows.size()), vocab);
      x[static_cast<size_t>(peak)] += 7;
      if (sequence == 13 && i == 2) x[5] = NAN;
      logits.insert(logits.end(), x.begin(), x.end());
      if (i == verify.num_drafts) continue;
      const bool failed = sequence == 22 && i == 3;
      drafts.push_back(failed ? -1 : random() % 8 == 0 ? any_id(random) : peak);
      if (!failed) ++count[drafts.back()];
      std::vector<float> q(static_cast<size_t>(vocab), 0.5f / static_cast<float>(vocab));
      q[static_cast<size_t>(peak)] += 0.5f;
      probabilities.insert(probabilities.end(), q.begin(), q.end());
    }
    // Some of a third kind: dropped, one of which failed.
    verify.num_dropped = sequence % 4 == 3 ? 2 : 0;
    for (int i = 0; i < verify.num_dropped; ++i) {
      drafts.push_back(sequence == 23 && i == 1 ? -1 : any_id(random));
      if (drafts.back() >= 0) ++count[drafts.back()];
      probabilities.resize(drafts.size() * static_cast<size_t>(vocab));
    }
    verify_rows.push_back(verify);
    if (sequence == 21) {  // padding between them
      verify_rows.push_back({.first_row = static_cast<int32_t>(rows.size())});
      rows.push_back({.slot = -1});
      logits.resize(logits.size() + static_cast<size_t>(vocab));
    }
  }
  const auto num_rows = static_cast<int64_t>(rows.size());
  const auto num_verify_rows = static_cast<int64_t>(verify_rows.size());
  struct Result {
    std::vector<float> num_tokens, tokens, counts, logprobs, top_ids;
  };
  auto run = [&](Backend& backend) {
    DeviceArena arena(backend);
    VerifyTokensArgs args;
    args.logits = arena.Floats(DType::kF32, {num_rows, vocab}, logits);
    args.rows = arena.UploadArray(rows);
    args.num_rows = static_cast<int32_t>(num_rows);
    args.verify_rows = arena.UploadArray(verify_rows);
    args.num_verify_rows = static_cast<int32_t>(num_verify_rows);
    args.counts = arena.Upload<uint32_t>(DType::kU32, {num_sequences, vocab}, counts);
    const auto num_drafts = static_cast<int64_t>(drafts.size());
    args.drafts = arena.Upload<int32_t>(DType::kI32, {num_drafts}, drafts);
    args.probabilities = arena.Floats(DType::kF32, {num_drafts, vocab}, probabilities);
    args.num_tokens = arena.Upload<int32_t>(DType::kI32, {num_verify_rows},
                                            std::vector<int32_t>(verify_rows.size(), -7));
    args.tokens =
        arena.Upload<int32_t>(DType::kI32, {num_rows}, std::vector<int32_t>(rows.size(), -7));
    args.logprobs = arena.Output(DType::kF32, {num_rows});
    args.top_ids = arena.Upload<int32_t>(DType::kI32, {num_rows, 3},
                                         std::vector<int32_t>(rows.size() * 3, -7));
    args.top_logprobs = arena.Output(DType::kF32, {num_rows, 3});
    ExpectOk(backend.VerifyTokens(args));
    return Result{arena.Download(args.num_tokens), arena.Download(args.tokens),
                  arena.Download(args.counts), arena.Download(args.logprobs),
                  arena.Download(args.top_ids)};
  };
  const Result actual = run(*backend_), expected = run(*ref_);
  EXPECT_TRUE(SameBits(actual.num_tokens, expected.num_tokens));
  EXPECT_TRUE(SameBits(actual.tokens, expected.tokens));
  EXPECT_TRUE(SameBits(actual.counts, expected.counts));
  EXPECT_TRUE(SameBits(actual.top_ids, expected.top_ids));
  EXPECT_TRUE(Within(actual.logprobs, expected.logprobs,
                     std::vector<double>(expected.logprobs.size(), std::ldexp(1.0, -15))));
  float total = 0, longest = 0;
  for (const float num_tokens : expected.num_tokens) {
    total += num_tokens;
    longest = std::max(longest, num_tokens);
  }
  EXPECT_GT(total, 2 * num_sequences) << "drafts are accepted";
  EXPECT_EQ(longest, max_drafts + 1) << "all of them somewhere";
}

// Drafts that are what Sample draws, one position after another, all stand, with the bits of its
// outputs.
TEST_P(ConformanceTest, VerifyTokensDrawsAsSampleDoes) {
  for (const int64_t vocab : {17, 3001, 40000}) {
    const std::vector<TokenBias> biases = {{0, 1.5f}, {3, -INFINITY}, {2, -4}};
    const int64_t num_rows = 24, num_top = 5;
    DeviceArena arena(*backend_);
    std::vector<SampleRow> rows = RowsUnderEveryRule(vocab, arena.UploadArray(biases), 3);
    for (SampleRow& row : rows) row.slot = 0;
    const std::vector<float> logits = RandomValues(72, num_rows * vocab, DType::kF32, 3);
    const SampleRow* const device_rows = arena.UploadArray(rows);
    std::vector<uint32_t> initial(static_cast<size_t>(vocab));
    for (size_t i = 0; i < initial.size(); i += 3) initial[i] = i % 2 == 0 ? kPromptBit | i % 4 : 2;
    VerifyTokensArgs verify;
    verify.logits = arena.Floats(DType::kF32, {num_rows, vocab}, logits);
    verify.counts = arena.Upload<uint32_t>(DType::kU32, {1, vocab}, initial);
    const auto outputs = [&](auto& args) {
      args.tokens = arena.Upload<int32_t>(DType::kI32, {num_rows}, std::vector<int32_t>(24, -7));
      args.logprobs = arena.Output(DType::kF32, {num_rows});
      args.top_ids =
          arena.Upload<int32_t>(DType::kI32, {num_rows, num_top}, std::vector<int32_t>(24 * 5, -7));
      args.top_logprobs = arena.Output(DType::kF32, {num_rows, num_top});
    };
    SampleArgs all;
    outputs(all);
    for (int64_t r = 0; r < num_rows; ++r) {
      ExpectOk(backend_->Sample({.logits = verify.logits,
                                 .rows = device_rows + r,
                                 .num_rows = 1,
                                 .counts = verify.counts,
                                 .tokens = RowRange(all.tokens, r, 1),
                                 .logprobs = RowRange(all.logprobs, r, 1),
                                 .top_ids = RowRange(all.top_ids, r, 1),
                                 .top_logprobs = RowRange(all.top_logprobs, r, 1)}));
    }
    const std::vector<float> counts_of_sample = arena.Download(verify.counts);
    const std::vector<VerifyRow> verify_rows = {{.num_drafts = static_cast<int32_t>(num_rows) - 1}};
    outputs(verify);
    verify.rows = device_rows;
    verify.num_rows = static_cast<int32_t>(num_rows);
    verify.verify_rows = arena.UploadArray(verify_rows);
    verify.num_verify_rows = 1;
    verify.drafts = RowRange(all.tokens, 0, num_rows - 1);
    verify.num_tokens = arena.Upload<int32_t>(DType::kI32, {1}, std::vector<int32_t>{-7});
    // As drawing the drafts leaves them: the last token is no draft.
    std::vector<uint32_t> counts = initial;
    const std::vector<float> tokens = arena.Download(all.tokens);
    for (int64_t r = 0; r + 1 < num_rows; ++r)
      ++counts[static_cast<size_t>(tokens[static_cast<size_t>(r)])];
    verify.counts = arena.Upload<uint32_t>(DType::kU32, {1, vocab}, counts);
    ExpectOk(backend_->VerifyTokens(verify));
    EXPECT_EQ(arena.Download(verify.num_tokens)[0], static_cast<float>(num_rows)) << vocab;
    EXPECT_TRUE(SameBits(arena.Download(verify.tokens), tokens)) << vocab;
    EXPECT_TRUE(SameBits(arena.Download(verify.counts), counts_of_sample)) << vocab;
    EXPECT_TRUE(SameBits(arena.Download(verify.logprobs), arena.Download(all.logprobs))) << vocab;
    EXPECT_TRUE(SameBits(arena.Download(verify.top_ids), arena.Download(all.top_ids))) << vocab;
  }
}

TEST_P(ConformanceTest, CountTokens) {
  auto run = [&](Backend& backend) {
    DeviceArena arena(backend);
    CountTokensArgs args;
    args.counts = arena.Upload<uint32_t>(DType::kU32, {3, 50}, std::vector<uint32_t>(150));
    args.slot = 2;
    args.token_ids = arena.Upload<int32_t>(DType::kI32, {70}, SomeIds(70, 50));
    ExpectOk(backend.CountTokens(args));
    args.is_prompt = 1;
    args.token_ids = RowRange(args.token_ids, 0, 7);
    ExpectOk(backend.CountTokens(args));
    return arena.Download(args.counts);
  };
  EXPECT_TRUE(SameBits(run(*backend_), run(*ref_)));
}

INSTANTIATE_TEST_SUITE_P(Backends, ConformanceTest, ::testing::ValuesIn(kBackends),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace godwit
