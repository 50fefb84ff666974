#include "kernels/cpu/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <ctime>
#include <thread>
#include <vector>

namespace godwit {
namespace {

TEST(ThreadPoolTest, RunCallsEachThreadOnce) {
  for (int num_threads : {1, 2, 3, 7}) {
    ThreadPool pool(num_threads);
    std::vector<int> calls(static_cast<size_t>(num_threads), 0);
    for (int run = 1; run <= 1000; ++run) {
      pool.Run([&](int thread) { ++calls[static_cast<size_t>(thread)]; });
      for (int count : calls) ASSERT_EQ(count, run);
    }
  }
}

TEST(ThreadPoolTest, ForEachHandsOutEachTaskOnce) {
  ThreadPool pool(3);
  for (int64_t num_tasks : {0, 1, 2, 3, 100, 1000}) {
    std::vector<int> calls(static_cast<size_t>(num_tasks), 0);
    pool.ForEach(num_tasks, [&](int64_t task) { ++calls[static_cast<size_t>(task)]; });
    for (int count : calls) ASSERT_EQ(count, 1);
  }
}

TEST(ThreadPoolTest, PassesTheThreadThatRunsTheTask) {
  ThreadPool pool(3);
  std::vector<int64_t> sums(3, 0);
  pool.ForEach(1000, [&](int64_t task, int thread) { sums[static_cast<size_t>(thread)] += task; });
  EXPECT_EQ(sums[0] + sums[1] + sums[2], 999 * 1000 / 2);
}

// Plain memory written before a barrier is read by all after it: the thread sanitizer checks the
// ordering.
TEST(ThreadPoolTest, BarrierOrdersPhases) {
  for (int num_threads : {1, 2, 3, 5}) {
    ThreadPool pool(num_threads);
    std::vector<int64_t> values(static_cast<size_t>(num_threads), 0);
    std::atomic<int64_t> wrong{0};
    for (int run = 0; run < 50; ++run) {
      pool.Run([&](int thread) {
        for (int64_t phase = 1; phase <= 20; ++phase) {
          values[static_cast<size_t>(thread)] = run * 20 + phase;
          pool.Barrier();
          for (int64_t value : values) wrong += value != run * 20 + phase;
          pool.Barrier();
        }
      });
    }
    EXPECT_EQ(wrong.load(), 0);
  }
}

TEST(ThreadPoolTest, WorksAfterWorkersParked) {
  ThreadPool pool(3);
  for (int round = 0; round < 20; ++round) {
    // Longer than the spin of 50 us: the next Run has to wake parked threads.
    std::this_thread::sleep_for(std::chrono::microseconds(300));
    int calls[3] = {};
    pool.Run([&](int thread) {
      // The caller parks while a worker is late.
      if (thread == 2) std::this_thread::sleep_for(std::chrono::microseconds(300));
      calls[thread] = 1;
    });
    ASSERT_EQ(calls[0] + calls[1] + calls[2], 3);
  }
}

TEST(ThreadPoolTest, IdlePoolUsesNoProcessor) {
  ThreadPool pool(4);
  pool.Run([](int) {});
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const std::clock_t before = std::clock();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  const double busy_s = static_cast<double>(std::clock() - before) / CLOCKS_PER_SEC;
  EXPECT_LT(busy_s, 0.02);
}

TEST(ThreadPoolTest, EndsWithoutEverRunning) {
  for (int round = 0; round < 50; ++round) ThreadPool pool(4);
}

}  // namespace
}  // namespace godwit
