// The packed product with AMX: a tile instruction adds 16 rows x 32 k times 32 k x 16 features. 16
// lines of a panel are a tile of B as they stand, 16 formed rows a tile of A. Within an instruction
// the even and the odd k are summed apart and then together into C (SDM, TDPBF16PS), another order
// than vdpbf16ps: so rows of every number go through this one.

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/product_args.h"

namespace godwit {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline constexpr int64_t kLine = 64;
inline constexpr int64_t kTileBytes = 16 * kLine;  // of B: 32 k

// The next tile of B. A tile load waits for its 16 lines alone: asked for one step ahead, the lines
// of all panels come side by side (22 GB/s against 14 with two threads).
inline void PrefetchTile(const char* b, int64_t stride) {
#pragma GCC unroll 16
  for (int line = 0; line < 16; ++line) _mm_prefetch(b + line * stride, _MM_HINT_T0);
}

inline void PrefetchLater(const char* b) {
#pragma GCC unroll 16
  for (int line = 0; line < 16; ++line) _mm_prefetch(b + line * kLine, _MM_HINT_T1);
}

// 32 rows x 2 panels: C in tiles 0..3, A in 4 and 5, B in 6 and 7. kFromMemory: B is not in the
// first-level cache yet. `ahead`: a panel to fetch into the second-level cache meanwhile, or null.
template <bool kFromMemory>
inline void TileProduct32(const PackedProductArgs& args, const char* a, const char* b, float* c,
                          const char* ahead) {
  const int64_t a_stride = args.a_stride_bytes;
  const int64_t c_stride = args.c_stride * 4;
  char* const c_bytes = reinterpret_cast<char*>(c);
  const char* const a_low = a + 16 * a_stride;
  const char* const b_right = b + args.b_panel_bytes;
  if (args.accumulate) {
    _tile_loadd(0, c_bytes, c_stride);
    _tile_loadd(1, c_bytes + 64, c_stride);
    _tile_loadd(2, c_bytes + 16 * c_stride, c_stride);
    _tile_loadd(3, c_bytes + 16 * c_stride + 64, c_stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < args.k / 32; ++k) {
    if constexpr (kFromMemory) {
      PrefetchTile(b + (k + 1) * kTileBytes, kLine);
      PrefetchTile(b_right + (k + 1) * kTileBytes, kLine);
    }
    if (ahead != nullptr) PrefetchLater(ahead + k * kTileBytes);
    PrefetchTile(a + (k + 1) * kLine, a_stride);
    PrefetchTile(a_low + (k + 1) * kLine, a_stride);
    _tile_loadd(6, b + k * kTileBytes, kLine);
    _tile_loadd(4, a + k * kLine, a_stride);
    _tile_loadd(7, b_right + k * kTileBytes, kLine);
    _tile_loadd(5, a_low + k * kLine, a_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c_bytes, c_stride);
  _tile_stored(1, c_bytes + 64, c_stride);
  _tile_stored(2, c_bytes + 16 * c_stride, c_stride);
  _tile_stored(3, c_bytes + 16 * c_stride + 64, c_stride);
}

// 16 rows x 1 panel, of what is left over: C in tile 0.
inline void TileProduct16(const PackedProductArgs& args, const char* a, const char* b, float* c) {
  const int64_t c_stride = args.c_stride * 4;
  if (args.accumulate) {
    _tile_loadd(0, c, c_stride);
  } else {
    _tile_zero(0);
  }
  for (int64_t k = 0; k < args.k / 32; ++k) {
    _tile_loadd(4, a + k * kLine, args.a_stride_bytes);
    _tile_loadd(6, b + k * kTileBytes, kLine);
    _tile_dpbf16ps(0, 4, 6);
  }
  _tile_stored(0, c, c_stride);
}

// 16 rows x 4 panels, the shape that streams weights: C in tiles 0..3, A in 4, B in 5.
inline void TileStream16(const PackedProductArgs& args, const char* a, const char* b, float* c) {
  const int64_t panel_bytes = args.b_panel_bytes;
  const int64_t c_stride = args.c_stride * 4;
  if (args.accumulate) {
    _tile_loadd(0, c, c_stride);
    _tile_loadd(1, c + 16, c_stride);
    _tile_loadd(2, c + 32, c_stride);
    _tile_loadd(3, c + 48, c_stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < args.k / 32; ++k) {
#pragma GCC unroll 4
    for (int panel = 0; panel < 4; ++panel)
      PrefetchTile(b + panel * panel_bytes + kTileBytes, kLine);
    _tile_loadd(4, a + k * kLine, args.a_stride_bytes);
    _tile_loadd(5, b, kLine);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(5, b + panel_bytes, kLine);
    _tile_dpbf16ps(1, 4, 5);
    _tile_loadd(5, b + 2 * panel_bytes, kLine);
    _tile_dpbf16ps(2, 4, 5);
    _tile_loadd(5, b + 3 * panel_bytes, kLine);
    _tile_dpbf16ps(3, 4, 5);
    b += kTileBytes;
  }
  _tile_stored(0, c, c_stride);
  _tile_stored(1, c + 16, c_stride);
  _tile_stored(2, c + 32, c_stride);
  _tile_stored(3, c + 48, c_stride);
}

// The rows of a pair of panels, or of the last panel alone. The first two blocks of rows each fetch
// one panel of the next pair; up to 32 rows nothing is left of the memory's time for that.
inline void TileBlock(const PackedProductArgs& args, int64_t panel) {
  const bool pair = panel + 2 <= args.num_panels;
  const char* const b = static_cast<const char*>(args.b) + panel * args.b_panel_bytes;
  const char* const next = args.num_rows > 2 * kTileRows ? NextPanels(args, panel + 2) : nullptr;
  for (int64_t row = 0; row < args.num_rows; row += 2 * kTileRows) {
    const char* const a = static_cast<const char*>(args.a) + row * args.a_stride_bytes;
    float* const c = args.c + row * args.c_stride + panel * 16;
    const int64_t rest = args.num_rows - row;
    if (pair && rest > kTileRows) {
      const int64_t block = row / (2 * kTileRows);
      const char* const ahead =
          next == nullptr || block > 1 ? nullptr : next + block * args.b_panel_bytes;
      row == 0 ? TileProduct32<true>(args, a, b, c, ahead)
               : TileProduct32<false>(args, a, b, c, ahead);
      continue;
    }
    for (int64_t down = 0; down < 2 * kTileRows && down < rest; down += kTileRows) {
      TileProduct16(args, a + down * args.a_stride_bytes, b, c + down * args.c_stride);
      if (pair)
        TileProduct16(args, a + down * args.a_stride_bytes, b + args.b_panel_bytes,
                      c + down * args.c_stride + 16);
    }
  }
}

void ProductAmx(const PackedProductArgs& args) {
  const TileConfig config;
  _tile_loadconfig(&config);
  int64_t panel = 0;
  if (args.num_rows <= kTileRows) {
    for (; panel + 4 <= args.num_panels; panel += 4) {
      TileStream16(args, static_cast<const char*>(args.a),
                   static_cast<const char*>(args.b) + panel * args.b_panel_bytes,
                   args.c + panel * 16);
    }
  }
  for (; panel < args.num_panels; panel += 2) TileBlock(args, panel);
  // Live tiles are 8 KiB more to save at every switch of threads.
  _tile_release();
}

}  // namespace
}  // namespace godwit
