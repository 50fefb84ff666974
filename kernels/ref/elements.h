#pragma once
// Elements of views as doubles.

#include <cstdint>
#include <cstring>

#include "kernels/base/bf16.h"
#include "kernels/base/tensor.h"

namespace godwit {

// bf16 or f32, of any alignment: weights come from mapped files.
inline double Get(const TensorView& x, int64_t row, int64_t column) {
  const char* const element =
      static_cast<const char*>(x.data) + (row * x.row_stride + column) * DTypeBytes(x.dtype);
  BF16 bf16;
  float f32 = 0;
  if (x.dtype == DType::kBF16) {
    std::memcpy(&bf16, element, sizeof(bf16));
    f32 = ToF32(bf16);
  } else {
    std::memcpy(&f32, element, sizeof(f32));
  }
  return static_cast<double>(f32);
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
