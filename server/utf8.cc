#include "server/utf8.h"

#include <cstdint>

namespace godwit {
namespace {

struct LeadByte {
  int num_bytes;                   // 0: no character begins so
  uint8_t second_min, second_max;  // range of the second byte; those after it: 80..BF
};

LeadByte Classify(uint8_t lead) {
  if (lead < 0x80) return {1, 0, 0};
  if (lead < 0xC2) return {0, 0, 0};
  if (lead < 0xE0) return {2, 0x80, 0xBF};
  if (lead == 0xE0) return {3, 0xA0, 0xBF};
  if (lead == 0xED) return {3, 0x80, 0x9F};
  if (lead < 0xF0) return {3, 0x80, 0xBF};
  if (lead == 0xF0) return {4, 0x90, 0xBF};
  if (lead < 0xF4) return {4, 0x80, 0xBF};
  if (lead == 0xF4) return {4, 0x80, 0x8F};
  return {0, 0, 0};
}

}  // namespace

Utf8Prefix ReadUtf8(std::string_view text) {
  using Kind = Utf8Prefix::Kind;
  const LeadByte lead = Classify(static_cast<uint8_t>(text[0]));
  for (int at = 1; at < lead.num_bytes; ++at) {
    if (static_cast<size_t>(at) == text.size()) return {Kind::kIncomplete, text.size()};
    const uint8_t byte = static_cast<uint8_t>(text[at]);
    const uint8_t min = at == 1 ? lead.second_min : 0x80;
    const uint8_t max = at == 1 ? lead.second_max : 0xBF;
    if (byte < min || byte > max) return {Kind::kInvalid, 1};
  }
  if (lead.num_bytes == 0) return {Kind::kInvalid, 1};
  return {Kind::kCharacter, static_cast<size_t>(lead.num_bytes)};
}

bool IsValidUtf8(std::string_view text) {
  while (!text.empty()) {
    const Utf8Prefix prefix = ReadUtf8(text);
    if (prefix.kind != Utf8Prefix::Kind::kCharacter) return false;
    text.remove_prefix(prefix.num_bytes);
  }
  return true;
}

std::string CutUtf8(std::string_view text, size_t max_bytes) {
  constexpr std::string_view kMore = "...";
  if (text.size() <= max_bytes) return std::string(text);
  size_t end = max_bytes - kMore.size();
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) --end;
  return std::string(text.substr(0, end)).append(kMore);
}

std::string ToValidUtf8(std::string_view text) {
  std::string valid;
  valid.reserve(text.size());
  while (!text.empty()) {
    const Utf8Prefix prefix = ReadUtf8(text);
    if (prefix.kind == Utf8Prefix::Kind::kCharacter) {
      valid += text.substr(0, prefix.num_bytes);
      text.remove_prefix(prefix.num_bytes);
    } else {
      valid += kReplacementCharacter;
      text.remove_prefix(1);
    }
  }
  return valid;
}

}  // namespace godwit
