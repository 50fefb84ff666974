// The packed product on plain vectors: f32 weights on every set, BF16 weights where no instruction
// multiplies BF16. The latter widens a pair of weights by shift and mask and takes formed rows that
// are f32 already (rounded to BF16): two fused multiply-adds per pair, first element first.

#include <cstdint>

#include "kernels/cpu/product_args.h"

namespace godwit {
namespace {

inline constexpr int kPanelColumns = 32;
inline constexpr int kPanelVectors = kPanelColumns / kLanes;

template <bool kBF16, int kRows, int kVectors>
inline void PlainTile(const PackedProductArgs& args, const char* a, const char* b, float* c) {
  constexpr int kStep = kBF16 ? 2 : 1;  // k per row of the panel
  constexpr int64_t kVectorBytes =
      kLanes * (kBF16 ? 4 : sizeof(float));  // of the panel: a pair or an f32 a lane
  VecF acc[kRows][kVectors];
  for (int row = 0; row < kRows; ++row) {
    for (int v = 0; v < kVectors; ++v)
      acc[row][v] = args.accumulate ? Load(c + row * args.c_stride + v * kLanes) : Zero();
  }
  for (int64_t k = 0; k < args.k; k += kStep, a += kStep * sizeof(float), b += kPanelColumns * 4) {
    __builtin_prefetch(b + args.prefetch_bytes, 0, 3);
    __builtin_prefetch(b + args.prefetch_bytes + 64, 0, 3);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      VecF first, second;
      if constexpr (kBF16) {
        LoadPairs(reinterpret_cast<const uint16_t*>(b + v * kVectorBytes), first, second);
      } else {
        first = Load(reinterpret_cast<const float*>(b + v * kVectorBytes));
      }
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
        const float* const x = reinterpret_cast<const float*>(a + row * args.a_stride_bytes);
        acc[row][v] = Fma(Set1(x[0]), first, acc[row][v]);
        if constexpr (kBF16) acc[row][v] = Fma(Set1(x[1]), second, acc[row][v]);
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int v = 0; v < kVectors; ++v) Store(c + row * args.c_stride + v * kLanes, acc[row][v]);
  }
}

// 12 rows x 2 vectors of 32 registers, or of 16 registers 8 accumulators: 2 x 4 (a narrow tile of
// few rows would wait for its own additions) or 4 x 2.
inline constexpr int kWideRows = kRegisters == 32 ? 12 : 4;
inline constexpr int kWideVectors = 2;
inline constexpr int kFewRows = 2;
inline constexpr int kFewVectors = kPanelVectors < 4 ? kPanelVectors : 4;

template <bool kBF16, int kRows>
inline void PlainRows(const PackedProductArgs& args, const char* a, const char* b, float* c) {
  constexpr int kVectors = kRows <= kFewRows ? kFewVectors : kWideVectors;
  for (int v = 0; v < kPanelVectors; v += kVectors) {
    PlainTile<kBF16, kRows, kVectors>(args, a, b + v * kLanes * 4, c + v * kLanes);
  }
}

template <bool kBF16, int kRows>
inline void PlainRowsOf(int rows, const PackedProductArgs& args, const char* a, const char* b,
                        float* c) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return PlainRowsOf<kBF16, kRows - 1>(rows, args, a, b, c);
  }
  PlainRows<kBF16, kRows>(args, a, b, c);
}

template <bool kBF16>
void PlainProduct(const PackedProductArgs& args) {
  const char* const a = static_cast<const char*>(args.a);
  for (int64_t panel = 0; panel < args.num_panels; ++panel) {
    const char* const b = static_cast<const char*>(args.b) + panel * args.b_panel_bytes;
    for (int64_t row = 0; row < args.num_rows; row += kWideRows) {
      const int64_t rest = args.num_rows - row;
      PlainRowsOf<kBF16, kWideRows>(static_cast<int>(rest < kWideRows ? rest : kWideRows), args,
                                    a + row * args.a_stride_bytes, b,
                                    args.c + row * args.c_stride + panel * kPanelColumns);
    }
  }
}

// How a set multiplies BF16 weights: in which form it wants its rows, and by what.
struct BF16Product {
  int64_t activation_bytes;
  void (*form_rows)(const FormRowsArgs&);
  void (*product)(const PackedProductArgs&);
};

}  // namespace
}  // namespace godwit
