#pragma once
// Backend::FillRandom for a back end whose memory the host packs: entries come from a counter, a
// few rows at a time.

#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/base/op_status.h"
#include "kernels/base/tensor.h"

#if defined(__CUDACC__)
#define GODWIT_HOST_DEVICE __host__ __device__
#else
#define GODWIT_HOST_DEVICE
#endif

namespace godwit {

// Uniform in [-sqrt(3) scale, sqrt(3) scale): mean 0, standard deviation `scale`. A hash of (seed,
// index), the same on every back end.
GODWIT_HOST_DEVICE inline float RandomEntry(uint64_t seed, uint64_t index, float scale) {
  uint64_t x = (index + 1) * 0x9e3779b97f4a7c15u ^ seed * 0xd1342543de82ef95u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;  // splitmix64
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  const auto high = static_cast<uint32_t>((x ^ x >> 31) >> 40);  // 24 bits
  return (static_cast<float>(high) * (1.0f / 8388608.0f) - 1.0f) * 1.7320508f * scale;
}

template <typename AnyBackend>
OpStatus FillRandomRows(AnyBackend& backend, const MatrixView& matrix, uint64_t seed, float scale) {
  std::vector<float> row(static_cast<size_t>(matrix.num_columns));
  for (int64_t r = 0; r < matrix.num_rows; ++r) {
    for (int64_t i = 0; i < matrix.num_columns; ++i) {
      row[static_cast<size_t>(i)] =
          RandomEntry(seed, static_cast<uint64_t>(r * matrix.num_columns + i), scale);
    }
    const TensorView source = MakeView(row.data(), DType::kF32, 1, matrix.num_columns);
    if (const OpStatus status = backend.PackMatrixRows(matrix, r, source); !status.ok())
      return status;
  }
  return {};
}

}  // namespace godwit
