// Functions made of the vector operations of simd_<set>-inl.h; the same source for every
// instruction set.

#include <cstdint>

namespace godwit {
namespace {

// An activation is float, or BF16 stored as its bits: overloads, so that a kernel is one template
// over the storage type.
inline VecF LoadAct(const float* p) { return Load(p); }
inline VecF LoadAct(const uint16_t* p) { return LoadBF16(p); }
inline VecF LoadActPartial(const float* p, int64_t count) { return LoadPartial(p, count); }
inline VecF LoadActPartial(const uint16_t* p, int64_t count) { return LoadBF16Partial(p, count); }
inline void StoreAct(float* p, VecF x) { Store(p, x); }
inline void StoreAct(uint16_t* p, VecF x) { StoreBF16(p, x); }
inline void StoreActPartial(float* p, VecF x, int64_t count) { StorePartial(p, x, count); }
inline void StoreActPartial(uint16_t* p, VecF x, int64_t count) { StoreBF16Partial(p, x, count); }

// 2 kLanes BF16 at p as kLanes pairs: the first and the second of each.
[[gnu::always_inline]] inline void LoadPairs(const uint16_t* p, VecF& first, VecF& second) {
  VecI pairs;
  __builtin_memcpy(&pairs, p, sizeof(pairs));
  first = reinterpret_cast<VecF>(pairs << 16);
  second = reinterpret_cast<VecF>(pairs & static_cast<int32_t>(0xffff0000u));
}

// The nearest BF16, as f32.
[[gnu::always_inline]] inline VecF RoundToBF16(VecF x) {
  return reinterpret_cast<VecF>(__builtin_convertvector(RoundBF16(x), VecI) << 16);
}

// exp(x) within 2 units of the last place: x = n ln 2 + r with ln 2 in two parts, then a polynomial
// of degree 6 on |r| <= ln 2 / 2 (the coefficients of Cephes expf). Below -87.3 the result is
// 2^-126 (1e-38), above 88 it is exp(88).
inline VecF Exp(VecF x) {
  const VecF clamped = Max(Min(x, Set1(88.0f)), Set1(-87.3f));
  const VecF n = RoundToInt(Mul(clamped, Set1(1.44269504f)));
  VecF r = Fma(n, Set1(-0.693359375f), clamped);
  r = Fma(n, Set1(2.12194440e-4f), r);
  VecF p = Set1(1.9875691500e-4f);
  p = Fma(p, r, Set1(1.3981999507e-3f));
  p = Fma(p, r, Set1(8.3334519073e-3f));
  p = Fma(p, r, Set1(4.1665795894e-2f));
  p = Fma(p, r, Set1(1.6666665459e-1f));
  p = Fma(p, r, Set1(5.0000001201e-1f));
  p = Add(Fma(Mul(r, r), p, r), Set1(1.0f));
  return Mul(p, PowerOfTwo(n));
}

inline VecF Silu(VecF x) { return Div(x, Add(Set1(1.0f), Exp(Sub(Zero(), x)))); }

}  // namespace
}  // namespace godwit
