#pragma once
// Memory of a back end that frees itself: on the device, and on the host where copies are queued
// from and to.

#include <cstdint>
#include <utility>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/base/status.h"

namespace godwit {

template <OpStatus (Backend::*kAllocate)(int64_t, void**), void (Backend::*kFree)(void*)>
class BackendBuffer {
 public:
  BackendBuffer() = default;

  // Zeroed; the back end must outlive the buffer. Zero bytes: an empty buffer.
  static absl::StatusOr<BackendBuffer> Allocate(Backend& backend, int64_t num_bytes) {
    BackendBuffer buffer;
    if (num_bytes == 0) return buffer;
    RETURN_IF_ERROR((backend.*kAllocate)(num_bytes, &buffer.data_));
    buffer.backend_ = &backend;
    return buffer;
  }

  BackendBuffer(BackendBuffer&& other) noexcept
      : backend_(std::exchange(other.backend_, nullptr)),
        data_(std::exchange(other.data_, nullptr)) {}
  BackendBuffer& operator=(BackendBuffer&& other) noexcept {
    std::swap(backend_, other.backend_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~BackendBuffer() {
    if (data_ != nullptr) (backend_->*kFree)(data_);
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

using DeviceBuffer = BackendBuffer<&Backend::Allocate, &Backend::Free>;
using HostBuffer = BackendBuffer<&Backend::AllocateHost, &Backend::FreeHost>;

}  // namespace godwit
