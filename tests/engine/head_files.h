#pragma once
// The files of an acceptance head, for tests.

#include <cstdint>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "engine/safetensors.h"
#include "gtest/gtest.h"
#include "tests/kernels/device_arena.h"

namespace godwit {

// Tensors by name, with their values kept.
struct HeadFiles {
  std::string json;
  std::vector<NamedTensor> tensors;
  std::vector<std::vector<float>> values;

  HeadFiles() { values.reserve(32); }
  void Add(const std::string& name, std::vector<int64_t> shape, std::vector<float> of) {
    values.push_back(std::move(of));
    tensors.push_back({name, "F32", std::move(shape), values.back().data()});
  }
  void AddRandom(const std::string& name, std::vector<int64_t> shape, uint32_t seed) {
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    Add(name, std::move(shape), RandomValues(seed, count, DType::kF32, 0.3f));
  }
  const std::vector<float>& Of(const std::string& name) const {
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (tensors[i].name == name) return values[i];
    }
    ADD_FAILURE() << name;
    return values[0];
  }
  absl::Status Write(const std::string& folder) const {
    std::ofstream(folder + "/acceptance_head.json") << json;
    return WriteSafetensors(folder + "/acceptance_head.safetensors", tensors);
  }
  void Erase(const std::string& name) {
    std::erase_if(tensors, [&](const NamedTensor& tensor) { return tensor.name == name; });
  }
};

}  // namespace godwit
