#include "server/utf8.h"

#include <gtest/gtest.h>

#include <random>

namespace godwit {
namespace {

TEST(Utf8Test, TellsValidFromInvalid) {
  for (const char* text : {"", "a", "é", "世界", "🦆", "\xF4\x8F\xBF\xBF", "\xED\x9F\xBF"}) {
    EXPECT_TRUE(IsValidUtf8(text)) << text;
  }
  // A stray continuation, overlong forms, a surrogate, above U+10FFFF, cut characters.
  for (const char* text :
       {"\x80", "\xC0\x80", "\xC1\xBF", "\xE0\x80\x80", "\xED\xA0\x80", "\xF0\x80\x80\x80",
        "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xFF", "\xE4\xB8", "a\xF0\x9F\xA6"}) {
    EXPECT_FALSE(IsValidUtf8(text)) << text;
  }
}

TEST(Utf8Test, ReplacesEachByteThatBelongsToNoCharacter) {
  EXPECT_EQ(ToValidUtf8("a\x80z"), "a\uFFFDz");
  EXPECT_EQ(ToValidUtf8("\xE4\xB8"), "\uFFFD\uFFFD");
  EXPECT_EQ(ToValidUtf8("\xE4\xB8\xC3\xA9"), "\uFFFD\uFFFDé");
}

TEST(Utf8Test, TellsWhatMayStillBecomeACharacter) {
  using Kind = Utf8Prefix::Kind;
  EXPECT_EQ(ReadUtf8("\xE4\xB8").kind, Kind::kIncomplete);
  EXPECT_EQ(ReadUtf8("\xF0").kind, Kind::kIncomplete);
  EXPECT_EQ(ReadUtf8("\xF0\x80").kind, Kind::kInvalid);
  EXPECT_EQ(ReadUtf8("\xE4z").kind, Kind::kInvalid);
  EXPECT_EQ(ReadUtf8("世z").num_bytes, 3u);
}

TEST(Utf8Test, RandomBytesBecomeValid) {
  std::mt19937 random(11);
  for (int round = 0; round < 2000; ++round) {
    std::string bytes(random() % 24, '\0');
    for (char& byte : bytes) byte = static_cast<char>(random());
    const std::string valid = ToValidUtf8(bytes);
    ASSERT_TRUE(IsValidUtf8(valid));
    ASSERT_EQ(ToValidUtf8(valid), valid);
  }
}

TEST(Utf8Test, CutsBetweenCharacters) {
  EXPECT_EQ(CutUtf8("abcdef", 6), "abcdef");
  EXPECT_EQ(CutUtf8("abcdefg", 6), "abc...");
  // Two, three and four bytes a character, at every place of the cut.
  for (const std::string character : {"\xc3\xa9", "\xe2\x82\xac", "\xf0\x9f\x98\x80"}) {
    std::string text;
    while (text.size() < 40) text += character;
    for (size_t max_bytes = 3; max_bytes < 40; ++max_bytes) {
      const std::string cut = CutUtf8(text, max_bytes);
      EXPECT_TRUE(IsValidUtf8(cut)) << max_bytes;
      EXPECT_LE(cut.size(), max_bytes);
      EXPECT_GT(cut.size() + character.size(), max_bytes);
    }
  }
}

}  // namespace
}  // namespace godwit
