#include "server/stop_finder.h"

#include <gtest/gtest.h>

#include <chrono>
#include <random>

#include "tests/server/piece_tokenizer.h"

namespace godwit {
namespace {

std::vector<SampledToken> Tokens(const std::vector<int32_t>& ids) {
  std::vector<SampledToken> tokens;
  for (int32_t id : ids) tokens.push_back({.token_id = id});
  return tokens;
}

TEST(StopAutomatonTest, ReportsTheFirstCompleteAndOfThoseTheLongest) {
  const StopAutomaton automaton({"bcd", "c", "abc"});
  StopAutomaton::State state = StopAutomaton::kStart;
  state = automaton.Next(state, 'a');
  state = automaton.Next(state, 'b');
  EXPECT_EQ(automaton.match(state), -1);
  EXPECT_EQ(automaton.depth(state), 2);
  state = automaton.Next(state, 'c');
  EXPECT_EQ(automaton.match(state), 2);  // "abc" ends here too, and is longer than "c"
}

TEST(StopAutomatonTest, DepthIsTheLongestSuffixThatBeginsAStop) {
  const StopAutomaton automaton({"aab", "abaa"});
  StopAutomaton::State state = StopAutomaton::kStart;
  std::string text;
  for (const char c : std::string("aaaxabab")) {
    state = automaton.Next(state, static_cast<uint8_t>(c));
    text += c;
    int64_t expected = 0;
    for (const std::string stop : {"aab", "abaa"}) {
      for (size_t size = 1; size <= stop.size(); ++size) {
        if (text.ends_with(stop.substr(0, size))) expected = std::max<int64_t>(expected, size);
      }
    }
    EXPECT_EQ(automaton.depth(state), expected) << text;
  }
}

TEST(StopFinderTest, FindsAStopAcrossTokensAndNamesTheTokenThatCompletesIt) {
  const PieceTokenizer tokenizer({"hel", "lo w", "orld", "!"});
  StopFinder finder(
      std::make_shared<StopAutomaton>(std::vector<std::string>{"xyz", "low", "o wor"}),
      PieceReader(&tokenizer, false));
  EXPECT_FALSE(finder(Tokens({0})).has_value());
  const auto match = finder(Tokens({1, 2, 3}));
  ASSERT_TRUE(match.has_value());
  EXPECT_EQ(match->last_token, 1);
  EXPECT_EQ(match->stop_index, 2);
}

TEST(StopFinderTest, DoesNotDependOnHowTheTokensArrive) {
  const PieceTokenizer tokenizer({"a", "b", "ab", "ba", "aab", "bb"});
  std::mt19937 random(5);
  for (int round = 0; round < 500; ++round) {
    std::vector<std::string> stops;
    for (int stop = 0; stop < 3; ++stop) {
      std::string text(1 + random() % 5, 'a');
      for (char& c : text) c = random() % 2 ? 'a' : 'b';
      stops.push_back(text);
    }
    const auto automaton = std::make_shared<StopAutomaton>(stops);
    std::vector<int32_t> ids(20);
    for (int32_t& id : ids) id = static_cast<int32_t>(random() % 6);

    // Oracle: the first place in the text where any stop ends, the longest of those.
    std::string text;
    int64_t expected_token = -1;
    std::string expected_stop;
    for (size_t token = 0; token < ids.size() && expected_token < 0; ++token) {
      for (const char c : tokenizer.Piece(ids[token])) {
        text += c;
        for (const std::string& stop : stops) {
          if (text.ends_with(stop) && stop.size() > expected_stop.size()) expected_stop = stop;
        }
        if (expected_stop.empty()) continue;
        expected_token = static_cast<int64_t>(token);
        break;
      }
    }
    StopFinder finder(automaton, PieceReader(&tokenizer, false));
    int64_t found_token = -1;
    std::string found_stop;
    for (size_t begin = 0; begin < ids.size() && found_token < 0;) {
      const size_t count = std::min<size_t>(1 + random() % 4, ids.size() - begin);
      const auto tokens = Tokens({ids.begin() + begin, ids.begin() + begin + count});
      if (const auto match = finder(tokens)) {
        found_token = static_cast<int64_t>(begin) + match->last_token;
        found_stop = stops[match->stop_index];
      }
      begin += count;
    }
    ASSERT_EQ(found_token, expected_token) << text;
    ASSERT_EQ(found_stop, expected_stop) << text;
  }
}

TEST(PieceReaderTest, DropsTheFirstSpaceOnce) {
  const PieceTokenizer tokenizer({"", " a", " b"});
  PieceReader reader(&tokenizer, true);
  EXPECT_EQ(reader.Next(0), "");
  EXPECT_EQ(reader.Next(1), "a");
  EXPECT_EQ(reader.Next(2), " b");
  PieceReader without(nullptr, true);
  EXPECT_EQ(without.Next(1), "");
}

// The bound that the engine thread relies on: 20 us for one token with the largest stops.
TEST(StopFinderTest, OneTokenTakesFarLessThan20Microseconds) {
  const PieceTokenizer tokenizer({std::string(16, 'a')});
  std::vector<std::string> stops;
  for (int stop = 0; stop < 16; ++stop)
    stops.push_back(std::string(255, 'a') + static_cast<char>('b' + stop));
  StopFinder finder(std::make_shared<StopAutomaton>(stops), PieceReader(&tokenizer, false));
  const auto tokens = Tokens({0});
  const auto begin = std::chrono::steady_clock::now();
  constexpr int kTokens = 20000;
  for (int token = 0; token < kTokens; ++token) ASSERT_FALSE(finder(tokens).has_value());
  const double us =
      std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count();
  RecordProperty("us_per_token", std::to_string(us / kTokens));
  EXPECT_LT(us / kTokens, 20);
}

}  // namespace
}  // namespace godwit
