// Vectors of x86-64-v3 (AVX2, FMA).

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace godwit {
namespace {

inline constexpr int kRegisters = 16;
inline constexpr int kLanes = 8;
inline constexpr int kTileVectors = 2;    // columns of a 4-row tile: 8 accumulators of 16 registers
inline constexpr int kOneRowVectors = 8;  // columns of a 1-row tile
typedef float VecF __attribute__((vector_size(32)));
typedef int32_t VecI __attribute__((vector_size(32)));
typedef uint16_t VecU16 __attribute__((vector_size(16)));
typedef uint64_t VecU64 __attribute__((vector_size(32)));

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
  return reinterpret_cast<VecF>(_mm256_slli_epi32(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
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

[[gnu::always_inline]] inline VecF Fma(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a, b, c); }
[[gnu::always_inline]] inline float ReduceAdd(VecF x) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
[[gnu::always_inline]] inline __m256i FirstLanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
// The 64-bit product of the low halves of each lane.
[[gnu::always_inline]] inline VecU64 MulLow32(VecU64 a, VecU64 b) {
  return reinterpret_cast<VecU64>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
[[gnu::always_inline]] inline VecF LoadPartial(const float* p, int64_t count) {
  return _mm256_maskload_ps(p, FirstLanes(count));
}
[[gnu::always_inline]] inline void StorePartial(float* p, VecF x, int64_t count) {
  _mm256_maskstore_ps(p, FirstLanes(count), x);
}

}  // namespace
}  // namespace godwit
