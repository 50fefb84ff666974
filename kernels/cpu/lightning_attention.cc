// Lightning attention: one task per (sequence, head, range of value columns). A task walks the
// blocks of its sequence from the stored base: windows of W rows (W-form), or blocks of P prompt
// rows (P-form). The two forms are the same code with another block length, but for the way scores
// are formed: dot products of rows in W-form (no transposition for one row), a product with the
// transposed keys in P-form. An output column of S is independent of the others, so the split over
// columns changes no bit.
//
// Work per row and head: W-form reads d_k d_v f32 of state; P-form costs 2 d_k d_v + P (d_k + d_v)
// / 2 fused multiply-adds a row and touches the state once in P rows.

#include "kernels/cpu/lightning_attention.h"

#include <algorithm>
#include <atomic>

#include "kernels/base/bf16.h"
#include "kernels/base/check.h"
#include "kernels/cpu/vector_ops.h"

namespace godwit {
namespace {

// Working memory of one thread, in f32 elements.
struct HeadScratch {
  float* q;          // [P, key_stride]
  float* k;          // [P, key_stride]
  float* k_decayed;  // [P, key_stride]
  float* k_columns;  // [d_k, P]: k transposed, P-form only
  float* v;          // [P, value_stride]
  float* scores;     // [P, P]
  float* state;      // [d_k, value_stride]: S beyond the stored base
  float* weights;    // [P]: what k is multiplied by in a fold
  float* cos;        // [P, angle_stride], with theta only
  float* sin;
  float* decay_back;  // [P + 1]: decay_back[m] = decay[P - m]
  int32_t* depth;     // [P]

  static int64_t Elements(const LightningAttentionArgs& args, int64_t key_width);
  static HeadScratch At(float* data, const LightningAttentionArgs& args, int64_t key_width);
};

constexpr int64_t kP = kPrefillBlock;
// decay_back and kRowPad elements after it, which a vector that reaches past the diagonal reads.
constexpr int64_t kDecayRow = PadRow(kP + 1) + kRowPad;

int64_t HeadScratch::Elements(const LightningAttentionArgs& args, int64_t key_width) {
  const int64_t key_stride = PadRow(key_width);
  const int64_t value_stride = PadRow(args.head_dim);
  return 4 * kP * key_stride + kP * value_stride + kP * kP + key_width * value_stride +
         2 * kP * (args.theta ? value_stride : 0) + kDecayRow + 2 * kP;
}

HeadScratch HeadScratch::At(float* data, const LightningAttentionArgs& args, int64_t key_width) {
  const int64_t key_stride = PadRow(key_width);
  const int64_t value_stride = PadRow(args.head_dim);
  auto take = [&](int64_t elements) {
    float* const taken = data;
    data += elements;
    return taken;
  };
  HeadScratch scratch;
  scratch.q = take(kP * key_stride);
  scratch.k = take(kP * key_stride);
  scratch.k_decayed = take(kP * key_stride);
  scratch.k_columns = take(kP * key_stride);
  scratch.v = take(kP * value_stride);
  scratch.scores = take(kP * kP);
  scratch.state = take(key_width * value_stride);
  scratch.cos = take(args.theta ? kP * value_stride : 0);
  scratch.sin = take(args.theta ? kP * value_stride : 0);
  scratch.weights = take(kP);
  scratch.decay_back = take(kDecayRow);
  scratch.depth = reinterpret_cast<int32_t*>(take(kP));
  return scratch;
}

class HeadTask {
 public:
  HeadTask(const LightningAttentionArgs& args, const IsaTable& isa, const HeadScratch& scratch,
           const StepRow& row, int64_t head, int64_t first_column, int64_t num_columns)
      : args_(args),
        isa_(isa),
        scratch_(scratch),
        row_(row),
        head_(head),
        first_column_(first_column),
        num_columns_(num_columns),
        key_width_(args.theta ? 2 * args.head_dim : args.head_dim),
        key_stride_(PadRow(key_width_)),
        value_stride_(PadRow(args.head_dim)),
        end_(row.position + row.num_tokens),
        is_bf16_(args.q.dtype == DType::kBF16),
        decay_(args.decay.decay.row<const float>(head)) {}

  void Run();

 private:
  // decay_back, as far as the sequence needs it.
  void ReverseDecay();
  // k and v of the block's rows [begin, end): of the ring, or of the step with their q.
  void LoadWindowRows(int64_t anchor, int64_t begin, int64_t end);
  void FormRows(int64_t anchor, int64_t begin, int64_t end);
  // Scores of the step's rows of the block, each with every row of the block up to itself.
  void ScoreRows(int64_t anchor, int64_t first, int64_t last);
  void ScoreBlock();
  void WriteOutputs(int64_t anchor, int64_t first, int64_t last);
  void WriteWindowRows(int64_t anchor, int64_t first, int64_t last);
  void Fold(int64_t length, float epsilon, float* to, int64_t to_stride);

  const void* Element(const TensorView& x, int64_t token, int64_t column) const {
    return static_cast<const char*>(x.data) + (token * x.row_stride + column) * DTypeBytes(x.dtype);
  }
  // The first key of `position` in the ring; its values lie num_heads * key_width on.
  char* WindowRow(int64_t position) const {
    const TensorView& window = args_.window;
    return static_cast<char*>(window.data) +
           (row_.slot * window.row_stride + position % window.shape[1] * window.shape[2]) *
               DTypeBytes(window.dtype);
  }

  const LightningAttentionArgs& args_;
  const IsaTable& isa_;
  const HeadScratch& scratch_;
  const StepRow& row_;
  const int64_t head_;
  const int64_t first_column_;
  const int64_t num_columns_;
  const int64_t key_width_;
  const int64_t key_stride_;
  const int64_t value_stride_;
  const int64_t end_;
  const bool is_bf16_;
  const float* const decay_;
  const float* state_ = nullptr;  // S at the anchor: the stored base, or scratch
  int64_t state_stride_ = 0;
};

void HeadTask::Run() {
  ReverseDecay();
  float* const stored =
      args_.state.row<float>(row_.slot) + head_ * key_width_ * args_.head_dim + first_column_;
  state_ = stored;
  state_stride_ = args_.head_dim;
  const float* const epsilon = args_.decay.fold_epsilon.row<const float>(head_);
  for (int64_t anchor = row_.base; anchor < end_;) {
    const bool is_block = anchor >= row_.p_begin && anchor < row_.p_end;
    const int64_t length = is_block ? kP : kWindow;
    const int64_t last = std::min(anchor + length, end_);
    const int64_t first = std::max(anchor, row_.position);
    if (anchor < row_.position) LoadWindowRows(anchor, anchor, std::min(last, row_.position));
    if (first < last) {
      FormRows(anchor, first, last);
      if (is_block) {
        ScoreBlock();
      } else {
        ScoreRows(anchor, first, last);
      }
      WriteOutputs(anchor, first, last);
      if (anchor >= row_.base_after) WriteWindowRows(anchor, first, last);
    }
    const int64_t next = anchor + length;
    if (next <= row_.base_after) {
      Fold(length, epsilon[is_block ? 1 : 0], stored, args_.head_dim);
    } else if (next < end_) {
      Fold(length, epsilon[is_block ? 1 : 0], scratch_.state, value_stride_);
    }
    anchor = next;
  }
}

void HeadTask::ReverseDecay() {
  const int64_t longest = row_.p_begin < row_.p_end ? kP : kWindow;
  for (int64_t m = 0; m <= longest; ++m) scratch_.decay_back[kP - m] = decay_[m];
}

void HeadTask::LoadWindowRows(int64_t anchor, int64_t begin, int64_t end) {
  const int64_t element = DTypeBytes(args_.window.dtype);
  const int64_t value = args_.num_heads * key_width_ + head_ * args_.head_dim + first_column_;
  while (begin < end) {
    // As far as the ring goes.
    const int64_t count =
        std::min(end - begin, args_.window.shape[1] - begin % args_.window.shape[1]);
    const char* const ring = WindowRow(begin);
    float* const k = scratch_.k + (begin - anchor) * key_stride_;
    isa_.widen_rows({.x = ring + head_ * key_width_ * element,
                     .is_bf16 = is_bf16_,
                     .x_stride = args_.window.shape[2],
                     .rows = count,
                     .columns = key_width_,
                     .y = k,
                     .y_stride = key_stride_});
    for (int64_t r = 0; r < count; ++r) {
      std::fill(k + r * key_stride_ + key_width_, k + (r + 1) * key_stride_, 0.0f);
    }
    isa_.widen_rows({.x = ring + value * element,
                     .is_bf16 = is_bf16_,
                     .x_stride = args_.window.shape[2],
                     .rows = count,
                     .columns = num_columns_,
                     .y = scratch_.v + (begin - anchor) * value_stride_,
                     .y_stride = value_stride_});
    begin += count;
  }
}

void HeadTask::FormRows(int64_t anchor, int64_t begin, int64_t end) {
  const int64_t token = row_.first_token + (begin - row_.position);
  const int64_t index = begin - anchor;
  const int64_t column = head_ * args_.head_dim;
  FormHeadArgs form = {.x = Element(args_.q, token, column),
                       .x_stride = args_.q.row_stride,
                       .is_bf16 = is_bf16_,
                       .silu = args_.qk_activation == Activation::kSilu,
                       .rows = end - begin,
                       .n = args_.head_dim,
                       .angle_stride = value_stride_,
                       .scale = args_.q_scale,
                       .y = scratch_.q + index * key_stride_,
                       .y_stride = key_stride_};
  if (args_.theta) {
    for (int64_t r = 0; r < end - begin; ++r) {
      isa_.sin_cos({.position = static_cast<double>(begin + r),
                    .frequency_f32 = args_.theta.row<const float>(head_),
                    .n = args_.head_dim,
                    .cos = scratch_.cos + r * value_stride_,
                    .sin = scratch_.sin + r * value_stride_});
    }
    form.cos = scratch_.cos;
    form.sin = scratch_.sin;
  }
  isa_.form_head(form);
  form.x = Element(args_.k, token, column);
  form.x_stride = args_.k.row_stride;
  form.round_bf16 = is_bf16_;
  form.scale = 1;
  form.y = scratch_.k + index * key_stride_;
  isa_.form_head(form);
  isa_.widen_rows({.x = Element(args_.v, token, column + first_column_),
                   .is_bf16 = is_bf16_,
                   .x_stride = args_.v.row_stride,
                   .rows = end - begin,
                   .columns = num_columns_,
                   .y = scratch_.v + index * value_stride_,
                   .y_stride = value_stride_});
}

void HeadTask::ScoreRows(int64_t anchor, int64_t first, int64_t last) {
  for (int64_t position = first; position < last; ++position) {
    const int64_t index = position - anchor;
    isa_.dot_rows({.q = scratch_.q + index * key_stride_,
                   .k = scratch_.k,
                   .k_stride = key_stride_,
                   .length = key_stride_,
                   .num_keys = static_cast<int>(index + 1),
                   .weights = scratch_.decay_back + (kP - index),
                   .scores = scratch_.scores + index * kP});
  }
}

void HeadTask::ScoreBlock() {
  isa_.transpose({.x = scratch_.k,
                  .x_stride = key_stride_,
                  .rows = kP,
                  .columns = key_width_,
                  .y = scratch_.k_columns,
                  .y_stride = kP});
  constexpr int64_t kStrip = 16;  // rows whose scores are formed up to a common column
  static_assert(kP % kStrip == 0);
  std::fill_n(scratch_.depth, kStrip, static_cast<int32_t>(key_width_));
  for (int64_t strip = 0; strip < kP; strip += kStrip) {
    isa_.tile_product({.a = scratch_.q + strip * key_stride_,
                       .a_stride = key_stride_,
                       .b = scratch_.k_columns,
                       .b_stride = kP,
                       .c = scratch_.scores + strip * kP,
                       .c_stride = kP,
                       .rows = kStrip,
                       .columns = static_cast<int>(strip + kStrip),
                       .depth = scratch_.depth});
  }
  isa_.scale_triangle(
      {.x = scratch_.scores, .stride = kP, .rows = kP, .weights = scratch_.decay_back + kP});
}

void HeadTask::WriteOutputs(int64_t anchor, int64_t first, int64_t last) {
  const int64_t index = first - anchor;
  const int rows = static_cast<int>(last - first);
  const int64_t token = row_.first_token + (first - row_.position);
  TileProductArgs product = {
      .a = scratch_.q + index * key_stride_,
      .a_stride = key_stride_,
      .b = state_,
      .b_stride = state_stride_,
      .c = args_.o.row<float>(token) + head_ * args_.head_dim + first_column_,
      .c_stride = args_.o.row_stride,
      .rows = rows,
      .columns = static_cast<int>(num_columns_),
      .depth = scratch_.depth,
      .row_scale = decay_ + index + 1};
  std::fill_n(scratch_.depth, rows, static_cast<int32_t>(key_width_));
  isa_.tile_product(product);
  for (int r = 0; r < rows; ++r) scratch_.depth[r] = static_cast<int32_t>(index + r + 1);
  product.a = scratch_.scores + index * kP;
  product.a_stride = kP;
  product.b = scratch_.v;
  product.b_stride = value_stride_;
  product.row_scale = nullptr;
  product.accumulate = true;
  isa_.tile_product(product);
}

void HeadTask::WriteWindowRows(int64_t anchor, int64_t first, int64_t last) {
  const int64_t key = head_ * key_width_;
  const int64_t value = args_.num_heads * key_width_ + head_ * args_.head_dim + first_column_;
  for (int64_t position = first; position < last; ++position) {
    const float* const k = scratch_.k + (position - anchor) * key_stride_;
    const float* const v = scratch_.v + (position - anchor) * value_stride_;
    // k and v were rounded to act when formed, so that narrowing them here is exact. One task of a
    // head writes its keys.
    const int64_t num_keys = first_column_ == 0 ? key_width_ : 0;
    if (is_bf16_) {
      BF16* const to = reinterpret_cast<BF16*>(WindowRow(position));
      std::transform(k, k + num_keys, to + key, ToBF16);
      std::transform(v, v + num_columns_, to + value, ToBF16);
    } else {
      float* const to = reinterpret_cast<float*>(WindowRow(position));
      std::copy(k, k + num_keys, to + key);
      std::copy(v, v + num_columns_, to + value);
    }
  }
}

void HeadTask::Fold(int64_t length, float epsilon, float* to, int64_t to_stride) {
  for (int64_t j = 0; j < length; ++j) scratch_.weights[j] = decay_[length - 1 - j];
  isa_.scale_rows({.x = scratch_.k,
                   .stride = key_stride_,
                   .rows = length,
                   .columns = key_stride_,
                   .scale = scratch_.weights,
                   .y = scratch_.k_decayed});
  isa_.fold_state({.k = scratch_.k_decayed,
                   .k_stride = key_stride_,
                   .v = scratch_.v,
                   .v_stride = value_stride_,
                   .num_tokens = static_cast<int>(length),
                   .epsilon = epsilon,
                   .from = state_,
                   .from_stride = state_stride_,
                   .to = to,
                   .to_stride = to_stride,
                   .num_rows = key_width_,
                   .columns = static_cast<int>(num_columns_)});
  state_ = to;
  state_stride_ = to_stride;
}

// What the engine promises of a row.
void CheckRow(const StepRow& row, int64_t window_rows) {
  if (row.num_tokens == 0) return;
  const int64_t end = row.position + row.num_tokens;
  GODWIT_CHECK(row.base % kWindow == 0 && row.base_after % kWindow == 0);
  GODWIT_CHECK(row.base <= row.position && row.base <= row.base_after && row.base_after <= end);
  GODWIT_CHECK(row.position - row.base <= window_rows && end - row.base_after <= window_rows);
  if (row.p_begin == row.p_end) return;
  GODWIT_CHECK(row.p_begin % kP == 0 && row.p_end % kP == 0);
  GODWIT_CHECK(row.position <= row.p_begin && row.p_begin < row.p_end && row.p_end <= end);
  GODWIT_CHECK(row.p_end <= row.base_after);
}

// Parts of a head's value columns that tasks take: as many as make a task for each thread, none
// narrower than 2 vectors. One part where a row that a task writes to the ring may lie over one
// that another still reads.
int64_t ColumnParts(const LightningAttentionArgs& args, int num_threads) {
  const int64_t tasks = static_cast<int64_t>(args.num_rows) * args.num_heads;
  const int64_t wanted = (num_threads + tasks - 1) / tasks;
  for (int32_t r = 0; r < args.num_rows; ++r) {
    const StepRow& row = args.rows[r];
    if (row.num_tokens == 0) continue;
    const int64_t end = row.position + row.num_tokens;
    if (row.position > row.base && end - row.base > args.window.shape[1]) return 1;
  }
  return std::clamp<int64_t>(args.head_dim / (2 * kRowPad), 1, wanted);
}

}  // namespace

OpStatus CpuLightningAttention(CpuContext& context, const LightningAttentionArgs& args) {
  if (args.num_rows == 0) return {};
  for (int32_t r = 0; r < args.num_rows; ++r) CheckRow(args.rows[r], args.window.shape[1]);
  const int64_t key_width = args.theta ? 2 * args.head_dim : args.head_dim;
  const int64_t scratch_elements = PadRow(HeadScratch::Elements(args, key_width));
  float* const scratch = static_cast<float*>(context.scratch.Get(
      scratch_elements * context.pool.num_threads() * static_cast<int64_t>(sizeof(float))));
  if (scratch == nullptr) {
    return context.Fail(OpCode::kResourceExhausted, "LightningAttention: no memory for scratch");
  }
  const int64_t parts = ColumnParts(args, context.pool.num_threads());
  const int64_t part_columns = PadRow((args.head_dim + parts - 1) / parts);
  const int64_t num_tasks = args.num_rows * args.num_heads * parts;
  std::atomic<int64_t> next_task = 0;
  auto body = [&](int thread) {
    const HeadScratch mine = HeadScratch::At(scratch + thread * scratch_elements, args, key_width);
    for (;;) {
      // From the last row down: prompts, the longest tasks, come last in a step.
      const int64_t task = num_tasks - 1 - next_task.fetch_add(1, std::memory_order_relaxed);
      if (task < 0) return;
      const int64_t first_column = task % parts * part_columns;
      const int64_t head = task / parts % args.num_heads;
      const StepRow& row = args.rows[task / parts / args.num_heads];
      const int64_t columns = std::min(part_columns, args.head_dim - first_column);
      if (columns <= 0 || row.num_tokens == 0) continue;
      HeadTask(args, context.isa, mine, row, head, first_column, columns).Run();
    }
  };
  if (num_tasks == 1) {
    body(0);
  } else {
    context.pool.Run(body);
  }
  return {};
}

}  // namespace godwit
