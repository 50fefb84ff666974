#pragma once
// The input of a product in bf16: round( gate * norm(x) ). One order of summation for every caller,
// so that a row has the same bits whether it is formed in front of a product or inside it.
//
// A block of kFormThreads forms up to kBatch rows at once. Thread i owns the pieces i, i +
// kFormThreads, ... of four columns; squares are summed per thread in ascending order, then over
// the block in a fixed tree. Up to kCachedPieces pieces stay in registers between the two passes (k
// <= 4,096); the others are read again. All first loads are independent of each other: a block is
// one latency of memory, one reduction and one store long.

#include "kernels/cuda/device.cuh"
#include "kernels/ops.h"

namespace godwit::cuda {

inline constexpr int kFormThreads = 256;
inline constexpr int kPiece = 4;  // columns
inline constexpr int kCachedPieces = 4;
static_assert(kCachedPieces * kFormThreads * kPiece == 4096);

// Four elements of an f32 or bf16 row, 16 or 8 bytes aligned.
__device__ inline float4 LoadPiece(const TensorView& x, int64_t row, int64_t column) {
  if (x.dtype == DType::kF32)
    return *reinterpret_cast<const float4*>(Row<const float>(x, row) + column);
  const uint2 bits = *reinterpret_cast<const uint2*>(Row<const Bf16>(x, row) + column);
  const float2 low = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&bits.x));
  const float2 high = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&bits.y));
  return {low.x, low.y, high.x, high.y};
}
__device__ inline float SumSquares(float sum, const float4& x) {
  return fmaf(x.w, x.w, fmaf(x.z, x.z, fmaf(x.y, x.y, fmaf(x.x, x.x, sum))));
}
__device__ inline float4 Multiply(const float4& a, const float4& b) {
  return {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w};
}
__device__ inline uint2 PackPiece(const float4& x) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(x.x, x.y),
                       high = __floats2bfloat162_rn(x.z, x.w);
  return {*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high)};
}

// What multiplies x besides the norm's scale: (offset + weight), or 1.
__device__ inline float4 NormWeight(const NormSpec& norm, int64_t column) {
  if (norm.weight.data == nullptr) return {1, 1, 1, 1};
  float4 weight =
      *reinterpret_cast<const float4*>(static_cast<const float*>(norm.weight.data) + column);
  weight.x += norm.weight_offset;
  weight.y += norm.weight_offset;
  weight.z += norm.weight_offset;
  weight.w += norm.weight_offset;
  return weight;
}

// Of the forming threads alone: other warps of the block may be at something else. Barrier 1 of the
// block.
__device__ __forceinline__ void FormBarrier() {
  asm volatile("bar.sync 1, %0;" ::"n"(kFormThreads) : "memory");
}

// Rows [first, first + num_rows) of the input, num_rows <= kBatch; write(row - first, column, four
// bf16). All kFormThreads threads of the block call it. `shared` holds kBatch * kFormThreads /
// kWarp floats.
template <int kBatch, typename Write>
__device__ inline void FormRows(const RowInput& input, int64_t first, int num_rows, int64_t k,
                                float* shared, const Write& write) {
  constexpr int kWarps = kFormThreads / kWarp;
  const bool norm = input.norm.kind == NormKind::kRms, gate = input.gate.data != nullptr;
  float4 x[kBatch][kCachedPieces], factor[kBatch][kCachedPieces];
  float squares[kBatch] = {};
#pragma unroll
  for (int row = 0; row < kBatch; ++row) {
#pragma unroll
    for (int piece = 0; piece < kCachedPieces; ++piece) {
      const int64_t column = (threadIdx.x + int64_t{piece} * kFormThreads) * kPiece;
      x[row][piece] = factor[row][piece] = {0, 0, 0, 0};
      if (column >= k || row >= num_rows) continue;
      x[row][piece] = LoadPiece(input.x, first + row, column);
      if (gate && kBatch == 1) factor[row][piece] = LoadPiece(input.gate, first + row, column);
    }
  }
  float scale[kBatch];
#pragma unroll
  for (int row = 0; row < kBatch; ++row) scale[row] = 1;
  if (norm) {
#pragma unroll
    for (int row = 0; row < kBatch; ++row) {
#pragma unroll
      for (int piece = 0; piece < kCachedPieces; ++piece)
        squares[row] = SumSquares(squares[row], x[row][piece]);
      if (row < num_rows) {
        for (int64_t column = (threadIdx.x + int64_t{kCachedPieces} * kFormThreads) * kPiece;
             column < k; column += kFormThreads * kPiece) {
          squares[row] = SumSquares(squares[row], LoadPiece(input.x, first + row, column));
        }
      }
      squares[row] = WarpSum(squares[row]);
      if (threadIdx.x % kWarp == 0) shared[row * kWarps + threadIdx.x / kWarp] = squares[row];
    }
    FormBarrier();
#pragma unroll
    for (int row = 0; row < kBatch; ++row) {
      float sum = 0;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) sum += shared[row * kWarps + warp];
      scale[row] = 1.0f / sqrtf(sum / static_cast<float>(k) + input.norm.epsilon);
    }
    FormBarrier();  // shared is free again
  }
  auto form = [&](int row, int64_t column, float4 value, const float4& gate_value) {
    value = Multiply(value, {scale[row], scale[row], scale[row], scale[row]});
    if (norm && input.norm.weight.data != nullptr)
      value = Multiply(value, NormWeight(input.norm, column));
    if (gate) value = Multiply(value, gate_value);
    write(row, column, PackPiece(value));
  };
#pragma unroll
  for (int row = 0; row < kBatch; ++row) {
    if (row >= num_rows) break;
#pragma unroll
    for (int piece = 0; piece < kCachedPieces; ++piece) {
      const int64_t column = (threadIdx.x + int64_t{piece} * kFormThreads) * kPiece;
      if (column >= k) continue;
      if (gate && kBatch > 1) factor[row][piece] = LoadPiece(input.gate, first + row, column);
      form(row, column, x[row][piece], factor[row][piece]);
    }
    for (int64_t column = (threadIdx.x + int64_t{kCachedPieces} * kFormThreads) * kPiece;
         column < k; column += kFormThreads * kPiece) {
      const float4 gate_value = gate ? LoadPiece(input.gate, first + row, column) : float4{};
      form(row, column, LoadPiece(input.x, first + row, column), gate_value);
    }
  }
}

}  // namespace godwit::cuda
