// Every kernel of a back end at the smallest shapes that reach it, once: what compute-sanitizer's
// racecheck, initcheck and synccheck can follow in seconds (tests/kernels/sanitize_cuda.sh).
// conformance_test derives tolerances and tries every shape; here a result is right to a few
// roundings of bf16.

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/ref/ref_backend.h"
#include "tests/kernels/backends.h"
#include "tests/kernels/device_arena.h"
#include "tests/kernels/lightning_run.h"
#include "tests/kernels/paged_run.h"

namespace godwit {
namespace {

class SmallestTest : public ::testing::TestWithParam<BackendRow> {
 protected:
  void SetUp() override {
    std::string reason;
    backend_ = GetParam().make(&reason);
    if (backend_ == nullptr) GTEST_SKIP() << reason;
    ref_ = CreateRefBackend();
  }

  // Runs `op` on both back ends; their results differ by less than a hundredth of their norm.
  void Compare(const std::string& what,
               const std::function<std::vector<float>(Backend& backend)>& op) {
    const std::vector<float> actual = op(*backend_), expected = op(*ref_);
    ASSERT_EQ(actual.size(), expected.size()) << what;
    double difference = 0, norm = 0;
    for (size_t i = 0; i < actual.size(); ++i) {
      difference += std::pow(static_cast<double>(actual[i]) - expected[i], 2);
      norm += std::pow(static_cast<double>(expected[i]), 2);
    }
    EXPECT_LE(std::sqrt(difference), 0.01 * std::sqrt(norm)) << what;
  }

  BackendPtr backend_;
  BackendPtr ref_;
};

void ExpectOk(const OpStatus& status) {
  EXPECT_TRUE(status.ok()) << (status.text == nullptr ? "" : status.text);
}

TEST_P(SmallestTest, Rows) {
  // More ranges than one launch takes, of any alignment, none of which touches the next.
  Compare("FillZero", [](Backend& backend) {
    DeviceArena arena(backend);
    const TensorView x = arena.Floats(DType::kF32, {250, 40}, RandomValues(7, 250 * 40));
    std::vector<ByteRange> ranges;
    for (int64_t row = 0; row < 250; ++row) {
      ranges.push_back({x.row<float>(row) + row % 7, (row % 5) * 16 + row % 3});
    }
    ExpectOk(backend.FillZero(ranges.data(), 250));
    return arena.Download(x);
  });
  Compare("EmbedTokens", [](Backend& backend) {
    DeviceArena arena(backend);
    EmbedTokensArgs args;
    args.table = arena.Matrix(DType::kBF16, 5, 16, RandomValues(1, 5 * 16, DType::kBF16));
    args.token_ids = arena.Upload<int32_t>(DType::kI32, {3}, std::vector<int32_t>{4, 0, 2});
    args.y = arena.Output(DType::kF32, {3, 16});
    ExpectOk(backend.EmbedTokens(args));
    return arena.Download(args.y);
  });
  Compare("GatherRows", [](Backend& backend) {
    DeviceArena arena(backend);
    GatherRowsArgs args;
    args.x = arena.Floats(DType::kF32, {4, 16}, RandomValues(2, 4 * 16));
    args.rows = arena.Upload<int32_t>(DType::kI32, {2}, std::vector<int32_t>{3, 1});
    args.y = arena.Output(DType::kF32, {2, 16});
    ExpectOk(backend.GatherRows(args));
    return arena.Download(args.y);
  });
  Compare("Rope", [](Backend& backend) {
    DeviceArena arena(backend);
    RopeArgs args;
    args.positions = arena.Upload<int64_t>(DType::kI64, {2}, std::vector<int64_t>{0, 77});
    args.table_ids = arena.Upload<int32_t>(DType::kI32, {2}, std::vector<int32_t>{0, 0});
    args.tables = arena.UploadArray(std::vector<double>{1, 0.5, 0.25, 0.125, 1});
    args.num_tables = 1;
    args.num_freqs = 4;
    args.cos = arena.Output(DType::kF32, {2, 4});
    args.sin = arena.Output(DType::kF32, {2, 4});
    ExpectOk(backend.Rope(args));
    return arena.Download(args.sin);
  });
  Compare("CountTokens", [](Backend& backend) {
    DeviceArena arena(backend);
    CountTokensArgs args;
    args.counts = arena.Upload<uint32_t>(DType::kU32, {1, 8}, std::vector<uint32_t>(8));
    args.token_ids = arena.Upload<int32_t>(DType::kI32, {3}, std::vector<int32_t>{1, 5, 1});
    ExpectOk(backend.CountTokens(args));
    return arena.Download(args.counts);
  });
}

// One row, few, and more than the wgmma kernel takes alone; columns that only the plain kernel
// takes; f32.
TEST_P(SmallestTest, Products) {
  struct Case {
    int64_t num_tokens, k, n;
    DType weights = DType::kBF16;
  };
  for (const Case& c : {Case{1, 64, 16}, Case{3, 64, 16}, Case{130, 64, 16}, Case{2, 33, 5},
                        Case{2, 16, 8, DType::kF32}}) {
    for (const bool gated : {false, true}) {
      Compare(
          "T " + std::to_string(c.num_tokens) + " k " + std::to_string(c.k), [&](Backend& backend) {
            DeviceArena arena(backend);
            RowInput input;
            input.x =
                arena.Floats(DType::kF32, {c.num_tokens, c.k}, RandomValues(3, c.num_tokens * c.k));
            input.norm.kind = NormKind::kRms;
            input.norm.epsilon = 1e-6f;
            const MatrixView w =
                arena.Matrix(c.weights, c.n, c.k, RandomValues(4, c.n * c.k, c.weights));
            const TensorView y = arena.Output(c.weights, {c.num_tokens, c.n});
            if (gated) {
              const MatrixView up =
                  arena.Matrix(c.weights, c.n, c.k, RandomValues(5, c.n * c.k, c.weights));
              ExpectOk(backend.GatedLinear({.input = input,
                                            .gate = w,
                                            .up = up,
                                            .activation = Activation::kSilu,
                                            .y = y,
                                            .num_decode_tokens = c.num_tokens}));
            } else {
              ExpectOk(backend.Linear({.input = input,
                                       .w = w,
                                       .epilogue = Epilogue::kStore,
                                       .y = y,
                                       .num_decode_tokens = c.num_tokens}));
            }
            return arena.Download(y);
          });
    }
  }
}

// Both step kernels and both prefill kernels, one block in P-form; and the general one.
TEST_P(SmallestTest, Lightning) {
  struct Case {
    int head_dim;
    bool lrpe;
    DType act;
  };
  for (const Case& c :
       {Case{128, false, DType::kBF16}, Case{64, false, DType::kBF16}, Case{64, true, DType::kBF16},
        Case{128, true, DType::kBF16}, Case{16, false, DType::kF32}}) {
    LightningShape shape;
    shape.heads = 1;
    shape.head_dim = c.head_dim;
    shape.lrpe = c.lrpe;
    shape.act = c.act;
    shape.rates = {0.1};
    Compare("d " + std::to_string(c.head_dim), [&](Backend& backend) {
      LightningRun lightning(backend, shape, 80);
      lightning.Step({Prefill(0, 1, 0, 66)});
      lightning.Step({Decode(0, 1, 66, 2, 66, 66)});
      lightning.Step({Decode(0, 1, 68, 12, 66, 68)});  // crosses a window
      return lightning.output(0);
    });
  }
}

// A range of keys and two that are merged, of one head and of a group, and more than there are
// multiprocessors; prompts; the general kernel.
TEST_P(SmallestTest, PagedAttention) {
  struct Case {
    int heads, kv_heads, head_dim;
    int64_t cached;
  };
  for (const Case& c : {Case{1, 1, 128, 20}, Case{4, 1, 128, 600}, Case{4, 1, 64, 600},
                        Case{72, 36, 64, 1560}, Case{2, 1, 40, 20}}) {
    PagedShape shape{c.heads, c.kv_heads, c.head_dim, c.head_dim / 4};
    shape.act = DType::kBF16;
    Compare("heads " + std::to_string(c.heads) + " d " + std::to_string(c.head_dim),
            [&](Backend& backend) {
              PagedRun paged(backend, shape, c.cached + 20);
              paged.Cache(0, c.cached);
              paged.Step({{0, c.cached, 1}});
              paged.Step({{0, c.cached + 1, 3}});
              std::vector<float> o = paged.Output(0, c.cached, c.cached + 4);
              PagedRun prompt(backend, shape, 70);
              prompt.Step({{0, 0, 64, true}});
              prompt.Step({{0, 64, 6, true}});
              o.insert(o.end(), prompt.output(0).begin(), prompt.output(0).end());
              return o;
            });
  }
}

std::vector<SampleRow> SomeSampleRows() {
  std::vector<SampleRow> rows(4);
  for (int i = 0; i < 4; ++i) {
    SampleRow& row = rows[static_cast<size_t>(i)];
    row.logit_row = i;
    row.slot = i;
    row.seed = 5;
    row.position = i;
    row.num_logprobs = 2;
  }
  rows[0].temperature = 0;
  rows[1].top_k = 5;
  rows[2].top_p = 0.7f;
  rows[3].repetition_penalty = 1.5f;
  return rows;
}

TEST_P(SmallestTest, Sampling) {
  constexpr int64_t kVocab = 96;
  const std::vector<float> logits = RandomValues(6, 4 * kVocab, DType::kF32, 3);
  Compare("Sample", [&](Backend& backend) {
    DeviceArena arena(backend);
    SampleArgs args;
    args.logits = arena.Floats(DType::kF32, {4, kVocab}, logits);
    args.rows = arena.UploadArray(SomeSampleRows());
    args.num_rows = 4;
    args.counts =
        arena.Upload<uint32_t>(DType::kU32, {4, kVocab}, std::vector<uint32_t>(4 * kVocab));
    args.tokens = arena.Upload<int32_t>(DType::kI32, {4}, std::vector<int32_t>(4));
    args.logprobs = arena.Output(DType::kF32, {4});
    args.top_ids = arena.Upload<int32_t>(DType::kI32, {4, 2}, std::vector<int32_t>(8));
    args.top_logprobs = arena.Output(DType::kF32, {4, 2});
    ExpectOk(backend.Sample(args));
    return arena.Download(args.tokens);
  });
  const auto head = [](int64_t width, int64_t num_outputs) {
    return [=](Backend& backend) {
      DeviceArena arena(backend);
      AcceptanceHeadArgs args;
      args.x = arena.Floats(DType::kF32, {4, width}, RandomValues(8, 4 * width));
      args.norm = {.kind = NormKind::kRms, .epsilon = 1e-5f};
      if (num_outputs > 0) {
        args.weight =
            arena.Floats(DType::kF32, {num_outputs, width}, RandomValues(9, num_outputs * width));
        args.bias = arena.Floats(DType::kF32, {num_outputs}, RandomValues(10, num_outputs));
        args.margins = arena.Floats(DType::kF32, {4}, RandomValues(12, 4));
        args.shown_margins = arena.Output(DType::kF32, {4});
      }
      const int64_t n = num_outputs > 0 ? num_outputs : width;
      args.readout = arena.Floats(DType::kF32, {n}, RandomValues(11, n));
      args.rows = arena.UploadArray(SomeSampleRows());
      args.num_rows = 4;
      args.logits = arena.Output(DType::kF32, {4});
      ExpectOk(backend.AcceptanceHead(args));
      return arena.Download(args.logits);
    };
  };
  Compare("AcceptanceHead", head(36, 18));
  Compare("AcceptanceHead of odd rows", head(7, 18));
  Compare("linear AcceptanceHead", head(36, 0));
  Compare("ScoreTokens", [&](Backend& backend) {
    DeviceArena arena(backend);
    ScoreTokensArgs args;
    args.logits = arena.Floats(DType::kF32, {4, kVocab}, logits);
    args.targets = arena.Upload<int32_t>(DType::kI32, {4}, std::vector<int32_t>{3, 95, 0, 1});
    args.logprobs = arena.Output(DType::kF32, {4});
    args.num_top = 2;
    args.top_ids = arena.Upload<int32_t>(DType::kI32, {4, 2}, std::vector<int32_t>(8));
    args.top_logprobs = arena.Output(DType::kF32, {4, 2});
    ExpectOk(backend.ScoreTokens(args));
    return arena.Download(args.logprobs);
  });
  Compare("VerifyTokens", [&](Backend& backend) {
    DeviceArena arena(backend);
    std::vector<SampleRow> rows = SomeSampleRows();
    for (SampleRow& row : rows) row.slot = 0;
    VerifyTokensArgs args;
    args.logits = arena.Floats(DType::kF32, {4, kVocab}, logits);
    args.rows = arena.UploadArray(rows);
    args.num_rows = 4;
    args.verify_rows = arena.UploadArray(std::vector<VerifyRow>{{.num_drafts = 3}});
    args.num_verify_rows = 1;
    std::vector<uint32_t> counts(kVocab);
    for (const size_t id : {7, 8, 9}) counts[id] = 1;
    args.counts = arena.Upload<uint32_t>(DType::kU32, {1, kVocab}, counts);
    args.drafts = arena.Upload<int32_t>(DType::kI32, {3}, std::vector<int32_t>{7, 8, 9});
    args.num_tokens = arena.Upload<int32_t>(DType::kI32, {1}, std::vector<int32_t>(1));
    args.tokens = arena.Upload<int32_t>(DType::kI32, {4}, std::vector<int32_t>(4));
    args.logprobs = arena.Output(DType::kF32, {4});
    args.top_ids = arena.Upload<int32_t>(DType::kI32, {4, 2}, std::vector<int32_t>(8));
    args.top_logprobs = arena.Output(DType::kF32, {4, 2});
    ExpectOk(backend.VerifyTokens(args));
    return arena.Download(args.tokens);
  });
}

INSTANTIATE_TEST_SUITE_P(Backends, SmallestTest, ::testing::ValuesIn(kBackends),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace godwit
