// Whole prompts in P-form, at the widths for which back ends have kernels of their own: against the
// reference, as bits over cuts and batches, and over 10^6 tokens against the fold in double.

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/ref/ref_backend.h"
#include "tests/kernels/backends.h"
#include "tests/kernels/device_arena.h"
#include "tests/kernels/lightning_run.h"

namespace godwit {
namespace {

class LightningPrefillTest : public ::testing::TestWithParam<BackendRow> {
 protected:
  void SetUp() override {
    std::string reason;
    backend_ = GetParam().make(&reason);
    if (backend_ == nullptr) GTEST_SKIP() << reason;
  }
  BackendPtr backend_;
};

// d_k x d_v of 128 x 128, 64 x 64, 128 x 64 and 256 x 128 in bf16; as many heads as there are.
LightningShape WideShape(int heads, int head_dim, bool lrpe, int layer, DType output) {
  LightningShape shape;
  shape.heads = heads;
  shape.head_dim = head_dim;
  shape.lrpe = lrpe;
  shape.act = DType::kBF16;
  shape.output = output;
  shape.zero_state = lrpe;  // the magnitude run has no bound for a state under rotated queries
  shape.rates = LayerRates(heads, layer, 24);
  return shape;
}

std::string Describe(const LightningShape& shape) {
  return std::to_string(shape.heads) + " heads of " + std::to_string(shape.head_dim) +
         (shape.lrpe ? ", LRPE" : "");
}

// Rows of many lengths in one step, some without a block of P, then a second step that goes on from
// wherever each stands.
std::vector<float> RunRaggedRows(Backend& backend, const LightningShape& shape) {
  LightningRun run(backend, shape, 330);
  run.Step(
      {Prefill(0, 3, 0, 256), Prefill(1, 1, 0, 63), Prefill(2, 0, 0, 65), Prefill(3, 2, 0, 1)});
  run.Step({Prefill(3, 2, 1, 127), Prefill(0, 3, 256, 330), Prefill(2, 0, 65, 257),
            Prefill(1, 1, 63, 64)});
  std::vector<float> result;
  for (int sequence = 0; sequence < 4; ++sequence) {
    const std::vector<float>& o = run.output(sequence);
    result.insert(result.end(), o.begin(), o.end());
  }
  if (shape.lrpe) return result;
  for (int slot = 0; slot < 4; ++slot) {
    const std::vector<float> state = run.State(slot);
    result.insert(result.end(), state.begin(), state.end());
  }
  return result;
}

struct Expected {
  std::vector<float> values;
  std::vector<double> tolerance;
};
// Once for all back ends.
const Expected& ExpectedOfRaggedRows(const LightningShape& shape) {
  static auto& all = *new std::map<std::string, Expected>;
  const auto [at, is_new] = all.try_emplace(Describe(shape));
  if (is_new) {
    const BackendPtr ref = CreateRefBackend();
    LightningShape magnitude = shape;
    magnitude.magnitude = true;
    at->second = {RunRaggedRows(*ref, shape),
                  LightningTolerance(shape, RunRaggedRows(*ref, magnitude), 330)};
  }
  return at->second;
}

TEST_P(LightningPrefillTest, RaggedRowsMatchTheReference) {
  for (const LightningShape& shape :
       {WideShape(8, 128, false, 0, DType::kBF16), WideShape(20, 64, false, 12, DType::kF32),
        WideShape(40, 64, true, 0, DType::kBF16), WideShape(2, 128, true, 0, DType::kF32),
        WideShape(2, 128, false, 23, DType::kF32)}) {
    const Expected& expected = ExpectedOfRaggedRows(shape);
    EXPECT_TRUE(Within(RunRaggedRows(*backend_, shape), expected.values, expected.tolerance))
        << Describe(shape);
  }
}

TEST_P(LightningPrefillTest, OutputsAreWithinOneInAHundredThousandOfTheirPower) {
  const BackendPtr ref = CreateRefBackend();
  for (const int layer : {0, 12, 23}) {
    for (const bool lrpe : {false, true}) {
      const LightningShape shape = WideShape(8, 64, lrpe, layer, DType::kBF16);
      auto run = [&](Backend& backend) {
        LightningRun lightning(backend, shape, 1024);
        lightning.Step({Prefill(0, 0, 0, 1024)});
        return lightning.output(0);
      };
      const std::vector<float> actual = run(*backend_), expected = run(*ref);
      double error = 0, power = 0;
      for (size_t i = 0; i < actual.size(); ++i) {
        error += std::pow(static_cast<double>(actual[i]) - static_cast<double>(expected[i]), 2);
        power += std::pow(static_cast<double>(expected[i]), 2);
      }
      EXPECT_LE(error, 1e-5 * power) << "layer " << layer << " lrpe " << lrpe;
    }
  }
}

TEST_P(LightningPrefillTest, CutsAndBatchesHaveTheSameBits) {
  for (const LightningShape& shape :
       {WideShape(3, 128, false, 12, DType::kBF16), WideShape(2, 128, true, 0, DType::kF32),
        WideShape(6, 64, false, 23, DType::kF32), WideShape(6, 64, true, 0, DType::kBF16)}) {
    const int64_t n = 330;
    LightningRun whole(*backend_, shape, n);
    whole.Step({Prefill(0, 1, 0, n)});
    LightningRun cut(*backend_, shape, n);
    for (const auto& [begin, end] :
         std::vector<std::pair<int64_t, int64_t>>{{0, 64}, {64, 128}, {128, 256}, {256, n}}) {
      cut.Step({Prefill(0, 1, begin, end)});
    }
    LightningRun batched(*backend_, shape, n);
    std::vector<LightningPiece> pieces = {Prefill(1, 2, 0, 130), Prefill(0, 1, 0, n),
                                          Prefill(2, 3, 0, 64)};
    batched.Step(pieces);
    for (LightningRun* other : {&cut, &batched}) {
      EXPECT_TRUE(SameBits(other->output(0), whole.output(0))) << Describe(shape);
      EXPECT_TRUE(SameBits(other->State(1), whole.State(1))) << Describe(shape);
    }
    // More rows than a device has room for at once: however d_v is divided among its parts.
    LightningRun crowded(*backend_, shape, n);
    pieces = {Prefill(0, 1, 0, n)};
    LightningPiece padding = Padding();
    padding.prefill = true;
    for (int i = 0; i < 300; ++i) pieces.push_back(padding);
    crowded.Step(pieces);
    EXPECT_TRUE(SameBits(crowded.output(0), whole.output(0))) << Describe(shape);
  }
}

// S <- S + (dS - eps S) in double over `count` repetitions of the sequence's first n tokens.
std::vector<double> FoldInDouble(const LightningShape& shape, const std::vector<float>& qkv,
                                 int64_t n, int64_t count) {
  const int64_t d = shape.head_dim, width = shape.width();
  std::vector<double> states;
  for (int head = 0; head < shape.heads; ++head) {
    const double rate = shape.rates[static_cast<size_t>(head)];
    std::vector<double> change(static_cast<size_t>(d * d)), state(static_cast<size_t>(d * d));
    for (int64_t t = 0; t < n; ++t) {
      const double weight = std::exp(-rate * static_cast<double>(n - 1 - t));
      if (weight < 1e-18) continue;
      const float* k = &qkv[static_cast<size_t>((t * 3 + 1) * width + head * d)];
      const float* v = k + width;
      for (int64_t i = 0; i < d; ++i) {
        const double key = weight * static_cast<double>(k[i]);
        for (int64_t j = 0; j < d; ++j) {
          change[static_cast<size_t>(i * d + j)] += key * static_cast<double>(v[j]);
        }
      }
    }
    const double decay = std::exp(-rate * static_cast<double>(n));
    for (int64_t i = 0; i < count; ++i) {
      for (size_t e = 0; e < state.size(); ++e) state[e] = decay * state[e] + change[e];
    }
    states.insert(states.end(), state.begin(), state.end());
  }
  return states;
}

// The slowest and the fastest head of the first, a middle and the last layer of 24.
TEST_P(LightningPrefillTest, AMillionTokensDriftByLessThanOneInAHundredThousand) {
  if (GetParam().is_cpu) GTEST_SKIP() << "10^6 tokens take the CPU minutes";
  for (const int head_dim : {64, 128}) {
    for (const int layer : {0, 12, 23}) {
      LightningShape shape = WideShape(2, head_dim, false, layer, DType::kBF16);
      shape.activation = Activation::kNone;  // k is what was drawn, bit by bit
      shape.zero_state = true;
      const std::vector<double> rates = LayerRates(32, layer, 24);
      shape.rates = {rates.front(), rates.back()};
      const int64_t n = 8192, count = 123;  // 1,007,616 tokens
      LightningRun run(*backend_, shape, n);
      run.Repeat({Prefill(0, 0, 0, n)}, count);
      const std::vector<float> state = run.State(0);
      const std::vector<double> expected = FoldInDouble(shape, run.qkv(0), n, count);
      const size_t size = state.size() / 2;
      for (size_t head = 0; head < 2; ++head) {
        double error = 0, power = 0;
        for (size_t i = head * size; i < (head + 1) * size; ++i) {
          error += std::pow(static_cast<double>(state[i]) - expected[i], 2);
          power += std::pow(expected[i], 2);
        }
        EXPECT_LE(std::sqrt(error / power), 1e-5)
            << "layer " << layer << " head " << (head == 0 ? 0 : 31) << " d " << head_dim;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, LightningPrefillTest, ::testing::ValuesIn(kBackends),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace godwit
