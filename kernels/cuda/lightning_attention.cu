// Lightning attention with a windowed state, for any type and shape. Three launches: form q and k
// of the step (activation, LRPE, rounding); one block per (sequence, head, kColumns columns of the
// state) walks the blocks of W or P positions; the rows that stay open go to the window last,
// because a row may take the place of one that another block still reads. Where
// lightning_prefill.cu takes the P-blocks, a walk before them hands it the state through its slot,
// and one after them goes on from there.
//
// In a walk a sub-block is kWindow rows; P-form is four of them against the same S, folded as one.
// A thread owns one column and every kGroups-th row (of q, or of d_k): sums over d_k and over j
// ascend, whatever the cuts. Shared memory: 2 d_k x 32 state tiles + 2 x 16 x d_k rows of q and k,
// f32: 98 KiB at d_k 256.

#include <algorithm>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/lightning_rows.cuh"
#include "kernels/cuda/pdl.cuh"

namespace godwit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = kWarp;               // of a state tile
constexpr int kGroups = kThreads / kColumns;  // threads that share a column
constexpr int kRowsPerThread = kWindow / kGroups;
static_assert(kWindow % kGroups == 0 && kWindow * kWindow == kThreads);

struct Shape {
  int32_t key_dim;    // d_k
  int32_t value_dim;  // d_v = head_dim
};

Shape ShapeOf(const LightningAttentionArgs& args) { return {KeyDim(args), args.head_dim}; }

// Forms q (f32) and k (rounded to act) of a row's tokens, or of those outside its P-blocks. Blocks
// with the same blockIdx.x share a row.
template <typename Act>
__global__ void __launch_bounds__(kThreads)
    FormKernel(LightningAttentionArgs args, int32_t first_row, bool skip_blocks, float* q, Act* k) {
  DependencyTrigger();
  DependencyWait();
  const StepRow& row = args.rows[first_row + blockIdx.x];
  const int64_t skipped = skip_blocks && HasBlocks(row) ? row.p_end - row.p_begin : 0;
  const int64_t width = int64_t{args.num_heads} * args.head_dim;
  for (int64_t i = blockIdx.y; i < row.num_tokens - skipped; i += gridDim.y) {
    const int64_t position = row.position + i + (row.position + i < row.p_begin ? 0 : skipped);
    const int64_t token = row.first_token + position - row.position;
    for (int64_t column = threadIdx.x; column < width; column += kThreads) {
      const int64_t head = column / args.head_dim;
      const int64_t index = (token * args.num_heads + head) * KeyDim(args) + column % args.head_dim;
      float x = Load(Row<const Act>(args.q, token) + column);
      float y = Load(Row<const Act>(args.k, token) + column);
      if (args.qk_activation == Activation::kSilu) {
        x = Silu(x);
        y = Silu(y);
      }
      if (args.theta.data == nullptr) {
        q[index] = x;
        Store(k + index, y);
        continue;
      }
      float sine, cosine;
      SineAndCosine(static_cast<const float*>(args.theta.data)[column],
                    static_cast<double>(position), &sine, &cosine);
      q[index] = x * cosine;
      q[index + args.head_dim] = x * sine;
      Store(k + index, y * cosine);
      Store(k + index + args.head_dim, y * sine);
    }
  }
}

// Shared memory of one walk.
struct Tiles {
  float* state;   // (d_k, kColumns)
  float* change;  // (d_k, kColumns)
  float* q;       // (kWindow, d_k)
  float* k;       // (kWindow, d_k)
  float* v;       // (kWindow, kColumns)
  float* scores;  // (kWindow, kWindow)
};

inline int64_t TileBytes(const Shape& shape) {
  const int64_t floats = 2 * int64_t{shape.key_dim} * kColumns +
                         2 * int64_t{kWindow} * shape.key_dim + kWindow * kColumns +
                         kWindow * kWindow;
  return floats * static_cast<int64_t>(sizeof(float));
}

template <typename Act>
struct Walk {
  const LightningAttentionArgs& args;
  const StepRow& row;
  const float* q;  // formed, [T, H, d_k]
  const Act* k;
  Shape shape;
  Tiles tiles;
  int64_t head;
  int64_t column;        // of d_v, this thread's; may be >= d_v in the last tile
  int64_t first_column;  // of the tile

  __device__ int64_t Token(int64_t position) const {
    return row.first_token + position - row.position;
  }
  __device__ const float* Decay() const { return Row<const float>(args.decay.decay, head); }

  __device__ void LoadQ(int64_t start, int64_t end) const {
    for (int i = threadIdx.x; i < kWindow * shape.key_dim; i += kThreads) {
      const int64_t position = start + i / shape.key_dim;
      const bool present = position >= row.position && position < end;
      tiles.q[i] =
          present ? q[(Token(position) * args.num_heads + head) * shape.key_dim + i % shape.key_dim]
                  : 0;
    }
  }

  // Keys and values of [start, start + kWindow), from the step or from the window; 0 from `end` on.
  __device__ void LoadKeysAndValues(int64_t start, int64_t end) const {
    const int64_t key_width = int64_t{args.num_heads} * shape.key_dim;
    const Act* window = Row<const Act>(args.window, row.slot);
    for (int i = threadIdx.x; i < kWindow * (shape.key_dim + kColumns); i += kThreads) {
      const bool is_key = i < kWindow * shape.key_dim;
      const int width = is_key ? shape.key_dim : kColumns;
      const int inner = is_key ? i : i - kWindow * shape.key_dim;
      const int64_t position = start + inner / width;
      const int64_t d = inner % width;
      float value = 0;
      if (position < end && (is_key || first_column + d < shape.value_dim)) {
        const Act* open = window + position % args.window.shape[1] * args.window.shape[2];
        const bool in_step = position >= row.position;
        if (is_key) {
          const int64_t formed = (Token(position) * args.num_heads + head) * shape.key_dim;
          value = Load(in_step ? k + formed + d : open + head * shape.key_dim + d);
        } else {
          const int64_t v_column = head * shape.value_dim + first_column + d;
          value = in_step ? Load(Row<const Act>(args.v, Token(position)) + v_column)
                          : Load(open + key_width + v_column);
        }
      }
      (is_key ? tiles.k : tiles.v)[inner] = value;
    }
  }

  // scores[i][j] = lambda^(i - j) q_i . k_j where position j <= position i, else 0; one entry a
  // thread.
  __device__ void Score(int64_t q_offset, int64_t k_offset) const {
    const int i = threadIdx.x / kWindow, j = threadIdx.x % kWindow;
    const int64_t distance = q_offset + i - (k_offset + j);
    float sum = 0;
    if (distance >= 0) {
      for (int d = 0; d < shape.key_dim; ++d) {
        sum = fmaf(tiles.q[i * shape.key_dim + d], tiles.k[j * shape.key_dim + d], sum);
      }
      sum *= Decay()[distance];
    }
    tiles.scores[threadIdx.x] = sum;
  }

  // Outputs of sub-block `sub` of the block that starts at `start`.
  __device__ void Outputs(int64_t start, int sub, int64_t end) const {
    const int local = threadIdx.x % kColumns, group = threadIdx.x / kColumns;
    const int64_t q_offset = int64_t{sub} * kWindow;
    LoadQ(start + q_offset, end);
    __syncthreads();
    float sums[kRowsPerThread];
    for (int r = 0; r < kRowsPerThread; ++r) {
      const int i = group + r * kGroups;
      float sum = 0;
      for (int d = 0; d < shape.key_dim; ++d) {
        sum = fmaf(tiles.q[i * shape.key_dim + d], tiles.state[d * kColumns + local], sum);
      }
      sums[r] = sum * Decay()[q_offset + i + 1];
    }
    for (int k_sub = 0; k_sub <= sub; ++k_sub) {
      LoadKeysAndValues(start + int64_t{k_sub} * kWindow, end);
      __syncthreads();
      Score(q_offset, int64_t{k_sub} * kWindow);
      __syncthreads();
      for (int r = 0; r < kRowsPerThread; ++r) {
        const int i = group + r * kGroups;
        for (int j = 0; j < kWindow; ++j) {
          sums[r] = fmaf(tiles.scores[i * kWindow + j], tiles.v[j * kColumns + local], sums[r]);
        }
      }
      __syncthreads();
    }
    for (int r = 0; r < kRowsPerThread; ++r) {
      const int64_t position = start + q_offset + group + r * kGroups;
      if (position < row.position || position >= end || column >= shape.value_dim) continue;
      StoreAny(args.o, Token(position), head * shape.value_dim + column, args.q_scale * sums[r]);
    }
  }

  // S <- S + (dS - epsilon S) over a whole block of `size` rows.
  __device__ void Fold(int64_t start, int size) const {
    const int local = threadIdx.x % kColumns, group = threadIdx.x / kColumns;
    for (int d = group; d < shape.key_dim; d += kGroups) tiles.change[d * kColumns + local] = 0;
    for (int first = 0; first < size; first += kWindow) {
      LoadKeysAndValues(start + first, start + size);
      __syncthreads();
      for (int d = group; d < shape.key_dim; d += kGroups) {
        float change = tiles.change[d * kColumns + local];
        for (int j = 0; j < kWindow; ++j) {
          const float key = Decay()[size - 1 - first - j] * tiles.k[j * shape.key_dim + d];
          change = fmaf(key, tiles.v[j * kColumns + local], change);
        }
        tiles.change[d * kColumns + local] = change;
      }
      __syncthreads();
    }
    const float epsilon = Row<const float>(args.decay.fold_epsilon, head)[size == kWindow ? 0 : 1];
    for (int d = group; d < shape.key_dim; d += kGroups) {
      float& state = tiles.state[d * kColumns + local];
      state += tiles.change[d * kColumns + local] - epsilon * state;
    }
    __syncthreads();
  }

  // The blocks of `part`, and where they end in the stored state: at the first P-block, or where
  // the base moves to.
  __device__ void Run(LightningPart part) const {
    const int64_t end = row.position + row.num_tokens;
    const bool stops = part == LightningPart::kBeforeBlocks && HasBlocks(row);
    const int64_t first = part == LightningPart::kAfterBlocks ? row.p_end : row.base;
    const int64_t last = stops ? row.p_begin : end;
    const int64_t stored_at = stops ? row.p_begin : row.base_after;
    if (first >= last) return;
    const int local = threadIdx.x % kColumns, group = threadIdx.x / kColumns;
    float* stored =
        Row<float>(args.state, row.slot) + head * shape.key_dim * int64_t{shape.value_dim};
    for (int d = group; d < shape.key_dim; d += kGroups) {
      tiles.state[d * kColumns + local] =
          column < shape.value_dim ? stored[int64_t{d} * shape.value_dim + column] : 0;
    }
    __syncthreads();
    for (int64_t start = first; start < last;) {
      const int size = start >= row.p_begin && start < row.p_end ? kPrefillBlock : kWindow;
      for (int sub = 0; sub * kWindow < size; ++sub) {
        const int64_t sub_start = start + int64_t{sub} * kWindow;
        if (sub_start < end && sub_start + kWindow > row.position) Outputs(start, sub, end);
      }
      if (start + size <= end) Fold(start, size);
      start += size;
      if (start != stored_at) continue;
      for (int d = group; d < shape.key_dim && column < shape.value_dim; d += kGroups) {
        stored[int64_t{d} * shape.value_dim + column] = tiles.state[d * kColumns + local];
      }
    }
  }
};

template <typename Act>
__global__ void __launch_bounds__(kThreads)
    WalkKernel(LightningAttentionArgs args, Shape shape, int32_t first_row, LightningPart part,
               const float* q, const Act* k) {
  extern __shared__ float memory[];
  DependencyTrigger();
  DependencyWait();
  const StepRow& row = args.rows[first_row + blockIdx.x];
  if (row.num_tokens == 0 || (part == LightningPart::kAfterBlocks && !HasBlocks(row))) return;
  Tiles tiles;
  tiles.state = memory;
  tiles.change = tiles.state + shape.key_dim * kColumns;
  tiles.q = tiles.change + shape.key_dim * kColumns;
  tiles.k = tiles.q + kWindow * shape.key_dim;
  tiles.v = tiles.k + kWindow * shape.key_dim;
  tiles.scores = tiles.v + kWindow * kColumns;
  const int64_t first_column = int64_t{blockIdx.z} * kColumns;
  const Walk<Act> walk = {args,
                          row,
                          q,
                          k,
                          shape,
                          tiles,
                          int64_t{blockIdx.y},
                          first_column + threadIdx.x % kColumns,
                          first_column};
  walk.Run(part);
}

// Rows that the stored base does not hold: k then v of all heads.
template <typename Act>
__global__ void __launch_bounds__(kThreads)
    WindowKernel(LightningAttentionArgs args, Shape shape, int32_t first_row, const Act* k) {
  DependencyTrigger();
  DependencyWait();
  const StepRow& row = args.rows[first_row + blockIdx.x];
  if (row.num_tokens == 0) return;
  const int64_t position = max(row.position, row.base_after) + blockIdx.y;
  if (position >= row.position + row.num_tokens) return;
  const int64_t token = row.first_token + position - row.position;
  const int64_t key_width = int64_t{args.num_heads} * shape.key_dim;
  Act* open =
      Row<Act>(args.window, row.slot) + position % args.window.shape[1] * args.window.shape[2];
  for (int64_t i = threadIdx.x; i < args.window.shape[2]; i += kThreads) {
    if (i < key_width) {
      open[i] = k[token * key_width + i];
    } else {
      open[i] = Row<const Act>(args.v, token)[i - key_width];
    }
  }
}

template <typename Act>
cudaError_t Form(const LightningAttentionArgs& args, const LightningRows& rows, bool skip_blocks,
                 const FormedLightning& formed, cudaStream_t stream) {
  // Few blocks where nearly every token is skipped; a row has at most 63 on each side.
  const int64_t blocks_of_row = std::min<int64_t>(rows.num_tokens, skip_blocks ? 128 : 8192);
  const dim3 grid(static_cast<unsigned>(rows.num_rows), static_cast<unsigned>(blocks_of_row));
  return LaunchDependent(FormKernel<Act>, grid, kThreads, 0, stream, args, rows.first_row,
                         skip_blocks, static_cast<float*>(formed.q), static_cast<Act*>(formed.k));
}

template <typename Act>
cudaError_t LaunchWalk(const LightningAttentionArgs& args, const LightningRows& rows,
                       LightningPart part, const FormedLightning& formed, cudaStream_t stream) {
  const Shape shape = ShapeOf(args);
  const auto tile_bytes = static_cast<int>(TileBytes(shape));
  cudaError_t error = cudaFuncSetAttribute(WalkKernel<Act>,
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, tile_bytes);
  if (error != cudaSuccess) return error;  // d_k beyond what a block of this device can hold
  const dim3 grid(static_cast<unsigned>(rows.num_rows), static_cast<unsigned>(args.num_heads),
                  static_cast<unsigned>(DivideUp(shape.value_dim, kColumns)));
  const auto* q = static_cast<const float*>(formed.q);
  const auto* k = static_cast<const Act*>(formed.k);
  error = LaunchDependent(WalkKernel<Act>, grid, kThreads, static_cast<size_t>(tile_bytes), stream,
                          args, shape, rows.first_row, part, q, k);
  if (error != cudaSuccess || part == LightningPart::kBeforeBlocks) return error;
  const dim3 window_grid(static_cast<unsigned>(rows.num_rows),
                         static_cast<unsigned>(args.window.shape[1]));
  return LaunchDependent(WindowKernel<Act>, window_grid, kThreads, 0, stream, args, shape,
                         rows.first_row, k);
}

}  // namespace

cudaError_t FormLightning(const LightningAttentionArgs& args, const LightningRows& rows,
                          bool skip_blocks, Context& context, FormedLightning* formed) {
  const int64_t elements = args.q.rows() * args.num_heads * KeyDim(args);
  void* memory = nullptr;
  const cudaError_t error =
      context.scratch.Reserve(elements * (4 + DTypeBytes(args.q.dtype)), &memory);
  if (error != cudaSuccess) return error;
  *formed = {memory, static_cast<float*>(memory) + elements};
  return args.q.dtype == DType::kBF16
             ? Form<Bf16>(args, rows, skip_blocks, *formed, context.stream)
             : Form<float>(args, rows, skip_blocks, *formed, context.stream);
}

cudaError_t WalkLightning(const LightningAttentionArgs& args, const LightningRows& rows,
                          LightningPart part, const FormedLightning& formed, Context& context) {
  return args.q.dtype == DType::kBF16 ? LaunchWalk<Bf16>(args, rows, part, formed, context.stream)
                                      : LaunchWalk<float>(args, rows, part, formed, context.stream);
}

cudaError_t LaunchLightningRows(const LightningAttentionArgs& args, const LightningRows& rows,
                                Context& context) {
  if (rows.num_rows == 0 || rows.num_tokens == 0) return cudaSuccess;
  FormedLightning formed;
  const cudaError_t error = FormLightning(args, rows, /*skip_blocks=*/false, context, &formed);
  return error == cudaSuccess ? WalkLightning(args, rows, LightningPart::kAll, formed, context)
                              : error;
}

int64_t LightningScratchBytes(const BackendLimits& limits) {
  return 2 * limits.max_tokens * limits.max_key_columns * static_cast<int64_t>(sizeof(float));
}

}  // namespace godwit::cuda
