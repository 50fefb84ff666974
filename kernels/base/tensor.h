#pragma once
// Views of device or host memory. They own nothing and are plain data (they cross the plugin boundary).

#include <cstdint>

namespace godwit {

enum class DType : int32_t { kF32 = 0, kBF16 = 1, kI32 = 2, kU32 = 3, kI64 = 4 };

inline constexpr int64_t DTypeBytes(DType dtype) {
  switch (dtype) {
    case DType::kF32:
    case DType::kI32:
    case DType::kU32: return 4;
    case DType::kBF16: return 2;
    case DType::kI64: return 8;
  }
  return 0;
}

// Up to 4 dimensions. All but the first are dense; `row_stride` elements lie between two indices of dimension 0, so a
// column range of a fused projection is a view too. An absent optional tensor has data == nullptr.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int32_t rank = 0;
  int64_t shape[4] = {0, 0, 0, 0};
  int64_t row_stride = 0;  // in elements; the product of shape[1..] when dense

  explicit operator bool() const { return data != nullptr; }
  int64_t rows() const { return rank == 0 ? 0 : shape[0]; }
  int64_t row_elements() const {
    int64_t n = 1;
    for (int d = 1; d < rank; ++d) n *= shape[d];
    return n;
  }
  int64_t elements() const { return rows() * row_elements(); }
  bool dense() const { return row_stride == row_elements(); }

  template <typename T>
  T* row(int64_t index) const {
    return static_cast<T*>(data) + index * row_stride;
  }
};

inline TensorView MakeView(void* data, DType dtype, int64_t n0) {
  return {data, dtype, 1, {n0, 0, 0, 0}, 1};
}
inline TensorView MakeView(void* data, DType dtype, int64_t n0, int64_t n1) {
  return {data, dtype, 2, {n0, n1, 0, 0}, n1};
}
inline TensorView MakeView(void* data, DType dtype, int64_t n0, int64_t n1, int64_t n2) {
  return {data, dtype, 3, {n0, n1, n2, 0}, n1 * n2};
}
inline TensorView MakeView(void* data, DType dtype, int64_t n0, int64_t n1, int64_t n2, int64_t n3) {
  return {data, dtype, 4, {n0, n1, n2, n3}, n1 * n2 * n3};
}

// Rows [begin, begin + count) of x.
inline TensorView RowRange(const TensorView& x, int64_t begin, int64_t count) {
  TensorView view = x;
  view.data = static_cast<char*>(x.data) + begin * x.row_stride * DTypeBytes(x.dtype);
  view.shape[0] = count;
  return view;
}

// Columns [begin, begin + count) of a rank 2 view; shares the row stride.
inline TensorView ColumnRange(const TensorView& x, int64_t begin, int64_t count) {
  TensorView view = x;
  view.data = static_cast<char*>(x.data) + begin * DTypeBytes(x.dtype);
  view.shape[1] = count;
  return view;
}

// A weight matrix [num_rows, num_columns] in the back end's own layout, made by Backend::AllocateMatrix and
// PackMatrixRows. Opaque to everybody else: only ops read it.
struct MatrixView {
  void* data = nullptr;
  DType dtype = DType::kBF16;  // kF32 or kBF16
  int64_t num_rows = 0;        // output features
  int64_t num_columns = 0;     // input features

  explicit operator bool() const { return data != nullptr; }
};

}  // namespace godwit
