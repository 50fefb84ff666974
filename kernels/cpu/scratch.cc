#include "kernels/cpu/scratch.h"

#include <algorithm>

#include "kernels/cpu/memory.h"

namespace godwit {

Scratch::~Scratch() { ReleaseMemory(data_, capacity_); }

void* Scratch::Get(int64_t num_bytes) {
  if (num_bytes <= capacity_) return data_;
  ReleaseMemory(data_, capacity_);
  // Half again what is asked, so that growing step sizes do not each allocate.
  capacity_ = std::max<int64_t>(num_bytes + num_bytes / 2, 1 << 16);
  data_ = AcquireMemory(capacity_);
  if (data_ == nullptr) capacity_ = 0;
  return data_;
}

}  // namespace godwit
