#pragma once
// The host arrays of a step, gathered in one buffer and uploaded by one copy. What has the same
// size in two steps and is pushed before anything that has not lies at the same device address in
// both, which is what replays need.

#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/batch.h"
#include "engine/device_buffer.h"
#include "kernels/backend.h"
#include "kernels/base/check.h"

namespace godwit {

// Not thread-safe. Capacity is fixed: the engine computes it from its limits. One device buffer,
// because steps run in order; one host buffer for each step in flight, because the copy of a step
// runs after its Submit.
class StepArena {
 public:
  static constexpr int64_t kAlignment = 64;

  static absl::StatusOr<StepArena> Create(Backend& backend, int64_t capacity) {
    StepArena arena(backend, capacity);
    ASSIGN_OR_RETURN(arena.device_, DeviceBuffer::Allocate(backend, capacity));
    for (HostBuffer& host : arena.hosts_) {
      ASSIGN_OR_RETURN(host, HostBuffer::Allocate(backend, capacity));
    }
    return arena;
  }

  // Bytes that a Push of num_bytes takes at most.
  static constexpr int64_t Footprint(int64_t num_bytes) {
    return (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
  }

  void Begin(StepId step) {
    size_ = uploaded_ = 0;
    host_ = hosts_[static_cast<size_t>(step % kMaxStepsInFlight)].bytes();
  }

  // Where the next Push goes: ops that are replayed find the arrays of a pass at one place,
  // whatever the passes before it took.
  void Seek(int64_t offset) {
    GODWIT_CHECK(uploaded_ == size_ && offset >= size_ && offset <= capacity_);
    size_ = uploaded_ = offset;
  }

  // Room for `count` values, to be written before Upload; *device is where they will lie.
  template <typename T>
  std::span<T> Reserve(int64_t count, T** device) {
    static_assert(std::is_trivially_copyable_v<T>);
    const int64_t num_bytes = Footprint(count * static_cast<int64_t>(sizeof(T)));
    GODWIT_CHECK(size_ + num_bytes <= capacity_);
    const int64_t offset = std::exchange(size_, size_ + num_bytes);
    *device = reinterpret_cast<T*>(device_.bytes() + offset);
    return {reinterpret_cast<T*>(host_ + offset), static_cast<size_t>(count)};
  }

  // Device address of a copy of `values`, valid once Upload has been called.
  template <typename T>
  T* Push(std::span<const T> values) {
    T* device = nullptr;
    const std::span<T> host = Reserve<T>(std::ssize(values), &device);
    if (!values.empty()) std::memcpy(host.data(), values.data(), values.size_bytes());
    return device;
  }
  template <typename T>
  T* Push(const std::vector<T>& values) {
    return Push(std::span<const T>(values));
  }

  // What was pushed since the last call.
  absl::Status Upload() {
    const int64_t begin = std::exchange(uploaded_, size_);
    if (begin == size_) return absl::OkStatus();
    return ToStatus(backend_->CopyFromHost(device_.bytes() + begin, host_ + begin, size_ - begin));
  }

 private:
  StepArena(Backend& backend, int64_t capacity) : backend_(&backend), capacity_(capacity) {}

  Backend* backend_;
  int64_t capacity_;
  DeviceBuffer device_;
  HostBuffer hosts_[kMaxStepsInFlight];
  char* host_ = nullptr;  // of the step that is being built
  int64_t size_ = 0;
  int64_t uploaded_ = 0;  // bytes of it that are on their way
};

}  // namespace godwit
