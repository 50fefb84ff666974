// Paged attention in three phases: the step's keys and values go to the cache; then tiles of query
// rows (tokens x the query heads of one kv head) attend, each over its ranges of kAttentionSplit
// keys; then the partial results of a row are merged in ascending order. A prefill tile takes its
// ranges one after the other and merges as it goes; the ranges of decode rows are tasks of their
// own. Both run the same functions, and a query row's bits depend on its own q, its position and
// the cache alone: not on its tile, nor on the phase.

#include "kernels/cpu/paged_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "kernels/base/bf16.h"
#include "kernels/base/check.h"
#include "kernels/cpu/vector_ops.h"
#include "kernels/validate.h"

namespace godwit {
namespace {

constexpr int64_t kTileRows = 64;  // query rows that share one widened tile of keys
constexpr int64_t kTileKeys =
    64;  // keys widened at once: 32 KiB of keys and of values at head_dim 128
constexpr int64_t kWriteTokens = 64;                       // tokens of a cache-writing task
constexpr int64_t kMaxPartialElements = int64_t{1} << 22;  // 16 MiB of partial results at once
static_assert(kAttentionSplit % kTileKeys == 0 && kTileKeys % kPagedBlock == 0);
static_assert(kPagedBlock % kRowPad == 0);

// Partial results of rows: o[r] = sum_j exp(s_j - max[r]) v_j, sum[r] = sum_j exp(s_j - max[r]).
struct Partial {
  float* o;
  int64_t stride;
  float* max;
  float* sum;
};

struct TileScratch {
  float* q;        // [kTileRows, row_stride], rotated and scaled
  float* scores;   // [kTileRows, kAttentionSplit]
  float* keys;     // [head_dim, kTileKeys]
  float* values;   // [kTileKeys, row_stride]
  Partial part;    // of one range
  Partial merged;  // of the ranges so far
  int32_t* depth;  // [kTileRows]

  static int64_t Elements(int64_t row_stride) {
    return kTileRows * (3 * row_stride + kAttentionSplit + 5) + 2 * kTileKeys * row_stride;
  }
  static TileScratch At(float* data, int64_t row_stride);
};

TileScratch TileScratch::At(float* data, int64_t row_stride) {
  auto take = [&](int64_t elements) {
    float* const taken = data;
    data += elements;
    return taken;
  };
  TileScratch s;
  s.q = take(kTileRows * row_stride);
  s.scores = take(kTileRows * kAttentionSplit);
  s.keys = take(kTileKeys * row_stride);
  s.values = take(kTileKeys * row_stride);
  s.part = {take(kTileRows * row_stride), row_stride, take(kTileRows), take(kTileRows)};
  s.merged = {take(kTileRows * row_stride), row_stride, take(kTileRows), take(kTileRows)};
  s.depth = reinterpret_cast<int32_t*>(take(kTileRows));
  return s;
}

// Some query rows of one sequence and kv head: row r is token (first + r) / group, head kv_head *
// group + (first + r) % group.
struct Tile {
  const StepRow* step_row;
  int64_t kv_head;
  int64_t first;
  int64_t rows;
};

class Attention {
 public:
  Attention(CpuContext& context, const PagedAttentionArgs& args)
      : context_(context),
        args_(args),
        group_(args.num_heads / args.num_kv_heads),
        head_dim_(args.head_dim),
        row_stride_(PadRow(args.head_dim)),
        is_bf16_(args.q.dtype == DType::kBF16) {}

  OpStatus Run();

 private:
  bool IsDecode(const StepRow& row) const { return row.is_prefill == 0; }
  int64_t TilesOfRow(const StepRow& row) const {
    return (row.num_tokens * group_ + kTileRows - 1) / kTileRows * args_.num_kv_heads;
  }
  int64_t NumTiles(bool split_decode, bool decode_only) const;
  Tile TileAt(int64_t index, bool split_decode, bool decode_only) const;
  bool Listed(const StepRow& row, bool split_decode, bool decode_only) const {
    return decode_only ? IsDecode(row) : !(split_decode && IsDecode(row));
  }

  int64_t PositionOf(const Tile& tile, int64_t r) const {
    return tile.step_row->position + (tile.first + r) / group_;
  }
  int64_t TokenOf(const Tile& tile, int64_t r) const {
    return tile.step_row->first_token + (tile.first + r) / group_;
  }
  int64_t HeadOf(const Tile& tile, int64_t r) const {
    return tile.kv_head * group_ + (tile.first + r) % group_;
  }
  int64_t NumRanges(const Tile& tile) const {
    return PositionOf(tile, tile.rows - 1) / kAttentionSplit + 1;
  }

  // What the block of `position` holds of kv_head: keys (part 0) or values (part 1).
  char* BlockPart(const StepRow& row, int64_t position, int64_t part, int64_t kv_head) const {
    const int64_t block = args_.block_tables[row.block_table + position / kPagedBlock];
    const int64_t element = block * args_.blocks.row_stride +
                            (part * args_.num_kv_heads + kv_head) * kPagedBlock * head_dim_;
    return static_cast<char*>(args_.blocks.data) + element * DTypeBytes(args_.blocks.dtype);
  }

  void LoadRotated(const TensorView& x, int64_t token, int64_t head, float* y) const;
  template <typename T>
  void WriteToken(const StepRow& row, int64_t index, int64_t kv_head) const;
  void WriteCache();

  void LoadQueries(const Tile& tile, const TileScratch& scratch) const;
  void AttendRange(const Tile& tile, int64_t range, const TileScratch& scratch) const;
  void ScoreKeys(const Tile& tile, int64_t begin, int64_t end, const TileScratch& scratch) const;
  void SumValues(const Tile& tile, int64_t begin, int64_t end, const TileScratch& scratch) const;
  void WriteOutput(const Tile& tile, const Partial& merged) const;
  void AttendTiles(bool split_decode, float* scratch, int64_t scratch_elements);
  void AttendDecode(int64_t max_ranges, float* scratch, int64_t scratch_elements, float* partials);

  int64_t DecodePartialElements() const { return decode_tile_rows_ * (row_stride_ + 2); }
  // Partial result of (tile, range) in the decode buffer.
  Partial DecodePartial(float* partials, int64_t tile, int64_t slot, int64_t slots) const {
    float* const data = partials + (tile * slots + slot) * DecodePartialElements();
    return {data, row_stride_, data + decode_tile_rows_ * row_stride_,
            data + decode_tile_rows_ * (row_stride_ + 1)};
  }

  CpuContext& context_;
  const PagedAttentionArgs& args_;
  const int64_t group_;
  const int64_t head_dim_;
  const int64_t row_stride_;
  const bool is_bf16_;
  int64_t decode_tile_rows_ = 0;  // of the largest decode tile
};

int64_t Attention::NumTiles(bool split_decode, bool decode_only) const {
  int64_t num_tiles = 0;
  for (int32_t r = 0; r < args_.num_rows; ++r) {
    if (Listed(args_.rows[r], split_decode, decode_only)) num_tiles += TilesOfRow(args_.rows[r]);
  }
  return num_tiles;
}

Tile Attention::TileAt(int64_t index, bool split_decode, bool decode_only) const {
  for (int32_t r = 0; r < args_.num_rows; ++r) {
    const StepRow& row = args_.rows[r];
    if (!Listed(row, split_decode, decode_only)) continue;
    const int64_t tiles = TilesOfRow(row);
    if (index >= tiles) {
      index -= tiles;
      continue;
    }
    const int64_t first = index / args_.num_kv_heads * kTileRows;
    return {&row, index % args_.num_kv_heads, first,
            std::min(kTileRows, row.num_tokens * group_ - first)};
  }
  GODWIT_CHECK(false);
}

void Attention::LoadRotated(const TensorView& x, int64_t token, int64_t head, float* y) const {
  const int64_t offset = token * x.row_stride + head * head_dim_;
  context_.isa.widen_rows({.x = static_cast<const char*>(x.data) + offset * DTypeBytes(x.dtype),
                           .is_bf16 = is_bf16_,
                           .rows = 1,
                           .columns = head_dim_,
                           .y = y});
  if (!args_.cos) return;
  const float* const cos = args_.cos.row<const float>(token);
  const float* const sin = args_.sin.row<const float>(token);
  const int64_t pairs = args_.cos.shape[1];
  const bool half_split = args_.pair_layout == PairLayout::kHalfSplit;
  for (int64_t i = 0; i < pairs; ++i) {
    float& a = half_split ? y[i] : y[2 * i];
    float& b = half_split ? y[i + pairs] : y[2 * i + 1];
    const float rotated = a * cos[i] - b * sin[i];
    b = b * cos[i] + a * sin[i];
    a = rotated;
  }
}

template <typename T>
void Attention::WriteToken(const StepRow& row, int64_t index, int64_t kv_head) const {
  float k[kMaxHeadDim];
  LoadRotated(args_.k, row.first_token + index, kv_head, k);
  const int64_t position = row.position + index;
  const int64_t lane = position % kPagedBlock;
  T* const keys = reinterpret_cast<T*>(BlockPart(row, position, 0, kv_head));
  T* const values = reinterpret_cast<T*>(BlockPart(row, position, 1, kv_head)) + lane * head_dim_;
  const T* const v = args_.v.row<const T>(row.first_token + index) + kv_head * head_dim_;
  for (int64_t i = 0; i < head_dim_; ++i) {
    if constexpr (sizeof(T) == sizeof(BF16)) {
      keys[i * kPagedBlock + lane] = ToBF16(k[i]);
    } else {
      keys[i * kPagedBlock + lane] = k[i];
    }
    values[i] = v[i];
  }
}

void Attention::WriteCache() {
  auto tasks_of_row = [](const StepRow& row) {
    return (row.num_tokens + kWriteTokens - 1) / kWriteTokens;
  };
  int64_t num_tasks = 0;
  for (int32_t r = 0; r < args_.num_rows; ++r) num_tasks += tasks_of_row(args_.rows[r]);
  context_.pool.ForEach(num_tasks * args_.num_kv_heads, [&](int64_t task) {
    int64_t chunk = task / args_.num_kv_heads;
    const StepRow* row = args_.rows;
    for (; chunk >= tasks_of_row(*row); ++row) chunk -= tasks_of_row(*row);
    const int64_t end = std::min<int64_t>((chunk + 1) * kWriteTokens, row->num_tokens);
    for (int64_t index = chunk * kWriteTokens; index < end; ++index) {
      if (is_bf16_) {
        WriteToken<BF16>(*row, index, task % args_.num_kv_heads);
      } else {
        WriteToken<float>(*row, index, task % args_.num_kv_heads);
      }
    }
  });
}

void Attention::LoadQueries(const Tile& tile, const TileScratch& scratch) const {
  for (int64_t r = 0; r < tile.rows; ++r) {
    float* const q = scratch.q + r * row_stride_;
    LoadRotated(args_.q, TokenOf(tile, r), HeadOf(tile, r), q);
    for (int64_t i = 0; i < head_dim_; ++i) q[i] *= args_.scale;
  }
}

// Scores of the keys [begin, end) of one range; those of a row beyond its own position are written
// and never read.
void Attention::ScoreKeys(const Tile& tile, int64_t begin, int64_t end,
                          const TileScratch& scratch) const {
  std::fill_n(scratch.depth, kTileRows, static_cast<int32_t>(head_dim_));
  int64_t row = 0;
  for (int64_t tile_begin = begin; tile_begin < end; tile_begin += kTileKeys) {
    const int64_t num_keys = std::min(kTileKeys, end - tile_begin);
    for (int64_t key = 0; key < num_keys; key += kPagedBlock) {
      context_.isa.widen_rows({.x = BlockPart(*tile.step_row, tile_begin + key, 0, tile.kv_head),
                               .is_bf16 = is_bf16_,
                               .x_stride = kPagedBlock,
                               .rows = head_dim_,
                               .columns = kPagedBlock,
                               .y = scratch.keys + key,
                               .y_stride = kTileKeys});
    }
    while (PositionOf(tile, row) < tile_begin) ++row;  // the last row sees key end - 1
    const int64_t columns = (num_keys + kPagedBlock - 1) / kPagedBlock * kPagedBlock;
    context_.isa.tile_product({.a = scratch.q + row * row_stride_,
                               .a_stride = row_stride_,
                               .b = scratch.keys,
                               .b_stride = kTileKeys,
                               .c = scratch.scores + row * kAttentionSplit + (tile_begin - begin),
                               .c_stride = kAttentionSplit,
                               .rows = static_cast<int>(tile.rows - row),
                               .columns = static_cast<int>(columns),
                               .depth = scratch.depth});
  }
}

void Attention::SumValues(const Tile& tile, int64_t begin, int64_t end,
                          const TileScratch& scratch) const {
  for (int64_t tile_begin = begin; tile_begin < end; tile_begin += kTileKeys) {
    const int64_t num_keys = std::min(kTileKeys, end - tile_begin);
    for (int64_t key = 0; key < num_keys; key += kPagedBlock) {
      context_.isa.widen_rows({.x = BlockPart(*tile.step_row, tile_begin + key, 1, tile.kv_head),
                               .is_bf16 = is_bf16_,
                               .x_stride = head_dim_,
                               .rows = std::min<int64_t>(kPagedBlock, num_keys - key),
                               .columns = head_dim_,
                               .y = scratch.values + key * row_stride_,
                               .y_stride = row_stride_});
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
      scratch.depth[r] = static_cast<int32_t>(
          std::clamp<int64_t>(PositionOf(tile, r) + 1 - tile_begin, 0, num_keys));
    }
    context_.isa.tile_product({.a = scratch.scores + (tile_begin - begin),
                               .a_stride = kAttentionSplit,
                               .b = scratch.values,
                               .b_stride = row_stride_,
                               .c = scratch.part.o,
                               .c_stride = row_stride_,
                               .rows = static_cast<int>(tile.rows),
                               .columns = static_cast<int>(head_dim_),
                               .depth = scratch.depth,
                               .accumulate = tile_begin != begin});
  }
}

// scratch.part <- keys [range * kAttentionSplit, ...) of each row; sum 0 for a row that ends before
// the range.
void Attention::AttendRange(const Tile& tile, int64_t range, const TileScratch& scratch) const {
  const int64_t begin = range * kAttentionSplit;
  const int64_t end = std::min(begin + kAttentionSplit, PositionOf(tile, tile.rows - 1) + 1);
  ScoreKeys(tile, begin, end, scratch);
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t num_keys = std::min(PositionOf(tile, r) + 1, end) - begin;
    SoftmaxRangeArgs softmax = {.x = scratch.scores + r * kAttentionSplit, .n = num_keys};
    if (num_keys > 0) context_.isa.softmax_range(softmax);
    scratch.part.max[r] = softmax.max;
    scratch.part.sum[r] = softmax.sum;
  }
  SumValues(tile, begin, end, scratch);
}

// merged <- merged + part; the first range is taken as it is. A row without keys in `part` stays.
void Merge(const Partial& part, bool first, int64_t rows, int64_t columns, const Partial& merged) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* const from = part.o + r * part.stride;
    float* const to = merged.o + r * merged.stride;
    if (first) {
      merged.max[r] = part.max[r];
      merged.sum[r] = part.sum[r];
      std::copy(from, from + columns, to);
      continue;
    }
    if (part.sum[r] == 0) continue;
    const float max = std::max(merged.max[r], part.max[r]);
    const float old_scale = std::exp(merged.max[r] - max);
    const float new_scale = std::exp(part.max[r] - max);
    merged.max[r] = max;
    merged.sum[r] = merged.sum[r] * old_scale + part.sum[r] * new_scale;
    for (int64_t i = 0; i < columns; ++i) to[i] = to[i] * old_scale + from[i] * new_scale;
  }
}

void Attention::WriteOutput(const Tile& tile, const Partial& merged) const {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t column = HeadOf(tile, r) * head_dim_;
    const float* const from = merged.o + r * merged.stride;
    const float scale = 1.0f / merged.sum[r];
    if (args_.o.dtype == DType::kBF16) {
      BF16* const o = args_.o.row<BF16>(TokenOf(tile, r)) + column;
      for (int64_t i = 0; i < head_dim_; ++i) o[i] = ToBF16(from[i] * scale);
    } else {
      float* const o = args_.o.row<float>(TokenOf(tile, r)) + column;
      for (int64_t i = 0; i < head_dim_; ++i) o[i] = from[i] * scale;
    }
  }
}

void Attention::AttendTiles(bool split_decode, float* scratch, int64_t scratch_elements) {
  const int64_t num_tiles = NumTiles(split_decode, false);
  if (num_tiles == 0) return;
  std::atomic<int64_t> next = 0;
  context_.pool.Run([&](int thread) {
    const TileScratch mine = TileScratch::At(scratch + thread * scratch_elements, row_stride_);
    for (;;) {
      // From the last down: the tiles with most keys come first.
      const int64_t index = num_tiles - 1 - next.fetch_add(1, std::memory_order_relaxed);
      if (index < 0) return;
      const Tile tile = TileAt(index, split_decode, false);
      LoadQueries(tile, mine);
      const int64_t num_ranges = NumRanges(tile);
      for (int64_t range = 0; range < num_ranges; ++range) {
        AttendRange(tile, range, mine);
        Merge(mine.part, range == 0, tile.rows, head_dim_, mine.merged);
      }
      WriteOutput(tile, mine.merged);
    }
  });
}

// Waves of ranges: a task computes one (tile, range); then each tile merges the ranges of the wave
// in order.
void Attention::AttendDecode(int64_t max_ranges, float* scratch, int64_t scratch_elements,
                             float* partials) {
  const int64_t num_tiles = NumTiles(true, true);
  // The last slot of a tile holds what is merged so far.
  const int64_t slots =
      std::max<int64_t>(2, kMaxPartialElements / (num_tiles * DecodePartialElements()));
  const int64_t wave = std::min(slots - 1, max_ranges);
  for (int64_t begin = 0; begin < max_ranges; begin += wave) {
    std::atomic<int64_t> next = 0;
    context_.pool.Run([&](int thread) {
      TileScratch mine = TileScratch::At(scratch + thread * scratch_elements, row_stride_);
      for (;;) {
        const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
        if (task >= num_tiles * wave) return;
        const Tile tile = TileAt(task / wave, true, true);
        const int64_t range = begin + task % wave;
        if (range >= NumRanges(tile)) continue;
        LoadQueries(tile, mine);
        mine.part = DecodePartial(partials, task / wave, task % wave, slots);
        AttendRange(tile, range, mine);
      }
    });
    context_.pool.ForEach(num_tiles, [&](int64_t index) {
      const Tile tile = TileAt(index, true, true);
      const int64_t num_ranges = NumRanges(tile);
      const Partial merged = DecodePartial(partials, index, slots - 1, slots);
      for (int64_t range = begin; range < std::min(begin + wave, num_ranges); ++range) {
        Merge(DecodePartial(partials, index, range - begin, slots), range == 0, tile.rows,
              head_dim_, merged);
      }
      if (begin + wave >= max_ranges) WriteOutput(tile, merged);
    });
  }
}

OpStatus Attention::Run() {
  int64_t max_decode_ranges = 0;
  for (int32_t r = 0; r < args_.num_rows; ++r) {
    const StepRow& row = args_.rows[r];
    if (row.num_tokens == 0 || !IsDecode(row)) continue;
    max_decode_ranges =
        std::max(max_decode_ranges, (row.position + row.num_tokens - 1) / kAttentionSplit + 1);
    decode_tile_rows_ = std::max(decode_tile_rows_, std::min(kTileRows, row.num_tokens * group_));
  }
  const bool split_decode = max_decode_ranges > 1;
  const int64_t scratch_elements = PadRow(TileScratch::Elements(row_stride_));
  int64_t elements = scratch_elements * context_.pool.num_threads();
  const int64_t partial_offset = elements;
  if (split_decode) {
    elements += std::max(kMaxPartialElements, 2 * NumTiles(true, true) * DecodePartialElements());
  }
  float* const scratch =
      static_cast<float*>(context_.scratch.Get(elements * static_cast<int64_t>(sizeof(float))));
  if (scratch == nullptr) {
    return context_.Fail(OpCode::kResourceExhausted, "PagedAttention: no memory for scratch");
  }
  WriteCache();
  AttendTiles(split_decode, scratch, scratch_elements);
  if (split_decode) {
    AttendDecode(max_decode_ranges, scratch, scratch_elements, scratch + partial_offset);
  }
  return {};
}

}  // namespace

OpStatus CpuPagedAttention(CpuContext& context, const PagedAttentionArgs& args) {
  return args.num_rows == 0 ? OpStatus{} : Attention(context, args).Run();
}

}  // namespace godwit
