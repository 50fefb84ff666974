#pragma once
// Elements of views as doubles.

#include <cstdint>

#include "kernels/base/bf16.h"
#include "kernels/base/tensor.h"

namespace godwit {

inline double Get(const TensorView& x, int64_t row, int64_t column) {
  if (x.dtype == DType::kBF16) return static_cast<double>(ToF32(x.row<const BF16>(row)[column]));
  return static_cast<double>(x.row<const float>(row)[column]);
}

inline void Set(const TensorView& x, int64_t row, int64_t column, double value) {
  if (x.dtype == DType::kBF16) {
    x.row<BF16>(row)[column] = ToBF16(static_cast<float>(value));
  } else {
    x.row<float>(row)[column] = static_cast<float>(value);
  }
}

inline double RoundTo(DType dtype, double value) {
  const float rounded = static_cast<float>(value);
  return static_cast<double>(dtype == DType::kBF16 ? ToF32(ToBF16(rounded)) : rounded);
}

inline const float* MatrixRow(const MatrixView& w, int64_t row) {
  return static_cast<const float*>(w.data) + row * w.num_columns;
}

}  // namespace godwit
