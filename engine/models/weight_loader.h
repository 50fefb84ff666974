#pragma once
// Carries the tensors of a checkpoint into a back end, one at a time: besides the packed weights,
// memory holds the pages of one tensor and one conversion buffer. Without a checkpoint every matrix
// is filled on the device with random entries that keep activations near unit scale, and every
// table with ones: the shape of a model, for measurements.

#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model.h"
#include "engine/models/device_memory.h"
#include "engine/safetensors.h"

namespace godwit {

class WeightLoader {
 public:
  // `dtype` of matrices; vectors and tables are always f32. Everything loaded belongs to `memory`.
  WeightLoader(const WeightSource& source, DType dtype, DeviceMemory& memory);

  struct Rows {
    std::string name;  // of a stored [num_rows, num_columns]
    int64_t num_rows = 0;
  };

  // One matrix of the rows of all parts, in order: products that share their input run as one.
  // NOT_FOUND / INVALID_ARGUMENT name file, tensor, expected and found; RESOURCE_EXHAUSTED the
  // tensor.
  absl::StatusOr<MatrixView> Matrix(const std::vector<Rows>& parts, int64_t num_columns);

  // A stored tensor of this shape as dense f32 [rows, columns].
  absl::StatusOr<TensorView> Table(const std::string& name, const std::vector<int64_t>& shape,
                                   int64_t num_rows, int64_t num_columns);

  bool Has(const std::string& name) const {
    return stored_ != nullptr && stored_->Find(name) != nullptr;
  }

  // Two stored tensors with the same dtype, shape and bytes.
  bool Same(const std::string& name, const std::string& other) const;

  // Counts a tensor as known though nothing is loaded from it.
  void MarkUsed(const std::string& name) { used_.insert(name); }

  // UNIMPLEMENTED naming a tensor that nothing asked for: a bias or a gate that would be left out
  // silently. Tables that follow from the config (rotary_emb.inv_freq) are not missed.
  absl::Status Finish() const;

  int64_t num_parameters() const { return num_parameters_; }

 private:
  absl::StatusOr<std::vector<const StoredTensor*>> Find(const std::vector<Rows>& parts,
                                                        int64_t num_columns);
  absl::Status Fill(const MatrixView& matrix);
  absl::Status Pack(const MatrixView& matrix, int64_t first_row, const StoredTensor& tensor);

  const SafetensorsReader* const stored_;  // null: random
  uint64_t seed_;                          // of the next random matrix
  const DType dtype_;
  DeviceMemory& memory_;
  std::set<std::string> used_;
  int64_t num_parameters_ = 0;
};

}  // namespace godwit
