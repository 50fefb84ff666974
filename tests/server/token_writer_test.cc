#include "server/token_writer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "server/utf8.h"
#include "tests/server/piece_tokenizer.h"

namespace godwit {
namespace {

std::vector<SampledToken> Tokens(const std::vector<int32_t>& ids) {
  std::vector<SampledToken> tokens;
  for (int32_t id : ids) tokens.push_back({.token_id = id, .logprob = -static_cast<float>(id)});
  return tokens;
}

std::vector<int32_t> Ids(const TextDelta& delta) {
  std::vector<int32_t> ids;
  for (const SampledToken& token : delta.tokens) ids.push_back(token.token_id);
  return ids;
}

class TokenWriterTest : public testing::Test {
 protected:
  TokenWriter Writer(std::vector<std::string> stops = {}, bool include_stop = false,
                     bool drop_space = false) {
    return TokenWriter(
        {.stops = std::make_shared<StopAutomaton>(std::move(stops)), .include_stop = include_stop},
        PieceReader(&tokenizer_, drop_space));
  }
  enum Id : int32_t { kHello, kWorld, kE4, kB8, k96, kBang, kEmpty, kEnd };
  const PieceTokenizer tokenizer_{{"Hello", " world", "\xE4", "\xB8", "\x96", "!", "", "END"}};
};

TEST_F(TokenWriterTest, PassesPlainTextThroughAtOnce) {
  TokenWriter writer = Writer();
  const auto delta = writer.Append(Tokens({kHello, kWorld}));
  ASSERT_TRUE(delta.has_value());
  EXPECT_EQ(delta->text, "Hello world");
  EXPECT_EQ(Ids(*delta), (std::vector<int32_t>{kHello, kWorld}));
  EXPECT_EQ(delta->tokens[1].logprob, -1);
  EXPECT_FALSE(writer.Finish({.reason = FinishReason::kLength}).has_value());
  EXPECT_EQ(writer.num_tokens(), 2);
}

TEST_F(TokenWriterTest, HoldsBackTheBytesOfACharacter) {
  TokenWriter writer = Writer();
  EXPECT_FALSE(writer.Append(Tokens({kE4})).has_value());
  EXPECT_FALSE(writer.Append(Tokens({kB8})).has_value());
  const auto delta = writer.Append(Tokens({k96}));
  ASSERT_TRUE(delta.has_value());
  EXPECT_EQ(delta->text, "世");
  EXPECT_EQ(delta->tokens.size(), 3u);
}

TEST_F(TokenWriterTest, ReplacesACharacterThatNeverComes) {
  TokenWriter writer = Writer();
  EXPECT_FALSE(writer.Append(Tokens({kE4, kB8})).has_value());
  const auto delta = writer.Append(Tokens({kBang}));
  ASSERT_TRUE(delta.has_value());
  EXPECT_EQ(delta->text, "\uFFFD\uFFFD!");
  EXPECT_FALSE(writer.Append(Tokens({kE4})).has_value());
  EXPECT_EQ(writer.Finish({.reason = FinishReason::kLength})->text, "\uFFFD");
}

TEST_F(TokenWriterTest, CutsTheStopStringButKeepsItsTokens) {
  TokenWriter writer = Writer({"wor"});
  EXPECT_EQ(writer.Append(Tokens({kHello}))->text, "Hello");
  EXPECT_FALSE(writer.Append(Tokens({kWorld})).has_value());
  const auto delta = writer.Finish({.reason = FinishReason::kStopString, .stop_index = 0});
  EXPECT_EQ(delta->text, " ");
  EXPECT_EQ(Ids(*delta), (std::vector<int32_t>{kWorld}));
}

TEST_F(TokenWriterTest, KeepsTheStopStringAndNothingAfterIt) {
  TokenWriter writer = Writer({"wor"}, /*include_stop=*/true);
  writer.Append(Tokens({kHello, kWorld}));
  EXPECT_EQ(writer.Finish({.reason = FinishReason::kStopString, .stop_index = 0})->text, " wor");
}

TEST_F(TokenWriterTest, ShowsWhatTurnedOutToBeNoStop) {
  TokenWriter writer = Writer({"Hello there"});
  EXPECT_FALSE(writer.Append(Tokens({kHello})).has_value());
  EXPECT_EQ(writer.Append(Tokens({kWorld}))->text, "Hello world");
}

TEST_F(TokenWriterTest, ShowsAllThatIsLeftWhenTheLengthIsReached) {
  TokenWriter writer = Writer({"Hello there"});
  writer.Append(Tokens({kHello}));
  EXPECT_EQ(writer.Finish({.reason = FinishReason::kLength})->text, "Hello");
}

TEST_F(TokenWriterTest, TokensWithoutTextGoOutToo) {
  TokenWriter writer = Writer();
  const auto delta = writer.Append(Tokens({kEmpty}));
  ASSERT_TRUE(delta.has_value());
  EXPECT_EQ(delta->text, "");
  EXPECT_EQ(delta->tokens.size(), 1u);
}

TEST_F(TokenWriterTest, DropsTheFirstSpaceOfAText) {
  TokenWriter writer = Writer({}, false, /*drop_space=*/true);
  EXPECT_EQ(writer.Append(Tokens({kWorld}))->text, "world");
  EXPECT_EQ(writer.Append(Tokens({kWorld}))->text, " world");
}

// What may be shown of `pieces` so far, by brute force: the longest run of whole tokens that ends
// at a character and before every suffix that begins a stop.
size_t NumTokensThatMayBeShown(const std::vector<std::string>& pieces,
                               const std::vector<std::string>& stops) {
  std::string text;
  std::vector<size_t> ends;
  for (const std::string& piece : pieces) ends.push_back((text += piece).size());
  size_t limit = text.size();
  for (const std::string& stop : stops) {
    for (size_t size = 1; size < stop.size(); ++size) {
      if (text.ends_with(stop.substr(0, size))) limit = std::min(limit, text.size() - size);
    }
  }
  std::vector<bool> boundary(text.size() + 1, false);  // a character, or a byte of none, ends here
  for (size_t at = 0;;) {
    boundary[at] = true;
    if (at == text.size()) break;
    const Utf8Prefix prefix = ReadUtf8(std::string_view(text).substr(at));
    if (prefix.kind == Utf8Prefix::Kind::kIncomplete) break;
    at += prefix.num_bytes;
  }
  size_t num_tokens = 0;
  for (size_t token = 0; token < ends.size(); ++token) {
    if (ends[token] <= limit && boundary[ends[token]]) num_tokens = token + 1;
  }
  return num_tokens;
}

struct Stop {
  size_t begin = std::string::npos, end = 0;
};

Stop FirstStop(const std::string& text, const std::vector<std::string>& stops) {
  for (size_t end = 1; end <= text.size(); ++end) {
    size_t longest = 0;
    for (const std::string& stop : stops) {
      if (std::string_view(text).substr(0, end).ends_with(stop))
        longest = std::max(longest, stop.size());
    }
    if (longest > 0) return {end - longest, end};
  }
  return {};
}

TEST(TokenWriterPropertyTest, AgreesWithBruteForceOnRandomPiecesAndStops) {
  std::mt19937 random(20261122);
  const std::vector<std::string> units = {"a",    "b",    " ",    "é",    "世", "🦆",
                                          "\xE4", "\xB8", "\x96", "\xF0", "ab", "ba"};
  for (int round = 0; round < 3000; ++round) {
    SCOPED_TRACE(testing::Message() << "round " << round);
    const auto unit = [&] { return units[random() % units.size()]; };
    std::vector<std::string> vocabulary = {""};
    for (int id = 1; id < 12; ++id) vocabulary.push_back(random() % 3 ? unit() : unit() + unit());
    std::vector<std::string> stops;
    for (size_t stop = random() % 4; stop > 0; --stop) {
      const std::string text = unit() + (random() % 2 ? unit() : "") + (random() % 3 ? "" : unit());
      if (IsValidUtf8(text)) stops.push_back(text);
    }
    const bool include_stop = random() % 2;
    const PieceTokenizer tokenizer(vocabulary);
    const auto automaton = std::make_shared<StopAutomaton>(stops);
    TokenWriter writer({.stops = automaton, .include_stop = include_stop},
                       PieceReader(&tokenizer, false));
    StopFinder finder(automaton, PieceReader(&tokenizer, false));

    std::string shown, raw;
    std::vector<int32_t> shown_ids, ids;
    std::vector<std::string> pieces;
    const auto take = [&](const std::optional<TextDelta>& delta) {
      if (!delta.has_value()) return;
      ASSERT_TRUE(IsValidUtf8(delta->text));
      shown += delta->text;
      for (int32_t id : Ids(*delta)) shown_ids.push_back(id);
    };
    FinishInfo finish = {.reason = FinishReason::kLength};
    for (int step = 0; step < 30; ++step) {
      std::vector<int32_t> step_ids(1 + random() % 3);
      for (int32_t& id : step_ids) id = static_cast<int32_t>(random() % vocabulary.size());
      const auto match = finder(Tokens(step_ids));
      if (match.has_value()) step_ids.resize(match->last_token + 1);
      for (int32_t id : step_ids) {
        ids.push_back(id);
        pieces.push_back(vocabulary[id]);
        raw += vocabulary[id];
      }
      take(writer.Append(Tokens(step_ids)));
      if (match.has_value()) {
        finish = {.reason = FinishReason::kStopString, .stop_index = match->stop_index};
        break;
      }
      ASSERT_EQ(shown_ids.size(), NumTokensThatMayBeShown(pieces, stops));
    }
    take(writer.Finish(finish));
    EXPECT_EQ(shown_ids, ids);
    const Stop stop = FirstStop(raw, stops);
    ASSERT_EQ(stop.begin != std::string::npos, finish.reason == FinishReason::kStopString);
    const std::string expected =
        stop.begin == std::string::npos ? raw : raw.substr(0, include_stop ? stop.end : stop.begin);
    // Deltas end where no character is cut, so replacing byte by byte is the same in parts and
    // whole.
    EXPECT_EQ(shown, ToValidUtf8(expected));
  }
}

}  // namespace
}  // namespace godwit
