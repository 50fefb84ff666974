#pragma once
// Device memory with an owner: the weights, tables and activations of one model.

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace godwit {

class DeviceMemory {
 public:
  explicit DeviceMemory(Backend& backend) : backend_(backend) {}
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  // Zeroed. RESOURCE_EXHAUSTED leaves everything as it was.
  absl::StatusOr<TensorView> Tensor(DType dtype, int64_t num_rows, int64_t num_columns);
  absl::StatusOr<MatrixView> Matrix(int64_t num_rows, int64_t num_columns, DType dtype);

  // A copy of host data, dense [num_rows, num_columns].
  absl::StatusOr<TensorView> Upload(const std::vector<float>& values, int64_t num_rows,
                                    int64_t num_columns);
  absl::StatusOr<const double*> Upload(const std::vector<double>& values);

  Backend& backend() const { return backend_; }
  int64_t num_bytes() const { return num_bytes_; }  // asked for; a back end may round up

 private:
  absl::StatusOr<void*> Allocate(int64_t num_bytes);

  Backend& backend_;
  std::vector<void*> blocks_;
  int64_t num_bytes_ = 0;
};

}  // namespace godwit
