#pragma once
// A few threads that run small pieces of work in order of arrival. Two are used: `delivery` turns
// tokens into messages, so that the engine thread never serialises or writes; `intake` splits long
// prompts, so that gRPC's own threads stay free.

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace godwit {

class WorkQueue {
 public:
  WorkQueue(int num_threads, size_t max_items);
  ~WorkQueue();  // Stop()

  // False when max_items are waiting, or after Stop(): `work` was not taken.
  bool Post(std::function<void()> work);
  // Runs what was taken, then ends the threads. Not to be called from one of them.
  void Stop();

 private:
  void Run();

  const size_t max_items_;
  std::mutex mutex_;  // guards items_, stopping_
  std::condition_variable wake_;
  std::deque<std::function<void()>> items_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace godwit
