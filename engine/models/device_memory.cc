#include "engine/models/device_memory.h"

#include "kernels/base/status.h"

namespace godwit {

DeviceMemory::~DeviceMemory() {
  for (void* block : blocks_) backend_.Free(block);
}

absl::StatusOr<void*> DeviceMemory::Allocate(int64_t num_bytes) {
  void* data = nullptr;
  RETURN_IF_ERROR(backend_.Allocate(num_bytes, &data));
  blocks_.push_back(data);
  num_bytes_ += num_bytes;
  return data;
}

absl::StatusOr<TensorView> DeviceMemory::Tensor(DType dtype, int64_t num_rows,
                                                int64_t num_columns) {
  ASSIGN_OR_RETURN(void* data, Allocate(num_rows * num_columns * DTypeBytes(dtype)));
  return MakeView(data, dtype, num_rows, num_columns);
}

absl::StatusOr<MatrixView> DeviceMemory::Matrix(int64_t num_rows, int64_t num_columns,
                                                DType dtype) {
  MatrixView matrix;
  RETURN_IF_ERROR(backend_.AllocateMatrix(num_rows, num_columns, dtype, &matrix));
  blocks_.push_back(matrix.data);
  num_bytes_ += num_rows * num_columns * DTypeBytes(dtype);
  return matrix;
}

absl::StatusOr<TensorView> DeviceMemory::Upload(const std::vector<float>& values, int64_t num_rows,
                                                int64_t num_columns) {
  ASSIGN_OR_RETURN(const TensorView view, Tensor(DType::kF32, num_rows, num_columns));
  RETURN_IF_ERROR(backend_.CopyFromHost(view.data, values.data(),
                                        num_rows * num_columns * DTypeBytes(DType::kF32)));
  return view;
}

absl::StatusOr<const double*> DeviceMemory::Upload(const std::vector<double>& values) {
  const auto num_bytes = static_cast<int64_t>(values.size() * sizeof(double));
  ASSIGN_OR_RETURN(void* data, Allocate(num_bytes));
  RETURN_IF_ERROR(backend_.CopyFromHost(data, values.data(), num_bytes));
  return static_cast<const double*>(data);
}

}  // namespace godwit
