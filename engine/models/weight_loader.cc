#include "engine/models/weight_loader.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace godwit {
namespace {

constexpr int64_t kConversionValues =
    1 << 20;  // f32 values converted at a time, 4 MiB; at least one row

absl::Status Named(const std::string& name, const absl::Status& status) {
  return absl::Status(status.code(), absl::StrCat("tensor '", name, "': ", status.message()));
}

}  // namespace

WeightLoader::WeightLoader(const WeightSource& source, DType dtype, DeviceMemory& memory)
    : stored_(source.stored), seed_(source.seed), dtype_(dtype), memory_(memory) {}

// The stored tensors of the parts; none where nothing is stored.
absl::StatusOr<std::vector<const StoredTensor*>> WeightLoader::Find(const std::vector<Rows>& parts,
                                                                    int64_t num_columns) {
  std::vector<const StoredTensor*> tensors;
  if (stored_ == nullptr) return tensors;
  for (const Rows& part : parts) {
    ASSIGN_OR_RETURN(const StoredTensor* tensor,
                     stored_->Expect(part.name, {part.num_rows, num_columns}));
    tensors.push_back(tensor);
    used_.insert(part.name);
  }
  return tensors;
}

absl::StatusOr<MatrixView> WeightLoader::Matrix(const std::vector<Rows>& parts,
                                                int64_t num_columns) {
  GODWIT_CHECK(!parts.empty());
  ASSIGN_OR_RETURN(const std::vector<const StoredTensor*> tensors, Find(parts, num_columns));
  int64_t num_rows = 0;
  for (const Rows& part : parts) num_rows += part.num_rows;
  absl::StatusOr<MatrixView> matrix = memory_.Matrix(num_rows, num_columns, dtype_);
  if (!matrix.ok()) return Named(parts[0].name, matrix.status());
  if (stored_ == nullptr) RETURN_IF_ERROR(Fill(*matrix));
  int64_t first_row = 0;
  for (size_t part = 0; part < tensors.size(); ++part) {
    if (const absl::Status status = Pack(*matrix, first_row, *tensors[part]); !status.ok()) {
      return Named(parts[part].name, status);
    }
    first_row += parts[part].num_rows;
  }
  num_parameters_ += num_rows * num_columns;
  return matrix;
}

// A product of an input of unit scale has unit scale again.
absl::Status WeightLoader::Fill(const MatrixView& matrix) {
  const double scale = 1 / std::sqrt(static_cast<double>(matrix.num_columns));
  return ToStatus(memory_.backend().FillRandom(matrix, seed_++, static_cast<float>(scale)));
}

absl::Status WeightLoader::Pack(const MatrixView& matrix, int64_t first_row,
                                const StoredTensor& tensor) {
  Backend& backend = memory_.backend();
  const int64_t num_rows = tensor.shape[0], num_columns = tensor.shape[1];
  const auto address = reinterpret_cast<uintptr_t>(tensor.data);
  const DType stored = tensor.dtype == "BF16" ? DType::kBF16 : DType::kF32;
  if (tensor.dtype != "F16" && address % static_cast<uintptr_t>(DTypeBytes(stored)) == 0) {
    const TensorView source =
        MakeView(const_cast<void*>(tensor.data), stored, num_rows, num_columns);
    RETURN_IF_ERROR(backend.PackMatrixRows(matrix, first_row, source));
  } else {
    const int64_t rows_at_once =
        std::min(num_rows, std::max<int64_t>(1, kConversionValues / num_columns));
    std::vector<float> buffer(static_cast<size_t>(rows_at_once * num_columns));
    for (int64_t row = 0; row < num_rows; row += rows_at_once) {
      const int64_t count = std::min(rows_at_once, num_rows - row);
      ToF32(tensor, row * num_columns, count * num_columns, buffer.data());
      const TensorView source = MakeView(buffer.data(), DType::kF32, count, num_columns);
      RETURN_IF_ERROR(backend.PackMatrixRows(matrix, first_row + row, source));
      RETURN_IF_ERROR(backend.Synchronize());  // the buffer is written again
    }
  }
  RETURN_IF_ERROR(backend.Synchronize());
  stored_->ReleasePages(tensor);
  return absl::OkStatus();
}

absl::StatusOr<TensorView> WeightLoader::Table(const std::string& name,
                                               const std::vector<int64_t>& shape, int64_t num_rows,
                                               int64_t num_columns) {
  std::vector<float> values(static_cast<size_t>(num_rows * num_columns), 1.0f);
  if (stored_ != nullptr) {
    ASSIGN_OR_RETURN(const StoredTensor* tensor, stored_->Expect(name, shape));
    used_.insert(name);
    ToF32(*tensor, 0, num_rows * num_columns, values.data());
  }
  absl::StatusOr<TensorView> table = memory_.Upload(values, num_rows, num_columns);
  if (!table.ok()) return Named(name, table.status());
  num_parameters_ += num_rows * num_columns;
  return table;
}

bool WeightLoader::Same(const std::string& name, const std::string& other) const {
  if (stored_ == nullptr) return false;
  const StoredTensor* a = stored_->Find(name);
  const StoredTensor* b = stored_->Find(other);
  if (a == nullptr || b == nullptr || a->dtype != b->dtype || a->shape != b->shape) return false;
  const bool same = std::memcmp(a->data, b->data, static_cast<size_t>(a->num_bytes)) == 0;
  stored_->ReleasePages(*a);
  stored_->ReleasePages(*b);
  return same;
}

absl::Status WeightLoader::Finish() const {
  if (stored_ == nullptr) return absl::OkStatus();
  for (const auto& [name, tensor] : stored_->tensors()) {
    if (used_.count(name) > 0 || absl::EndsWith(name, "rotary_emb.inv_freq")) continue;
    return absl::UnimplementedError(
        absl::StrCat(tensor.file, ": tensor '", name.substr(0, 120),
                     "' belongs to no part of this model; leaving it out may change the result"));
  }
  return absl::OkStatus();
}

}  // namespace godwit
