// Lightning attention with a windowed state. Three launches: form q and k of the step (activation,
// LRPE, rounding); one block per (sequence, head, kColumns columns of the state) walks the blocks
// of W or P positions; the rows that stay open go to the window last, because a row may take the
// place of one that another block still reads.
//
// In a walk a sub-block is kWindow rows; P-form is four of them against the same S, folded as one.
// A thread owns one column and every kGroups-th row (of q, or of d_k): sums over d_k and over j
// ascend, whatever the cuts. Shared memory: 2 d_k x 32 state tiles + 2 x 16 x d_k rows of q and k,
// f32: 98 KiB at d_k 256.

#include <algorithm>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/launch.h"

namespace godwit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = kWarp;               // of a state tile
constexpr int kGroups = kThreads / kColumns;  // threads that share a column
constexpr int kRowsPerThread = kWindow / kGroups;
static_assert(kWindow % kGroups == 0 && kWindow * kWindow == kThreads);
constexpr double kTwoPi = 6.283185307179586476925286766559;

struct Shape {
  int32_t key_dim;    // d_k
  int32_t value_dim;  // d_v = head_dim
};

// q (f32) and k (rounded to act, kept as f32): [T, H, d_k] each.
template <typename Act>
__global__ void __launch_bounds__(kThreads)
    FormKernel(LightningAttentionArgs args, Shape shape, int64_t first_token, float* q, float* k) {
  const int64_t token = first_token + blockIdx.x;
  const StepRow& row = RowOfToken(args.rows, args.num_rows, token);
  const auto position = static_cast<double>(row.position + token - row.first_token);
  const int64_t width = int64_t{args.num_heads} * args.head_dim;
  const bool has_theta = args.theta.data != nullptr;
  for (int64_t column = threadIdx.x; column < width; column += kThreads) {
    float x[2] = {Load(Row<const Act>(args.q, token) + column),
                  Load(Row<const Act>(args.k, token) + column)};
    float sine = 0, cosine = 1;
    if (has_theta) {
      double exact_sine, exact_cosine;
      const double theta = static_cast<const float*>(args.theta.data)[column];
      sincos(fmod(theta * position, kTwoPi), &exact_sine, &exact_cosine);
      sine = static_cast<float>(exact_sine);
      cosine = static_cast<float>(exact_cosine);
    }
    const int64_t head = column / args.head_dim;
    const int64_t index = (token * args.num_heads + head) * shape.key_dim + column % args.head_dim;
    for (int part = 0; part < 2; ++part) {
      float value = x[part];
      if (args.qk_activation == Activation::kSilu) value = Silu(value);
      float* to = part == 0 ? q : k;
      const float first = has_theta ? value * cosine : value;
      to[index] = part == 0 ? first : Round<Act>(first);
      if (!has_theta) continue;
      const float second = value * sine;
      to[index + args.head_dim] = part == 0 ? second : Round<Act>(second);
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
  const float* k;
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
          value = in_step ? k[(Token(position) * args.num_heads + head) * shape.key_dim + d]
                          : Load(open + head * shape.key_dim + d);
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

  __device__ void Run() const {
    const int local = threadIdx.x % kColumns, group = threadIdx.x / kColumns;
    float* stored =
        Row<float>(args.state, row.slot) + head * shape.key_dim * int64_t{shape.value_dim};
    for (int d = group; d < shape.key_dim; d += kGroups) {
      tiles.state[d * kColumns + local] =
          column < shape.value_dim ? stored[int64_t{d} * shape.value_dim + column] : 0;
    }
    __syncthreads();
    const int64_t end = row.position + row.num_tokens;
    for (int64_t start = row.base; start < end;) {
      const int size = start >= row.p_begin && start < row.p_end ? kPrefillBlock : kWindow;
      for (int sub = 0; sub * kWindow < size; ++sub) {
        const int64_t first = start + int64_t{sub} * kWindow;
        if (first < end && first + kWindow > row.position) Outputs(start, sub, end);
      }
      if (start + size <= end) Fold(start, size);
      start += size;
      if (start != row.base_after || row.base_after == row.base) continue;
      for (int d = group; d < shape.key_dim && column < shape.value_dim; d += kGroups) {
        stored[int64_t{d} * shape.value_dim + column] = tiles.state[d * kColumns + local];
      }
    }
  }
};

template <typename Act>
__global__ void __launch_bounds__(kThreads)
    WalkKernel(LightningAttentionArgs args, Shape shape, int32_t first_row, const float* q,
               const float* k) {
  extern __shared__ float memory[];
  const StepRow& row = args.rows[first_row + blockIdx.x];
  if (row.num_tokens == 0) return;
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
  walk.Run();
}

// Rows that the stored base does not hold: k then v of all heads.
template <typename Act>
__global__ void __launch_bounds__(kThreads)
    WindowKernel(LightningAttentionArgs args, Shape shape, int32_t first_row, const float* k) {
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
      Store(open + i, k[token * key_width + i]);
    } else {
      open[i] = Row<const Act>(args.v, token)[i - key_width];
    }
  }
}

template <typename Act>
cudaError_t Launch(const LightningAttentionArgs& args, const LightningRows& rows, Scratch& scratch,
                   cudaStream_t stream) {
  const Shape shape = {args.theta ? 2 * args.head_dim : args.head_dim, args.head_dim};
  const int64_t formed = args.q.rows() * args.num_heads * shape.key_dim;
  void* memory = nullptr;
  cudaError_t error = scratch.Reserve(2 * formed * static_cast<int64_t>(sizeof(float)), &memory);
  if (error != cudaSuccess) return error;
  float* q = static_cast<float*>(memory);
  float* k = q + formed;
  FormKernel<Act><<<static_cast<unsigned>(rows.num_tokens), kThreads, 0, stream>>>(
      args, shape, rows.first_token, q, k);
  const auto tile_bytes = static_cast<int>(TileBytes(shape));
  error = cudaFuncSetAttribute(WalkKernel<Act>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               tile_bytes);
  if (error != cudaSuccess) return error;  // d_k beyond what a block of this device can hold
  const dim3 grid(static_cast<unsigned>(rows.num_rows), static_cast<unsigned>(args.num_heads),
                  static_cast<unsigned>(DivideUp(shape.value_dim, kColumns)));
  WalkKernel<Act><<<grid, kThreads, tile_bytes, stream>>>(args, shape, rows.first_row, q, k);
  const dim3 window_grid(static_cast<unsigned>(rows.num_rows),
                         static_cast<unsigned>(args.window.shape[1]));
  WindowKernel<Act><<<window_grid, kThreads, 0, stream>>>(args, shape, rows.first_row, k);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchLightningRows(const LightningAttentionArgs& args, const LightningRows& rows,
                                Context& context) {
  if (rows.num_rows == 0 || rows.num_tokens == 0) return cudaSuccess;
  return args.q.dtype == DType::kBF16 ? Launch<Bf16>(args, rows, context.scratch, context.stream)
                                      : Launch<float>(args, rows, context.scratch, context.stream);
}

cudaError_t LaunchLightningPrefill(const LightningAttentionArgs& args, Context& context) {
  const LightningRows rows = {args.num_decode_rows, args.num_rows - args.num_decode_rows,
                              args.num_decode_tokens, args.q.rows() - args.num_decode_tokens};
  return LaunchLightningRows(args, rows, context);
}

int64_t LightningScratchBytes(const BackendLimits& limits) {
  return 2 * limits.max_tokens * limits.max_key_columns * static_cast<int64_t>(sizeof(float));
}

}  // namespace godwit::cuda
