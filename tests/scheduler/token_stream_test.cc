#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "scheduler/request.h"

namespace godwit {
namespace {

TokenEvent Tokens(int32_t output_index, std::vector<int32_t> ids) {
  TokenEvent event{.kind = TokenEvent::Kind::kTokens, .output_index = output_index};
  for (int32_t id : ids) event.tokens.push_back({.token_id = id});
  return event;
}

std::vector<TokenEvent> One(TokenEvent event) {
  std::vector<TokenEvent> events;
  events.push_back(std::move(event));
  return events;
}

TEST(TokenStreamTest, NotifiesOnlyWhenTheMailboxWasEmpty) {
  int num_notified = 0;
  TokenStream stream([&] { ++num_notified; });
  stream.Push({});
  EXPECT_EQ(num_notified, 0);
  stream.Push(One(Tokens(0, {1})));
  stream.Push(One(Tokens(0, {2})));
  EXPECT_EQ(num_notified, 1);
  EXPECT_EQ(stream.Drain().size(), 1u);
  EXPECT_TRUE(stream.Drain().empty());
  stream.Push(One(Tokens(0, {3})));
  EXPECT_EQ(num_notified, 2);
}

TEST(TokenStreamTest, NotifiesWithoutALock) {
  TokenStream* self = nullptr;
  size_t num_drained = 0;
  TokenStream stream([&] { num_drained += self->Drain().size(); });  // would deadlock
  self = &stream;
  stream.Push(One(Tokens(0, {1})));
  EXPECT_EQ(num_drained, 1u);
}

TEST(TokenStreamTest, MergesTokensPerOutputAndStaysBounded) {
  TokenStream stream([] {});
  stream.Push(One({.kind = TokenEvent::Kind::kPrompt}));
  for (int32_t id = 0; id < 1000; ++id) {
    std::vector<TokenEvent> events;
    events.push_back(Tokens(0, {id}));
    events.push_back(Tokens(1, {-id, -id}));
    stream.Push(std::move(events));
  }
  stream.Push(One({.kind = TokenEvent::Kind::kFinished, .output_index = 0}));
  stream.Push(One(Tokens(1, {7})));
  stream.Push(One({.kind = TokenEvent::Kind::kFinished, .output_index = 1}));
  stream.Push(One({.kind = TokenEvent::Kind::kDone}));
  const std::vector<TokenEvent> events = stream.Drain();
  ASSERT_EQ(events.size(), 6u);  // 2 n + 2
  EXPECT_EQ(events[0].kind, TokenEvent::Kind::kPrompt);
  ASSERT_EQ(events[1].tokens.size(), 1000u);
  EXPECT_EQ(events[1].tokens[999].token_id, 999);
  ASSERT_EQ(events[2].tokens.size(), 2001u);
  EXPECT_EQ(events[2].tokens.back().token_id, 7);
  EXPECT_EQ(events[5].kind, TokenEvent::Kind::kDone);
}

TEST(TokenStreamTest, DrainAndCancelOnOtherThreads) {
  constexpr int32_t kTokens = 20'000;
  TokenStream stream([] {});
  std::vector<int32_t> received;
  std::thread reader([&] {
    while (received.size() < kTokens) {
      for (const TokenEvent& event : stream.Drain()) {
        for (const SampledToken& token : event.tokens) received.push_back(token.token_id);
      }
      std::this_thread::yield();
    }
    stream.Cancel();
  });
  for (int32_t id = 0; id < kTokens; ++id) stream.Push(One(Tokens(0, {id})));
  while (!stream.cancelled()) std::this_thread::yield();
  reader.join();
  for (int32_t id = 0; id < kTokens; ++id) ASSERT_EQ(received[static_cast<size_t>(id)], id);
}

}  // namespace
}  // namespace godwit
