#pragma once
// What the tests of single CPU ops share: a context, the instruction sets of this machine, and
// seeded tensors.

#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/base/bf16.h"
#include "kernels/base/check.h"
#include "kernels/base/tensor.h"
#include "kernels/cpu/cpu_context.h"
#include "kernels/cpu/memory.h"
#include "kernels/cpu/packed_matrix.h"
#include "kernels/cpu/select_isa.h"

namespace godwit {

class CpuOps {
 public:
  CpuOps(const std::string& isa, int num_threads)
      : pool_(num_threads), context_{pool_, **SelectIsa(isa), scratch_, ""} {}
  CpuContext& context() { return context_; }

 private:
  ThreadPool pool_;
  Scratch scratch_;
  CpuContext context_;
};

inline std::vector<std::string> IsasOfThisMachine() {
  std::vector<std::string> result;
  for (const char* name : {"portable", "avx2", "avx512bf16", "amx"}) {
    if (SelectIsa(name).ok()) result.push_back(name);
  }
  return result;
}

// A tensor in host memory with rows `padding` elements further apart than they are long.
class HostTensor {
 public:
  HostTensor(DType dtype, int64_t rows, int64_t columns, int64_t padding = 0)
      : bytes_(static_cast<size_t>((rows * (columns + padding)) * DTypeBytes(dtype)), '\0'),
        view_(MakeView(bytes_.data(), dtype, rows, columns)) {
    view_.row_stride = columns + padding;
  }
  HostTensor(const HostTensor&) = delete;
  HostTensor& operator=(const HostTensor&) = delete;

  const TensorView& view() const { return view_; }
  float At(int64_t row, int64_t column) const {
    return view_.dtype == DType::kF32 ? view_.row<float>(row)[column]
                                      : ToF32(view_.row<BF16>(row)[column]);
  }
  void Set(int64_t row, int64_t column, float value) {
    if (view_.dtype == DType::kF32) {
      view_.row<float>(row)[column] = value;
    } else {
      view_.row<BF16>(row)[column] = ToBF16(value);
    }
  }
  HostTensor& FillNormal(std::mt19937_64& random, float scale = 1) {
    std::normal_distribution<float> normal;
    for (int64_t row = 0; row < view_.shape[0]; ++row) {
      for (int64_t column = 0; column < view_.shape[1]; ++column)
        Set(row, column, scale * normal(random));
    }
    return *this;
  }
  bool SameRow(int64_t row, const HostTensor& other, int64_t other_row) const {
    const int64_t size = view_.shape[1] * DTypeBytes(view_.dtype);
    return std::memcmp(RowBytes(row), other.RowBytes(other_row), static_cast<size_t>(size)) == 0;
  }

 private:
  const char* RowBytes(int64_t row) const {
    return static_cast<const char*>(view_.data) + row * view_.row_stride * DTypeBytes(view_.dtype);
  }
  std::vector<char> bytes_;
  TensorView view_;
};

class PackedMatrix {
 public:
  PackedMatrix(CpuContext& context, const HostTensor& source, DType dtype)
      : matrix_{nullptr, dtype, source.view().shape[0], source.view().shape[1]} {
    matrix_.data = AcquireMemory(PackedBytes(matrix_));
    GODWIT_CHECK(CpuPackMatrixRows(context, matrix_, 0, source.view()).ok());
  }
  ~PackedMatrix() { ReleaseMemory(matrix_.data, PackedBytes(matrix_)); }
  PackedMatrix(const PackedMatrix&) = delete;
  PackedMatrix& operator=(const PackedMatrix&) = delete;

  const MatrixView& view() const { return matrix_; }

 private:
  MatrixView matrix_;
};

}  // namespace godwit
