// Row-wise ops without products: embedding, gather, rotation table, turned keys, token counts;
// zeroed memory. Bound by memory.

#include <algorithm>

#include "kernels/base/random_rows.h"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/form_rows.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/pdl.cuh"
#include "kernels/validate.h"

namespace godwit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr double kTwoPi = 6.283185307179586476925286766559;

// As many ranges as the arguments of a launch hold.
constexpr int kMaxZeroed = 200;
struct Zeroed {
  ByteRange ranges[kMaxZeroed];
};

// Columns of blocks: a range each.
__global__ void __launch_bounds__(kThreads) FillZeroKernel(const __grid_constant__ Zeroed zeroed) {
  const ByteRange& range = zeroed.ranges[blockIdx.y];
  char* data = static_cast<char*>(range.data);
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t num_threads = int64_t{gridDim.x} * kThreads;
  const int64_t num_pieces =
      reinterpret_cast<uintptr_t>(data) % sizeof(uint4) == 0 ? range.num_bytes / sizeof(uint4) : 0;
  for (int64_t i = thread; i < num_pieces; i += num_threads) {
    reinterpret_cast<uint4*>(data)[i] = uint4{};
  }
  for (int64_t i = num_pieces * sizeof(uint4) + thread; i < range.num_bytes; i += num_threads) {
    data[i] = 0;
  }
}

// One block a token, four columns a thread where rows allow it (16 bytes of f32).
__global__ void __launch_bounds__(kThreads)
    EmbedTokensKernel(const __grid_constant__ EmbedTokensArgs args, bool pieces) {
  DependencyTrigger();
  DependencyWait();
  const int64_t token = blockIdx.x;
  const int64_t d = args.table.num_columns;
  int64_t id = *Row<const int32_t>(args.token_ids, token);
  if (id < 0) id = max(*Row<const int32_t>(args.drawn, ~id), 0);
  const TensorView table = {
      args.table.data, args.table.dtype, 2, {args.table.num_rows, d, 0, 0}, d};
  float* y = Row<float>(args.y, token);
  if (pieces) {
    for (int64_t i = threadIdx.x * kPiece; i < d; i += kThreads * kPiece) {
      *reinterpret_cast<float4*>(y + i) =
          Multiply(LoadPiece(table, id, i), {args.scale, args.scale, args.scale, args.scale});
    }
  } else {
    for (int64_t i = threadIdx.x; i < d; i += kThreads) y[i] = args.scale * LoadAny(table, id, i);
  }
}

__global__ void __launch_bounds__(kThreads)
    GatherRowsKernel(const __grid_constant__ GatherRowsArgs args, bool pieces) {
  DependencyTrigger();
  DependencyWait();
  const int64_t row = blockIdx.x, d = args.x.shape[1];
  const float* from = Row<const float>(args.x, *Row<const int32_t>(args.rows, row));
  float* y = Row<float>(args.y, row);
  if (pieces) {
    for (int64_t i = threadIdx.x * kPiece; i < d; i += kThreads * kPiece) {
      *reinterpret_cast<float4*>(y + i) = *reinterpret_cast<const float4*>(from + i);
    }
  } else {
    for (int64_t i = threadIdx.x; i < d; i += kThreads) y[i] = from[i];
  }
}

__global__ void __launch_bounds__(kThreads) RopeKernel(const __grid_constant__ RopeArgs args) {
  DependencyTrigger();
  DependencyWait();
  const int64_t token = blockIdx.x;
  const double position = static_cast<double>(*Row<const int64_t>(args.positions, token));
  const double* const table =
      args.tables + int64_t{*Row<const int32_t>(args.table_ids, token)} * (args.num_freqs + 1);
  const double attention_factor = table[args.num_freqs];
  for (int64_t i = threadIdx.x; i < args.num_freqs; i += kThreads) {
    const double angle = fmod(position * table[i], kTwoPi);
    double sine, cosine;
    sincos(angle, &sine, &cosine);
    Row<float>(args.cos, token)[i] = static_cast<float>(cosine * attention_factor);
    Row<float>(args.sin, token)[i] = static_cast<float>(sine * attention_factor);
  }
}

// One block a turn and kv head. Angles once, then a pair of a key a thread.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    TurnKeysKernel(const __grid_constant__ TurnKeysArgs args) {
  __shared__ float cosines[kMaxHeadDim / 2], sines[kMaxHeadDim / 2];
  const BlockTurn turn = args.turns[blockIdx.x];
  const double* const table = args.tables + int64_t{turn.table_id} * (args.num_freqs + 1);
  for (int i = threadIdx.x; i < args.num_freqs; i += kThreads) {
    double sine, cosine;
    sincos(fmod(static_cast<double>(turn.delta) * table[i], kTwoPi), &sine, &cosine);
    cosines[i] = static_cast<float>(cosine);
    sines[i] = static_cast<float>(sine);
  }
  __syncthreads();
  const int width = kPagedBlock * args.head_dim;
  const int64_t key = int64_t{blockIdx.y} * width, value = key + int64_t{args.num_kv_heads} * width;
  T* const blocks = static_cast<T*>(args.blocks.data);
  const T* const from = blocks + turn.from_block * args.blocks.row_stride;
  T* const to = blocks + turn.to_block * args.blocks.row_stride;
  const bool half_split = args.pair_layout == PairLayout::kHalfSplit;
  const int step = half_split ? 1 : 2, other = half_split ? args.num_freqs : 1;
  for (int i = threadIdx.x; i < width; i += kThreads) {
    to[value + i] = from[value + i];
    if (i % args.head_dim >= 2 * args.num_freqs) to[key + i] = from[key + i];
  }
  for (int i = threadIdx.x; i < kPagedBlock * args.num_freqs; i += kThreads) {
    const int pair = i % args.num_freqs;
    const int64_t first = key + i / args.num_freqs * args.head_dim + step * pair;
    const float a = Load(from + first), b = Load(from + first + other);
    Store(to + first, a * cosines[pair] - b * sines[pair]);
    Store(to + first + other, b * cosines[pair] + a * sines[pair]);
  }
}

__global__ void __launch_bounds__(kThreads) CountTokensKernel(CountTokensArgs args) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= args.token_ids.shape[0]) return;
  uint32_t* count = Row<uint32_t>(args.counts, args.slot) + *Row<const int32_t>(args.token_ids, i);
  if (args.is_prompt != 0) {
    atomicOr(count, kPromptBit);
  } else {
    atomicAdd(count, 1u);
  }
}

__global__ void __launch_bounds__(kThreads)
    FillRandomKernel(MatrixView matrix, uint64_t seed, float scale) {
  const int64_t size = matrix.num_rows * matrix.num_columns;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < size;
       i += int64_t{gridDim.x} * kThreads) {
    const float value = RandomEntry(seed, static_cast<uint64_t>(i), scale);
    if (matrix.dtype == DType::kF32) {
      static_cast<float*>(matrix.data)[i] = value;
    } else {
      Store(static_cast<Bf16*>(matrix.data) + i, value);
    }
  }
}

}  // namespace

cudaError_t LaunchFillRandom(const MatrixView& matrix, uint64_t seed, float scale,
                             cudaStream_t stream) {
  constexpr int64_t kMaxBlocks = 4096;
  const int64_t blocks = DivideUp(matrix.num_rows * matrix.num_columns, kThreads);
  FillRandomKernel<<<static_cast<unsigned>(min(blocks, kMaxBlocks)), kThreads, 0, stream>>>(
      matrix, seed, scale);
  return cudaGetLastError();
}

cudaError_t LaunchFillZero(const ByteRange* ranges, int64_t num_ranges, cudaStream_t stream) {
  constexpr int64_t kBytesOfBlock = 16 * kThreads * sizeof(uint4), kMaxBlocks = 64;
  for (int64_t first = 0; first < num_ranges; first += kMaxZeroed) {
    const int64_t count = std::min<int64_t>(num_ranges - first, kMaxZeroed);
    Zeroed zeroed;
    std::copy_n(ranges + first, count, zeroed.ranges);
    int64_t most = 1;
    for (int64_t i = 0; i < count; ++i) most = std::max(most, zeroed.ranges[i].num_bytes);
    const dim3 grid(static_cast<unsigned>(std::min(DivideUp(most, kBytesOfBlock), kMaxBlocks)),
                    static_cast<unsigned>(count));
    FillZeroKernel<<<grid, kThreads, 0, stream>>>(zeroed);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t LaunchEmbedTokens(const EmbedTokensArgs& args, cudaStream_t stream) {
  const int64_t num_tokens = args.token_ids.rows();
  if (num_tokens == 0) return cudaSuccess;
  const bool pieces = args.table.num_columns % kPiece == 0 && Aligned(args.y);
  return LaunchDependent(EmbedTokensKernel, dim3(static_cast<unsigned>(num_tokens)), dim3(kThreads),
                         0, stream, args, pieces);
}

cudaError_t LaunchGatherRows(const GatherRowsArgs& args, cudaStream_t stream) {
  if (args.rows.rows() == 0) return cudaSuccess;
  const bool pieces = args.x.shape[1] % kPiece == 0 && Aligned(args.x) && Aligned(args.y);
  return LaunchDependent(GatherRowsKernel, dim3(static_cast<unsigned>(args.rows.rows())),
                         dim3(kThreads), 0, stream, args, pieces);
}

cudaError_t LaunchRope(const RopeArgs& args, cudaStream_t stream) {
  if (args.positions.rows() == 0 || args.num_freqs == 0) return cudaSuccess;
  return LaunchDependent(RopeKernel, dim3(static_cast<unsigned>(args.positions.rows())),
                         dim3(kThreads), 0, stream, args);
}

// Launched as usual: it writes what an earlier kernel of the queue reads.
cudaError_t LaunchTurnKeys(const TurnKeysArgs& args, cudaStream_t stream) {
  if (args.num_turns == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(args.num_turns), static_cast<unsigned>(args.num_kv_heads));
  if (args.blocks.dtype == DType::kF32) {
    TurnKeysKernel<float><<<grid, kThreads, 0, stream>>>(args);
  } else {
    TurnKeysKernel<Bf16><<<grid, kThreads, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

cudaError_t LaunchCountTokens(const CountTokensArgs& args, cudaStream_t stream) {
  if (args.token_ids.rows() == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(DivideUp(args.token_ids.rows(), kThreads));
  CountTokensKernel<<<blocks, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace godwit::cuda
