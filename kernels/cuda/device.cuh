#pragma once
// Shared by the kernels: elements of either activation type, and reductions whose order is fixed.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/ops.h"

namespace godwit::cuda {

inline constexpr int kWarp = 32;

using Bf16 = __nv_bfloat16;

__device__ inline float Load(const float* x) { return *x; }
__device__ inline float Load(const Bf16* x) { return __bfloat162float(*x); }
__device__ inline void Store(float* y, float x) { *y = x; }
__device__ inline void Store(Bf16* y, float x) { *y = __float2bfloat16_rn(x); }
template <typename Act>
__device__ inline float Round(float x) {
  Act rounded;
  Store(&rounded, x);
  return Load(&rounded);
}

// x / (1 + exp(-x)) in 5 instructions: good to 6 roundings of itself for x > -1, and elsewhere to
// 2^-21 of a value below 0.28; -0 where exp(-x) overflows.
__device__ inline float Silu(float x) {
  float power, quotient;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.44269504f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(quotient) : "f"(1.0f + power));
  return x * quotient;
}

// sin and cos of theta * position; the product in double, reduced there to a turn.
__device__ inline void SineAndCosine(float theta, double position, float* sine, float* cosine) {
  constexpr double kTurnsPerRadian = 0.15915494309189533576888376337251;
  constexpr float kPi = 3.14159265358979f;
  const double turns = theta * position * kTurnsPerRadian;
  const double half_turns = 2 * (turns - rint(turns));
  const auto main = static_cast<float>(half_turns);
  const float rest = kPi * static_cast<float>(half_turns - main);
  float s, c;
  sincospif(main, &s, &c);
  *sine = fmaf(rest, c, s);
  *cosine = fmaf(-rest, s, c);
}

// Row `index` of a tensor (TensorView's own member is host code).
template <typename T>
__device__ inline T* Row(const TensorView& x, int64_t index) {
  return static_cast<T*>(x.data) + index * x.row_stride;
}

// An element of a tensor that is f32 or bf16.
__device__ inline float LoadAny(const TensorView& x, int64_t row, int64_t column) {
  return x.dtype == DType::kF32 ? *(Row<const float>(x, row) + column)
                                : Load(Row<const Bf16>(x, row) + column);
}
__device__ inline void StoreAny(const TensorView& y, int64_t row, int64_t column, float value) {
  if (y.dtype == DType::kF32) {
    *(Row<float>(y, row) + column) = value;
  } else {
    Store(Row<Bf16>(y, row) + column, value);
  }
}

// Sum over the warp, the same bits in every lane.
template <typename T>
__device__ inline T WarpSum(T x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
__device__ inline float WarpMax(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  }
  return x;
}

// Reductions over a block of kThreads; `shared` holds kThreads / 32 values. Every thread gets the
// result.
template <int kThreads, typename T>
__device__ inline T BlockSum(T x, T* shared) {
  x = WarpSum(x);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  T sum = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) sum += shared[warp];
  __syncthreads();
  return sum;
}
template <int kThreads>
__device__ inline float BlockMax(float x, float* shared) {
  x = WarpMax(x);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  float max = shared[0];
  for (int warp = 1; warp < kThreads / kWarp; ++warp) max = fmaxf(max, shared[warp]);
  __syncthreads();
  return max;
}

// The sequence that a token of the step belongs to.
__device__ inline const StepRow& RowOfToken(const StepRow* rows, int32_t num_rows, int64_t token) {
  int32_t row = 0;
  while (row + 1 < num_rows && token >= rows[row].first_token + int64_t{rows[row].num_tokens})
    ++row;
  return rows[row];
}

constexpr int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows may be read and written in pieces of 16 bytes.
inline bool Aligned(const TensorView& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 &&
         (x.rows() <= 1 || x.row_stride * DTypeBytes(x.dtype) % 16 == 0);
}

}  // namespace godwit::cuda
