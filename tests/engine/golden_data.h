#pragma once
// Cases computed by another implementation: golden/<case>/{config.json, model.safetensors,
// golden.safetensors}. They live outside of the repository; GODWIT_TEST_DATA names the folder that
// holds golden/.

#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/safetensors.h"

namespace godwit {

// Empty when there is none: the test skips.
inline std::string TestDataFolder() {
  const char* folder = std::getenv("GODWIT_TEST_DATA");
  return folder == nullptr ? "" : folder;
}

struct GoldenCase {
  std::string folder;
  int64_t vocab_size = 0;
  std::vector<int32_t> tokens;  // [T]
  std::vector<float> logits;    // [T, vocab]
  std::vector<int32_t> greedy;  // the greedy continuation of `tokens`
};

inline absl::StatusOr<GoldenCase> ReadGoldenCase(const std::string& name) {
  GoldenCase golden = {.folder = TestDataFolder() + "/golden/" + name};
  auto reader = SafetensorsReader::OpenFile(golden.folder + "/golden.safetensors");
  if (!reader.ok()) return reader.status();
  const auto read_ids = [&](const char* tensor_name, std::vector<int32_t>& ids) {
    const StoredTensor* tensor = (*reader)->Find(tensor_name);
    if (tensor == nullptr || tensor->dtype != "I32") return false;
    const auto* begin = static_cast<const int32_t*>(tensor->data);
    ids.assign(begin, begin + tensor->shape[0]);
    return true;
  };
  const StoredTensor* logits = (*reader)->Find("logits");
  if (!read_ids("tokens", golden.tokens) || !read_ids("greedy", golden.greedy) ||
      logits == nullptr) {
    return absl::InvalidArgumentError(golden.folder + ": not a golden case");
  }
  golden.vocab_size = logits->shape[1];
  golden.logits.resize(static_cast<size_t>(logits->shape[0] * logits->shape[1]));
  ToF32(*logits, 0, std::ssize(golden.logits), golden.logits.data());
  return golden;
}

}  // namespace godwit
