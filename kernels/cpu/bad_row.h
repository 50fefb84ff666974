#pragma once
// The lowest row that a parallel loop found fault with.

#include <atomic>
#include <cstdint>

namespace godwit {

class BadRow {
 public:
  void Report(int64_t row) {
    int64_t lowest = row_.load(std::memory_order_relaxed);
    while (row < lowest && !row_.compare_exchange_weak(lowest, row, std::memory_order_relaxed)) {
    }
  }
  bool found() const { return row() != INT64_MAX; }
  int64_t row() const { return row_.load(std::memory_order_relaxed); }

 private:
  std::atomic<int64_t> row_ = INT64_MAX;
};

}  // namespace godwit
