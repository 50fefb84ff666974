#pragma once
// The host arrays of a step, gathered in one buffer and uploaded by one copy.

#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/device_buffer.h"
#include "kernels/backend.h"
#include "kernels/base/check.h"

namespace godwit {

// Not thread-safe. Capacity is fixed: the engine computes it from its limits.
class StepArena {
 public:
  static constexpr int64_t kAlignment = 64;

  static absl::StatusOr<StepArena> Create(Backend& backend, int64_t capacity) {
    ASSIGN_OR_RETURN(DeviceBuffer device, DeviceBuffer::Allocate(backend, capacity));
    return StepArena(backend, std::move(device), capacity);
  }

  // Bytes that a Push of num_bytes takes at most.
  static constexpr int64_t Footprint(int64_t num_bytes) {
    return (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
  }

  void Clear() { size_ = 0; }

  // Device address of a copy of `values`, valid once Upload has been called.
  template <typename T>
  T* Push(std::span<const T> values) {
    static_assert(std::is_trivially_copyable_v<T>);
    const int64_t num_bytes = static_cast<int64_t>(values.size_bytes());
    GODWIT_CHECK(size_ + Footprint(num_bytes) <= std::ssize(host_));
    const int64_t offset = std::exchange(size_, size_ + Footprint(num_bytes));
    if (num_bytes > 0) std::memcpy(host_.data() + offset, values.data(), values.size_bytes());
    return reinterpret_cast<T*>(device_.bytes() + offset);
  }
  template <typename T>
  T* Push(const std::vector<T>& values) {
    return Push(std::span<const T>(values));
  }

  absl::Status Upload() {
    return size_ == 0 ? absl::OkStatus()
                      : ToStatus(backend_->CopyFromHost(device_.bytes(), host_.data(), size_));
  }

 private:
  StepArena(Backend& backend, DeviceBuffer device, int64_t capacity)
      : backend_(&backend), device_(std::move(device)), host_(static_cast<size_t>(capacity)) {}

  Backend* backend_;
  DeviceBuffer device_;
  std::vector<char> host_;
  int64_t size_ = 0;
};

}  // namespace godwit
