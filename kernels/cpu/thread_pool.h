#pragma once
// Fork-join over a fixed set of threads. A waiting worker spins at most 50 us (ops of one step
// follow each other within that) and then parks on a condition variable, so an idle server uses no
// processor.

#include <cstdint>
#include <memory>
#include <type_traits>

namespace godwit {

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);  // >= 1; the caller of Run is thread 0
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Calls body(thread_index) once on each thread and returns when all have. One caller at a time;
  // body must not call Run.
  template <typename Body>
  void Run(const Body& body) {
    RunErased([](const void* context, int thread) { (*static_cast<const Body*>(context))(thread); },
              &body);
  }

  // Calls body(task) or body(task, thread_index) for each task in [0, num_tasks), handed out one at
  // a time in ascending order.
  template <typename Body>
  void ForEach(int64_t num_tasks, const Body& body) {
    const auto call = [&body](int64_t task, int thread) {
      if constexpr (std::is_invocable_v<const Body&, int64_t, int>) {
        body(task, thread);
      } else {
        body(task);
      }
    };
    if (num_tasks == 0) return;
    if (num_threads_ == 1 || num_tasks == 1) {
      for (int64_t task = 0; task < num_tasks; ++task) call(task, 0);
      return;
    }
    ResetTasks();
    Run([&](int thread) {
      for (int64_t task = NextTask(); task < num_tasks; task = NextTask()) call(task, thread);
    });
  }

  // Inside Run only: returns when every thread of the pool has called it. For ops with several
  // phases.
  void Barrier();

 private:
  using Erased = void (*)(const void* context, int thread);
  void RunErased(Erased function, const void* context);
  void ResetTasks();
  int64_t NextTask();

  struct Shared;
  int num_threads_;
  std::unique_ptr<Shared> shared_;
};

}  // namespace godwit
