#pragma once
// Working memory of one op. It grows to the largest size ever asked for and stays there: after
// warm-up no op allocates.

#include <cstdint>

namespace godwit {

class Scratch {
 public:
  Scratch() = default;
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // At least num_bytes, aligned to 64, contents unspecified; valid until the next Get. Null when
  // there is no memory.
  void* Get(int64_t num_bytes);

 private:
  void* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace godwit
