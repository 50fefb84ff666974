#include "server/work_queue.h"

#include <utility>

namespace godwit {

WorkQueue::WorkQueue(int num_threads, size_t max_items) : max_items_(max_items) {
  for (int thread = 0; thread < num_threads; ++thread) threads_.emplace_back([this] { Run(); });
}

WorkQueue::~WorkQueue() { Stop(); }

bool WorkQueue::Post(std::function<void()> work) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stopping_ || items_.size() >= max_items_) return false;
    items_.push_back(std::move(work));
  }
  wake_.notify_one();
  return true;
}

void WorkQueue::Stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

void WorkQueue::Run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    wake_.wait(lock, [this] { return stopping_ || !items_.empty(); });
    if (items_.empty()) return;
    const std::function<void()> work = std::move(items_.front());
    items_.pop_front();
    lock.unlock();
    work();
    lock.lock();
  }
}

}  // namespace godwit
