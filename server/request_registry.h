#pragma once
// The ids of the requests that are running. Thread-safe.

#include <cstdint>
#include <mutex>
#include <string>
#include <unordered_set>

#include "absl/status/status.h"

namespace godwit {

class RequestRegistry {
 public:
  // ALREADY_EXISTS while a request with this id runs.
  absl::Status Add(const std::string& id);
  void Remove(const std::string& id);
  int64_t size() const;

 private:
  mutable std::mutex mutex_;  // guards ids_
  std::unordered_set<std::string> ids_;
};

}  // namespace godwit
