#pragma once
// Device memory that frees itself.

#include <cstdint>
#include <utility>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/base/status.h"

namespace godwit {

class DeviceBuffer {
 public:
  DeviceBuffer() = default;

  // Zeroed; the back end must outlive the buffer. Zero bytes: an empty buffer.
  static absl::StatusOr<DeviceBuffer> Allocate(Backend& backend, int64_t num_bytes) {
    DeviceBuffer buffer;
    if (num_bytes == 0) return buffer;
    RETURN_IF_ERROR(backend.Allocate(num_bytes, &buffer.data_));
    buffer.backend_ = &backend;
    return buffer;
  }

  DeviceBuffer(DeviceBuffer&& other) noexcept
      : backend_(std::exchange(other.backend_, nullptr)),
        data_(std::exchange(other.data_, nullptr)) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(backend_, other.backend_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~DeviceBuffer() {
    if (data_ != nullptr) backend_->Free(data_);
  }

  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  char* bytes() const { return as<char>(); }

 private:
  Backend* backend_ = nullptr;
  void* data_ = nullptr;
};

}  // namespace godwit
