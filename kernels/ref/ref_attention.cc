// Lightning attention token by token (2401.04658 eq. 4), softmax attention over all keys at once,
// and the rotation table.

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/ref/elements.h"
#include "kernels/ref/ref_backend.h"

namespace godwit {
namespace {

constexpr double kTwoPi = 6.283185307179586476925286766559;

// The rate s of a head, of its f32 tables: expm1 keeps a small rate exact to f32, exp a large one.
double RateOf(const LightningDecay& decay, int64_t head) {
  const double epsilon = Get(decay.fold_epsilon, head, 0);  // 1 - exp(-s W)
  if (epsilon < 0.5) return -std::log1p(-epsilon) / kWindow;
  return -std::log(Get(decay.decay, head, 1));
}

// One head of q or k of a token of the step: activation, LRPE, rounding if `round`.
std::vector<double> FormHead(const LightningAttentionArgs& args, const TensorView& x, int64_t token,
                             int64_t position, int64_t head, bool round) {
  const int64_t n = args.head_dim;
  std::vector<double> y(static_cast<size_t>(args.theta ? 2 * n : n));
  for (int64_t i = 0; i < n; ++i) {
    double value = Get(x, token, head * n + i);
    if (args.qk_activation == Activation::kSilu) value /= 1 + std::exp(-value);
    double sine = 0;
    if (args.theta) {
      const double angle =
          std::fmod(Get(args.theta, head, i) * static_cast<double>(position), kTwoPi);
      sine = value * std::sin(angle);
      value *= std::cos(angle);
    }
    y[static_cast<size_t>(i)] = round ? RoundTo(x.dtype, value) : value;
    if (args.theta) y[static_cast<size_t>(n + i)] = round ? RoundTo(x.dtype, sine) : sine;
  }
  return y;
}

// One (sequence, head).
class LightningHead {
 public:
  LightningHead(const LightningAttentionArgs& args, const StepRow& row, int64_t head)
      : args_(args),
        row_(row),
        head_(head),
        key_dim_(args.theta ? 2 * args.head_dim : args.head_dim),
        lambda_(std::exp(-RateOf(args.decay, head))),
        stored_(args.state.row<float>(row.slot) + head * key_dim_ * args.head_dim),
        state_(stored_, stored_ + key_dim_ * args.head_dim) {}

  void Run() {
    const int64_t end = row_.position + row_.num_tokens;
    for (int64_t position = row_.base; position < end; ++position) {
      Append(position);
      if (position >= row_.position) WriteOutput(position);
      if (position + 1 == row_.base_after) {
        std::transform(state_.begin(), state_.end(), stored_,
                       [](double s) { return static_cast<float>(s); });
      }
    }
    // Last, because a row may take the place of one that was read above.
    for (int64_t position = std::max(row_.position, row_.base_after); position < end; ++position) {
      WriteWindow(position);
    }
  }

 private:
  int64_t Token(int64_t position) const { return row_.first_token + (position - row_.position); }
  // The window row of a position, as a view of one row.
  TensorView WindowRow(int64_t position) const {
    const TensorView& window = args_.window;
    const int64_t element =
        row_.slot * window.row_stride + position % window.shape[1] * window.shape[2];
    return MakeView(static_cast<char*>(window.data) + element * DTypeBytes(window.dtype),
                    window.dtype, 1, window.shape[2]);
  }
  int64_t KeyColumn() const { return head_ * key_dim_; }
  int64_t ValueColumn() const { return args_.num_heads * key_dim_ + head_ * args_.head_dim; }

  // S <- lambda S + k v^T
  void Append(int64_t position) {
    const bool in_step = position >= row_.position;
    std::vector<double> k(static_cast<size_t>(key_dim_));
    if (in_step) {
      k = FormHead(args_, args_.k, Token(position), position, head_, true);
    } else {
      for (int64_t d = 0; d < key_dim_; ++d) {
        k[static_cast<size_t>(d)] = Get(WindowRow(position), 0, KeyColumn() + d);
      }
    }
    for (int64_t n = 0; n < args_.head_dim; ++n) {
      const double v = in_step ? Get(args_.v, Token(position), head_ * args_.head_dim + n)
                               : Get(WindowRow(position), 0, ValueColumn() + n);
      for (int64_t d = 0; d < key_dim_; ++d) {
        double& s = state_[static_cast<size_t>(d * args_.head_dim + n)];
        s = lambda_ * s + k[static_cast<size_t>(d)] * v;
      }
    }
  }

  void WriteOutput(int64_t position) const {
    const std::vector<double> q = FormHead(args_, args_.q, Token(position), position, head_, false);
    for (int64_t n = 0; n < args_.head_dim; ++n) {
      double sum = 0;
      for (int64_t d = 0; d < key_dim_; ++d) {
        sum += q[static_cast<size_t>(d)] * state_[static_cast<size_t>(d * args_.head_dim + n)];
      }
      Set(args_.o, Token(position), head_ * args_.head_dim + n,
          static_cast<double>(args_.q_scale) * sum);
    }
  }

  void WriteWindow(int64_t position) const {
    const std::vector<double> k = FormHead(args_, args_.k, Token(position), position, head_, true);
    for (int64_t d = 0; d < key_dim_; ++d) {
      Set(WindowRow(position), 0, KeyColumn() + d, k[static_cast<size_t>(d)]);
    }
    for (int64_t n = 0; n < args_.head_dim; ++n) {
      Set(WindowRow(position), 0, ValueColumn() + n,
          Get(args_.v, Token(position), head_ * args_.head_dim + n));
    }
  }

  const LightningAttentionArgs& args_;
  const StepRow& row_;
  const int64_t head_;
  const int64_t key_dim_;
  const double lambda_;
  float* const stored_;
  std::vector<double> state_;
};

// One head of q or k of a token, rotated.
std::vector<double> RotatedHead(const PagedAttentionArgs& args, const TensorView& x, int64_t token,
                                int64_t head) {
  std::vector<double> y(static_cast<size_t>(args.head_dim));
  for (int64_t i = 0; i < args.head_dim; ++i) {
    y[static_cast<size_t>(i)] = Get(x, token, head * args.head_dim + i);
  }
  const int64_t pairs = args.cos ? args.cos.row_elements() : 0;
  for (int64_t i = 0; i < pairs; ++i) {
    const bool half_split = args.pair_layout == PairLayout::kHalfSplit;
    double& a = y[static_cast<size_t>(half_split ? i : 2 * i)];
    double& b = y[static_cast<size_t>(half_split ? i + pairs : 2 * i + 1)];
    const double cos = Get(args.cos, token, i);
    const double sin = Get(args.sin, token, i);
    const double rotated = a * cos - b * sin;
    b = b * cos + a * sin;
    a = rotated;
  }
  return y;
}

// Key or value (part 0, 1) element of a position: [kPagedBlock, head_dim] in a block.
TensorView CacheRow(const PagedAttentionArgs& args, const StepRow& row, int64_t position,
                    int64_t part, int64_t kv_head) {
  const int64_t block = args.block_tables[row.block_table + position / kPagedBlock];
  const int64_t element =
      block * args.blocks.row_stride +
      ((part * args.num_kv_heads + kv_head) * kPagedBlock + position % kPagedBlock) * args.head_dim;
  return MakeView(static_cast<char*>(args.blocks.data) + element * DTypeBytes(args.blocks.dtype),
                  args.blocks.dtype, 1, args.head_dim);
}

void WriteCache(const PagedAttentionArgs& args, const StepRow& row) {
  for (int64_t t = 0; t < row.num_tokens; ++t) {
    for (int64_t head = 0; head < args.num_kv_heads; ++head) {
      const std::vector<double> k = RotatedHead(args, args.k, row.first_token + t, head);
      for (int64_t i = 0; i < args.head_dim; ++i) {
        Set(CacheRow(args, row, row.position + t, 0, head), 0, i, k[static_cast<size_t>(i)]);
        Set(CacheRow(args, row, row.position + t, 1, head), 0, i,
            Get(args.v, row.first_token + t, head * args.head_dim + i));
      }
    }
  }
}

void Attend(const PagedAttentionArgs& args, const StepRow& row, int64_t t, int64_t head) {
  const int64_t kv_head = head / (args.num_heads / args.num_kv_heads);
  const std::vector<double> q = RotatedHead(args, args.q, row.first_token + t, head);
  const int64_t num_keys = row.position + t + 1;
  std::vector<double> scores(static_cast<size_t>(num_keys));
  for (int64_t j = 0; j < num_keys; ++j) {
    const TensorView k = CacheRow(args, row, j, 0, kv_head);
    double sum = 0;
    for (int64_t i = 0; i < args.head_dim; ++i) sum += q[static_cast<size_t>(i)] * Get(k, 0, i);
    scores[static_cast<size_t>(j)] = sum * static_cast<double>(args.scale);
  }
  const double max = *std::max_element(scores.begin(), scores.end());
  std::vector<double> o(static_cast<size_t>(args.head_dim));
  double total = 0;
  for (int64_t j = 0; j < num_keys; ++j) {
    const double p = std::exp(scores[static_cast<size_t>(j)] - max);
    const TensorView v = CacheRow(args, row, j, 1, kv_head);
    total += p;
    for (int64_t i = 0; i < args.head_dim; ++i) o[static_cast<size_t>(i)] += p * Get(v, 0, i);
  }
  for (int64_t i = 0; i < args.head_dim; ++i) {
    Set(args.o, row.first_token + t, head * args.head_dim + i, o[static_cast<size_t>(i)] / total);
  }
}

}  // namespace

void RefLightningAttention(const LightningAttentionArgs& args) {
  for (int32_t r = 0; r < args.num_rows; ++r) {
    if (args.rows[r].num_tokens == 0) continue;
    for (int64_t head = 0; head < args.num_heads; ++head)
      LightningHead(args, args.rows[r], head).Run();
  }
}

void RefRope(const RopeArgs& args) {
  for (int64_t t = 0; t < args.positions.rows(); ++t) {
    const double* const table =
        args.tables + int64_t{*args.table_ids.row<const int32_t>(t)} * (args.num_freqs + 1);
    for (int64_t i = 0; i < args.num_freqs; ++i) {
      const double position = static_cast<double>(*args.positions.row<const int64_t>(t));
      const double angle = std::fmod(position * table[i], kTwoPi);
      Set(args.cos, t, i, std::cos(angle) * table[args.num_freqs]);
      Set(args.sin, t, i, std::sin(angle) * table[args.num_freqs]);
    }
  }
}

void RefPagedAttention(const PagedAttentionArgs& args) {
  for (int32_t r = 0; r < args.num_rows; ++r) WriteCache(args, args.rows[r]);
  for (int32_t r = 0; r < args.num_rows; ++r) {
    for (int64_t t = 0; t < args.rows[r].num_tokens; ++t) {
      for (int64_t head = 0; head < args.num_heads; ++head) Attend(args, args.rows[r], t, head);
    }
  }
}

void RefTurnKeys(const TurnKeysArgs& args) {
  const int64_t rows = int64_t{args.num_kv_heads} * kPagedBlock;  // of keys, then of values
  const bool half_split = args.pair_layout == PairLayout::kHalfSplit;
  for (int32_t turn = 0; turn < args.num_turns; ++turn) {
    const BlockTurn& block = args.turns[turn];
    const double* const table = args.tables + int64_t{block.table_id} * (args.num_freqs + 1);
    const auto view = [&](int32_t index) {
      return MakeView(static_cast<char*>(args.blocks.data) +
                          index * args.blocks.row_stride * DTypeBytes(args.blocks.dtype),
                      args.blocks.dtype, 2 * rows, args.head_dim);
    };
    const TensorView from = view(block.from_block), to = view(block.to_block);
    for (int64_t row = 0; row < 2 * rows; ++row) {
      for (int64_t i = 0; i < args.head_dim; ++i) Set(to, row, i, Get(from, row, i));
      if (row >= rows) continue;
      for (int64_t i = 0; i < args.num_freqs; ++i) {
        const int64_t a = half_split ? i : 2 * i, b = half_split ? i + args.num_freqs : 2 * i + 1;
        const double angle = std::fmod(static_cast<double>(block.delta) * table[i], kTwoPi);
        const double cos = std::cos(angle), sin = std::sin(angle);
        Set(to, row, a, Get(from, row, a) * cos - Get(from, row, b) * sin);
        Set(to, row, b, Get(from, row, b) * cos + Get(from, row, a) * sin);
      }
    }
  }
}

}  // namespace godwit
