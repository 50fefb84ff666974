#include "kernels/validate.h"

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace godwit {
namespace {

char memory[64];  // never read: Validate looks at shapes only

TensorView View(DType dtype, int64_t n0) { return MakeView(memory, dtype, n0); }
TensorView View(DType dtype, int64_t n0, int64_t n1) { return MakeView(memory, dtype, n0, n1); }
TensorView View(DType dtype, int64_t n0, int64_t n1, int64_t n2, int64_t n3) {
  return {memory, dtype, 4, {n0, n1, n2, n3}, n1 * n2 * n3};
}

// One change to arguments that pass, and the words its rejection must hold.
template <typename Args>
struct Rejection {
  std::function<void(Args&)> change;
  std::string words;
};

template <typename Args>
void ExpectRejections(const Args& good, const std::string& op,
                      const std::vector<Rejection<Args>>& rejections) {
  EXPECT_TRUE(Validate(good).ok()) << Validate(good).text;
  for (const Rejection<Args>& rejection : rejections) {
    Args args = good;
    rejection.change(args);
    const OpStatus status = Validate(args);
    EXPECT_EQ(status.code, OpCode::kInvalidArgument) << rejection.words;
    if (status.ok()) continue;
    EXPECT_EQ(std::string(status.text).rfind(op + ": ", 0), 0u) << status.text;
    EXPECT_NE(std::string(status.text).find(rejection.words), std::string::npos)
        << "'" << status.text << "' lacks '" << rejection.words << "'";
  }
}

TEST(ValidateTest, EmbedTokens) {
  EmbedTokensArgs good;
  good.table = {memory, DType::kBF16, 10, 8};
  good.token_ids = View(DType::kI32, 3);
  good.y = View(DType::kF32, 3, 8);
  ExpectRejections<EmbedTokensArgs>(
      good, "EmbedTokens",
      {{[](auto& a) { a.table.data = nullptr; }, "table is absent"},
       {[](auto& a) { a.table.dtype = DType::kI32; }, "table has dtype i32"},
       {[](auto& a) { a.table.num_rows = 0; }, "table is 0, expected at least 1"},
       {[](auto& a) { a.token_ids.dtype = DType::kI64; }, "token_ids has dtype i64, expected i32"},
       {[](auto& a) { a.token_ids.rank = 2; }, "token_ids has rank 2, expected 1"},
       {[](auto& a) { a.token_ids.data = nullptr; }, "token_ids is absent"},
       {[](auto& a) { a.scale = NAN; }, "scale is nan"},
       {[](auto& a) { a.y.dtype = DType::kBF16; }, "y has dtype bf16, expected f32"},
       {[](auto& a) { a.y.shape[0] = 4; }, "y has size 4 in dimension 0, expected 3"},
       {[](auto& a) { a.y.shape[1] = 9; }, "y has size 9 in dimension 1, expected 8"},
       {[](auto& a) { a.y.row_stride = 7; }, "y has row stride 7"}});
}

LinearArgs GoodLinear() {
  LinearArgs good;
  good.input.x = View(DType::kBF16, 5, 8);
  good.input.norm = {NormKind::kRms, View(DType::kF32, 8), 1e-6f, 0};
  good.input.gate = View(DType::kBF16, 5, 8);
  good.w = {memory, DType::kBF16, 6, 8};
  good.y = View(DType::kBF16, 5, 6);
  good.num_decode_tokens = 2;
  return good;
}

TEST(ValidateTest, Linear) {
  ExpectRejections<LinearArgs>(
      GoodLinear(), "Linear",
      {{[](auto& a) { a.w.data = nullptr; }, "w is absent"},
       {[](auto& a) { a.input.x.dtype = DType::kI32; }, "input.x has dtype i32"},
       {[](auto& a) { a.w.num_columns = 9; }, "input.x has size 8 in dimension 1, expected 9"},
       {[](auto& a) { a.input.x.data = nullptr; }, "input.x is absent"},
       {[](auto& a) { a.input.norm.epsilon = -1; }, "norm epsilon is -1"},
       {[](auto& a) { a.input.norm.kind = static_cast<NormKind>(7); }, "norm kind 7 is unknown"},
       {[](auto& a) { a.input.norm.weight.shape[0] = 7; }, "norm weight has size 7"},
       {[](auto& a) { a.input.norm.weight.dtype = DType::kBF16; }, "norm weight has dtype bf16"},
       {[](auto& a) { a.input.norm.weight_offset = INFINITY; }, "norm weight_offset is inf"},
       {[](auto& a) { a.input.gate.shape[0] = 4; },
        "input.gate has size 4 in dimension 0, expected 5"},
       {[](auto& a) { a.input.gate.dtype = DType::kU32; }, "input.gate has dtype u32"},
       {[](auto& a) { a.y.dtype = DType::kI64; }, "y has dtype i64"},
       {[](auto& a) { a.y.shape[1] = 5; }, "y has size 5 in dimension 1, expected 6"},
       {[](auto& a) { a.epilogue = Epilogue::kAdd; }, "y has dtype bf16, expected f32"},
       {[](auto& a) { a.epilogue = static_cast<Epilogue>(2); }, "epilogue 2 is unknown"},
       {[](auto& a) { a.num_decode_tokens = 6; }, "num_decode_tokens is 6, not in [0, 5]"},
       {[](auto& a) { a.num_decode_tokens = -1; }, "num_decode_tokens is -1"}});
}

TEST(ValidateTest, EmptyTensorsMayBeAbsent) {
  LinearArgs args = GoodLinear();
  for (TensorView* view : {&args.input.x, &args.y}) {
    view->shape[0] = 0;
    view->data = nullptr;
  }
  args.input.gate = {};
  args.num_decode_tokens = 0;
  EXPECT_TRUE(Validate(args).ok()) << Validate(args).text;
}

TEST(ValidateTest, GatedLinear) {
  GatedLinearArgs good;
  good.input.x = View(DType::kF32, 5, 8);
  good.gate = {memory, DType::kBF16, 6, 8};
  good.up = good.gate;
  good.y = View(DType::kBF16, 5, 6);
  ExpectRejections<GatedLinearArgs>(
      good, "GatedLinear",
      {{[](auto& a) { a.gate.data = nullptr; }, "gate is absent"},
       {[](auto& a) { a.up.data = nullptr; }, "up is absent"},
       {[](auto& a) { a.up.num_rows = 7; }, "up is [7, 8], expected [6, 8] as gate"},
       {[](auto& a) { a.up.dtype = DType::kF32; }, "up has dtype f32, gate has bf16"},
       {[](auto& a) { a.input.x.shape[1] = 7; }, "input.x has size 7"},
       {[](auto& a) { a.activation = static_cast<Activation>(5); }, "activation 5 is unknown"},
       {[](auto& a) { a.y.shape[0] = 6; }, "y has size 6"},
       {[](auto& a) { a.y.dtype = DType::kI32; }, "y has dtype i32"},
       {[](auto& a) { a.num_decode_tokens = 9; }, "num_decode_tokens is 9"}});
}

TEST(ValidateTest, GatherRows) {
  GatherRowsArgs good;
  good.x = View(DType::kF32, 5, 8);
  good.rows = View(DType::kI32, 2);
  good.y = View(DType::kF32, 2, 8);
  ExpectRejections<GatherRowsArgs>(
      good, "GatherRows",
      {{[](auto& a) { a.x.dtype = DType::kBF16; }, "x has dtype bf16"},
       {[](auto& a) { a.x.rank = 1; }, "x has rank 1, expected 2"},
       {[](auto& a) { a.rows.dtype = DType::kI64; }, "rows has dtype i64"},
       {[](auto& a) { a.rows.rank = 2; }, "rows has rank 2"},
       {[](auto& a) { a.y.dtype = DType::kBF16; }, "y has dtype bf16"},
       {[](auto& a) { a.y.shape[0] = 3; }, "y has size 3"}});
}

TEST(ValidateTest, LightningAttention) {
  static StepRow row;
  LightningAttentionArgs good;
  good.num_heads = 2;
  good.head_dim = 4;
  good.q = good.k = good.v = View(DType::kBF16, 5, 8);
  good.q.row_stride = 24;
  good.theta = View(DType::kF32, 2, 4);
  good.decay = {View(DType::kF32, 2, kPrefillBlock + 1), View(DType::kF32, 2, 2)};
  good.state = View(DType::kF32, 3, 2, 8, 4);
  good.window = MakeView(memory, DType::kBF16, 3, 33, 2 * 8 + 2 * 4);
  good.rows = &row;
  good.num_rows = 1;
  good.o = View(DType::kF32, 5, 8);
  ExpectRejections<LightningAttentionArgs>(
      good, "LightningAttention",
      {{[](auto& a) { a.num_heads = 0; }, "num_heads is 0"},
       {[](auto& a) { a.head_dim = 0; }, "head_dim is 0"},
       {[](auto& a) { a.head_dim = kMaxHeadDim + 1; }, "head_dim is 1025, not in [1, 1024]"},
       {[](auto& a) { a.q.shape[1] = 9; }, "q has size 9"},
       {[](auto& a) { a.q.dtype = DType::kI32; }, "q has dtype i32"},
       {[](auto& a) { a.k.dtype = DType::kF32; }, "k has dtype f32, expected bf16"},
       {[](auto& a) { a.k.shape[0] = 4; }, "k has size 4"},
       {[](auto& a) { a.v.dtype = DType::kF32; }, "v has dtype f32, expected bf16"},
       {[](auto& a) { a.v.data = nullptr; }, "v is absent"},
       {[](auto& a) { a.qk_activation = static_cast<Activation>(2); },
        "qk_activation 2 is unknown"},
       {[](auto& a) { a.q_scale = NAN; }, "q_scale is nan"},
       {[](auto& a) { a.theta.dtype = DType::kBF16; }, "theta has dtype bf16"},
       {[](auto& a) { a.theta.shape[1] = 3; }, "theta has size 3"},
       {[](auto& a) { a.theta = {}; }, "state has size 8 in dimension 2, expected 4"},
       {[](auto& a) { a.decay.decay.shape[1] = 64; },
        "decay.decay has size 64 in dimension 1, expected 65"},
       {[](auto& a) { a.decay.decay.dtype = DType::kBF16; }, "decay.decay has dtype bf16"},
       {[](auto& a) { a.decay.fold_epsilon.shape[1] = 1; }, "decay.fold_epsilon has size 1"},
       {[](auto& a) { a.decay.fold_epsilon.data = nullptr; }, "decay.fold_epsilon is absent"},
       {[](auto& a) { a.state.dtype = DType::kBF16; }, "state has dtype bf16, expected f32"},
       {[](auto& a) { a.state.rank = 3; }, "state has rank 3"},
       {[](auto& a) { a.window.dtype = DType::kF32; }, "window has dtype f32, expected bf16"},
       {[](auto& a) { a.window.rank = 2; }, "window has rank 2"},
       {[](auto& a) { a.window.shape[1] = 15; }, "window rows is 15, expected at least 16"},
       {[](auto& a) { a.window.shape[2] = 23; }, "window has size 23 in dimension 2, expected 24"},
       {[](auto& a) { a.window.shape[0] = 2; }, "window has size 2 in dimension 0, expected 3"},
       {[](auto& a) { a.num_rows = -1; }, "num_rows is -1"},
       {[](auto& a) { a.rows = nullptr; }, "rows are absent"},
       {[](auto& a) { a.num_decode_rows = 2; }, "num_decode_rows is 2, not in [0, 1]"},
       {[](auto& a) { a.num_decode_tokens = 6; }, "num_decode_tokens is 6"},
       {[](auto& a) { a.o.dtype = DType::kI32; }, "o has neither dtype f32 nor"},
       {[](auto& a) { a.o.shape[1] = 7; }, "o has size 7"}});
}

TEST(ValidateTest, Rope) {
  static double tables[10];
  RopeArgs good;
  good.positions = View(DType::kI64, 3);
  good.table_ids = View(DType::kI32, 3);
  good.tables = tables;
  good.num_tables = 2;
  good.num_freqs = 4;
  good.cos = good.sin = View(DType::kF32, 3, 4);
  ExpectRejections<RopeArgs>(
      good, "Rope",
      {{[](auto& a) { a.positions.dtype = DType::kI32; }, "positions has dtype i32"},
       {[](auto& a) { a.positions.rank = 2; }, "positions has rank 2"},
       {[](auto& a) { a.table_ids.dtype = DType::kI64; }, "table_ids has dtype i64"},
       {[](auto& a) { a.table_ids.shape[0] = 2; }, "table_ids has size 2"},
       {[](auto& a) { a.tables = nullptr; }, "tables are absent"},
       {[](auto& a) { a.num_tables = 0; }, "num_tables is 0"},
       {[](auto& a) { a.num_freqs = 0; }, "num_freqs is 0"},
       {[](auto& a) { a.cos.shape[1] = 5; }, "cos has size 5"},
       {[](auto& a) { a.cos.dtype = DType::kBF16; }, "cos has dtype bf16"},
       {[](auto& a) { a.sin.shape[0] = 2; }, "sin has size 2"},
       {[](auto& a) { a.sin.dtype = DType::kBF16; }, "sin has dtype bf16"}});
}

TEST(ValidateTest, TurnKeys) {
  static double tables[10];
  static BlockTurn turn;
  TurnKeysArgs good;
  good.num_kv_heads = 2;
  good.head_dim = 8;
  good.blocks = View(DType::kBF16, 5, 2, 2, 8 * kPagedBlock);
  good.tables = tables;
  good.num_tables = 2;
  good.num_freqs = 4;
  good.turns = &turn;
  good.num_turns = 1;
  ExpectRejections<TurnKeysArgs>(
      good, "TurnKeys",
      {{[](auto& a) { a.num_kv_heads = 0; }, "num_kv_heads is 0"},
       {[](auto& a) { a.head_dim = 1025; }, "head_dim is 1025"},
       {[](auto& a) { a.num_freqs = 5; }, "num_freqs is 5, not in [1, 4]"},
       {[](auto& a) { a.num_tables = 0; }, "num_tables is 0"},
       {[](auto& a) { a.tables = nullptr; }, "tables are absent"},
       {[](auto& a) { a.pair_layout = static_cast<PairLayout>(7); }, "pair_layout 7 is unknown"},
       {[](auto& a) { a.blocks.dtype = DType::kI32; },
        "blocks has dtype i32, expected f32 or bf16"},
       {[](auto& a) { a.blocks.shape[2] = 3; }, "blocks has size 3 in dimension 2"},
       {[](auto& a) { a.num_turns = -1; }, "num_turns is -1"},
       {[](auto& a) { a.turns = nullptr; }, "turns are absent"}});
}

TEST(ValidateTest, PagedAttention) {
  static StepRow row;
  static int32_t tables[1];
  PagedAttentionArgs good;
  good.num_heads = 4;
  good.num_kv_heads = 2;
  good.head_dim = 8;
  good.scale = 0.25f;
  good.q = View(DType::kBF16, 3, 32);
  good.k = good.v = View(DType::kBF16, 3, 16);
  good.cos = good.sin = View(DType::kF32, 3, 4);
  good.blocks = View(DType::kBF16, 5, 2, 2, 8 * kPagedBlock);
  good.block_tables = tables;
  good.rows = &row;
  good.num_rows = 1;
  good.o = View(DType::kF32, 3, 32);
  ExpectRejections<PagedAttentionArgs>(
      good, "PagedAttention",
      {{[](auto& a) { a.num_kv_heads = 0; }, "num_kv_heads is 0"},
       {[](auto& a) { a.num_heads = 1; }, "num_heads is 1, expected at least 2"},
       {[](auto& a) { a.num_heads = 5; }, "num_heads 5 is no multiple of num_kv_heads 2"},
       {[](auto& a) { a.head_dim = 1025; }, "head_dim is 1025"},
       {[](auto& a) { a.scale = INFINITY; }, "scale is inf"},
       {[](auto& a) { a.q.dtype = DType::kI32; }, "q has dtype i32"},
       {[](auto& a) { a.q.shape[1] = 31; }, "q has size 31"},
       {[](auto& a) { a.k.dtype = DType::kF32; }, "k has dtype f32"},
       {[](auto& a) { a.k.shape[1] = 17; }, "k has size 17"},
       {[](auto& a) { a.v.dtype = DType::kF32; }, "v has dtype f32"},
       {[](auto& a) { a.v.shape[0] = 2; }, "v has size 2"},
       {[](auto& a) { a.cos.shape[1] = a.sin.shape[1] = 5; }, "rotary pairs is 5, not in [1, 4]"},
       {[](auto& a) { a.sin = {}; }, "sin has rank 0"},
       {[](auto& a) { a.cos.dtype = DType::kBF16; }, "cos has dtype bf16"},
       {[](auto& a) { a.pair_layout = static_cast<PairLayout>(2); }, "pair_layout 2 is unknown"},
       {[](auto& a) { a.blocks.dtype = DType::kF32; }, "blocks has dtype f32"},
       {[](auto& a) { a.blocks.shape[1] = 1; }, "blocks has size 1 in dimension 1"},
       {[](auto& a) { a.blocks.shape[3] = 8; }, "blocks has size 8 in dimension 3, expected 128"},
       {[](auto& a) { a.block_tables = nullptr; }, "block_tables are absent"},
       {[](auto& a) { a.rows = nullptr; }, "rows are absent"},
       {[](auto& a) { a.num_decode_rows = -1; }, "num_decode_rows is -1"},
       {[](auto& a) { a.num_decode_tokens = 4; }, "num_decode_tokens is 4"},
       {[](auto& a) { a.o.shape[0] = 4; }, "o has size 4"},
       {[](auto& a) { a.o.dtype = DType::kI32; }, "o has neither dtype f32 nor"}});
}

TEST(ValidateTest, CountTokens) {
  CountTokensArgs good;
  good.counts = View(DType::kU32, 2, 10);
  good.token_ids = View(DType::kI32, 4);
  ExpectRejections<CountTokensArgs>(
      good, "CountTokens",
      {{[](auto& a) { a.counts.dtype = DType::kI32; }, "counts has dtype i32"},
       {[](auto& a) { a.counts.rank = 1; }, "counts has rank 1"},
       {[](auto& a) { a.slot = 2; }, "slot is 2, not in [0, 1]"},
       {[](auto& a) { a.slot = -1; }, "slot is -1"},
       {[](auto& a) { a.token_ids.dtype = DType::kU32; }, "token_ids has dtype u32"},
       {[](auto& a) { a.token_ids.rank = 2; }, "token_ids has rank 2"}});
}

TEST(ValidateTest, Sample) {
  static SampleRow row;
  SampleArgs good;
  good.logits = View(DType::kF32, 2, 10);
  good.rows = &row;
  good.num_rows = 3;
  good.counts = View(DType::kU32, 2, 10);
  good.tokens = View(DType::kI32, 3);
  good.logprobs = View(DType::kF32, 3);
  good.top_ids = View(DType::kI32, 3, 4);
  good.top_logprobs = View(DType::kF32, 3, 4);
  ExpectRejections<SampleArgs>(
      good, "Sample",
      {{[](auto& a) { a.logits.dtype = DType::kBF16; }, "logits has dtype bf16"},
       {[](auto& a) { a.logits.rank = 1; }, "logits has rank 1"},
       {[](auto& a) { a.logits.shape[1] = a.counts.shape[1] = 0; }, "vocabulary is 0"},
       {[](auto& a) { a.num_rows = -1; }, "num_rows is -1"},
       {[](auto& a) { a.rows = nullptr; }, "rows are absent"},
       {[](auto& a) { a.counts.dtype = DType::kI32; }, "counts has dtype i32"},
       {[](auto& a) { a.counts.shape[1] = 9; }, "counts has size 9"},
       {[](auto& a) { a.tokens.dtype = DType::kI64; }, "tokens has dtype i64"},
       {[](auto& a) { a.tokens.shape[0] = 2; }, "tokens has size 2"},
       {[](auto& a) { a.logprobs.dtype = DType::kBF16; }, "logprobs has dtype bf16"},
       {[](auto& a) { a.logprobs.shape[0] = 2; }, "logprobs has size 2"},
       {[](auto& a) { a.top_ids.dtype = DType::kI64; }, "top_ids has dtype i64"},
       {[](auto& a) { a.top_ids.shape[0] = 1; }, "top_ids has size 1"},
       {[](auto& a) { a.top_logprobs.shape[1] = 5; }, "top_logprobs has size 5"},
       {[](auto& a) { a.top_logprobs = {}; }, "top_logprobs has rank 0"},
       {[](auto& a) { a.probabilities = View(DType::kF32, 2, 9); }, "probabilities has size 9"},
       {[](auto& a) { a.probabilities = View(DType::kBF16, 2, 10); },
        "probabilities has dtype bf16"},
       {[](auto& a) { a.margins = View(DType::kF32, 2); }, "margins has size 2"},
       {[](auto& a) { a.certainties = View(DType::kF32, 3, 3); }, "certainties has size 3"}});
}

TEST(ValidateTest, AcceptanceHead) {
  static SampleRow row;
  AcceptanceHeadArgs good;
  good.x = View(DType::kF32, 2, 10);
  good.norm = {.kind = NormKind::kRms, .weight = View(DType::kF32, 10)};
  good.z = View(DType::kF32, 2, 10);
  good.bias = View(DType::kF32, 10);
  good.feature_weights = View(DType::kF32, kNumHeadFeatures, 10);
  good.y = View(DType::kF32, 2, 10);
  good.readout = View(DType::kF32, 10);
  good.readout_features = View(DType::kF32, kNumHeadFeatures);
  good.rows = &row;
  good.num_rows = 3;
  good.margins = View(DType::kF32, 3);
  good.certainties = View(DType::kF32, 3, 2);
  good.logits = View(DType::kF32, 3);
  ExpectRejections<AcceptanceHeadArgs>(
      good, "AcceptanceHead",
      {{[](auto& a) { a.x = a.z = {}; }, "x and z are absent"},
       {[](auto& a) { a.z.rank = 1; }, "rows have rank 1"},
       {[](auto& a) { a.weight = View(DType::kF32, 10, 10); }, "weight is there without x, or"},
       {[](auto& a) { a.x.shape[1] = 9; }, "x has size 9"},
       {[](auto& a) { a.x.dtype = DType::kBF16; }, "x has dtype bf16"},
       {[](auto& a) { a.norm.weight.shape[0] = 9; }, "norm weight has size 9"},
       {[](auto& a) { a.z.dtype = DType::kBF16; }, "z has dtype bf16"},
       {[](auto& a) { a.bias.shape[0] = 9; }, "bias has size 9"},
       {[](auto& a) { a.feature_weights.shape[0] = 4; }, "feature_weights has size 4"},
       {[](auto& a) { a.y.shape[0] = 1; }, "y has size 1"},
       {[](auto& a) { a.readout.shape[0] = 9; }, "readout has size 9"},
       {[](auto& a) { a.readout_features.shape[0] = 4; }, "readout_features has size 4"},
       {[](auto& a) { a.readout_bias = NAN; }, "readout_bias is nan"},
       {[](auto& a) { a.place = INFINITY; }, "place is inf"},
       {[](auto& a) { a.num_rows = -1; }, "num_rows is -1"},
       {[](auto& a) { a.rows = nullptr; }, "rows are absent"},
       {[](auto& a) { a.margins = {}; }, "margins or certainties are absent"},
       {[](auto& a) { a.margins.shape[0] = 2; }, "margins has size 2"},
       {[](auto& a) { a.certainties.shape[1] = 3; }, "certainties has size 3"},
       {[](auto& a) { a.logits = {}; }, "logits are absent"},
       {[](auto& a) { a.logits.shape[0] = 2; }, "logits has size 2"},
       {[](auto& a) { a.shown_margins = View(DType::kF32, 2); }, "shown_margins has size 2"},
       {[](auto& a) {
          a.feature_weights = a.readout_features = a.margins = {};
          a.shown_margins = View(DType::kF32, 3);
        },
        "margins or readout are absent"}});
  AcceptanceHeadArgs mlp = good;
  mlp.z = {};
  mlp.weight = View(DType::kF32, 10, 6);
  mlp.x = View(DType::kF32, 2, 6);
  mlp.norm.weight = View(DType::kF32, 6);
  mlp.shown_margins = View(DType::kF32, 3);
  ExpectRejections<AcceptanceHeadArgs>(
      mlp, "AcceptanceHead",
      {{[](auto& a) {
          a.x = {};
          a.z = View(DType::kF32, 2, 10);
        },
        "weight is there without x, or beside z"},
       {[](auto& a) { a.weight.rank = 1; }, "weight has rank 1"},
       {[](auto& a) { a.weight.shape[1] = 5; }, "weight has size 5"},
       {[](auto& a) { a.weight.dtype = DType::kBF16; }, "weight has dtype bf16"},
       {[](auto& a) { a.norm.weight.shape[0] = 10; }, "norm weight has size 10"},
       {[](auto& a) { a.bias.shape[0] = 6; }, "bias has size 6"},
       {[](auto& a) { a.readout.shape[0] = 6; }, "readout has size 6"},
       {[](auto& a) { a.y.shape[1] = 6; }, "y has size 6"}});
}

TEST(ValidateTest, VerifyTokens) {
  static SampleRow row;
  static VerifyRow verify_row;
  VerifyTokensArgs good;
  good.logits = View(DType::kF32, 3, 10);
  good.rows = &row;
  good.num_rows = 3;
  good.verify_rows = &verify_row;
  good.num_verify_rows = 1;
  good.counts = View(DType::kU32, 2, 10);
  good.drafts = View(DType::kI32, 5);
  good.probabilities = View(DType::kF32, 5, 10);
  good.num_tokens = View(DType::kI32, 1);
  good.tokens = View(DType::kI32, 3);
  good.logprobs = View(DType::kF32, 3);
  good.top_ids = View(DType::kI32, 3, 4);
  good.top_logprobs = View(DType::kF32, 3, 4);
  ExpectRejections<VerifyTokensArgs>(
      good, "VerifyTokens",
      {{[](auto& a) { a.logits.dtype = DType::kBF16; }, "logits has dtype bf16"},
       {[](auto& a) { a.num_rows = -1; }, "num_rows is -1"},
       {[](auto& a) { a.rows = nullptr; }, "rows are absent"},
       {[](auto& a) { a.num_verify_rows = -1; }, "num_verify_rows is -1"},
       {[](auto& a) { a.verify_rows = nullptr; }, "verify_rows are absent"},
       {[](auto& a) { a.counts = {}; }, "counts has dtype f32"},
       {[](auto& a) { a.counts.shape[1] = 9; }, "counts has size 9"},
       {[](auto& a) { a.drafts.dtype = DType::kI64; }, "drafts has dtype i64"},
       {[](auto& a) { a.probabilities.shape[1] = 9; }, "probabilities has size 9"},
       {[](auto& a) { a.num_tokens.shape[0] = 2; }, "num_tokens has size 2"},
       {[](auto& a) { a.tokens.shape[0] = 2; }, "tokens has size 2"},
       {[](auto& a) { a.logprobs.dtype = DType::kBF16; }, "logprobs has dtype bf16"},
       {[](auto& a) { a.top_ids.shape[0] = 1; }, "top_ids has size 1"}});
}

TEST(ValidateTest, ScoreTokens) {
  ScoreTokensArgs good;
  good.logits = View(DType::kF32, 2, 10);
  good.targets = View(DType::kI32, 2);
  good.logprobs = View(DType::kF32, 2);
  good.num_top = 3;
  good.top_ids = View(DType::kI32, 2, 3);
  good.top_logprobs = View(DType::kF32, 2, 3);
  ExpectRejections<ScoreTokensArgs>(
      good, "ScoreTokens",
      {{[](auto& a) { a.logits.dtype = DType::kBF16; }, "logits has dtype bf16"},
       {[](auto& a) { a.targets.dtype = DType::kI64; }, "targets has dtype i64"},
       {[](auto& a) { a.targets.shape[0] = 1; }, "targets has size 1"},
       {[](auto& a) { a.logprobs.shape[0] = 1; }, "logprobs has size 1"},
       {[](auto& a) { a.logprobs.dtype = DType::kBF16; }, "logprobs has dtype bf16"},
       {[](auto& a) { a.num_top = 11; }, "num_top is 11, not in [0, 10]"},
       {[](auto& a) { a.num_top = -1; }, "num_top is -1"},
       {[](auto& a) { a.num_top = 4; }, "top_ids has size 3 in dimension 1, expected 4"},
       {[](auto& a) { a.top_ids.dtype = DType::kU32; }, "top_ids has dtype u32"},
       {[](auto& a) { a.top_logprobs.dtype = DType::kBF16; }, "top_logprobs has dtype bf16"},
       {[](auto& a) { a.top_logprobs.shape[0] = 3; }, "top_logprobs has size 3"}});
}

}  // namespace
}  // namespace godwit
