// Vectors of x86-64-v4 (AVX-512).

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace godwit {
namespace {

inline constexpr int kRegisters = 32;
inline constexpr int kLanes = 16;
inline constexpr int kTileVectors = 4;  // columns of a 4-row tile: 16 accumulators of 32 registers
inline constexpr int kOneRowVectors =
    8;  // columns of a 1-row tile: 8 chains of 4 cycles at 2 a cycle
typedef float VecF __attribute__((vector_size(64)));
typedef int32_t VecI __attribute__((vector_size(64)));
typedef uint16_t VecU16 __attribute__((vector_size(32)));
typedef uint64_t VecU64 __attribute__((vector_size(64)));

[[gnu::always_inline]] inline VecF Zero() { return VecF{}; }
[[gnu::always_inline]] inline VecF Set1(float x) { return x - VecF{}; }  // - 0: exact for -0 too
[[gnu::always_inline]] inline VecF Add(VecF a, VecF b) { return a + b; }
[[gnu::always_inline]] inline VecF Sub(VecF a, VecF b) { return a - b; }
[[gnu::always_inline]] inline VecF Mul(VecF a, VecF b) { return a * b; }
[[gnu::always_inline]] inline VecF Div(VecF a, VecF b) { return a / b; }
// A NaN in b stays.
[[gnu::always_inline]] inline VecF Min(VecF a, VecF b) { return a < b ? a : b; }
[[gnu::always_inline]] inline VecF Max(VecF a, VecF b) { return a > b ? a : b; }
// |x| < 2^22; ties to even.
[[gnu::always_inline]] inline VecF RoundToInt(VecF x) {
  const VecF magic = Set1(12582912.0f);  // 1.5 * 2^23
  return (x + magic) - magic;
}
// 2^n for an integer n in [-126, 127].
[[gnu::always_inline]] inline VecF PowerOfTwo(VecF n) {
  return reinterpret_cast<VecF>((__builtin_convertvector(n, VecI) + 127) << 23);
}
[[gnu::always_inline]] inline VecF Load(const float* p) {
  VecF x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
[[gnu::always_inline]] inline void Store(float* p, VecF x) { __builtin_memcpy(p, &x, sizeof(x)); }
[[gnu::always_inline]] inline VecF LoadBF16(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  // One instruction to widen; g++ 12 makes five of __builtin_convertvector.
  return reinterpret_cast<VecF>(reinterpret_cast<VecI>(_mm512_maskz_cvtepu16_epi32(0xffff, bits)) << 16);
}
// As ToBF16: to nearest, ties to even, NaN stays a quiet NaN.
[[gnu::always_inline]] inline VecU16 RoundBF16(VecF x) {
  const VecI u = reinterpret_cast<VecI>(x);
  const VecI rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const VecI quiet = (u >> 16) | 0x40;
  return __builtin_convertvector((u & 0x7fffffff) > 0x7f800000 ? quiet : rounded, VecU16);
}
[[gnu::always_inline]] inline void StoreBF16(uint16_t* p, VecF x) {
  const VecU16 bits = RoundBF16(x);
  __builtin_memcpy(p, &bits, sizeof(bits));
}
[[gnu::always_inline]] inline VecF LoadBF16Partial(const uint16_t* p, int64_t count) {
  VecU16 bits = {};
  __builtin_memcpy(&bits, p, 2 * static_cast<size_t>(count));
  return reinterpret_cast<VecF>(__builtin_convertvector(bits, VecI) << 16);
}
[[gnu::always_inline]] inline void StoreBF16Partial(uint16_t* p, VecF x, int64_t count) {
  const VecU16 bits = RoundBF16(x);
  __builtin_memcpy(p, &bits, 2 * static_cast<size_t>(count));
}

[[gnu::always_inline]] inline VecF Fma(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a, b, c); }
// A tree of halves. _mm512_reduce_add_ps is the same and draws a warning of g++ 12
// (maybe-uninitialized).
[[gnu::always_inline]] inline float ReduceAdd(VecF x) {
  const __m256 halves = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                        __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  __m128 sum = __builtin_shufflevector(halves, halves, 0, 1, 2, 3) +
               __builtin_shufflevector(halves, halves, 4, 5, 6, 7);
  sum += _mm_movehl_ps(sum, sum);
  return sum[0] + sum[1];
}
[[gnu::always_inline]] inline __mmask16 FirstLanes(int64_t count) {
  return static_cast<__mmask16>((1u << count) - 1u);
}
// The 64-bit product of the low halves of each lane.
[[gnu::always_inline]] inline VecU64 MulLow32(VecU64 a, VecU64 b) {
  // All lanes of the mask: the unmasked intrinsic draws a warning of g++ 12 (maybe-uninitialized).
  return reinterpret_cast<VecU64>(_mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
[[gnu::always_inline]] inline VecF LoadPartial(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(FirstLanes(count), p);
}
[[gnu::always_inline]] inline void StorePartial(float* p, VecF x, int64_t count) {
  _mm512_mask_storeu_ps(p, FirstLanes(count), x);
}

}  // namespace
}  // namespace godwit
