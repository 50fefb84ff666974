// The packed product with vdpbf16ps: the sum of two BF16 products into an f32 lane. A line of a
// panel is an operand as it stands; a pair of the formed row is broadcast.

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/product_args.h"

namespace godwit {
namespace {

// kRows x kPanels accumulators. Every loop over them is unrolled by name: g++ keeps an array in
// registers only if no index is a variable. Rows are addressed from every third one, so that base,
// base + stride and base + 2 stride take three general registers for nine rows and none is spilled.
template <int kRows, int kPanels>
inline void DotTile(const PackedProductArgs& args, const char* a, const char* b, float* c,
                    const char* ahead = nullptr) {
  constexpr int kBases = (kRows + 2) / 3;
  __m512 acc[kRows][kPanels];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
    for (int v = 0; v < kPanels; ++v) {
      acc[row][v] =
          args.accumulate ? _mm512_loadu_ps(c + row * args.c_stride + v * 16) : _mm512_setzero_ps();
    }
  }
  const int64_t stride = args.a_stride_bytes;
  const int64_t panel_bytes = args.b_panel_bytes;
  const char* base[kBases];
#pragma GCC unroll 16
  for (int i = 0; i < kBases; ++i) base[i] = a + 3 * i * stride;
  // Without one, the line that is being read: a request that costs a slot of a load port and no
  // more.
  const int64_t ahead_bytes = ahead == nullptr ? 0 : ahead - b;
  for (int64_t k = 0; k < args.k; k += 2) {
    _mm_prefetch(b + ahead_bytes, _MM_HINT_T1);
    __m512bh w[kPanels];
#pragma GCC unroll 16
    for (int v = 0; v < kPanels; ++v) w[v] = (__m512bh)_mm512_loadu_si512(b + v * panel_bytes);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      int32_t pair;
      __builtin_memcpy(&pair, base[row / 3] + row % 3 * stride, 4);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 16
      for (int v = 0; v < kPanels; ++v) acc[row][v] = _mm512_dpbf16_ps(acc[row][v], x, w[v]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kBases; ++i) base[i] += 4;
    b += 64;
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
    for (int v = 0; v < kPanels; ++v)
      _mm512_storeu_ps(c + row * args.c_stride + v * 16, acc[row][v]);
  }
}

// Panels side by side for a number of rows: as many as leave every accumulator, operand and
// broadcast in 32 registers.
template <int kRows>
inline constexpr int kDotPanels = kRows <= 2   ? 8
                                  : kRows <= 6 ? 4
                                               : 2;
inline constexpr int kDotRows =
    12;  // with fewer rows than a tile of 12 x 2 one pass over the weights serves all
inline constexpr int kBlockedRows = 6;  // with more, 6 x 4: 10 loads for 24 products, against 14

template <int kRows, int kPanels>
inline void DotPanels(const PackedProductArgs& args, int64_t first_panel) {
  const char* const a = static_cast<const char*>(args.a);
  int64_t panel = first_panel;
  for (; panel + kPanels <= args.num_panels; panel += kPanels) {
    DotTile<kRows, kPanels>(args, a, static_cast<const char*>(args.b) + panel * args.b_panel_bytes,
                            args.c + panel * 16);
  }
  if constexpr (kPanels > 1) DotPanels<kRows, kPanels / 2>(args, panel);
}

template <int kRows>
inline void DotRowsOf(const PackedProductArgs& args) {
  if constexpr (kRows > 1) {
    if (args.num_rows < kRows) return DotRowsOf<kRows - 1>(args);
  }
  DotPanels<kRows, kDotPanels<kRows>>(args, 0);
}

// The tiles of all rows over one group of panels, whose part of k stays in the first-level cache.
// The first four tiles each fetch one panel of the next group: spread over the arithmetic, where a
// burst of requests would hold it up.
template <int kPanels>
inline void DotBlock(const PackedProductArgs& args, int64_t panel) {
  const char* const b = static_cast<const char*>(args.b) + panel * args.b_panel_bytes;
  const char* const next = NextPanels(args, panel + kPanels);
  // Tiles of equal height, of 3 to 6 rows: 13 rows are 4, 3, 3 and 3.
  const int64_t tiles_of_six = (args.num_rows + kBlockedRows - 1) / kBlockedRows;
  const int64_t num_tiles = tiles_of_six < 4 ? 4 : tiles_of_six;
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    const int64_t begin = args.num_rows * tile / num_tiles;
    const int64_t end = args.num_rows * (tile + 1) / num_tiles;
    const char* const ahead =
        next == nullptr || tile >= kPanels ? nullptr : next + tile * args.b_panel_bytes;
    const char* const a = static_cast<const char*>(args.a) + begin * args.a_stride_bytes;
    float* const c = args.c + begin * args.c_stride + panel * 16;
    switch (end - begin) {
      case 6:
        DotTile<6, kPanels>(args, a, b, c, ahead);
        break;
      case 5:
        DotTile<5, kPanels>(args, a, b, c, ahead);
        break;
      case 4:
        DotTile<4, kPanels>(args, a, b, c, ahead);
        break;
      default:
        DotTile<3, kPanels>(args, a, b, c, ahead);
        break;
    }
  }
}

void ProductBF16(const PackedProductArgs& args) {
  if (args.num_rows <= kDotRows) return DotRowsOf<kDotRows>(args);
  int64_t panel = 0;
  for (; panel + 4 <= args.num_panels; panel += 4) DotBlock<4>(args, panel);
  for (; panel < args.num_panels; ++panel) DotBlock<1>(args, panel);
}

}  // namespace
}  // namespace godwit
