#pragma once
// Reading (mmap, bounds-checked) and writing of safetensors files; sharded Hugging Face folders.

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/base/tensor.h"

namespace godwit {

struct StoredTensor {
  std::string dtype;  // "F32", "F16", "BF16", "I32", "I64", ...
  std::vector<int64_t> shape;
  const void* data = nullptr;  // into the mapping; any alignment
  int64_t num_bytes = 0;
  std::string file;  // for messages
};

// All tensors of a folder (model.safetensors, or model.safetensors.index.json and its shards) or of
// one file. Every offset, size and shape is checked against the file size with overflow-safe
// arithmetic; a duplicate name, overlapping or out-of-range data, or an index that disagrees with a
// shard is INVALID_ARGUMENT / DATA_LOSS naming file and tensor. Thread-safe after Open.
class SafetensorsReader {
 public:
  static absl::StatusOr<std::unique_ptr<SafetensorsReader>> OpenFolder(const std::string& folder);
  static absl::StatusOr<std::unique_ptr<SafetensorsReader>> OpenFile(const std::string& path);
  ~SafetensorsReader();

  // Null when absent.
  const StoredTensor* Find(const std::string& name) const;
  const std::map<std::string, StoredTensor>& tensors() const { return tensors_; }

  // The tensor, which must exist with exactly this shape and a float dtype (F32, F16, BF16):
  // NOT_FOUND / INVALID_ARGUMENT name file, tensor, expected and found.
  absl::StatusOr<const StoredTensor*> Expect(const std::string& name,
                                             const std::vector<int64_t>& shape) const;

  // A tensor that must exist with exactly this shape and a float dtype, as a matrix [shape[0],
  // rest]; f16, and what is not aligned for its type, is converted to f32 on the way (`storage`
  // keeps the conversion alive). Errors as Expect.
  absl::StatusOr<TensorView> Matrix(const std::string& name, const std::vector<int64_t>& shape,
                                    std::vector<float>& storage) const;

  // Gives the pages of a tensor back to the system; reading it again fetches them from the file.
  void ReleasePages(const StoredTensor& tensor) const;

 private:
  struct Mapping;
  SafetensorsReader();
  absl::Status AddFile(const std::string& path);
  absl::Status AddShards(const std::string& folder, const std::string& index_path);
  std::vector<std::unique_ptr<Mapping>> mappings_;
  std::map<std::string, StoredTensor> tensors_;
};

// `count` values of F32, F16 or BF16 starting at `index`, at any alignment, as f32.
void ToF32(const StoredTensor& tensor, int64_t index, int64_t count, float* to);

struct NamedTensor {
  std::string name;
  std::string dtype;  // "F32", "BF16", "I32"
  std::vector<int64_t> shape;
  const void* data = nullptr;
};

// Written to a temporary name beside `path`, then renamed.
absl::Status WriteSafetensors(const std::string& path, const std::vector<NamedTensor>& tensors);

}  // namespace godwit
