#pragma once
// Sequences of random tokens run through lightning attention in steps of a test's choosing.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "tests/kernels/device_arena.h"

namespace godwit {

struct LightningShape {
  int heads = 2;
  int head_dim = 16;
  bool lrpe = false;
  DType act = DType::kF32;
  DType output = DType::kF32;
  Activation activation = Activation::kSilu;
  std::vector<double> rates;  // [heads]
  int num_slots = 4;
  int window_rows = 33;  // 15 + 18: up to 9 rows a step, one step in flight
  bool zero_state = false;
  bool magnitude =
      false;  // inputs, states and rotations replaced by their magnitudes: a bound of every sum

  int key_dim() const { return lrpe ? 2 * head_dim : head_dim; }
  int width() const { return heads * head_dim; }
};

// Rates of a layer: ALiBi slopes (2^p heads, then every second slope of twice as many) times 1 - l
// / (L - 1) + 1e-5.
inline std::vector<double> LayerRates(int heads, int layer, int num_layers) {
  auto slopes = [](int n) {
    std::vector<double> result;
    for (int h = 0; h < n; ++h) result.push_back(std::pow(2.0, -8.0 * (h + 1) / n));
    return result;
  };
  int power = 1;
  while (2 * power <= heads) power *= 2;
  std::vector<double> rates = slopes(power);
  const std::vector<double> more = slopes(2 * power);
  for (int h = 0; static_cast<int>(rates.size()) < heads; h += 2)
    rates.push_back(more[static_cast<size_t>(h)]);
  for (double& rate : rates) rate *= 1.0 - static_cast<double>(layer) / (num_layers - 1) + 1e-5;
  return rates;
}

// One sequence's part of a step; for the fields see StepRow.
struct LightningPiece {
  int sequence = 0;
  int slot = 0;
  int64_t position = 0;
  int num_tokens = 1;
  bool prefill = false;
  int64_t base = 0;
  int64_t base_after = 0;
  int64_t p_begin = 0;
  int64_t p_end = 0;
};

// A row of no tokens. Its other fields are read by nobody, so they say what would show.
inline LightningPiece Padding() {
  LightningPiece piece;
  piece.num_tokens = 0;
  piece.slot = 1 << 20;
  piece.position = 77;
  piece.base = 5;
  piece.base_after = 1 << 30;
  return piece;
}

inline int64_t FloorTo(int64_t x, int64_t multiple) { return x / multiple * multiple; }

// Prompt rows [begin, end) with whole blocks in P-form (p_form), folded as far as they go.
inline LightningPiece Prefill(int sequence, int slot, int64_t begin, int64_t end,
                              bool p_form = true) {
  LightningPiece piece{sequence,
                       slot,
                       begin,
                       static_cast<int>(end - begin),
                       true,
                       FloorTo(begin, kWindow),
                       FloorTo(end, kWindow),
                       0,
                       0};
  const int64_t p_begin = FloorTo(begin + kPrefillBlock - 1, kPrefillBlock);
  const int64_t p_end = FloorTo(end, kPrefillBlock);
  if (p_form && p_begin < p_end) {
    piece.p_begin = p_begin;
    piece.p_end = p_end;
  }
  return piece;
}
// Decode or verify rows; the base stands at the window of `confirmed_before` and moves to that of
// `confirmed`.
inline LightningPiece Decode(int sequence, int slot, int64_t position, int num_tokens,
                             int64_t confirmed_before, int64_t confirmed) {
  return {sequence,
          slot,
          position,
          num_tokens,
          false,
          FloorTo(confirmed_before, kWindow),
          FloorTo(confirmed, kWindow),
          0,
          0};
}

class LightningRun {
 public:
  LightningRun(Backend& backend, const LightningShape& shape, int64_t max_tokens, uint32_t seed = 1)
      : shape_(shape), arena_(backend), max_tokens_(max_tokens), seed_(seed) {
    std::vector<float> decay, epsilon;
    for (const double s : shape.rates) {
      for (int m = 0; m <= kPrefillBlock; ++m)
        decay.push_back(static_cast<float>(std::exp(-s * m)));
      epsilon.push_back(static_cast<float>(-std::expm1(-s * kWindow)));
      epsilon.push_back(static_cast<float>(-std::expm1(-s * kPrefillBlock)));
    }
    decay_.decay = arena_.Floats(DType::kF32, {shape.heads, kPrefillBlock + 1}, decay);
    decay_.fold_epsilon = arena_.Floats(DType::kF32, {shape.heads, 2}, epsilon);
    state_elements_ = int64_t{shape.heads} * shape.key_dim() * shape.head_dim;
    std::vector<float> state;
    for (int slot = 0; slot < shape.num_slots; ++slot) {
      const std::vector<float> part =
          Values(1000 + static_cast<uint32_t>(slot), state_elements_, DType::kF32);
      state.insert(state.end(), part.begin(), part.end());
    }
    if (shape.zero_state) std::fill(state.begin(), state.end(), 0.0f);
    state_ = arena_.Floats(DType::kF32,
                           {shape.num_slots, shape.heads, shape.key_dim(), shape.head_dim}, state);
    const int64_t row = int64_t{shape.heads} * (shape.key_dim() + shape.head_dim);
    // Garbage that would show: no row is read before it is written.
    window_ = arena_.Floats(
        shape.act, {shape.num_slots, shape.window_rows, row},
        std::vector<float>(static_cast<size_t>(shape.num_slots * shape.window_rows * row), NAN));
    if (shape.lrpe) {
      std::vector<float> theta;
      for (int j = 0; j < shape.width(); ++j) {
        theta.push_back(shape.magnitude
                            ? 0.0f
                            : static_cast<float>(std::pow(10000.0, -2.0 * j / shape.width())));
      }
      theta_ = arena_.Floats(DType::kF32, {shape.heads, shape.head_dim}, theta);
    }
  }

  // Runs one step; tokens in the order of `pieces` (decode pieces first). Outputs land in
  // output(sequence), and in that order in last().
  void Step(const std::vector<LightningPiece>& pieces) {
    DeviceArena arena(arena_.backend());
    const LightningAttentionArgs args = Upload(arena, pieces);
    const OpStatus status = arena_.backend().LightningAttention(args);
    ASSERT_TRUE(status.ok()) << status.text;
    last_ = arena.Download(args.o);
    auto from = last_.begin();
    for (const LightningPiece& piece : pieces) {
      if (piece.num_tokens == 0) continue;
      const int64_t count = int64_t{piece.num_tokens} * shape_.width();
      std::copy(from, from + count,
                Tokens(piece.sequence).o.begin() + piece.position * shape_.width());
      from += count;
    }
  }

  // Runs steps of one piece each, all of them `count` times over; outputs are dropped.
  void Repeat(const std::vector<LightningPiece>& steps, int64_t count) {
    DeviceArena arena(arena_.backend());
    std::vector<LightningAttentionArgs> all;
    for (const LightningPiece& piece : steps) all.push_back(Upload(arena, {piece}));
    for (int64_t i = 0; i < count; ++i) {
      for (const LightningAttentionArgs& args : all) {
        ASSERT_TRUE(arena_.backend().LightningAttention(args).ok());
      }
    }
    ASSERT_TRUE(arena_.backend().Synchronize().ok());
  }

  const std::vector<float>& last() const { return last_; }
  // [max_tokens, width]; rows that no step has computed are 0.
  const std::vector<float>& output(int sequence) { return Tokens(sequence).o; }
  std::vector<float> Output(int sequence, int64_t begin, int64_t end) {
    const std::vector<float>& o = output(sequence);
    return {o.begin() + begin * shape_.width(), o.begin() + end * shape_.width()};
  }
  std::vector<float> State(int slot) {
    const std::vector<float> all = arena_.Download(state_);
    return {all.begin() + slot * state_elements_, all.begin() + (slot + 1) * state_elements_};
  }
  void SetState(int slot, const std::vector<float>& values) {
    const OpStatus status =
        arena_.backend().CopyFromHost(state_.row<float>(slot), values.data(),
                                      static_cast<int64_t>(values.size() * sizeof(float)));
    ASSERT_TRUE(status.ok());
  }
  // q, k, v of all tokens, [max_tokens, 3 width].
  const std::vector<float>& qkv(int sequence) { return Tokens(sequence).qkv; }
  // Replaces the tokens of `sequence` from `position` on (what a rejected draft was).
  void ReplaceTokens(int sequence, int64_t position, int64_t count, uint32_t seed) {
    const int64_t width = 3 * shape_.width();
    const std::vector<float> values = Values(seed, count * width, shape_.act);
    std::copy(values.begin(), values.end(), Tokens(sequence).qkv.begin() + position * width);
  }
  void RestoreTokens(int sequence) { Tokens(sequence).qkv = MakeTokens(sequence); }

 private:
  struct Sequence {
    std::vector<float> qkv;
    std::vector<float> o;
  };

  std::vector<float> Values(uint32_t seed, int64_t n, DType act) {
    std::vector<float> values = RandomValues(seed_ * 7919 + seed, n, act);
    if (!shape_.magnitude) return values;
    for (float& x : values) x = std::abs(x);
    return values;
  }
  std::vector<float> MakeTokens(int sequence) {
    const int64_t width = shape_.width();
    std::vector<float> values = RandomValues(seed_ * 7919 + static_cast<uint32_t>(sequence),
                                             max_tokens_ * 3 * width, shape_.act);
    if (!shape_.magnitude) return values;
    for (size_t i = 0; i < values.size(); ++i) {
      float& x = values[i];
      const bool is_qk = static_cast<int64_t>(i) % (3 * width) < 2 * width;
      if (is_qk && shape_.activation == Activation::kSilu) x = x / (1 + std::exp(-x));
      x = std::abs(x);
    }
    return values;
  }
  LightningAttentionArgs Upload(DeviceArena& arena, const std::vector<LightningPiece>& pieces) {
    std::vector<StepRow> rows;
    std::vector<float> qkv;
    int32_t num_tokens = 0, num_decode = 0, num_decode_rows = 0;
    for (const LightningPiece& piece : pieces) {
      rows.push_back({num_tokens, piece.num_tokens, piece.slot, piece.prefill, piece.position,
                      piece.base, piece.base_after, piece.p_begin, piece.p_end, 0});
      num_tokens += piece.num_tokens;
      if (!piece.prefill) {
        num_decode += piece.num_tokens;
        ++num_decode_rows;
      }
      if (piece.num_tokens == 0) continue;
      const Sequence& tokens = Tokens(piece.sequence);
      const int64_t width = 3 * shape_.width();
      const auto begin = tokens.qkv.begin() + piece.position * width;
      qkv.insert(qkv.end(), begin, begin + piece.num_tokens * width);
    }
    const TensorView fused = arena.Floats(shape_.act, {num_tokens, 3 * shape_.width()}, qkv);
    LightningAttentionArgs args;
    args.q = ColumnRange(fused, 0, shape_.width());
    args.k = ColumnRange(fused, shape_.width(), shape_.width());
    args.v = ColumnRange(fused, 2 * shape_.width(), shape_.width());
    args.qk_activation = shape_.magnitude ? Activation::kNone : shape_.activation;
    args.theta = theta_;
    args.decay = decay_;
    args.num_heads = shape_.heads;
    args.head_dim = shape_.head_dim;
    args.state = state_;
    args.window = window_;
    args.rows = arena.UploadArray(rows);
    args.num_rows = static_cast<int32_t>(rows.size());
    args.num_decode_rows = num_decode_rows;
    args.num_decode_tokens = num_decode;
    args.o = arena.Output(shape_.output, {num_tokens, shape_.width()});
    return args;
  }
  Sequence& Tokens(int sequence) {
    while (static_cast<int>(sequences_.size()) <= sequence) {
      const int next = static_cast<int>(sequences_.size());
      sequences_.push_back({MakeTokens(next),
                            std::vector<float>(static_cast<size_t>(max_tokens_ * shape_.width()))});
    }
    return sequences_[static_cast<size_t>(sequence)];
  }

  const LightningShape shape_;
  DeviceArena arena_;
  const int64_t max_tokens_;
  const uint32_t seed_;
  int64_t state_elements_ = 0;
  LightningDecay decay_;
  TensorView state_, window_, theta_;
  std::vector<float> last_;
  std::vector<Sequence> sequences_;
};

// What f32 arithmetic may differ by from exact sums whose terms' magnitudes add up to `magnitude`
// (a run of the same shape with .magnitude): chains of d_k + 2 P products, a fold a window, and 8
// roundings of a term before it enters; and, where k is rounded to bf16 after an activation or
// rotation that may itself be off by a rounding, one bf16 unit of the term. A rotated term is a sum
// of two products, each no larger than the term's magnitude. In bf16 P-form rounds q and the scores,
// or q and the state: half a unit of the term each. An output in bf16 is off by a unit.
inline std::vector<double> LightningTolerance(const LightningShape& shape,
                                              const std::vector<float>& magnitude,
                                              int64_t num_tokens) {
  const double roundings =
      shape.key_dim() + 2.0 * kPrefillBlock + 3.0 * static_cast<double>(num_tokens) / kWindow + 8;
  double relative = roundings * std::ldexp(1.0, -24);
  const bool rounds_k = shape.activation != Activation::kNone || shape.lrpe;
  if (shape.act == DType::kBF16 && rounds_k) relative += std::ldexp(1.0, -8);
  if (shape.act == DType::kBF16) relative += std::ldexp(1.0, -8);
  if (shape.lrpe) relative *= 2;
  if (shape.output == DType::kBF16) relative += std::ldexp(1.0, -8);
  std::vector<double> tolerance;
  for (const float x : magnitude) tolerance.push_back(relative * static_cast<double>(x) + 1e-30);
  return tolerance;
}

}  // namespace godwit
