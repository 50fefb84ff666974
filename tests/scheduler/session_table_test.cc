// Sessions through the scheduler: what a request leaves and what the next one starts from.

#include "scheduler/session_table.h"

#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/scheduler/harness.h"

namespace godwit {
namespace {

constexpr int64_t kStoreBytes = 1 << 20;

HarnessOptions Options(int64_t num_slots, bool paged = false, int steps_in_flight = 1,
                       int64_t store_bytes = kStoreBytes, int64_t num_blocks = 1000) {
  HarnessOptions options{.geometry =
                             FakeGeometry(num_slots, paged, paged ? num_blocks : 0, 1 << 20)};
  options.geometry.store_bytes = store_bytes;
  options.scheduler.max_steps_in_flight = steps_in_flight;
  return options;
}

// What a session holds, as the test knows it: the whole text, and whether its last token is in the
// state.
struct Text {
  std::vector<int32_t> tokens;
  int64_t position = 0;
};

class SessionTest : public testing::TestWithParam<std::tuple<bool, int>> {
 protected:
  SessionTest() : harness_(Options(4, std::get<0>(GetParam()), std::get<1>(GetParam()))) {}

  SessionTable& sessions() { return harness_.scheduler->sessions(); }

  // Input after the text of `from`, kept as `to`; runs it and checks its tokens against a run of
  // the whole text.
  void Turn(Text& text, SessionKey from, SessionKey to, int64_t num_input, int64_t max_tokens,
            std::vector<int32_t> stop_ids = {}) {
    GenerateRequest request = Harness::Request(num_input, max_tokens, ++seed_);
    GenerateRequest whole = request;
    whole.token_ids.insert(whole.token_ids.begin(), text.tokens.begin(), text.tokens.end());
    whole.stop_token_ids = request.stop_token_ids = stop_ids;
    request.session = from;
    request.start_position = from == 0 ? 0 : text.position;
    request.keep_as = to;
    if (num_input > 0 || from == 0) {
      request.token_ids.assign(whole.token_ids.begin() + request.start_position,
                               whole.token_ids.end());
    }
    Client& client = harness_.Add(request);
    harness_.Run();
    ASSERT_TRUE(client.status.ok()) << client.status;
    harness_.ExpectReference(client, whole);
    if (to == 0) return;
    text.tokens = whole.token_ids;
    if (max_tokens > 0) {
      text.tokens.insert(text.tokens.end(), client.tokens[0].begin(), client.tokens[0].end());
    }
    text.position = sessions().position(to);
    EXPECT_EQ(client.kept_position, text.position);
    const bool all = client.kept_token < 0;
    EXPECT_EQ(text.position + (all ? 0 : 1), std::ssize(text.tokens));
    EXPECT_TRUE(all || client.kept_token == text.tokens.back());
  }

  void ExpectCleanWithout(std::vector<SessionKey> keys) {
    for (const SessionKey key : keys) sessions().Erase(key);
    EXPECT_EQ(harness_.caches->free_store_bytes(), kStoreBytes);
    harness_.ExpectClean();
  }

  Harness harness_;
  uint64_t seed_ = 0;
};

TEST_P(SessionTest, TurnsContinueTheTextAsOneRunWould) {
  Text text;
  Turn(text, 0, 1, 70, 9);
  for (const int64_t num_input : {3, 64, 1, 130, 5000}) Turn(text, 1, 1, num_input, 7);
  EXPECT_EQ(sessions().stats().num_from_device, 5);
  ExpectCleanWithout({1});
}

TEST_P(SessionTest, GoesOnWithoutInput) {
  Text text;
  Turn(text, 0, 1, 20, 5);
  Turn(text, 1, 1, 0, 6);
  Turn(text, 1, 1, 0, 1);
  EXPECT_EQ(text.tokens.size(), 20u + 5 + 6 + 1);
  ExpectCleanWithout({1});
}

TEST_P(SessionTest, AStopTokenEndsTheTextBeforeIt) {
  Text text;
  Turn(text, 0, 1, 20, 0);
  EXPECT_EQ(text.position, 20);
  std::vector<int32_t> all(1000);
  for (int32_t id = 0; id < 1000; ++id) all[static_cast<size_t>(id)] = id;
  // Every second id ends it, so that it ends at some step with another in flight.
  std::vector<int32_t> half;
  for (int32_t id = 0; id < 1000; id += 16) half.push_back(id);
  half.resize(60);
  for (int turn = 0; turn < 20; ++turn) Turn(text, 1, 1, 1 + turn % 3, 200, half);
  EXPECT_EQ(text.position, std::ssize(text.tokens));
  ExpectCleanWithout({1});
}

TEST_P(SessionTest, AnEndThatIsNotOkLeavesTheSessionAsItWas) {
  Text text;
  Turn(text, 0, 1, 20, 5);
  const int64_t position = text.position;
  GenerateRequest request = Harness::Request(30, 50);
  request.session = request.keep_as = 1;
  request.start_position = position;
  Client& client = harness_.Add(request);
  for (int step = 0; step < 7; ++step) harness_.Step();
  client.stream->Cancel();
  harness_.Run();
  EXPECT_EQ(client.status.code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(client.kept_position, -1);
  EXPECT_EQ(sessions().position(1), position);
  Turn(text, 1, 1, 4, 4);
  ExpectCleanWithout({1});
}

TEST_P(SessionTest, ForksShareTheStateAndGoTheirOwnWays) {
  Text text;
  Turn(text, 0, 1, 100, 3);
  ASSERT_TRUE(sessions().Fork(1, 2).ok());
  ASSERT_TRUE(sessions().Fork(2, 3).ok());
  EXPECT_EQ(sessions().stats().num_on_device, 1);
  Text second = text, third = text;
  Turn(second, 2, 2, 5, 5);
  Turn(third, 3, 3, 6, 5);
  Turn(text, 1, 1, 7, 5);
  Turn(text, 1, 0, 7, 5);  // not kept: the session stays where it is
  Turn(text, 1, 1, 2, 5);
  EXPECT_EQ(sessions().Fork(9, 10).code(), absl::StatusCode::kNotFound);
  ExpectCleanWithout({1, 2, 3});
}

TEST_P(SessionTest, IdleStatesMakeWayForRequestsAndComeBack) {
  std::vector<Text> texts(7);
  for (SessionKey key = 1; key <= 7; ++key)
    Turn(texts[static_cast<size_t>(key) - 1], 0, key, 30, 3);
  EXPECT_GT(sessions().stats().num_to_host, 2);
  // All slots at once are had by requests of no session.
  for (int client = 0; client < 4; ++client) harness_.Add(Harness::Request(10, 3));
  harness_.Step();
  EXPECT_EQ(sessions().stats().num_on_device, 0);
  EXPECT_EQ(sessions().stats().num_on_host, 7);
  harness_.Run();
  for (SessionKey key = 1; key <= 7; ++key) {
    Turn(texts[static_cast<size_t>(key) - 1], key, key, 5, 3);
  }
  EXPECT_EQ(sessions().stats().num_dropped, 0);
  ExpectCleanWithout({1, 2, 3, 4, 5, 6, 7});
}

TEST_P(SessionTest, ExportedAndImportedContinuesAsBefore) {
  Text text;
  Turn(text, 0, 1, 50, 4);
  auto image = sessions().Export(1, *harness_.executor);
  ASSERT_TRUE(image.ok()) << image.status();
  EXPECT_EQ((*image)->position, text.position);
  ASSERT_TRUE(sessions().Import(2, text.position, *image, *harness_.executor).ok());
  Text second = text;
  Turn(second, 2, 2, 3, 5);
  Turn(text, 1, 1, 4, 5);
  EXPECT_EQ(sessions().Export(9, *harness_.executor).status().code(), absl::StatusCode::kNotFound);
  ExpectCleanWithout({1, 2});
}

INSTANTIATE_TEST_SUITE_P(Kinds, SessionTest,
                         testing::Combine(testing::Bool(), testing::Values(1, 2)));

TEST(SessionTableTest, WithoutRoomTheOldestStateIsGivenUp) {
  HarnessOptions options = Options(2, false, 1, 0);
  Harness harness(options);
  for (SessionKey key = 1; key <= 3; ++key) {
    GenerateRequest request = Harness::Request(10, 3, static_cast<uint64_t>(key));
    request.keep_as = key;
    harness.Add(request);
    harness.Run();
  }
  SessionTable& sessions = harness.scheduler->sessions();
  EXPECT_EQ(sessions.place(1), SessionTable::Place::kLost);
  EXPECT_EQ(sessions.place(3), SessionTable::Place::kDevice);
  EXPECT_EQ(sessions.stats().num_dropped, 1);
  GenerateRequest request = Harness::Request(10, 3);
  request.session = 1;
  request.start_position = 12;
  const Client& client = harness.Add(request);
  harness.Run();
  EXPECT_EQ(client.status.code(), absl::StatusCode::kDataLoss);
  for (SessionKey key = 1; key <= 3; ++key) sessions.Erase(key);
  harness.ExpectClean();
}

TEST(SessionTableTest, WhereNothingMayBeGivenUpARequestIsRefused) {
  HarnessOptions options = Options(1, false, 1, 0);
  options.scheduler.may_drop_sessions = false;
  Harness harness(options);
  GenerateRequest request = Harness::Request(10, 3);
  request.keep_as = 1;
  harness.Add(request);
  harness.Run();
  const Client& client = harness.Add(Harness::Request(10, 3));
  harness.Run();
  EXPECT_EQ(client.status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(harness.scheduler->sessions().place(1), SessionTable::Place::kDevice);
  harness.scheduler->sessions().Erase(1);
  harness.ExpectClean();
}

// One on the device has to make way and has no room, though host memory as a whole would hold it:
// the request waits for whoever takes another elsewhere, but not for ever.
TEST(SessionTableTest, WhereNothingMayBeGivenUpARequestWaitsForRoom) {
  enum class Outcome { kRoom, kRefused, kLate };
  for (const Outcome outcome : {Outcome::kRoom, Outcome::kRefused, Outcome::kLate}) {
    HarnessOptions options = Options(1, false);
    options.geometry.store_bytes = Harness(options).caches->StateBytes(20) * 3 / 2;
    options.scheduler.may_drop_sessions = false;
    options.scheduler.max_wait = 50 * kMillisecond;
    Harness harness(options);
    SessionTable& sessions = harness.scheduler->sessions();
    for (SessionKey key = 1; key <= 2; ++key) {
      GenerateRequest request = Harness::Request(10, 3, static_cast<uint64_t>(key));
      request.keep_as = key;
      harness.Add(request);
      harness.Run();
    }
    EXPECT_EQ(sessions.place(1), SessionTable::Place::kHost);
    const GenerateRequest request = Harness::Request(10, 3);
    const Client& client = harness.Add(request);
    for (int step = 0; step < 20; ++step) EXPECT_FALSE(harness.Step());
    EXPECT_FALSE(client.done());
    EXPECT_TRUE(harness.scheduler->waits_for_room());
    EXPECT_EQ(sessions.stats().store_bytes_wanted, harness.caches->StateBytes(12));
    if (outcome == Outcome::kRoom) sessions.Erase(1);
    if (outcome == Outcome::kRefused) sessions.RefuseRoom();
    if (outcome == Outcome::kLate) harness.now += 30 * kMillisecond;
    harness.Run();
    EXPECT_EQ(client.status.code(), outcome == Outcome::kRoom
                                        ? absl::StatusCode::kOk
                                        : absl::StatusCode::kResourceExhausted);
    if (outcome == Outcome::kRoom) harness.ExpectReference(client, request);
    EXPECT_EQ(sessions.place(2), outcome == Outcome::kRoom ? SessionTable::Place::kHost
                                                           : SessionTable::Place::kDevice);
    EXPECT_EQ(sessions.stats().store_bytes_wanted, 0);
    EXPECT_FALSE(harness.scheduler->waits_for_room());
    for (SessionKey key = 1; key <= 2; ++key) sessions.Erase(key);
    harness.ExpectClean();
  }
}

// One that host memory could never hold stays where it is, and does not keep the others there.
TEST(SessionTableTest, AStateTooLargeForHostMemoryIsPassedOver) {
  HarnessOptions options = Options(2, /*paged=*/true);
  options.geometry.store_bytes = Harness(options).caches->StateBytes(100);
  options.scheduler.may_drop_sessions = false;
  Harness harness(options);
  SessionTable& sessions = harness.scheduler->sessions();
  for (const SessionKey key : {1, 2}) {
    GenerateRequest request = Harness::Request(key == 1 ? 400 : 10, 3);
    request.keep_as = key;
    harness.Add(request);
    harness.Run();
  }
  const Client& client = harness.Add(Harness::Request(10, 3));
  harness.Run();
  EXPECT_TRUE(client.status.ok()) << client.status;
  EXPECT_EQ(sessions.place(1), SessionTable::Place::kDevice);
  EXPECT_EQ(sessions.place(2), SessionTable::Place::kHost);
  for (const SessionKey key : {1, 2}) sessions.Erase(key);
  harness.ExpectClean();
}

// Thousands of turns, forks, exports and ends of every kind, with drafts, two steps in flight and
// preemption: no slot or byte is left, and every text is one run's.
TEST(SessionTableTest, RandomTurnsAndForksLeakNothing) {
  for (const bool paged : {false, true}) {
    HarnessOptions options = Options(5, paged, 2, 20'000, 60);
    Harness harness(options);
    SessionTable& sessions = harness.scheduler->sessions();
    std::mt19937_64 random(7);
    SessionKey next = 1;
    std::vector<SessionKey> idle;
    std::vector<std::pair<Client*, SessionKey>> running;
    for (int step = 0; step < 6000; ++step) {
      const auto pick = [&] { return static_cast<size_t>(random() % idle.size()); };
      if (running.size() < 6 && random() % 3 == 0) {
        GenerateRequest request =
            Harness::Request(1 + static_cast<int64_t>(random() % 90), random() % 12, random());
        if (!idle.empty() && random() % 3 != 0) {
          const size_t at = pick();
          request.session = idle[at];
          request.start_position = sessions.position(idle[at]);
          request.keep_as = random() % 4 == 0 ? 0 : idle[at];
          idle.erase(idle.begin() + static_cast<std::ptrdiff_t>(at));
        } else {
          request.keep_as = next++;
        }
        request.priority = static_cast<int32_t>(random() % 3);
        if (random() % 2 == 0) request.max_draft_tokens = 3;
        for (int32_t id = 0; id < 60; ++id) request.stop_token_ids.push_back(id);
        if (request.max_tokens > 0 && random() % 8 == 0) request.num_outputs = 2;
        if (random() % 9 == 0) request.time_limit = harness.now + 4 * kMillisecond;
        const SessionKey key = request.session != 0 ? request.session : request.keep_as;
        running.emplace_back(&harness.Add(std::move(request)), key);
      }
      if (!idle.empty() && random() % 7 == 0) {
        if (sessions.Fork(idle[pick()], next).ok()) idle.push_back(next++);
      }
      if (!idle.empty() && random() % 11 == 0) {
        const size_t at = pick();
        sessions.Erase(idle[at]);
        idle.erase(idle.begin() + static_cast<std::ptrdiff_t>(at));
      }
      if (!idle.empty() && random() % 13 == 0) {
        const SessionKey from = idle[pick()];
        auto image = sessions.Export(from, *harness.executor);
        if (image.ok() &&
            sessions.Import(next, (*image)->position, *image, *harness.executor).ok()) {
          idle.push_back(next++);
        }
      }
      if (!running.empty() && random() % 29 == 0) {
        running[random() % running.size()].first->stream->Cancel();
      }
      harness.Step();
      std::erase_if(running, [&](const auto& one) {
        if (!one.first->done()) return false;
        if (sessions.Has(one.second)) idle.push_back(one.second);
        return true;
      });
    }
    harness.Run();
    const SessionStats stats = sessions.stats();
    EXPECT_GT(stats.num_kept, 300);
    EXPECT_GT(stats.num_to_host, 30);
    EXPECT_GT(stats.num_dropped, 3);
    EXPECT_GT(stats.num_from_host, 10);
    for (SessionKey key = 1; key < next; ++key) sessions.Erase(key);
    EXPECT_EQ(harness.caches->free_store_bytes(), 20'000);
    harness.ExpectClean();
  }
}

}  // namespace
}  // namespace godwit
