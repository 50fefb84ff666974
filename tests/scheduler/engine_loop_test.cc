#include "scheduler/engine_loop.h"

#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "tests/scheduler/harness.h"

namespace godwit {
namespace {

constexpr TimeNs kSecond = 1'000 * kMillisecond;

// A client on its own thread's terms: waits for the notify callback.
class WaitingClient {
 public:
  WaitingClient()
      : client(std::make_shared<TokenStream>([shared = shared_] {
          std::lock_guard<std::mutex> lock(shared->mutex);
          shared->notified = true;
          shared->changed.notify_one();
        })) {}

  template <typename Predicate>
  void ReadUntil(Predicate predicate) {
    while (!predicate(client)) {
      std::unique_lock<std::mutex> lock(shared_->mutex);
      shared_->changed.wait(lock, [&] { return shared_->notified; });
      shared_->notified = false;
      lock.unlock();
      client.Read();
    }
  }
  void ReadAll() {
    ReadUntil([](const Client& c) { return c.done(); });
  }

 private:
  struct Shared {
    std::mutex mutex;  // guards notified
    std::condition_variable changed;
    bool notified = false;
  };
  std::shared_ptr<Shared> shared_ = std::make_shared<Shared>();

 public:
  Client client;
};

struct Server {
  explicit Server(int64_t num_slots, int steps_in_flight = 1, FakeExecutorOptions fake = {},
                  EngineLoopOptions loop_options = {}) {
    caches = *CacheManager::Create(FakeGeometry(num_slots, true, 64 * num_slots, 1 << 24));
    fake.max_steps_in_flight = steps_in_flight;
    executor = std::make_unique<FakeExecutor>(fake, *caches);
    loop_options.scheduler.max_steps_in_flight = steps_in_flight;
    loop_options.scheduler.context_length = 100'000;
    loop = std::make_unique<EngineLoop>(std::move(loop_options), *executor, *caches);
  }
  absl::Status Submit(GenerateRequest request, const Client& client) {
    request.stream = client.stream;
    return loop->Submit(std::move(request));
  }
  void StopAndExpectClean() {
    loop->Stop();
    for (const std::string& violation : executor->violations()) ADD_FAILURE() << violation;
    const CacheGeometry& geometry = caches->geometry();
    EXPECT_EQ(caches->free_slots(), geometry.num_slots);
    EXPECT_EQ(caches->free_blocks(), geometry.num_blocks);
    EXPECT_EQ(caches->free_swap_bytes(), geometry.swap_bytes);
    EXPECT_EQ(executor->num_host_copies(), 0u);
  }

  std::unique_ptr<CacheManager> caches;
  std::unique_ptr<FakeExecutor> executor;
  std::unique_ptr<EngineLoop> loop;
};

// Holds the engine thread at its next submit until Open.
class Gate {
 public:
  FakeExecutorOptions Options() {
    return {.fault = [this](const std::string& call, int64_t) {
      if (call == "submit") {
        std::unique_lock<std::mutex> lock(mutex_);
        reached_ = true;
        changed_.notify_all();
        changed_.wait(lock, [this] { return open_; });
      }
      return absl::OkStatus();
    }};
  }
  void AwaitReached() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return reached_; });
  }
  void Open() {
    std::lock_guard<std::mutex> lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;  // guards the rest
  std::condition_variable changed_;
  bool reached_ = false, open_ = false;
};

TEST(EngineLoopTest, RunsRequestsAndReportsSteps) {
  for (int steps_in_flight : {1, 2}) {
    std::atomic<int64_t> num_tokens{0};
    EngineLoopOptions options{.on_step = [&](const StepReport& report) {
      num_tokens += report.num_tokens;
      EXPECT_GE(report.step_ns, report.forward_ns);
      EXPECT_GE(report.num_rows, 1);
    }};
    Server server(4, steps_in_flight, {}, options);
    const GenerateRequest request = Harness::Request(100, 20);
    WaitingClient waiting;
    ASSERT_TRUE(server.Submit(request, waiting.client).ok());
    waiting.ReadAll();
    EXPECT_TRUE(waiting.client.status.ok());
    EXPECT_EQ(waiting.client.tokens[0], FakeExecutor::ReferenceTokens(request, 0, 1000, true));
    EXPECT_LT(waiting.client.timings.submitted, waiting.client.timings.finished);
    server.StopAndExpectClean();
    EXPECT_EQ(num_tokens, 119);
    EXPECT_EQ(server.loop->stats().generation_tokens, 20);
    EXPECT_EQ(server.loop->stats().num_running, 0);
  }
}

TEST(EngineLoopTest, RefusesInvalidRequestsAtOnce) {
  Server server(2);
  Client client;
  EXPECT_EQ(server.Submit(Harness::Request(0, 4), client).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(server.Submit(Harness::Request(4, 1'000'000), client).code(),
            absl::StatusCode::kInvalidArgument);
  GenerateRequest three = Harness::Request(4, 4);
  three.num_outputs = 3;
  EXPECT_EQ(server.Submit(three, client).code(), absl::StatusCode::kInvalidArgument);
  server.StopAndExpectClean();
  client.Read();
  EXPECT_EQ(client.num_done, 0);
}

TEST(EngineLoopTest, CountsTheQueueAndTheMailboxAtOnce) {
  for (bool mailbox : {false, true}) {
    Gate gate;
    EngineLoopOptions options;
    options.scheduler.max_waiting = mailbox ? 100 : 5;
    options.max_mailbox = mailbox ? 5 : 100;
    Server server(1, 1, gate.Options(), options);
    std::deque<Client> clients(7);
    ASSERT_TRUE(server.Submit(Harness::Request(4, 4), clients[0]).ok());
    gate.AwaitReached();  // the first one left the mailbox, the engine thread stands still
    int num_accepted = 0;
    for (size_t index = 1; index < 7; ++index) {
      const absl::Status status = server.Submit(Harness::Request(4, 4), clients[index]);
      num_accepted += status.ok();
      if (!status.ok()) {
        EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
      }
    }
    // Until the engine thread publishes, the running one counts as waiting too.
    EXPECT_EQ(num_accepted, mailbox ? 5 : 4);
    gate.Open();
    server.loop->Drain(60 * kSecond);
    server.StopAndExpectClean();
    int num_done = 0;
    for (Client& client : clients) {
      client.Read();
      num_done += client.num_done;
    }
    EXPECT_EQ(num_done, 1 + num_accepted);
  }
}

TEST(EngineLoopTest, DrainLetsAcceptedRequestsFinishAndRefusesNewOnes) {
  Server server(2);
  std::deque<Client> clients(6);
  for (Client& client : clients) ASSERT_TRUE(server.Submit(Harness::Request(50, 50), client).ok());
  server.loop->Drain(60 * kSecond);
  for (Client& client : clients) {
    client.Read();
    EXPECT_EQ(client.num_done, 1);
    EXPECT_TRUE(client.status.ok());
  }
  EXPECT_EQ(server.Submit(Harness::Request(4, 4), clients[0]).code(),
            absl::StatusCode::kUnavailable);
  server.loop->Drain(0);  // idle: returns at once
  server.StopAndExpectClean();
}

TEST(EngineLoopTest, DrainEndsTheRestWithUnavailableAtItsTimeout) {
  for (int steps_in_flight : {1, 2}) {
    Gate gate;
    Server server(2, steps_in_flight, gate.Options());
    std::deque<WaitingClient> clients(5);
    for (WaitingClient& waiting : clients) {
      ASSERT_TRUE(server.Submit(Harness::Request(50, 1'900), waiting.client).ok());
    }
    gate.AwaitReached();
    std::thread drainer([&] { server.loop->Drain(0); });
    std::deque<Client> late;
    while (!absl::IsUnavailable(server.Submit(Harness::Request(4, 4), late.emplace_back()))) {
      std::this_thread::yield();  // accepted, or the queue is full, until Drain has begun
    }
    gate.Open();
    drainer.join();
    int num_unavailable = 0;
    for (WaitingClient& waiting : clients) {
      waiting.ReadAll();
      EXPECT_EQ(waiting.client.num_done, 1);
      num_unavailable += absl::IsUnavailable(waiting.client.status);
    }
    EXPECT_GE(num_unavailable, 1);  // all, unless the thread of Drain is very slow
    server.StopAndExpectClean();
  }
}

TEST(EngineLoopTest, StopEndsEverythingWithUnavailable) {
  Gate gate;
  Server server(1, 1, gate.Options());
  std::deque<Client> clients(4);
  for (Client& client : clients) ASSERT_TRUE(server.Submit(Harness::Request(50, 900), client).ok());
  gate.AwaitReached();
  std::thread stopper([&] { server.loop->Stop(); });
  Client late;
  while (!absl::IsUnavailable(server.Submit(Harness::Request(4, 4), late))) {
    std::this_thread::yield();  // RESOURCE_EXHAUSTED or accepted until Stop has begun
    late = Client();
  }
  gate.Open();
  stopper.join();
  for (Client& client : clients) {
    client.Read();
    EXPECT_TRUE(absl::IsUnavailable(client.status));
  }
  server.StopAndExpectClean();
}

TEST(EngineLoopTest, ALostDeviceEndsEverythingWithUnavailable) {
  for (const char* planted : {"submit", "collect"}) {
    for (int steps_in_flight : {1, 2}) {
      Gate gate;
      FakeExecutorOptions fake = gate.Options();
      fake.fault = [planted, hold = fake.fault](const std::string& call, int64_t count) {
        const bool lost = call == planted && count == 5;
        return lost ? absl::UnavailableError("device gone") : hold(call, count);
      };
      Server server(2, steps_in_flight, fake);
      std::deque<WaitingClient> clients(4);
      for (WaitingClient& waiting : clients) {
        ASSERT_TRUE(server.Submit(Harness::Request(50, 900), waiting.client).ok());
      }
      gate.Open();
      for (WaitingClient& waiting : clients) {
        waiting.ReadAll();
        EXPECT_TRUE(absl::IsUnavailable(waiting.client.status));
        EXPECT_TRUE(IsDeviceLost(waiting.client.status));
      }
      EXPECT_TRUE(server.loop->device_lost());
      EXPECT_EQ(server.loop->device_lost_cause(), "device gone");
      Client late;
      EXPECT_TRUE(absl::IsUnavailable(server.Submit(Harness::Request(4, 4), late)));
      server.StopAndExpectClean();
    }
  }
}

TEST(EngineLoopTest, OtherErrorsEndOnlyTheRequestsOfTheStep) {
  FakeExecutorOptions fake{.fault = [](const std::string& call, int64_t count) {
    return call == "submit" && count == 5 ? absl::InternalError("planted") : absl::OkStatus();
  }};
  Server server(1, 2, fake);
  std::deque<WaitingClient> clients(3);
  for (WaitingClient& waiting : clients) {
    ASSERT_TRUE(server.Submit(Harness::Request(50, 90), waiting.client).ok());
  }
  for (WaitingClient& waiting : clients) waiting.ReadAll();
  EXPECT_TRUE(absl::IsInternal(clients[0].client.status));
  EXPECT_TRUE(clients[1].client.status.ok());
  EXPECT_TRUE(clients[2].client.status.ok());
  EXPECT_FALSE(server.loop->device_lost());
  server.StopAndExpectClean();
}

TEST(EngineLoopTest, CancelsARunningRequest) {
  Server server(1, 2);
  WaitingClient waiting;
  ASSERT_TRUE(server.Submit(Harness::Request(4, 1'000), waiting.client).ok());
  waiting.ReadUntil([](const Client& client) {
    return client.done() || (!client.tokens.empty() && !client.tokens[0].empty());
  });
  waiting.client.stream->Cancel();
  server.loop->Wake();
  waiting.ReadAll();
  // The fake may have been quicker.
  EXPECT_TRUE(waiting.client.status.ok() || absl::IsCancelled(waiting.client.status));
  EXPECT_GT(server.loop->last_heartbeat(), 0);
  server.StopAndExpectClean();
}

}  // namespace
}  // namespace godwit
