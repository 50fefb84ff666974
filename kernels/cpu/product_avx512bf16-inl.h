// The packed product with vdpbf16ps: the sum of two BF16 products into an f32 lane. A row of the
// panel is two operands as it stands; a pair of the formed row is broadcast.

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/product_args.h"

namespace godwit {
namespace {

inline constexpr int64_t kPairBytes = 128;  // of a panel: one pair of k for 32 features

// kRows x kPanels panels: 2 kRows kPanels accumulators. Rows are addressed from every third one, so
// that base, base + stride and base + 2 stride take three general registers for nine rows and none
// is spilled.
template <int kRows, int kPanels>
inline void DotTile(const PackedProductArgs& args, const char* a, const char* b, float* c) {
  constexpr int kVectors = 2 * kPanels;
  constexpr int kBases = (kRows + 2) / 3;
  __m512 acc[kRows][kVectors];
  for (int row = 0; row < kRows; ++row) {
    for (int v = 0; v < kVectors; ++v) {
      acc[row][v] =
          args.accumulate ? _mm512_loadu_ps(c + row * args.c_stride + v * 16) : _mm512_setzero_ps();
    }
  }
  const int64_t stride = args.a_stride_bytes;
  const int64_t panel_bytes = args.b_panel_bytes;
  const int64_t prefetch = args.prefetch_bytes;
  const char* base[kBases];
  for (int i = 0; i < kBases; ++i) base[i] = a + 3 * i * stride;
  for (int64_t k = 0; k < args.k; k += 2) {
    __m512bh w[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const char* const from = b + v / 2 * panel_bytes + v % 2 * 64;
      w[v] = (__m512bh)_mm512_loadu_si512(from);
      _mm_prefetch(from + prefetch, _MM_HINT_T0);
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      int32_t pair;
      __builtin_memcpy(&pair, base[row / 3] + row % 3 * stride, 4);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[row][v] = _mm512_dpbf16_ps(acc[row][v], x, w[v]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kBases; ++i) base[i] += 4;
    b += kPairBytes;
  }
  for (int row = 0; row < kRows; ++row) {
    for (int v = 0; v < kVectors; ++v)
      _mm512_storeu_ps(c + row * args.c_stride + v * 16, acc[row][v]);
  }
}

inline constexpr int kTallRows = 12;  // x 1 panel: 24 accumulators
inline constexpr int kPairRows = 6;   // x 2 panels: 24 accumulators

template <int kRows, int kPanels>
inline void DotRowsOf(int64_t rows, const PackedProductArgs& args, const char* a, const char* b,
                      float* c) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return DotRowsOf<kRows - 1, kPanels>(rows, args, a, b, c);
  }
  DotTile<kRows, kPanels>(args, a, b, c);
}

void ProductBF16(const PackedProductArgs& args) {
  const char* const a = static_cast<const char*>(args.a);
  const char* b = static_cast<const char*>(args.b);
  int64_t panel = 0;
  if (args.num_rows <= kPairRows) {
    for (; panel + 2 <= args.num_panels; panel += 2, b += 2 * args.b_panel_bytes) {
      DotRowsOf<kPairRows, 2>(args.num_rows, args, a, b, args.c + panel * 32);
    }
  }
  // Tiles of equal height: 13 rows are 7 and 6, not 12 and 1.
  const int64_t num_tiles = (args.num_rows + kTallRows - 1) / kTallRows;
  for (; panel < args.num_panels; ++panel, b += args.b_panel_bytes) {
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t begin = args.num_rows * tile / num_tiles;
      const int64_t end = args.num_rows * (tile + 1) / num_tiles;
      DotRowsOf<kTallRows, 1>(end - begin, args, a + begin * args.a_stride_bytes, b,
                              args.c + begin * args.c_stride + panel * 32);
    }
  }
}

}  // namespace
}  // namespace godwit
