#pragma once
// The files of an acceptance head, for tests.

#include <cstdint>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "engine/acceptance_head.h"
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

inline std::string HeadConfig(const std::string& kind, const std::string& label, int64_t hidden,
                              const std::string& more = "") {
  return "{\"kind\": \"" + kind + "\", \"label\": \"" + label +
         "\", \"hidden_size\": " + std::to_string(hidden) + more + "}";
}

// Of random weights: it stops anywhere.
inline HeadFiles RandomHead(HeadKind kind, HeadLabel label, int64_t hidden) {
  HeadFiles files;
  if (kind == HeadKind::kSpecDecPP) {
    files.json = HeadConfig("specdecpp", label == HeadLabel::kPost ? "post" : "pre", hidden,
                            ", \"num_layers\": 2, \"reject_weight\": 3");
    files.AddRandom("model.0.linear.weight", {hidden, hidden}, 1);
    files.AddRandom("model.0.linear.bias", {hidden}, 2);
    files.AddRandom("model.2.weight", {2, hidden}, 3);
    files.AddRandom("model.2.bias", {2}, 4);
  } else {
    const int64_t width = 8;
    files.json = HeadConfig("mlp", "pre", hidden, ", \"width\": 8");
    files.AddRandom("hidden.weight", {width, hidden}, 1);
    files.AddRandom("hidden.features", {kNumHeadFeatures, width}, 2);
    files.AddRandom("hidden.bias", {width}, 3);
    files.AddRandom("readout.weight", {1, width}, 4);
    for (float& weight : files.values.back()) weight *= 10;
    files.AddRandom("readout.bias", {1}, 5);
  }
  return files;
}

}  // namespace godwit
