#include "bench/plain_layout.h"

#include <immintrin.h>

#include <cstdint>

namespace godwit {
namespace {

constexpr int kFeatures = 4;
constexpr int kRowsOfTile = 4;

// kRows x 4 dot products: four streams of weights, each lane its own sum.
template <int kRows>
void DotTile(const PlainProductArgs& args, int64_t row, int64_t feature) {
  __m512 acc[kRows][kFeatures];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int f = 0; f < kFeatures; ++f) acc[r][f] = _mm512_setzero_ps();
  }
  const uint16_t* const x = args.x + row * args.k;
  const uint16_t* const w = args.w + feature * args.k;
  for (int64_t k = 0; k < args.k; k += 32) {
    __m512bh w_part[kFeatures];
#pragma GCC unroll 4
    for (int f = 0; f < kFeatures; ++f)
      w_part[f] = (__m512bh)_mm512_loadu_si512(w + f * args.k + k);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m512bh x_part = (__m512bh)_mm512_loadu_si512(x + r * args.k + k);
#pragma GCC unroll 4
      for (int f = 0; f < kFeatures; ++f)
        acc[r][f] = _mm512_dpbf16_ps(acc[r][f], x_part, w_part[f]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int f = 0; f < kFeatures; ++f) {
      alignas(64) float lanes[16];
      _mm512_store_ps(lanes, acc[r][f]);
      float sum = 0;
      for (float lane : lanes) sum += lane;
      args.y[(row + r) * args.n + feature + f] = sum;
    }
  }
}

}  // namespace

void PlainLayoutProduct(const PlainProductArgs& args, int64_t begin, int64_t end) {
  for (int64_t feature = begin; feature < end; feature += kFeatures) {
    int64_t row = 0;
    for (; row + kRowsOfTile <= args.num_rows; row += kRowsOfTile)
      DotTile<kRowsOfTile>(args, row, feature);
    for (; row < args.num_rows; ++row) DotTile<1>(args, row, feature);
  }
}

}  // namespace godwit
