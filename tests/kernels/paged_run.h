#pragma once
// Sequences of random tokens run through paged attention in steps of a test's choosing.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "tests/kernels/device_arena.h"

namespace godwit {

struct PagedShape {
  int heads = 4;
  int kv_heads = 2;
  int head_dim = 16;
  int rotary_pairs = 0;  // 0: no rotation
  PairLayout layout = PairLayout::kHalfSplit;
  DType act = DType::kF32;
  DType o = DType::kF32;
  int max_sequences = 4;
  bool magnitude = false;  // |v| for v: outputs are the sums of the magnitudes of their terms

  float scale() const { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }
};

struct PagedPiece {
  int sequence = 0;
  int64_t position = 0;
  int num_tokens = 1;
  bool prefill = false;
  bool only_cached = false;  // attends to its own block alone: a cheap way to fill the cache
};

class PagedRun {
 public:
  PagedRun(Backend& backend, const PagedShape& shape, int64_t max_tokens, uint32_t seed = 1)
      : shape_(shape),
        arena_(backend),
        max_tokens_(max_tokens),
        seed_(seed),
        blocks_per_sequence_((max_tokens + kPagedBlock - 1) / kPagedBlock) {
    const int64_t num_blocks = blocks_per_sequence_ * shape.max_sequences;
    // Garbage that would show: nothing beyond a sequence's end is read.
    blocks_ = arena_.Floats(
        shape.act, {num_blocks, 2, shape.kv_heads, int64_t{kPagedBlock} * shape.head_dim},
        std::vector<float>(
            static_cast<size_t>(num_blocks * 2 * shape.kv_heads * kPagedBlock * shape.head_dim),
            NAN));
    // Blocks of a sequence are scattered: entry i of sequence s is block i * max_sequences + s,
    // from the far end.
    std::vector<int32_t> tables;
    for (int s = 0; s < shape.max_sequences; ++s) {
      for (int64_t i = 0; i < blocks_per_sequence_; ++i) {
        tables.push_back(static_cast<int32_t>(num_blocks - 1 - (i * shape.max_sequences + s)));
      }
    }
    tables_ = arena_.UploadArray(tables);
  }

  void Step(const std::vector<PagedPiece>& pieces) {
    DeviceArena arena(arena_.backend());
    std::vector<StepRow> rows;
    std::vector<float> qkv, cos, sin;
    int32_t num_tokens = 0, num_decode = 0, num_decode_rows = 0;
    const int64_t width = (shape_.heads + 2 * shape_.kv_heads) * shape_.head_dim;
    for (const PagedPiece& piece : pieces) {
      StepRow row;
      row.first_token = num_tokens;
      row.num_tokens = piece.num_tokens;
      row.is_prefill = piece.prefill;
      row.position = piece.only_cached ? piece.position % kPagedBlock : piece.position;
      row.block_table = piece.sequence * blocks_per_sequence_;
      if (piece.only_cached) row.block_table += piece.position / kPagedBlock;
      rows.push_back(row);
      num_tokens += piece.num_tokens;
      if (!piece.prefill) {
        num_decode += piece.num_tokens;
        ++num_decode_rows;
      }
      const auto begin = Tokens(piece.sequence).qkv.begin() + piece.position * width;
      qkv.insert(qkv.end(), begin, begin + piece.num_tokens * width);
      for (int64_t t = piece.position; t < piece.position + piece.num_tokens; ++t) {
        for (int i = 0; i < shape_.rotary_pairs; ++i) {
          const double angle = static_cast<double>(t) *
                               std::pow(10000.0, -static_cast<double>(i) / shape_.rotary_pairs);
          cos.push_back(static_cast<float>(std::cos(angle)));
          sin.push_back(static_cast<float>(std::sin(angle)));
        }
      }
    }
    const TensorView fused = arena.Floats(shape_.act, {num_tokens, width}, qkv);
    PagedAttentionArgs args;
    args.q = ColumnRange(fused, 0, shape_.heads * shape_.head_dim);
    args.k = ColumnRange(fused, shape_.heads * shape_.head_dim, shape_.kv_heads * shape_.head_dim);
    args.v = ColumnRange(fused, (shape_.heads + shape_.kv_heads) * shape_.head_dim,
                         shape_.kv_heads * shape_.head_dim);
    if (shape_.rotary_pairs > 0) {
      args.cos = arena.Floats(DType::kF32, {num_tokens, shape_.rotary_pairs}, cos);
      args.sin = arena.Floats(DType::kF32, {num_tokens, shape_.rotary_pairs}, sin);
    }
    args.pair_layout = shape_.layout;
    args.num_heads = shape_.heads;
    args.num_kv_heads = shape_.kv_heads;
    args.head_dim = shape_.head_dim;
    args.scale = shape_.scale();
    args.blocks = blocks_;
    args.block_tables = tables_;
    args.rows = arena.UploadArray(rows);
    args.num_rows = static_cast<int32_t>(rows.size());
    args.num_decode_rows = num_decode_rows;
    args.num_decode_tokens = num_decode;
    args.o = arena.Output(shape_.o, {num_tokens, int64_t{shape_.heads} * shape_.head_dim});
    const OpStatus status = arena_.backend().PagedAttention(args);
    ASSERT_TRUE(status.ok()) << status.text;
    const std::vector<float> o = arena.Download(args.o);
    auto from = o.begin();
    for (const PagedPiece& piece : pieces) {
      const int64_t row = int64_t{shape_.heads} * shape_.head_dim;
      std::copy(from, from + piece.num_tokens * row,
                Tokens(piece.sequence).o.begin() + piece.position * row);
      from += piece.num_tokens * row;
    }
  }

  // Puts the keys and values of positions [0, n) into the cache.
  void Cache(int sequence, int64_t n) {
    std::vector<PagedPiece> pieces;
    for (int64_t position = 0; position < n; position += kPagedBlock) {
      pieces.push_back(
          {.sequence = sequence,
           .position = position,
           .num_tokens = static_cast<int>(std::min<int64_t>(kPagedBlock, n - position)),
           .prefill = true,
           .only_cached = true});
    }
    Step(pieces);
  }

  // The first block of each `to` becomes that of its `from`, its keys `delta` positions further.
  struct Turn {
    int from = 0, to = 0;
    int64_t delta = 0;
  };
  void TurnFirstBlocks(const std::vector<Turn>& turns) {
    DeviceArena arena(arena_.backend());
    std::vector<double> tables(static_cast<size_t>(shape_.rotary_pairs) + 1, 0.25);  // not theirs
    for (int i = 0; i < shape_.rotary_pairs; ++i) {
      tables.push_back(std::pow(10000.0, -static_cast<double>(i) / shape_.rotary_pairs));
    }
    tables.push_back(1.25);  // an attention factor, which keys carry already
    const auto last = static_cast<int32_t>(blocks_.shape[0] - 1);
    std::vector<BlockTurn> blocks;
    for (const Turn& turn : turns)
      blocks.push_back({last - turn.from, last - turn.to, 1, turn.delta});
    const OpStatus status =
        arena_.backend().TurnKeys({.blocks = blocks_,
                                   .pair_layout = shape_.layout,
                                   .num_kv_heads = shape_.kv_heads,
                                   .head_dim = shape_.head_dim,
                                   .tables = arena.UploadArray(tables),
                                   .num_tables = 2,
                                   .num_freqs = shape_.rotary_pairs,
                                   .turns = arena.UploadArray(blocks),
                                   .num_turns = static_cast<int32_t>(blocks.size())});
    ASSERT_TRUE(status.ok()) << status.text;
    ASSERT_TRUE(arena_.backend().Synchronize().ok());
  }

  const std::vector<float>& output(int sequence) { return Tokens(sequence).o; }
  std::vector<float> Output(int sequence, int64_t begin, int64_t end) {
    const std::vector<float>& o = output(sequence);
    const int64_t row = int64_t{shape_.heads} * shape_.head_dim;
    return {o.begin() + begin * row, o.begin() + end * row};
  }

  // What f32 arithmetic may differ by from exact results, for every output: with scores of
  // magnitude up to A = scale sum |q k| their error is e = (head_dim + 4) 2^-24 A, the weights'
  // relative error 2 e + 4 2^-23, and a sum of num_keys products adds num_keys 2^-24; all times the
  // largest |v|. Keys rounded to bf16 after a rotation that is off by a rounding: 2^-8 A more.
  std::vector<double> Tolerance(int sequence) {
    const std::vector<float>& qkv = Tokens(sequence).qkv;
    const int64_t q_width = int64_t{shape_.heads} * shape_.head_dim;
    const int64_t kv_width = int64_t{shape_.kv_heads} * shape_.head_dim;
    const int64_t width = q_width + 2 * kv_width;
    double max_q = 0, max_k = 0, max_v = 0;
    for (size_t i = 0; i < qkv.size(); ++i) {
      const int64_t column = static_cast<int64_t>(i) % width;
      double& max = column < q_width ? max_q : column < q_width + kv_width ? max_k : max_v;
      max = std::max(max, std::abs(static_cast<double>(qkv[i])));
    }
    // |q . k| <= |q| |k| <= head_dim max_q max_k; a rotation keeps the norm.
    const double scores = static_cast<double>(shape_.scale()) * shape_.head_dim * max_q * max_k;
    double score_error = (shape_.head_dim + 4) * std::ldexp(1.0, -24) * scores;
    if (shape_.act == DType::kBF16 && shape_.rotary_pairs > 0)
      score_error += std::ldexp(1.0, -8) * scores;
    const double relative = 2 * score_error + std::ldexp(1.0, -21) +
                            static_cast<double>(max_tokens_) * std::ldexp(1.0, -24);
    const double stored = shape_.o == DType::kBF16 ? std::ldexp(1.0, -8) : 0;
    return std::vector<double>(Tokens(sequence).o.size(), (relative + stored) * max_v);
  }

 private:
  struct Sequence {
    std::vector<float> qkv;
    std::vector<float> o;
  };
  Sequence& Tokens(int sequence) {
    while (static_cast<int>(sequences_.size()) <= sequence) {
      const uint32_t seed = seed_ * 7919 + static_cast<uint32_t>(sequences_.size());
      const int64_t width = int64_t{shape_.heads + 2 * shape_.kv_heads} * shape_.head_dim;
      sequences_.push_back(
          {RandomValues(seed, max_tokens_ * width, shape_.act),
           std::vector<float>(static_cast<size_t>(max_tokens_ * shape_.heads * shape_.head_dim))});
      if (!shape_.magnitude) continue;
      const int64_t first_value = int64_t{shape_.heads + shape_.kv_heads} * shape_.head_dim;
      std::vector<float>& qkv = sequences_.back().qkv;
      for (size_t i = 0; i < qkv.size(); ++i) {
        if (static_cast<int64_t>(i) % width >= first_value) qkv[i] = std::abs(qkv[i]);
      }
    }
    return sequences_[static_cast<size_t>(sequence)];
  }

  const PagedShape shape_;
  DeviceArena arena_;
  const int64_t max_tokens_;
  const uint32_t seed_;
  const int64_t blocks_per_sequence_;
  TensorView blocks_;
  int32_t* tables_ = nullptr;
  std::vector<Sequence> sequences_;
};

}  // namespace godwit
