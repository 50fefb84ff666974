#include "kernels/validate.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <initializer_list>

namespace godwit {
namespace {

const char* NameOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kBF16:
      return "bf16";
    case DType::kI32:
      return "i32";
    case DType::kU32:
      return "u32";
    case DType::kI64:
      return "i64";
  }
  return "unknown dtype";
}

// Checks of one op. The first failure is kept; later checks then do nothing, so that they may rely
// on the earlier ones.
class Checker {
 public:
  explicit Checker(const char* op) : op_(op) {}

  const OpStatus& status() const { return status_; }
  bool ok() const { return status_.ok(); }

  [[gnu::format(printf, 3, 4)]] void Expect(bool condition, const char* format, ...) {
    if (condition || !ok()) return;
    // Plain characters: this file is part of plugins too, whose texts outlive no call.
    static thread_local char text[256];
    const int used = std::snprintf(text, sizeof(text), "%s: ", op_);
    va_list list;
    va_start(list, format);
    std::vsnprintf(text + used, sizeof(text) - static_cast<size_t>(used), format, list);
    va_end(list);
    status_ = {OpCode::kInvalidArgument, text};
  }

  void Type(const char* name, const TensorView& x, DType expected) {
    Expect(x.dtype == expected, "%s has dtype %s, expected %s", name, NameOf(x.dtype),
           NameOf(expected));
  }
  void ActivationType(const char* name, const TensorView& x) {
    Expect(x.dtype == DType::kF32 || x.dtype == DType::kBF16,
           "%s has dtype %s, expected f32 or bf16", name, NameOf(x.dtype));
  }

  // Present unless empty; dense but for dimension 0.
  void Shape(const char* name, const TensorView& x, std::initializer_list<int64_t> shape) {
    Expect(x.rank == static_cast<int32_t>(shape.size()), "%s has rank %d, expected %d", name,
           x.rank, static_cast<int>(shape.size()));
    if (!ok()) return;
    int dimension = 0;
    for (const int64_t size : shape) {
      Expect(x.shape[dimension] == size, "%s has size %lld in dimension %d, expected %lld", name,
             static_cast<long long>(x.shape[dimension]), dimension, static_cast<long long>(size));
      ++dimension;
    }
    if (!ok() || x.elements() == 0) return;
    Expect(x.data != nullptr, "%s is absent", name);
    Expect(x.rows() == 1 || x.row_stride >= x.row_elements(),
           "%s has row stride %lld, below its row of %lld elements", name,
           static_cast<long long>(x.row_stride), static_cast<long long>(x.row_elements()));
  }

  void AtLeast(const char* name, int64_t value, int64_t least) {
    Expect(value >= least, "%s is %lld, expected at least %lld", name,
           static_cast<long long>(value), static_cast<long long>(least));
  }
  void Between(const char* name, int64_t value, int64_t least, int64_t most) {
    Expect(value >= least && value <= most, "%s is %lld, not in [%lld, %lld]", name,
           static_cast<long long>(value), static_cast<long long>(least),
           static_cast<long long>(most));
  }
  void Finite(const char* name, double value) {
    Expect(std::isfinite(value), "%s is %g, expected a finite number", name, value);
  }

  void Matrix(const char* name, const MatrixView& w) {
    Expect(w.data != nullptr, "%s is absent", name);
    Expect(w.dtype == DType::kF32 || w.dtype == DType::kBF16,
           "%s has dtype %s, expected f32 or bf16", name, NameOf(w.dtype));
    AtLeast(name, w.num_rows, 1);
    AtLeast(name, w.num_columns, 1);
  }

  // Rows [T, k] of a product.
  void Input(const RowInput& input, int64_t num_columns) {
    const int64_t num_tokens = input.x.rows();
    ActivationType("input.x", input.x);
    Shape("input.x", input.x, {num_tokens, num_columns});
    if (input.norm.kind == NormKind::kRms) {
      Expect(input.norm.epsilon >= 0 && std::isfinite(input.norm.epsilon),
             "norm epsilon is %g, expected >= 0", static_cast<double>(input.norm.epsilon));
      Finite("norm weight_offset", static_cast<double>(input.norm.weight_offset));
      if (input.norm.weight) {
        Type("norm weight", input.norm.weight, DType::kF32);
        Shape("norm weight", input.norm.weight, {num_columns});
      }
    } else {
      Expect(input.norm.kind == NormKind::kNone, "norm kind %d is unknown",
             static_cast<int>(input.norm.kind));
    }
    if (input.gate) {
      ActivationType("input.gate", input.gate);
      Shape("input.gate", input.gate, {num_tokens, num_columns});
    }
  }

  void Steps(const StepRow* rows, int32_t num_rows, int32_t num_decode_rows,
             int64_t num_decode_tokens, int64_t num_tokens) {
    AtLeast("num_rows", num_rows, 0);
    Between("num_decode_rows", num_decode_rows, 0, num_rows);
    Expect(num_rows <= 0 || rows != nullptr, "rows are absent, num_rows is %d", num_rows);
    Between("num_decode_tokens", num_decode_tokens, 0, num_tokens);
  }

 private:
  const char* op_;
  OpStatus status_;
};

void CheckActivation(Checker& check, const char* name, Activation activation) {
  check.Expect(activation == Activation::kNone || activation == Activation::kSilu,
               "%s %d is unknown", name, static_cast<int>(activation));
}

// f32, or the activation type.
void Output(Checker& check, const char* name, const TensorView& x, DType act) {
  check.Expect(x.dtype == DType::kF32 || x.dtype == act,
               "%s has neither dtype f32 nor that of the activations", name);
}

}  // namespace

OpStatus Validate(const EmbedTokensArgs& args) {
  Checker check("EmbedTokens");
  check.Matrix("table", args.table);
  check.Type("token_ids", args.token_ids, DType::kI32);
  check.Shape("token_ids", args.token_ids, {args.token_ids.rows()});
  check.Finite("scale", static_cast<double>(args.scale));
  check.Type("y", args.y, DType::kF32);
  check.Shape("y", args.y, {args.token_ids.rows(), args.table.num_columns});
  if (args.drawn) {
    check.Type("drawn", args.drawn, DType::kI32);
    check.Shape("drawn", args.drawn, {args.drawn.rows()});
  }
  return check.status();
}

OpStatus Validate(const LinearArgs& args) {
  Checker check("Linear");
  check.Matrix("w", args.w);
  check.Input(args.input, args.w.num_columns);
  check.ActivationType("y", args.y);
  check.Shape("y", args.y, {args.input.x.rows(), args.w.num_rows});
  check.Expect(args.epilogue == Epilogue::kStore || args.epilogue == Epilogue::kAdd,
               "epilogue %d is unknown", static_cast<int>(args.epilogue));
  if (args.epilogue == Epilogue::kAdd) check.Type("y", args.y, DType::kF32);
  check.Between("num_decode_tokens", args.num_decode_tokens, 0, args.input.x.rows());
  return check.status();
}

OpStatus Validate(const GatedLinearArgs& args) {
  Checker check("GatedLinear");
  check.Matrix("gate", args.gate);
  check.Matrix("up", args.up);
  check.Expect(
      args.gate.num_rows == args.up.num_rows && args.gate.num_columns == args.up.num_columns,
      "up is [%lld, %lld], expected [%lld, %lld] as gate", static_cast<long long>(args.up.num_rows),
      static_cast<long long>(args.up.num_columns), static_cast<long long>(args.gate.num_rows),
      static_cast<long long>(args.gate.num_columns));
  check.Expect(args.gate.dtype == args.up.dtype, "up has dtype %s, gate has %s",
               NameOf(args.up.dtype), NameOf(args.gate.dtype));
  check.Input(args.input, args.gate.num_columns);
  CheckActivation(check, "activation", args.activation);
  check.ActivationType("y", args.y);
  check.Shape("y", args.y, {args.input.x.rows(), args.gate.num_rows});
  check.Between("num_decode_tokens", args.num_decode_tokens, 0, args.input.x.rows());
  return check.status();
}

OpStatus Validate(const GatherRowsArgs& args) {
  Checker check("GatherRows");
  check.Type("x", args.x, DType::kF32);
  check.Shape("x", args.x, {args.x.rows(), args.x.row_elements()});
  check.Type("rows", args.rows, DType::kI32);
  check.Shape("rows", args.rows, {args.rows.rows()});
  check.Type("y", args.y, DType::kF32);
  check.Shape("y", args.y, {args.rows.rows(), args.x.row_elements()});
  return check.status();
}

OpStatus Validate(const LightningAttentionArgs& args) {
  Checker check("LightningAttention");
  check.AtLeast("num_heads", args.num_heads, 1);
  check.Between("head_dim", args.head_dim, 1, kMaxHeadDim);
  const int64_t num_tokens = args.q.rows();
  const int64_t width = static_cast<int64_t>(args.num_heads) * args.head_dim;
  const int64_t key_dim = args.theta ? 2 * args.head_dim : args.head_dim;
  check.ActivationType("q", args.q);
  check.Shape("q", args.q, {num_tokens, width});
  check.Type("k", args.k, args.q.dtype);
  check.Shape("k", args.k, {num_tokens, width});
  check.Type("v", args.v, args.q.dtype);
  check.Shape("v", args.v, {num_tokens, width});
  CheckActivation(check, "qk_activation", args.qk_activation);
  check.Finite("q_scale", static_cast<double>(args.q_scale));
  if (args.theta) {
    check.Type("theta", args.theta, DType::kF32);
    check.Shape("theta", args.theta, {args.num_heads, args.head_dim});
  }
  check.Type("decay.decay", args.decay.decay, DType::kF32);
  check.Shape("decay.decay", args.decay.decay, {args.num_heads, kPrefillBlock + 1});
  check.Type("decay.fold_epsilon", args.decay.fold_epsilon, DType::kF32);
  check.Shape("decay.fold_epsilon", args.decay.fold_epsilon, {args.num_heads, 2});
  check.Type("state", args.state, DType::kF32);
  check.Shape("state", args.state, {args.state.rows(), args.num_heads, key_dim, args.head_dim});
  check.Type("window", args.window, args.q.dtype);
  check.Expect(args.window.rank == 3, "window has rank %d, expected 3", args.window.rank);
  check.AtLeast("window rows", args.window.shape[1], kWindow);
  check.Shape("window", args.window,
              {args.state.rows(), args.window.shape[1], args.num_heads * key_dim + width});
  check.Steps(args.rows, args.num_rows, args.num_decode_rows, args.num_decode_tokens, num_tokens);
  Output(check, "o", args.o, args.q.dtype);
  check.Shape("o", args.o, {num_tokens, width});
  return check.status();
}

OpStatus Validate(const RopeArgs& args) {
  Checker check("Rope");
  check.Type("positions", args.positions, DType::kI64);
  check.Shape("positions", args.positions, {args.positions.rows()});
  check.Type("table_ids", args.table_ids, DType::kI32);
  check.Shape("table_ids", args.table_ids, {args.positions.rows()});
  check.AtLeast("num_freqs", args.num_freqs, 1);
  check.AtLeast("num_tables", args.num_tables, 1);
  check.Expect(args.tables != nullptr, "tables are absent");
  check.Type("cos", args.cos, DType::kF32);
  check.Shape("cos", args.cos, {args.positions.rows(), args.num_freqs});
  check.Type("sin", args.sin, DType::kF32);
  check.Shape("sin", args.sin, {args.positions.rows(), args.num_freqs});
  return check.status();
}

OpStatus Validate(const PagedAttentionArgs& args) {
  Checker check("PagedAttention");
  check.AtLeast("num_kv_heads", args.num_kv_heads, 1);
  check.AtLeast("num_heads", args.num_heads, args.num_kv_heads);
  if (!check.ok()) return check.status();
  check.Expect(args.num_heads % args.num_kv_heads == 0,
               "num_heads %d is no multiple of num_kv_heads %d", args.num_heads, args.num_kv_heads);
  check.Between("head_dim", args.head_dim, 1, kMaxHeadDim);
  check.Finite("scale", static_cast<double>(args.scale));
  const int64_t num_tokens = args.q.rows();
  const int64_t kv_width = static_cast<int64_t>(args.num_kv_heads) * args.head_dim;
  const int64_t width = static_cast<int64_t>(args.num_heads) * args.head_dim;
  check.ActivationType("q", args.q);
  check.Shape("q", args.q, {num_tokens, width});
  check.Type("k", args.k, args.q.dtype);
  check.Shape("k", args.k, {num_tokens, kv_width});
  check.Type("v", args.v, args.q.dtype);
  check.Shape("v", args.v, {num_tokens, kv_width});
  if (args.cos || args.sin) {
    const int64_t pairs = args.cos.row_elements();
    check.Between("rotary pairs", pairs, 1, args.head_dim / 2);
    check.Type("cos", args.cos, DType::kF32);
    check.Shape("cos", args.cos, {num_tokens, pairs});
    check.Type("sin", args.sin, DType::kF32);
    check.Shape("sin", args.sin, {num_tokens, pairs});
  }
  check.Expect(
      args.pair_layout == PairLayout::kHalfSplit || args.pair_layout == PairLayout::kInterleaved,
      "pair_layout %d is unknown", static_cast<int>(args.pair_layout));
  check.Type("blocks", args.blocks, args.q.dtype);
  check.Shape("blocks", args.blocks,
              {args.blocks.rows(), 2, args.num_kv_heads, int64_t{kPagedBlock} * args.head_dim});
  check.Steps(args.rows, args.num_rows, args.num_decode_rows, args.num_decode_tokens, num_tokens);
  check.Expect(args.num_rows == 0 || args.block_tables != nullptr, "block_tables are absent");
  Output(check, "o", args.o, args.q.dtype);
  check.Shape("o", args.o, {num_tokens, width});
  return check.status();
}

OpStatus Validate(const TurnKeysArgs& args) {
  Checker check("TurnKeys");
  check.AtLeast("num_kv_heads", args.num_kv_heads, 1);
  check.Between("head_dim", args.head_dim, 1, kMaxHeadDim);
  if (!check.ok()) return check.status();
  check.Between("num_freqs", args.num_freqs, 1, args.head_dim / 2);
  check.AtLeast("num_tables", args.num_tables, 1);
  check.Expect(args.tables != nullptr, "tables are absent");
  check.Expect(
      args.pair_layout == PairLayout::kHalfSplit || args.pair_layout == PairLayout::kInterleaved,
      "pair_layout %d is unknown", static_cast<int>(args.pair_layout));
  check.ActivationType("blocks", args.blocks);
  check.Shape("blocks", args.blocks,
              {args.blocks.rows(), 2, args.num_kv_heads, int64_t{kPagedBlock} * args.head_dim});
  check.AtLeast("num_turns", args.num_turns, 0);
  check.Expect(args.num_turns == 0 || args.turns != nullptr, "turns are absent");
  return check.status();
}

OpStatus Validate(const CountTokensArgs& args) {
  Checker check("CountTokens");
  check.Type("counts", args.counts, DType::kU32);
  check.Shape("counts", args.counts, {args.counts.rows(), args.counts.row_elements()});
  check.Between("slot", args.slot, 0, args.counts.rows() - 1);
  check.Type("token_ids", args.token_ids, DType::kI32);
  check.Shape("token_ids", args.token_ids, {args.token_ids.rows()});
  return check.status();
}

namespace {

// top_ids and top_logprobs [num_rows, num_top].
void CheckTop(Checker& check, const TensorView& ids, const TensorView& logprobs, int64_t num_rows,
              int64_t num_top) {
  check.Type("top_ids", ids, DType::kI32);
  check.Shape("top_ids", ids, {num_rows, num_top});
  check.Type("top_logprobs", logprobs, DType::kF32);
  check.Shape("top_logprobs", logprobs, {num_rows, num_top});
}

// [R, V], V in [1, 2^31 - 1].
void CheckLogits(Checker& check, const TensorView& logits) {
  check.Type("logits", logits, DType::kF32);
  check.Shape("logits", logits, {logits.rows(), logits.row_elements()});
  check.Between("vocabulary", logits.row_elements(), 1, INT32_MAX);
}

// [n, V]
void CheckProbabilities(Checker& check, const TensorView& x, const TensorView& logits) {
  check.Type("probabilities", x, DType::kF32);
  check.Shape("probabilities", x, {x.rows(), logits.row_elements()});
}

}  // namespace

OpStatus Validate(const SampleArgs& args) {
  Checker check("Sample");
  CheckLogits(check, args.logits);
  check.AtLeast("num_rows", args.num_rows, 0);
  check.Expect(args.num_rows <= 0 || args.rows != nullptr, "rows are absent, num_rows is %d",
               args.num_rows);
  if (args.counts) {
    check.Type("counts", args.counts, DType::kU32);
    check.Shape("counts", args.counts, {args.counts.rows(), args.logits.row_elements()});
  }
  check.Type("tokens", args.tokens, DType::kI32);
  check.Shape("tokens", args.tokens, {args.num_rows});
  if (args.logprobs) {
    check.Type("logprobs", args.logprobs, DType::kF32);
    check.Shape("logprobs", args.logprobs, {args.num_rows});
  }
  if (args.top_ids || args.top_logprobs) {
    CheckTop(check, args.top_ids, args.top_logprobs, args.num_rows, args.top_ids.row_elements());
  }
  if (args.probabilities) CheckProbabilities(check, args.probabilities, args.logits);
  if (args.margins) {
    check.Type("margins", args.margins, DType::kF32);
    check.Shape("margins", args.margins, {args.num_rows});
  }
  if (args.certainties) {
    check.Type("certainties", args.certainties, DType::kF32);
    check.Shape("certainties", args.certainties, {args.num_rows, 2});
  }
  return check.status();
}

OpStatus Validate(const AcceptanceHeadArgs& args) {
  Checker check("AcceptanceHead");
  check.Expect(args.x || args.z, "x and z are absent");
  check.Expect(!args.weight || (args.x && !args.z), "weight is there without x, or beside z");
  const TensorView& rows = args.z ? args.z : args.x;
  check.Expect(rows.rank == 2, "rows have rank %d, expected 2", rows.rank);
  check.Expect(!args.weight || args.weight.rank == 2, "weight has rank %d, expected 2",
               args.weight.rank);
  if (!check.ok()) return check.status();
  const int64_t num_columns = rows.row_elements();
  const int64_t n = args.weight ? args.weight.rows() : num_columns;
  check.AtLeast("n", n, 1);
  check.AtLeast("columns", num_columns, 1);
  const auto f32 = [&](const char* name, const TensorView& x,
                       std::initializer_list<int64_t> shape) {
    if (!x) return;
    check.Type(name, x, DType::kF32);
    check.Shape(name, x, shape);
  };
  f32("x", args.x, {rows.rows(), num_columns});
  f32("weight", args.weight, {n, num_columns});
  f32("z", args.z, {rows.rows(), n});
  f32("y", args.y, {rows.rows(), n});
  f32("bias", args.bias, {n});
  f32("feature_weights", args.feature_weights, {kNumHeadFeatures, n});
  f32("readout", args.readout, {n});
  f32("readout_features", args.readout_features, {kNumHeadFeatures});
  if (args.x) check.Input({.x = args.x, .norm = args.norm}, num_columns);
  check.Finite("readout_bias", static_cast<double>(args.readout_bias));
  check.Finite("place", static_cast<double>(args.place));
  check.AtLeast("num_rows", args.num_rows, 0);
  check.Expect(args.num_rows <= 0 || args.rows != nullptr, "rows are absent, num_rows is %d",
               args.num_rows);
  if (args.feature_weights || args.readout_features) {
    check.Expect(args.margins && args.certainties, "margins or certainties are absent");
    f32("certainties", args.certainties, {args.num_rows, 2});
  }
  f32("margins", args.margins, {args.num_rows});
  if (args.shown_margins) {
    check.Expect(args.margins && args.readout, "margins or readout are absent");
    f32("shown_margins", args.shown_margins, {args.num_rows});
  }
  if (args.readout) {
    check.Expect(static_cast<bool>(args.logits), "logits are absent");
    f32("logits", args.logits, {args.num_rows});
  }
  return check.status();
}

OpStatus Validate(const VerifyTokensArgs& args) {
  Checker check("VerifyTokens");
  CheckLogits(check, args.logits);
  check.AtLeast("num_verify_rows", args.num_verify_rows, 0);
  check.Expect(args.num_verify_rows <= 0 || args.verify_rows != nullptr,
               "verify_rows are absent, num_verify_rows is %d", args.num_verify_rows);
  check.AtLeast("num_rows", args.num_rows, 0);
  check.Expect(args.num_rows <= 0 || args.rows != nullptr, "rows are absent, num_rows is %d",
               args.num_rows);
  check.Type("counts", args.counts, DType::kU32);
  check.Shape("counts", args.counts, {args.counts.rows(), args.logits.row_elements()});
  check.Type("drafts", args.drafts, DType::kI32);
  check.Shape("drafts", args.drafts, {args.drafts.rows()});
  if (args.probabilities) CheckProbabilities(check, args.probabilities, args.logits);
  check.Type("num_tokens", args.num_tokens, DType::kI32);
  check.Shape("num_tokens", args.num_tokens, {args.num_verify_rows});
  check.Type("tokens", args.tokens, DType::kI32);
  check.Shape("tokens", args.tokens, {args.num_rows});
  check.Type("logprobs", args.logprobs, DType::kF32);
  check.Shape("logprobs", args.logprobs, {args.num_rows});
  CheckTop(check, args.top_ids, args.top_logprobs, args.num_rows, args.top_ids.row_elements());
  return check.status();
}

OpStatus Validate(const ScoreTokensArgs& args) {
  Checker check("ScoreTokens");
  CheckLogits(check, args.logits);
  check.Type("targets", args.targets, DType::kI32);
  check.Shape("targets", args.targets, {args.logits.rows()});
  check.Type("logprobs", args.logprobs, DType::kF32);
  check.Shape("logprobs", args.logprobs, {args.logits.rows()});
  check.Between("num_top", args.num_top, 0, args.logits.row_elements());
  if (args.num_top > 0) {
    CheckTop(check, args.top_ids, args.top_logprobs, args.logits.rows(), args.num_top);
  }
  return check.status();
}

}  // namespace godwit
