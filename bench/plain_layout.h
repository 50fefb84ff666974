#pragma once
// The rival of kernels/cpu/packed_matrix.h: BF16 weights as they lie in a file, [n][k], multiplied
// by tiles of dot products along k. Measured to choose the layout (docs/performance.md); the server
// does not contain it.

#include <cstdint>

namespace godwit {

// Rows of BF16 bits; k a multiple of 32, n of 4.
struct PlainProductArgs {
  const uint16_t* x = nullptr;  // [num_rows, k]
  const uint16_t* w = nullptr;  // [n, k]
  float* y = nullptr;           // [num_rows, n]
  int64_t num_rows = 0;
  int64_t n = 0;
  int64_t k = 0;
};

// Features [begin, end), multiples of 4, of all rows. Needs AVX-512 BF16.
void PlainLayoutProduct(const PlainProductArgs& args, int64_t begin, int64_t end);

}  // namespace godwit
