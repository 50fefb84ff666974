#pragma once
// bfloat16 storage. Arithmetic is always in f32.

#include <bit>
#include <cstdint>

namespace godwit {

struct BF16 {
  uint16_t bits = 0;
};

inline float ToF32(BF16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float ToF32(float x) { return x; }

// Round to nearest, ties to even; NaN stays a (quiet) NaN.
inline BF16 ToBF16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40u)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

}  // namespace godwit
