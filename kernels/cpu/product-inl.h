// The packed product on plain vectors: f32 weights on every set, BF16 weights where no instruction
// multiplies BF16. The latter widens a pair of weights by shift and mask and takes formed rows that
// are f32 already (rounded to BF16): two fused multiply-adds per pair, first element first.

#include <cstdint>

#include "kernels/cpu/product_args.h"

namespace godwit {
namespace {

inline constexpr int kPanelVectors = 16 / kLanes;
inline constexpr int64_t kPanelLine = 64;  // one k of a panel in f32, one pair of k in BF16

// What is multiplied after the panels before `panel`.
inline const char* NextPanels(const PackedProductArgs& args, int64_t panel) {
  return panel < args.num_panels ? static_cast<const char*>(args.b) + panel * args.b_panel_bytes
                                 : static_cast<const char*>(args.next_b);
}

// kVectors vectors from vector `first` of panel 0 on; they may span panels.
template <bool kBF16, int kRows, int kVectors>
inline void PlainTile(const PackedProductArgs& args, const char* a, const char* b, float* c) {
  constexpr int kStep = kBF16 ? 2 : 1;  // k per line
  const int64_t a_stride = args.a_stride_bytes;
  const int64_t panel_bytes = args.b_panel_bytes;
  VecF acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      acc[row][v] = args.accumulate ? Load(c + row * args.c_stride + v * kLanes) : Zero();
    }
  }
  for (int64_t k = 0; k < args.k; k += kStep, a += kStep * sizeof(float), b += kPanelLine) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const char* const line =
          b + v / kPanelVectors * panel_bytes + v % kPanelVectors * (kLanes * 4);
      VecF first, second;
      if constexpr (kBF16) {
        LoadPairs(reinterpret_cast<const uint16_t*>(line), first, second);
      } else {
        first = Load(reinterpret_cast<const float*>(line));
      }
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
        const float* const x = reinterpret_cast<const float*>(a + row * a_stride);
        acc[row][v] = Fma(Set1(x[0]), first, acc[row][v]);
        if constexpr (kBF16) acc[row][v] = Fma(Set1(x[1]), second, acc[row][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) Store(c + row * args.c_stride + v * kLanes, acc[row][v]);
  }
}

// Rows x vectors of a tile: 6 x 4 of 32 registers, 4 x 2 of 16; with fewer rows more vectors, so
// that a tile does not wait for its own additions and reads several panels at once. A panel of 4
// vectors is cut in two.
inline constexpr int kPlainRows = kRegisters == 32 ? 6 : 4;
template <int kRows>
inline constexpr int kPlainVectors = kRegisters == 32 ? (kRows <= 2 ? 8 : 4)
                                                      : (kRows <= 1   ? 8
                                                         : kRows <= 2 ? 4
                                                                      : 2);

template <bool kBF16, int kRows, int kVectors>
inline void PlainPanels(const PackedProductArgs& args, int64_t row, int64_t vector) {
  const char* const a = static_cast<const char*>(args.a) + row * args.a_stride_bytes;
  for (; vector + kVectors <= args.num_panels * kPanelVectors; vector += kVectors) {
    const char* const b = static_cast<const char*>(args.b) +
                          vector / kPanelVectors * args.b_panel_bytes +
                          vector % kPanelVectors * (kLanes * 4);
    PlainTile<kBF16, kRows, kVectors>(args, a, b, args.c + row * args.c_stride + vector * kLanes);
  }
  if constexpr (kVectors > 1) PlainPanels<kBF16, kRows, kVectors / 2>(args, row, vector);
}

template <bool kBF16, int kRows>
inline void PlainRowsOf(const PackedProductArgs& args, int64_t row) {
  if constexpr (kRows > 1) {
    if (args.num_rows - row < kRows) return PlainRowsOf<kBF16, kRows - 1>(args, row);
  }
  PlainPanels<kBF16, kRows, kPlainVectors<kRows>>(args, row, 0);
}

template <bool kBF16>
void PlainProduct(const PackedProductArgs& args) {
  if (args.num_rows <= kPlainRows) return PlainRowsOf<kBF16, kPlainRows>(args, 0);
  // All rows over one group of panels, whose part of k stays in the first-level cache.
  constexpr int kWidth = kPlainVectors<kPlainRows> / kPanelVectors;
  constexpr int kGroup = kWidth < 1 ? 1 : kWidth;
  PackedProductArgs part = args;
  for (int64_t panel = 0; panel < args.num_panels; panel += kGroup) {
    part.b = static_cast<const char*>(args.b) + panel * args.b_panel_bytes;
    part.c = args.c + panel * 16;
    part.num_panels = args.num_panels - panel < kGroup ? args.num_panels - panel : kGroup;
    for (int64_t row = 0; row < args.num_rows; row += kPlainRows)
      PlainRowsOf<kBF16, kPlainRows>(part, row);
  }
}

// How a set multiplies BF16 weights: in which form it wants its rows, and by what.
struct BF16Product {
  int64_t activation_bytes;
  int64_t stream_rows;
  void (*form_rows)(const FormRowsArgs&);
  void (*product)(const PackedProductArgs&);
};

}  // namespace
}  // namespace godwit
