// The anchor rule as bits: how a sequence is cut into steps, batched, lagged or rolled back changes
// nothing. And the arithmetic against the recurrence in double.

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/ref/ref_backend.h"
#include "tests/kernels/device_arena.h"
#include "tests/kernels/lightning_run.h"

namespace godwit {
namespace {

class CpuLightningAttentionTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    std::string reason;
    backend_ = MakeCpuBackend(GetParam(), 2, &reason);
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

TEST_P(CpuLightningAttentionTest, AnyCutsMatchTheRecurrence) {
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
TEST_P(CpuLightningAttentionTest, MatchesTheQuadraticForm) {
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

TEST_P(CpuLightningAttentionTest, PrefillThenDecodeMatchesOnePass) {
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

TEST_P(CpuLightningAttentionTest, SlopesOfAllLayersAndHeadCounts) {
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

TEST_P(CpuLightningAttentionTest, KeysOf256ColumnsByLrpe) {
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

TEST_P(CpuLightningAttentionTest, WindowFormHasTheSameBitsInAnyCuts) {
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

TEST_P(CpuLightningAttentionTest, PrefillCutAtMultiplesOfPHasTheSameBits) {
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

TEST_P(CpuLightningAttentionTest, PrefillFromAnyPositionHasTheSameBitsInCutsAtMultiplesOfP) {
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

TEST_P(CpuLightningAttentionTest, MixedBatchHasTheBitsOfEachAlone) {
  const LightningShape shape = SmallShape();
  const std::vector<int> slots = {2, 0, 3};
  const int64_t n = 90;
  std::vector<std::vector<float>> alone;
  for (int sequence = 0; sequence < 3; ++sequence) {
    LightningRun run(backend(), shape, n);
    run.Step({Prefill(sequence, slots[static_cast<size_t>(sequence)], 0, 70)});
    for (int64_t t = 70; t < n; ++t) {
      run.Step({Decode(sequence, slots[static_cast<size_t>(sequence)], t, 1,
                       std::max<int64_t>(t - 1, 70), t)});
    }
    alone.push_back(run.output(sequence));
  }
  // 0 decodes while 1 and then 2 are prefilled; the order of rows changes every step.
  LightningRun run(backend(), shape, n);
  run.Step({Prefill(0, slots[0], 0, 70)});
  auto decode = [&](int sequence, int64_t t) {
    return Decode(sequence, slots[static_cast<size_t>(sequence)], t, 1,
                  std::max<int64_t>(t - 1, 70), t);
  };
  run.Step({decode(0, 70), Prefill(1, slots[1], 0, 64), Prefill(2, slots[2], 0, 64)});
  run.Step({decode(0, 71), Prefill(2, slots[2], 64, 70), Prefill(1, slots[1], 64, 70)});
  for (int64_t t = 72; t < n; ++t) {
    std::vector<LightningPiece> pieces = {decode(0, t), decode(1, t - 2), decode(2, t - 2)};
    std::rotate(pieces.begin(), pieces.begin() + t % 3, pieces.end());
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

TEST_P(CpuLightningAttentionTest, ReusedSlotHasTheBitsOfAFreshOne) {
  LightningShape shape = SmallShape();
  shape.zero_state = true;
  LightningRun run(backend(), shape, 50);
  for (int64_t t = 0; t < 50; ++t) run.Step({Decode(0, 1, t, 1, std::max<int64_t>(t - 1, 0), t)});
  run.SetState(1, std::vector<float>(
                      run.State(1).size()));  // zeroed at hand-out; the window keeps its bytes
  for (int64_t t = 0; t < 50; ++t) run.Step({Decode(1, 1, t, 1, std::max<int64_t>(t - 1, 0), t)});
  EXPECT_TRUE(SameBits(run.output(1), DecodeAlone(shape, 50, 1, 0)));
}

TEST_P(CpuLightningAttentionTest, VerifiedAndRolledBackHasTheBitsOfNeverSpeculated) {
  for (const DType act : {DType::kF32, DType::kBF16}) {
    LightningShape shape = SmallShape();
    shape.act = act;
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

TEST_P(CpuLightningAttentionTest, LaggingBaseHasTheSameBits) {
  LightningShape shape = SmallShape();
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

TEST_P(CpuLightningAttentionTest, FoldsALaggingBaseWithoutTokens) {
  const LightningShape shape = SmallShape();
  LightningRun lagging(backend(), shape, 40), prompt(backend(), shape, 40);
  for (int64_t t = 0; t < 32; ++t) lagging.Step({Decode(0, 0, t, 1, 0, 0)});
  LightningPiece fold = Decode(0, 0, 32, 0, 0, 32);
  lagging.Step({fold, Decode(1, 1, 0, 1, 0, 0)});
  for (int64_t t = 0; t < 32; ++t) prompt.Step({Prefill(0, 0, t, t + 1, false)});
  EXPECT_TRUE(SameBits(lagging.State(0), prompt.State(0)));
}

TEST_P(CpuLightningAttentionTest, ThreadsAndColumnSplitsDoNotChangeBits) {
  LightningShape shape;
  shape.heads = 1;
  shape.head_dim = 72;
  shape.rates = {0.01};
  std::vector<std::vector<float>> outputs;
  for (const int threads : {1, 2, 3}) {
    std::string reason;
    BackendPtr backend = MakeCpuBackend(GetParam(), threads, &reason);
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
TEST_P(CpuLightningAttentionTest, MillionTokensOfTheLastLayerStayNearDouble) {
  LightningShape shape;
  shape.heads = 1;
  shape.rates = {LayerRates(8, 23, 24)[7]};
  shape.zero_state = true;
  const int64_t piece = 4096, num_pieces = 256;
  LightningRun run(backend(), shape, piece + kWindow);
  std::vector<double> exact(static_cast<size_t>(shape.head_dim * shape.head_dim));
  std::vector<double> chunk(
      exact.size());  // what the piece adds, the same for every repetition of it
  const double lambda = std::exp(-shape.rates[0]);
  auto silu = [](double x) { return x / (1 + std::exp(-x)); };
  const std::vector<float>& qkv = run.qkv(0);
  for (int64_t t = 0; t < piece; ++t) {
    const float* const row = &qkv[static_cast<size_t>(t * 3 * shape.head_dim)];
    for (int d = 0; d < shape.head_dim; ++d) {
      const double k = silu(static_cast<double>(row[shape.head_dim + d]));
      for (int n = 0; n < shape.head_dim; ++n) {
        double& s = chunk[static_cast<size_t>(d * shape.head_dim + n)];
        s = lambda * s + k * static_cast<double>(row[2 * shape.head_dim + n]);
      }
    }
  }
  // A piece is at positions [0, 4096) each time: without LRPE nothing else depends on the position.
  for (int64_t i = 0; i < num_pieces; ++i) {
    run.Step({Prefill(0, 0, 0, piece)});
    for (size_t e = 0; e < exact.size(); ++e) {
      exact[e] = std::exp(-shape.rates[0] * static_cast<double>(piece)) * exact[e] + chunk[e];
    }
  }
  const std::vector<float> state = run.State(0);
  double error = 0, norm = 0;
  for (size_t e = 0; e < exact.size(); ++e) {
    error += std::pow(static_cast<double>(state[e]) - exact[e], 2);
    norm += exact[e] * exact[e];
  }
  // num_folds roundings of a random sign: 2^-24 sqrt(16384) = 8e-6, and the like for the sums
  // within a block.
  const double folds = static_cast<double>(piece * num_pieces / kPrefillBlock);
  EXPECT_LT(std::sqrt(error / norm), 4 * std::ldexp(1.0, -24) * std::sqrt(folds));
}

INSTANTIATE_TEST_SUITE_P(Isa, CpuLightningAttentionTest, ::testing::ValuesIn(kCpuIsaNames),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace godwit
