#include "kernels/cpu/thread_pool.h"

#include <immintrin.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels/base/check.h"

namespace godwit {
namespace {

constexpr auto kSpinTime = std::chrono::microseconds(50);
// Between two looks at the clock: at 40 to 140 cycles a pause this is 1 to 3 us.
constexpr int kPausesPerClock = 64;

// A counter that threads wait on: they spin, then park. The sequentially consistent order of (write
// value, read num_parked) in Advance against (write num_parked, read value) in Wait is what rules
// out a lost wake-up.
class alignas(64) Event {
 public:
  uint64_t Value() const { return value_.load(std::memory_order_acquire); }

  // Returns the value before.
  uint64_t Advance() {
    const uint64_t before = value_.fetch_add(1, std::memory_order_seq_cst);
    if (num_parked_.load(std::memory_order_seq_cst) > 0) {
      // Taken so that a thread between its check and its wait is not missed.
      { std::lock_guard<std::mutex> lock(mutex_); }
      condition_.notify_all();
    }
    return before;
  }

  // Returns once `reached(value)`.
  template <typename Reached>
  void Wait(const Reached& reached) {
    if (Spin(reached)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    num_parked_.fetch_add(1, std::memory_order_seq_cst);
    while (!reached(value_.load(std::memory_order_seq_cst))) condition_.wait(lock);
    num_parked_.fetch_sub(1, std::memory_order_seq_cst);
  }

 private:
  template <typename Reached>
  bool Spin(const Reached& reached) const {
    const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
    do {
      for (int pause = 0; pause < kPausesPerClock; ++pause) {
        if (reached(Value())) return true;
        _mm_pause();
      }
    } while (std::chrono::steady_clock::now() < deadline);
    return false;
  }

  std::atomic<uint64_t> value_{0};
  std::atomic<int> num_parked_{0};
  std::mutex mutex_;
  std::condition_variable condition_;
};

}  // namespace

// Written by the owner before start.Advance() and read by workers after it: function, context,
// stopping.
struct ThreadPool::Shared {
  Erased function = nullptr;
  const void* context = nullptr;
  bool stopping = false;
  Event start;    // one step per Run
  Event done;     // one step per worker that finished
  Event arrived;  // one step per thread in a barrier
  alignas(64) std::atomic<int64_t> next_task{0};
  std::vector<std::thread> workers;
};

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(num_threads), shared_(std::make_unique<Shared>()) {
  GODWIT_CHECK(num_threads >= 1);
  Shared& shared = *shared_;
  for (int thread = 1; thread < num_threads; ++thread) {
    shared.workers.emplace_back([&shared, thread] {
      for (uint64_t run = 1;; ++run) {
        shared.start.Wait([run](uint64_t value) { return value >= run; });
        if (shared.stopping) return;
        shared.function(shared.context, thread);
        shared.done.Advance();
      }
    });
  }
}

ThreadPool::~ThreadPool() {
  shared_->stopping = true;
  shared_->start.Advance();
  for (std::thread& worker : shared_->workers) worker.join();
}

void ThreadPool::RunErased(Erased function, const void* context) {
  if (num_threads_ == 1) {
    function(context, 0);
    return;
  }
  Shared& shared = *shared_;
  shared.function = function;
  shared.context = context;
  const uint64_t all_done = shared.done.Value() + static_cast<uint64_t>(num_threads_ - 1);
  shared.start.Advance();
  function(context, 0);
  shared.done.Wait([all_done](uint64_t value) { return value >= all_done; });
}

void ThreadPool::Barrier() {
  if (num_threads_ == 1) return;
  // Barriers are numbered by the arrivals before them: nobody can arrive twice before all have
  // arrived once.
  const uint64_t size = static_cast<uint64_t>(num_threads_);
  const uint64_t before = shared_->arrived.Advance();
  const uint64_t target = (before / size + 1) * size;
  shared_->arrived.Wait([target](uint64_t value) { return value >= target; });
}

void ThreadPool::ResetTasks() { shared_->next_task.store(0, std::memory_order_relaxed); }

int64_t ThreadPool::NextTask() {
  return shared_->next_task.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace godwit
