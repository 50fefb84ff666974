// The packed product with AMX: a tile instruction adds 16 rows x 32 k times 32 k x 16 features. 16
// rows of 64 bytes at the panel's row stride of 128 are a tile of B as it stands; 16 formed rows
// are a tile of A. Within an instruction the even and the odd k are summed apart and then together
// into C (SDM, TDPBF16PS), another order than vdpbf16ps: so rows of every number go through this
// one.

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/product_args.h"

namespace godwit {
namespace {

inline constexpr int64_t kPanelRowBytes = 128;

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline void PrefetchTile(const char* b) {
#pragma GCC unroll 16
  for (int row = 0; row < 16; ++row) _mm_prefetch(b + row * kPanelRowBytes, _MM_HINT_T0);
}

// 32 rows x 1 panel: C in tiles 0..3, A in 4 and 5, B in 6 and 7. B panels are read 32 k at a time.
inline void TileProduct32(const PackedProductArgs& args, const char* a, const char* b, float* c) {
  const int64_t a_stride = args.a_stride_bytes;
  const int64_t c_stride = args.c_stride * 4;
  char* const c_bytes = reinterpret_cast<char*>(c);
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
  for (int64_t k = 0; k < args.k; k += 32) {
    _tile_loadd(6, b, kPanelRowBytes);
    _tile_loadd(4, a, a_stride);
    _tile_loadd(7, b + 64, kPanelRowBytes);
    _tile_loadd(5, a + 16 * a_stride, a_stride);
    PrefetchTile(b + args.prefetch_bytes);
    PrefetchTile(b + args.prefetch_bytes + 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    a += 64;
    b += 16 * kPanelRowBytes;
  }
  _tile_stored(0, c_bytes, c_stride);
  _tile_stored(1, c_bytes + 64, c_stride);
  _tile_stored(2, c_bytes + 16 * c_stride, c_stride);
  _tile_stored(3, c_bytes + 16 * c_stride + 64, c_stride);
}

// 16 rows x 1 panel: C in tiles 0 and 1.
inline void TileProduct16(const PackedProductArgs& args, const char* a, const char* b, float* c) {
  const int64_t a_stride = args.a_stride_bytes;
  const int64_t c_stride = args.c_stride * 4;
  char* const c_bytes = reinterpret_cast<char*>(c);
  if (args.accumulate) {
    _tile_loadd(0, c_bytes, c_stride);
    _tile_loadd(1, c_bytes + 64, c_stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
  }
  for (int64_t k = 0; k < args.k; k += 32) {
    PrefetchTile(b + args.prefetch_bytes);
    PrefetchTile(b + args.prefetch_bytes + 64);
    _tile_loadd(4, a, a_stride);
    _tile_loadd(6, b, kPanelRowBytes);
    _tile_loadd(7, b + 64, kPanelRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    a += 64;
    b += 16 * kPanelRowBytes;
  }
  _tile_stored(0, c_bytes, c_stride);
  _tile_stored(1, c_bytes + 64, c_stride);
}

void ProductAmx(const PackedProductArgs& args) {
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t panel = 0; panel < args.num_panels; ++panel) {
    const char* const b = static_cast<const char*>(args.b) + panel * args.b_panel_bytes;
    int64_t row = 0;
    for (; args.num_rows - row > kTileRows; row += 2 * kTileRows) {
      TileProduct32(args, static_cast<const char*>(args.a) + row * args.a_stride_bytes, b,
                    args.c + row * args.c_stride + panel * 32);
    }
    if (row < args.num_rows) {
      TileProduct16(args, static_cast<const char*>(args.a) + row * args.a_stride_bytes, b,
                    args.c + row * args.c_stride + panel * 32);
    }
  }
  // Live tiles are 8 KiB more to save at every switch of threads.
  _tile_release();
}

}  // namespace
}  // namespace godwit
