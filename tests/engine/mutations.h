#pragma once
// Damage to JSON texts, for fuzzers that are the same every time: of bytes, and of values, members
// and nesting, which leaves the text well-formed and reaches what reads the fields.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace godwit {

// Where the values and members of a well-formed JSON text lie.
class JsonSpans {
 public:
  struct Span {
    size_t begin = 0, end = 0;
  };

  explicit JsonSpans(std::string_view text) : text_(text) {
    SkipSpace();
    well_formed_ = Value(0);
    SkipSpace();
    well_formed_ = well_formed_ && at_ == text_.size();
  }
  bool well_formed() const { return well_formed_; }
  const std::vector<Span>& values() const { return values_; }    // the whole text is one
  const std::vector<Span>& members() const { return members_; }  // "key": value

 private:
  static constexpr int kMaxDepth = 100;

  static bool IsOneOf(char c, std::string_view of) { return of.find(c) != of.npos; }
  void SkipSpace() {
    while (at_ < text_.size() && IsOneOf(text_[at_], " \t\r\n")) ++at_;
  }
  bool Take(char c) {
    SkipSpace();
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  bool String() {
    if (!Take('"')) return false;
    for (; at_ < text_.size() && text_[at_] != '"'; ++at_) at_ += text_[at_] == '\\';
    return Take('"');
  }
  bool List(char close, int depth) {
    if (Take(close)) return true;
    do {
      SkipSpace();
      const size_t begin = at_;
      if (close == '}' && !(String() && Take(':'))) return false;
      SkipSpace();
      if (!Value(depth + 1)) return false;
      if (close == '}') members_.push_back({begin, at_});
    } while (Take(','));
    return Take(close);
  }
  bool Value(int depth) {
    if (depth > kMaxDepth || at_ >= text_.size()) return false;
    const size_t begin = at_, index = values_.size();
    values_.emplace_back();
    bool ok = false;
    if (text_[at_] == '"') {
      ok = String();
    } else if (text_[at_] == '{' || text_[at_] == '[') {
      const char close = text_[at_++] == '{' ? '}' : ']';
      ok = List(close, depth);
    } else {
      while (at_ < text_.size() && !IsOneOf(text_[at_], ",]} \t\r\n")) ++at_;
      ok = at_ > begin;
    }
    values_[index] = {begin, at_};
    return ok;
  }

  std::string_view text_;
  size_t at_ = 0;
  bool well_formed_ = false;
  std::vector<Span> values_, members_;
};

class JsonMutator {
 public:
  explicit JsonMutator(uint32_t seed) : random_(seed) {}

  size_t Below(size_t limit) {
    return std::uniform_int_distribution<size_t>(0, limit - 1)(random_);
  }

  // One to three edits.
  std::string Mutated(std::string text) {
    for (size_t edit = 0, count = 1 + Below(3); edit < count && !text.empty(); ++edit) {
      const JsonSpans spans(text);
      if (spans.well_formed() && Below(8) != 0) {
        EditValues(spans, text);
      } else {
        EditBytes(text);
      }
    }
    return text;
  }

  void EditBytes(std::string& text) {
    const size_t at = Below(text.size());
    switch (Below(5)) {
      case 0:
        text[at] = static_cast<char>(text[at] ^ (1 << Below(8)));
        break;
      case 1:
        text.insert(at, 1 + Below(3), kMarks[Below(kMarks.size())]);
        break;
      case 2:
        text.erase(at, 1 + Below(8));
        break;
      case 3:
        text[at] = kMarks[Below(kMarks.size())];
        break;
      default:
        text.resize(at);
    }
  }

  void EditValues(const JsonSpans& spans, std::string& text) {
    using Span = JsonSpans::Span;
    const auto pick = [&](const std::vector<Span>& of) { return of[Below(of.size())]; };
    const auto text_of = [&](Span span) { return text.substr(span.begin, span.end - span.begin); };
    const Span value = pick(spans.values());
    const auto replace = [&](const std::string& by) {
      text.replace(value.begin, value.end - value.begin, by);
    };
    switch (spans.members().empty() ? Below(5) : Below(8)) {
      case 0:
      case 1:
      case 2:
        return replace(Word());
      case 3:
        return replace(Nested(text_of(value)));
      case 4:
        return replace(text_of(pick(spans.values())));
      case 5: {  // given twice, with the same value or another
        const std::string member = text_of(pick(spans.members()));
        const size_t at = pick(spans.members()).begin;
        text.insert(
            at, (Below(2) == 0 ? member : member.substr(0, member.find(':') + 1) + Word()) + ",");
        return;
      }
      case 6: {  // left out
        const Span member = pick(spans.members());
        const bool comma = member.end < text.size() && text[member.end] == ',';
        text.erase(member.begin, member.end - member.begin + (comma ? 1 : 0));
        return;
      }
      default:  // one more that nobody knows
        text.insert(pick(spans.members()).begin,
                    "\"x" + std::to_string(Below(9)) + "\":" + Word() + ",");
    }
  }

  // What may stand where a number, a string or anything else is expected.
  std::string Word() {
    static const std::vector<std::string> kWords = {"-1",
                                                    "0",
                                                    "-0",
                                                    "1",
                                                    "2",
                                                    "3",
                                                    "0.5",
                                                    "8",
                                                    "64",
                                                    "1e-320",
                                                    "1e308",
                                                    "1e999",
                                                    "-1e999",
                                                    "2147483647",
                                                    "2147483648",
                                                    "4294967296",
                                                    "-9223372036854775808",
                                                    "9223372036854775807",
                                                    "9223372036854775808",
                                                    "18446744073709551615",
                                                    "99999999999999999999999999",
                                                    "1e15",
                                                    "1e18",
                                                    "NaN",
                                                    "-Infinity",
                                                    "null",
                                                    "true",
                                                    "false",
                                                    "\"8\"",
                                                    "\"\"",
                                                    "\"\\u0000\"",
                                                    "\"\\ud800\"",
                                                    "\"llama\"",
                                                    "\"yarn\"",
                                                    "\"../../etc/passwd\"",
                                                    "[]",
                                                    "{}",
                                                    "[null]",
                                                    "[1,\"2\",{}]",
                                                    "[-1,9223372036854775807]",
                                                    "{\"type\":\"linear\",\"factor\":-1}"};
    switch (Below(24)) {
      case 0:
        return Nested("1");
      case 1:
        return "\"" + std::string(size_t{1} << (4 + Below(14)), 'x') + "\"";
      case 2: {
        std::string list = "[1";
        for (size_t count = size_t{1} << Below(16); count > 0; --count) list += ",1";
        return list + "]";
      }
      default:
        return kWords[Below(kWords.size())];
    }
  }

 private:
  static constexpr std::string_view kMarks = "0123456789[]{},:\".-e\\";

  // Deeper than any reader needs, now and then deeper than any stack holds.
  std::string Nested(const std::string& text) {
    const size_t depth = size_t{1} << Below(Below(8) == 0 ? 18 : 6);
    if (Below(2) == 0) return std::string(depth, '[') + text + std::string(depth, ']');
    std::string nested;
    for (size_t level = 0; level < depth; ++level) nested += "{\"a\":";
    return nested + text + std::string(depth, '}');
  }

  std::mt19937 random_;
};

}  // namespace godwit
