// 10,000 cancels through the engine thread, each at a random step of its request: waiting,
// prefilling, decoding, swapped. The others keep the tokens of an uninterrupted run, and nothing
// leaks.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <random>
#include <thread>

#include "scheduler/engine_loop.h"
#include "tests/scheduler/harness.h"

namespace godwit {
namespace {

constexpr int kNumThreads = 2;
constexpr int64_t kCancelsPerThread = 2'500;  // twice: with 1 and 2 steps in flight
constexpr size_t kMinOpen = 40;               // of all threads, for a step to run
constexpr size_t kOldest = 6;                 // on 4 slots: most of them run or are swapped
constexpr size_t kMaxOpen = 60;               // requests per client thread

// Cancels one of the oldest open requests in every third step. Runs between two steps, on the
// engine thread, and waits there until the clients have opened enough, so that the phases are hit
// in proportion to the steps spent in them, however slow the client threads are.
class Canceller {
 public:
  void Register(std::shared_ptr<TokenStream> stream) {
    std::lock_guard<std::mutex> lock(mutex_);
    streams_.push_back(std::move(stream));
    changed_.notify_one();
  }
  void Forget(const std::shared_ptr<TokenStream>& stream) {
    std::lock_guard<std::mutex> lock(mutex_);
    std::erase(streams_, stream);
  }
  void NoMoreRequests() {
    std::lock_guard<std::mutex> lock(mutex_);
    finishing_ = true;
    changed_.notify_one();
  }
  void OnStep() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return finishing_ || streams_.size() >= kMinOpen; });
    if (random_() % 3 != 0 || streams_.empty()) return;
    const size_t index = random_() % std::min<size_t>(streams_.size(), kOldest);
    streams_[index]->Cancel();
    streams_.erase(streams_.begin() + static_cast<std::ptrdiff_t>(index));
  }

 private:
  std::mutex mutex_;  // guards the rest
  std::condition_variable changed_;
  std::vector<std::shared_ptr<TokenStream>> streams_;  // in order of arrival
  bool finishing_ = false;
  std::mt19937_64 random_{11};
};

struct Tally {
  std::array<int64_t, 4> cancelled{};  // by phase
  int64_t num_ok = 0, num_compared = 0, num_cancelled = 0;
  std::vector<std::string> errors;
};

// One client thread: keeps kMaxOpen requests open until enough have been cancelled.
class Storm {
 public:
  Storm(uint64_t seed, EngineLoop& loop, Canceller& canceller)
      : random_(seed), loop_(loop), canceller_(canceller) {}

  Tally Run() {
    while (tally_.num_cancelled < kCancelsPerThread || !open_.empty()) {
      if (tally_.num_cancelled >= kCancelsPerThread) canceller_.NoMoreRequests();
      if (tally_.num_cancelled < kCancelsPerThread && open_.size() < kMaxOpen) Submit();
      Poll();
    }
    return std::move(tally_);
  }

 private:
  struct Open {
    GenerateRequest request;
    Client client;
  };

  void Submit() {
    Open open{.request = Harness::Request(1 + static_cast<int64_t>(random_() % 300),
                                          1 + static_cast<int64_t>(random_() % 60), random_())};
    if (random_() % 5 == 0) open.request.num_outputs = 2;
    if (random_() % 4 == 0) open.request.priority = static_cast<int32_t>(random_() % 4);
    GenerateRequest request = open.request;
    request.stream = open.client.stream;
    const absl::Status status = loop_.Submit(std::move(request));
    if (!status.ok()) tally_.errors.push_back(std::string(status.message()));
    canceller_.Register(open.client.stream);
    if (random_() % 10 == 0) {  // from this thread too, whatever the engine thread is doing
      open.client.stream->Cancel();
      loop_.Wake();
    }
    open_.push_back(std::move(open));
  }

  void Poll() {
    for (size_t index = 0; index < open_.size();) {
      Open& open = open_[index];
      open.client.Read();
      if (!open.client.done()) {
        ++index;
        continue;
      }
      canceller_.Forget(open.client.stream);
      End(open);
      std::swap(open_[index], open_.back());
      open_.pop_back();
    }
    std::this_thread::yield();
  }

  void End(const Open& open) {
    for (const std::string& error : open.client.errors) tally_.errors.push_back(error);
    if (absl::IsCancelled(open.client.status)) {
      ++tally_.num_cancelled;
      ++tally_.cancelled[static_cast<size_t>(open.client.phase)];
      return;
    }
    if (!open.client.status.ok()) tally_.errors.push_back(open.client.status.ToString());
    if (++tally_.num_ok % 2 == 0) return;
    ++tally_.num_compared;
    for (int32_t output = 0; output < open.request.num_outputs; ++output) {
      if (open.client.tokens[static_cast<size_t>(output)] !=
          FakeExecutor::ReferenceTokens(open.request, output, 1000, true)) {
        tally_.errors.push_back("tokens differ from an uninterrupted run");
      }
    }
  }

  std::mt19937_64 random_;
  EngineLoop& loop_;
  Canceller& canceller_;
  std::vector<Open> open_;
  Tally tally_;
};

Tally RunThreads(EngineLoop& loop, Canceller& canceller) {
  std::array<Tally, kNumThreads> tallies;
  std::vector<std::thread> threads;
  for (size_t thread = 0; thread < kNumThreads; ++thread) {
    threads.emplace_back(
        [&, thread] { tallies[thread] = Storm(17 + thread, loop, canceller).Run(); });
  }
  for (std::thread& thread : threads) thread.join();
  Tally sum;
  for (const Tally& tally : tallies) {
    for (size_t phase = 0; phase < 4; ++phase) sum.cancelled[phase] += tally.cancelled[phase];
    sum.num_ok += tally.num_ok;
    sum.num_compared += tally.num_compared;
    sum.num_cancelled += tally.num_cancelled;
    sum.errors.insert(sum.errors.end(), tally.errors.begin(), tally.errors.end());
  }
  return sum;
}

TEST(CancelStormTest, TenThousandCancelsInEveryPhase) {
  for (int steps_in_flight : {1, 2}) {
    Canceller canceller;
    std::unique_ptr<CacheManager> caches =
        *CacheManager::Create(FakeGeometry(4, true, 70, 1 << 20));
    FakeExecutor executor({.max_tokens_per_step = 128,
                           .max_steps_in_flight = steps_in_flight,
                           .fault =
                               [&canceller](const std::string& call, int64_t) {
                                 if (call == "submit") canceller.OnStep();
                                 return absl::OkStatus();
                               }},
                          *caches);
    EngineLoopOptions options;
    options.scheduler = {.max_tokens_per_step = 128,
                         .max_wait = 600'000 * kMillisecond,
                         .max_steps_in_flight = steps_in_flight,
                         .context_length = 1000};
    EngineLoop loop(options, executor, *caches);
    const Tally tally = RunThreads(loop, canceller);
    loop.Stop();
    for (const std::string& error : tally.errors) ADD_FAILURE() << error;
    std::printf(
        "cancelled: %lld waiting, %lld prefilling, %lld decoding, %lld swapped; "
        "compared %lld of %lld others\n",
        static_cast<long long>(tally.cancelled[0]), static_cast<long long>(tally.cancelled[1]),
        static_cast<long long>(tally.cancelled[2]), static_cast<long long>(tally.cancelled[3]),
        static_cast<long long>(tally.num_compared), static_cast<long long>(tally.num_ok));
    EXPECT_GE(tally.num_cancelled, kNumThreads * kCancelsPerThread);
    for (int64_t count : tally.cancelled) EXPECT_GE(count, 20);
    EXPECT_GE(tally.num_compared, 100);
    for (const std::string& violation : executor.violations()) ADD_FAILURE() << violation;
    EXPECT_EQ(caches->free_slots(), 4);
    EXPECT_EQ(caches->free_blocks(), 70);
    EXPECT_EQ(caches->free_swap_bytes(), 1 << 20);
    EXPECT_EQ(executor.num_host_copies(), 0u);
  }
}

}  // namespace
}  // namespace godwit
