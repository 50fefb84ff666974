// The anchor rule as bits: how a sequence is cut into steps, batched, lagged or rolled back changes
// nothing. And the arithmetic against the recurrence in double.

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/ref/ref_backend.h"
#include "tests/kernels/backends.h"
#include "tests/kernels/device_arena.h"
#include "tests/kernels/lightning_run.h"

namespace godwit {
namespace {

class LightningAttentionTest : public ::testing::TestWithParam<BackendRow> {
 protected:
  void SetUp() override {
    std::string reason;
    backend_ = GetParam().make(&reason);
    if (backend_ == nullptr) GTEST_SKIP() << reason;
  }
  Backend& backend() { return *backend_; }

  // One sequence in decode steps of one token, everything confirmed: the yardstick of the
  // bit-equality tests.
  std::vector<float> DecodeAlone(const LightningShape& shape, int64_t num_tokens, int sequence = 0,
                                 int slot = 0) {
    LightningRun run(backend(), shape, num_tokens);
    for (int64_t t = 0; t < num_tokens; ++t) {
      run.Step({Decode(sequence, slot, t, 1, std::max<int64_t>(t - 1, 0), t)});
    }
    return run.output(sequence);
  }

  BackendPtr backend_;
};

LightningShape SmallShape() {
  LightningShape shape;
  shape.heads = 3;
  shape.head_dim = 24;
  shape.rates = LayerRates(3, 1, 4);
  return shape;
}

// SmallShape, and what kernels of fixed widths take.
std::vector<LightningShape> SomeShapes() {
  std::vector<LightningShape> shapes = {SmallShape(), SmallShape()};
  shapes[1].act = DType::kBF16;
  for (const auto& [heads, head_dim, lrpe] : std::vector<std::tuple<int, int, bool>>{
           {3, 64, false}, {3, 64, true}, {1, 128, false}, {1, 128, true}}) {
    LightningShape shape;
    shape.heads = heads;
    shape.head_dim = head_dim;
    shape.lrpe = lrpe;
    shape.act = DType::kBF16;
    shape.rates = LayerRates(heads, 1, 4);
    shapes.push_back(shape);
  }
  return shapes;
}
std::string Describe(const LightningShape& shape) {
  return std::to_string(shape.heads) + " heads of " + std::to_string(shape.head_dim) +
         (shape.lrpe ? ", LRPE" : "") + (shape.act == DType::kBF16 ? ", bf16" : ", f32");
}

// The recurrence by the reference back end in one piece, and the tolerance of its outputs.
struct Expected {
  std::vector<float> output;
  std::vector<double> tolerance;
};
Expected RunReference(const LightningShape& shape, int64_t num_tokens) {
  BackendPtr ref = CreateRefBackend();
  LightningRun run(*ref, shape, num_tokens);
  run.Step({Prefill(0, 0, 0, num_tokens)});
  LightningShape magnitude = shape;
  magnitude.magnitude = true;
  LightningRun bound(*ref, magnitude, num_tokens);
  bound.Step({Prefill(0, 0, 0, num_tokens)});
  return {run.output(0), LightningTolerance(shape, bound.output(0), num_tokens)};
}

TEST_P(LightningAttentionTest, AnyCutsMatchTheRecurrence) {
  for (const int layer : {0, 3, 23}) {
    for (const DType act : {DType::kF32, DType::kBF16}) {
      LightningShape shape;
      shape.heads = 8;
      shape.act = act;
      shape.rates = LayerRates(8, layer, 24);
      const int64_t n = 203;
      const Expected expected = RunReference(shape, n);
      for (const int64_t cut : {1, 7, 32, 64, 203, 256}) {
        for (const bool p_form : {false, true}) {
          LightningRun run(backend(), shape, n);
          for (int64_t t = 0; t < n; t += cut)
            run.Step({Prefill(0, 0, t, std::min(t + cut, n), p_form)});
          EXPECT_TRUE(Within(run.output(0), expected.output, expected.tolerance))
              << "layer " << layer << " cut " << cut << " p_form " << p_form;
        }
      }
    }
  }
}

// o_t = sum_j lambda^(t - j) (q_t . k_j) v_j, without a state and without the reference back end.
TEST_P(LightningAttentionTest, MatchesTheQuadraticForm) {
  LightningShape shape = SmallShape();
  shape.zero_state = true;
  shape.activation = Activation::kNone;
  const int64_t n = 150;
  LightningRun run(backend(), shape, n);
  run.Step({Prefill(0, 0, 0, 100)});
  for (int64_t t = 100; t < n; ++t) run.Step({Decode(0, 0, t, 1, t - 1, t)});
  const std::vector<float>& qkv = run.qkv(0);
  const int64_t width = shape.width();
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t column = 0; column < width; ++column) {
      const int64_t head = column / shape.head_dim;
      double sum = 0, magnitude = 0;
      for (int64_t j = 0; j <= t; ++j) {
        double dot = 0, abs_dot = 0;
        for (int64_t i = 0; i < shape.head_dim; ++i) {
          const double q = static_cast<double>(
              qkv[static_cast<size_t>(t * 3 * width + head * shape.head_dim + i)]);
          const double k = static_cast<double>(
              qkv[static_cast<size_t>((j * 3 + 1) * width + head * shape.head_dim + i)]);
          dot += q * k;
          abs_dot += std::abs(q * k);
        }
        const double v =
            static_cast<double>(qkv[static_cast<size_t>((j * 3 + 2) * width + column)]);
        const double weight =
            std::exp(-shape.rates[static_cast<size_t>(head)] * static_cast<double>(t - j));
        sum += weight * dot * v;
        magnitude += weight * abs_dot * std::abs(v);
      }
      const double tolerance = LightningTolerance(shape, {static_cast<float>(magnitude)}, n)[0];
      EXPECT_NEAR(static_cast<double>(run.output(0)[static_cast<size_t>(t * width + column)]), sum,
                  tolerance);
    }
  }
}

TEST_P(LightningAttentionTest, PrefillThenDecodeMatchesOnePass) {
  LightningShape shape = SmallShape();
  const int64_t m = 20;
  for (const int64_t n : {63, 64, 65, 255, 256, 257}) {
    const Expected expected = RunReference(shape, n + m);
    LightningRun run(backend(), shape, n + m);
    run.Step({Prefill(0, 0, 0, n)});
    for (int64_t t = n; t < n + m; ++t) run.Step({Decode(0, 0, t, 1, std::max(t - 1, n), t)});
    EXPECT_TRUE(Within(run.output(0), expected.output, expected.tolerance)) << n;
  }
}

TEST_P(LightningAttentionTest, SlopesOfAllLayersAndHeadCounts) {
  for (const int heads : {6, 8, 20, 40}) {
    for (const int layer : {0, 12, 23}) {
      LightningShape shape;
      shape.heads = heads;
      shape.rates = LayerRates(heads, layer, 24);
      const Expected expected = RunReference(shape, 100);
      LightningRun run(backend(), shape, 100);
      run.Step({Prefill(0, 0, 0, 70)});
      for (int64_t t = 70; t < 100; ++t)
        run.Step({Decode(0, 0, t, 1, std::max<int64_t>(t - 1, 70), t)});
      EXPECT_TRUE(Within(run.output(0), expected.output, expected.tolerance))
          << heads << " " << layer;
    }
  }
}

TEST_P(LightningAttentionTest, KeysOf256ColumnsByLrpe) {
  for (const DType act : {DType::kF32, DType::kBF16}) {
    LightningShape shape;
    shape.head_dim = 128;
    shape.lrpe = true;
    shape.act = act;
    shape.zero_state = true;  // the magnitude run has no bound for a state under rotated queries
    shape.rates = LayerRates(2, 0, 4);
    const Expected expected = RunReference(shape, 150);
    LightningRun run(backend(), shape, 150);
    run.Step({Prefill(0, 0, 0, 130)});
    for (int64_t t = 130; t < 150; ++t)
      run.Step({Decode(0, 0, t, 1, std::max<int64_t>(t - 1, 130), t)});
    EXPECT_TRUE(Within(run.output(0), expected.output, expected.tolerance));
  }
}

TEST_P(LightningAttentionTest, WindowFormHasTheSameBitsInAnyCuts) {
  if (!GetParam().is_cpu) GTEST_SKIP() << "prompt rows have a kernel of their own";
  for (const DType act : {DType::kF32, DType::kBF16}) {
    for (const bool lrpe : {false, true}) {
      LightningShape shape = SmallShape();
      shape.act = act;
      shape.lrpe = lrpe;
      const int64_t n = 150;
      const std::vector<float> alone = DecodeAlone(shape, n);
      for (const int64_t cut : {2, 7, 16, 33, 150}) {
        LightningRun run(backend(), shape, n);
        for (int64_t t = 0; t < n; t += cut)
          run.Step({Prefill(0, 0, t, std::min(t + cut, n), false)});
        EXPECT_TRUE(SameBits(run.output(0), alone)) << cut;
      }
    }
  }
}

TEST_P(LightningAttentionTest, PrefillCutAtMultiplesOfPHasTheSameBits) {
  LightningShape shape = SmallShape();
  shape.act = DType::kBF16;
  const int64_t n = 700;
  std::vector<std::vector<float>> outputs, states;
  for (const int64_t cut : {64, 128, 192, 704}) {
    LightningRun run(backend(), shape, n);
    for (int64_t t = 0; t < n; t += cut) run.Step({Prefill(0, 0, t, std::min(t + cut, n))});
    outputs.push_back(run.output(0));
    states.push_back(run.State(0));
    EXPECT_TRUE(SameBits(outputs.back(), outputs[0])) << cut;
    EXPECT_TRUE(SameBits(states.back(), states[0])) << cut;
  }
}

TEST_P(LightningAttentionTest, PrefillFromAnyPositionHasTheSameBitsInCutsAtMultiplesOfP) {
  const LightningShape shape = SmallShape();
  const int64_t n = 300;
  for (const int64_t begin : {5, 16, 37, 63, 64, 70}) {
    std::vector<std::vector<float>> outputs;
    for (const int64_t cut : {64, 128, 512}) {
      LightningRun run(backend(), shape, n);
      for (int64_t t = 0; t < begin; ++t)
        run.Step({Decode(0, 0, t, 1, std::max<int64_t>(t - 1, 0), t)});
      for (int64_t t = begin; t < n;) {
        const int64_t end = std::min(FloorTo(t, kPrefillBlock) + cut, n);
        LightningPiece piece = Prefill(0, 0, t, end);
        if (t == begin) piece.base = FloorTo(std::max<int64_t>(t - 1, 0), kWindow);
        run.Step({piece});
        t = end;
      }
      outputs.push_back(run.output(0));
      EXPECT_TRUE(SameBits(outputs.back(), outputs[0])) << begin << " " << cut;
    }
  }
}

TEST_P(LightningAttentionTest, MixedBatchHasTheBitsOfEachAlone) {
  const std::vector<int> slots = {2, 0, 3};
  const int64_t n = 90;
  auto decode = [&](int sequence, int64_t t) {
    return Decode(sequence, slots[static_cast<size_t>(sequence)], t, 1,
                  std::max<int64_t>(t - 1, 70), t);
  };
  for (const LightningShape& shape : SomeShapes()) {
    SCOPED_TRACE(Describe(shape));
    std::vector<std::vector<float>> alone;
    for (int sequence = 0; sequence < 3; ++sequence) {
      LightningRun run(backend(), shape, n);
      run.Step({Prefill(sequence, slots[static_cast<size_t>(sequence)], 0, 70)});
      for (int64_t t = 70; t < n; ++t) run.Step({decode(sequence, t)});
      alone.push_back(run.output(sequence));
    }
    // 0 decodes while 1 and then 2 are prefilled; the order of rows changes every step, and rows of
    // no tokens lie between them.
    LightningRun run(backend(), shape, n);
    run.Step({Prefill(0, slots[0], 0, 70)});
    run.Step({decode(0, 70), Prefill(1, slots[1], 0, 64), Prefill(2, slots[2], 0, 64)});
    run.Step({Padding(), decode(0, 71), Padding(), Prefill(2, slots[2], 64, 70),
              Prefill(1, slots[1], 64, 70)});
    for (int64_t t = 72; t < n; ++t) {
      std::vector<LightningPiece> pieces = {decode(0, t), Padding(), decode(1, t - 2),
                                            decode(2, t - 2)};
      std::rotate(pieces.begin(), pieces.begin() + t % 4, pieces.end());
      run.Step(pieces);
    }
    EXPECT_TRUE(SameBits(run.output(0), alone[0]));
    for (const int sequence : {1, 2}) {
      const std::vector<float> expected(
          alone[static_cast<size_t>(sequence)].begin(),
          alone[static_cast<size_t>(sequence)].begin() + (n - 2) * shape.width());
      EXPECT_TRUE(SameBits(run.Output(sequence, 0, n - 2), expected)) << sequence;
    }
  }
}

// One sequence in every slot of a batch large enough to be split otherwise than a small one, each
// slot in cuts of its own length.
TEST_P(LightningAttentionTest, ManyRowsOfAnyLengthHaveTheBitsOfOneAlone) {
  const int num_rows = GetParam().is_cpu ? 40 : 540;
  const int64_t n = 60;
  for (LightningShape shape : SomeShapes()) {
    SCOPED_TRACE(Describe(shape));
    shape.zero_state = true;
    const std::vector<float> alone = DecodeAlone(shape, n);
    shape.num_slots = num_rows;
    shape.window_rows = 2 * kWindow - 1 + kWindow;
    LightningRun run(backend(), shape, n);
    std::vector<int64_t> position(static_cast<size_t>(num_rows)), confirmed = position;
    for (;;) {
      std::vector<LightningPiece> pieces;
      std::vector<float> expected;
      for (int slot = 0; slot < num_rows; ++slot) {
        int64_t& t = position[static_cast<size_t>(slot)];
        const int64_t count = std::min<int64_t>(1 + slot * 5 % kWindow, n - t);
        if (count == 0) continue;
        pieces.push_back(Decode(0, slot, t, static_cast<int>(count),
                                std::exchange(confirmed[static_cast<size_t>(slot)], t), t));
        expected.insert(expected.end(), alone.begin() + t * shape.width(),
                        alone.begin() + (t + count) * shape.width());
        t += count;
      }
      if (pieces.empty()) break;
      run.Step(pieces);
      ASSERT_TRUE(SameBits(run.last(), expected));
    }
  }
}

TEST_P(LightningAttentionTest, ReusedSlotHasTheBitsOfAFreshOne) {
  LightningShape shape = SmallShape();
  shape.zero_state = true;
  LightningRun run(backend(), shape, 50);
  for (int64_t t = 0; t < 50; ++t) run.Step({Decode(0, 1, t, 1, std::max<int64_t>(t - 1, 0), t)});
  run.SetState(1, std::vector<float>(
                      run.State(1).size()));  // zeroed at hand-out; the window keeps its bytes
  for (int64_t t = 0; t < 50; ++t) run.Step({Decode(1, 1, t, 1, std::max<int64_t>(t - 1, 0), t)});
  EXPECT_TRUE(SameBits(run.output(1), DecodeAlone(shape, 50, 1, 0)));
}

TEST_P(LightningAttentionTest, VerifiedAndRolledBackHasTheBitsOfNeverSpeculated) {
  for (LightningShape shape : SomeShapes()) {
    SCOPED_TRACE(Describe(shape));
    const int64_t n = 120;
    const std::vector<float> alone = DecodeAlone(shape, n);
    for (const int rows : {2, 5, 9, 16}) {
      shape.window_rows = kWindow - 1 + 2 * rows;
      LightningRun run(backend(), shape, n);
      uint32_t seed = 77;
      int64_t confirmed_before = 0;
      for (int64_t t = 0; t < n;) {
        const int count = static_cast<int>(std::min<int64_t>(rows, n - t));
        const int accepted =
            1 + static_cast<int>(seed++ * 2654435761u % static_cast<uint32_t>(count));
        // Rows after the accepted ones are drafts that will turn out wrong.
        run.ReplaceTokens(0, t + accepted, count - accepted, seed);
        run.Step({Decode(0, 0, t, count, confirmed_before, t)});
        run.RestoreTokens(0);
        confirmed_before = t;
        t += accepted;
      }
      EXPECT_TRUE(SameBits(run.output(0), alone)) << rows;
    }
  }
}

TEST_P(LightningAttentionTest, LaggingBaseHasTheSameBits) {
  for (LightningShape shape : SomeShapes()) {
    SCOPED_TRACE(Describe(shape));
    const int64_t n = 200;
    const std::vector<float> alone = DecodeAlone(shape, n);
    for (const int64_t lag : {16, 32, 48, 11, 37}) {
      for (const int rows : {1, 4}) {
        shape.window_rows = kWindow - 1 + static_cast<int>(lag) + rows + 16;
        LightningRun run(backend(), shape, n);
        int64_t confirmed_before = 0;
        for (int64_t t = 0; t < n; t += rows) {
          const int64_t confirmed = std::max<int64_t>(t - lag, 0);
          run.Step({Decode(0, 0, t, static_cast<int>(std::min<int64_t>(rows, n - t)),
                           confirmed_before, confirmed)});
          confirmed_before = confirmed;
        }
        EXPECT_TRUE(SameBits(run.output(0), alone)) << lag << " " << rows;
      }
    }
  }
}

// A fold of rows of the step itself, of rows of the ring, one or several blocks late: one state.
TEST_P(LightningAttentionTest, StoredFoldsHaveTheSameBitsWheneverTheyAreStored) {
  for (LightningShape shape : SomeShapes()) {
    SCOPED_TRACE(Describe(shape));
    shape.window_rows = 100;
    const int64_t n = 65;
    LightningRun at_once(backend(), shape, n), next(backend(), shape, n), late(backend(), shape, n);
    for (int64_t t = 0; t + kWindow <= 64; t += kWindow) {
      at_once.Step({Decode(0, 0, t, kWindow, t, t + kWindow)});
    }
    for (int64_t t = 0; t < n; ++t) {
      next.Step({Decode(0, 0, t, 1, std::max<int64_t>(t - 1, 0), t)});
      late.Step({Decode(0, 0, t, 1, t < 64 ? 0 : 16, t < 63 ? 0 : t < 64 ? 16 : 64)});
    }
    EXPECT_TRUE(SameBits(next.State(0), at_once.State(0)));
    EXPECT_TRUE(SameBits(late.State(0), at_once.State(0)));
  }
}

TEST(CpuLightningAttentionTest, ThreadsAndColumnSplitsDoNotChangeBits) {
  LightningShape shape;
  shape.heads = 1;
  shape.head_dim = 72;
  shape.rates = {0.01};
  std::vector<std::vector<float>> outputs;
  for (const int threads : {1, 2, 3}) {
    std::string reason;
    BackendPtr backend = MakeCpuBackend("portable", threads, &reason);
    LightningRun run(*backend, shape, 200);
    run.Step({Prefill(0, 0, 0, 150)});
    for (int64_t t = 150; t < 200; ++t)
      run.Step({Decode(0, 0, t, 1, std::max<int64_t>(t - 1, 150), t)});
    outputs.push_back(run.output(0));
    EXPECT_TRUE(SameBits(outputs.back(), outputs[0])) << threads;
  }
}

// A last layer forgets 4e-8 a token: folds of S + (dS - eps S) stay near the exact sum for a
// million tokens, where lambda^W S + dS in f32 would be off by the error of lambda^W each time.
// A piece of tokens is repeated: without LRPE nothing depends on the position but the decay.
class MillionTokens {
 public:
  static constexpr int64_t kPiece = 4096, kNumPieces = 256;

  MillionTokens(Backend& backend, const LightningShape& shape)
      : shape_(shape), run_(backend, shape, kPiece + kWindow) {}

  // Relative error of S, in the Frobenius norm, after the steps of a piece were repeated.
  double Error(const std::vector<LightningPiece>& steps) {
    run_.Repeat(steps, kNumPieces);
    const std::vector<float> state = run_.State(0);
    const std::vector<double> piece = OfPiece();
    const double forgotten = std::exp(-shape_.rates[0] * static_cast<double>(kPiece));
    double error = 0, norm = 0;
    for (size_t e = 0; e < state.size(); ++e) {
      double exact = 0;
      for (int64_t i = 0; i < kNumPieces; ++i) exact = forgotten * exact + piece[e];
      error += std::pow(static_cast<double>(state[e]) - exact, 2);
      norm += exact * exact;
    }
    return std::sqrt(error / norm);
  }

 private:
  // What a piece adds.
  std::vector<double> OfPiece() {
    const int64_t d_k = shape_.head_dim;
    std::vector<double> sum(static_cast<size_t>(d_k * d_k));
    const double lambda = std::exp(-shape_.rates[0]);
    for (int64_t t = 0; t < kPiece; ++t) {
      const float* const row = &run_.qkv(0)[static_cast<size_t>(t * 3 * d_k)];
      for (int64_t d = 0; d < d_k; ++d) {
        const double x = static_cast<double>(row[d_k + d]);
        const double k =
            static_cast<double>(RoundToAct(shape_.act, static_cast<float>(x / (1 + std::exp(-x)))));
        double* const s = &sum[static_cast<size_t>(d * d_k)];
        for (int64_t n = 0; n < d_k; ++n)
          s[n] = lambda * s[n] + k * static_cast<double>(row[2 * d_k + n]);
      }
    }
    return sum;
  }

  const LightningShape shape_;
  LightningRun run_;
};

LightningShape LastLayer(DType act, int head_dim) {
  LightningShape shape;
  shape.heads = 1;
  shape.head_dim = head_dim;
  shape.act = act;
  shape.rates = {LayerRates(8, 23, 24)[7]};
  shape.zero_state = true;
  return shape;
}

// num_folds roundings of a random sign, 2^-24 sqrt(num_folds), and the like for the sums within a
// block: 8e-6 in P-form, 1.5e-5 in W-form, had S its last size from the first fold on.
TEST_P(LightningAttentionTest, MillionPromptTokensOfTheLastLayerStayNearDouble) {
  MillionTokens run(backend(), LastLayer(DType::kF32, 16));
  const double folds =
      static_cast<double>(MillionTokens::kPiece * MillionTokens::kNumPieces / kPrefillBlock);
  EXPECT_LT(run.Error({Prefill(0, 0, 0, MillionTokens::kPiece)}),
            4 * std::ldexp(1.0, -24) * std::sqrt(folds));
}

TEST_P(LightningAttentionTest, MillionDecodedTokensOfTheLastLayerStayNearDouble) {
  std::vector<LightningPiece> steps;
  for (int64_t t = 0; t < MillionTokens::kPiece; t += kWindow) {
    steps.push_back(Decode(0, 0, t, kWindow, t, t + kWindow));
  }
  MillionTokens small(backend(), LastLayer(DType::kF32, 16));
  EXPECT_LT(small.Error(steps), 1e-5);
  MillionTokens wide(backend(), LastLayer(DType::kBF16, 64));
  EXPECT_LT(wide.Error(steps), 1e-5);
}

INSTANTIATE_TEST_SUITE_P(Backends, LightningAttentionTest, ::testing::ValuesIn(kBackends),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace godwit
