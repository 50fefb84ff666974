#pragma once
// UTF-8 as RFC 3629 has it: no overlong forms, no surrogates, at most U+10FFFF.

#include <cstddef>
#include <string>
#include <string_view>

namespace godwit {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";  // U+FFFD

// What `text` (not empty) begins with.
struct Utf8Prefix {
  enum class Kind {
    kCharacter,   // a character of num_bytes
    kIncomplete,  // all of `text` is the beginning of a character
    kInvalid,     // one byte that belongs to no character
  };
  Kind kind = Kind::kInvalid;
  size_t num_bytes = 1;
};
Utf8Prefix ReadUtf8(std::string_view text);

bool IsValidUtf8(std::string_view text);

// Text of at most max_bytes: whole characters of a valid one, and "..." where it was longer.
std::string CutUtf8(std::string_view text, size_t max_bytes);

// Replaces each byte that belongs to no character by U+FFFD, as sentencepiece does when it decodes.
std::string ToValidUtf8(std::string_view text);

}  // namespace godwit
