#include "server/token_writer.h"

#include <utility>

#include "server/utf8.h"

namespace godwit {

void TokenWriter::Read(const SampledToken& token) {
  ++num_tokens_;
  for (const char c : pieces_.Next(token.token_id)) {
    bytes_ += c;
    if (match_end_.has_value()) continue;
    state_ = options_.stops->Next(state_, static_cast<uint8_t>(c));
    if (options_.stops->match(state_) >= 0) {
      match_end_ = static_cast<int64_t>(bytes_.size());
      match_index_ = options_.stops->match(state_);
    }
  }
  held_.push_back({token, static_cast<int64_t>(bytes_.size())});
}

int64_t TokenWriter::NumTokensToShow() const {
  // A complete stop string stays here until Finish decides.
  int64_t limit = static_cast<int64_t>(bytes_.size()) - options_.stops->depth(state_);
  if (match_end_.has_value())
    limit = *match_end_ - static_cast<int64_t>(options_.stops->stop(match_index_).size());
  int64_t num_shown = 0, boundary = 0;
  for (size_t at = 0; at < held_.size(); ++at) {
    const int64_t end = held_[at].end;
    if (end > limit) break;
    while (boundary < end) {
      const Utf8Prefix prefix = ReadUtf8(std::string_view(bytes_).substr(boundary));
      if (prefix.kind == Utf8Prefix::Kind::kIncomplete) return num_shown;
      boundary += static_cast<int64_t>(prefix.num_bytes);
    }
    if (boundary == end) num_shown = static_cast<int64_t>(at) + 1;
  }
  return num_shown;
}

TextDelta TokenWriter::Take(int64_t num_tokens, int64_t num_bytes) {
  TextDelta delta;
  delta.text = ToValidUtf8(std::string_view(bytes_).substr(0, num_bytes));
  const int64_t end = num_tokens == 0 ? 0 : held_[num_tokens - 1].end;
  delta.tokens.reserve(num_tokens);
  for (int64_t at = 0; at < num_tokens; ++at) delta.tokens.push_back(std::move(held_[at].token));
  held_.erase(held_.begin(), held_.begin() + num_tokens);
  bytes_.erase(0, end);
  for (Held& held : held_) held.end -= end;
  if (match_end_.has_value()) *match_end_ -= end;
  return delta;
}

std::optional<TextDelta> TokenWriter::Append(std::span<const SampledToken> tokens) {
  for (const SampledToken& token : tokens) Read(token);
  const int64_t num_tokens = NumTokensToShow();
  if (num_tokens == 0) return std::nullopt;
  return Take(num_tokens, held_[num_tokens - 1].end);
}

std::optional<TextDelta> TokenWriter::Finish(const FinishInfo& finish) {
  if (held_.empty()) return std::nullopt;
  int64_t num_bytes = static_cast<int64_t>(bytes_.size());
  if (finish.reason == FinishReason::kStopString && match_end_.has_value()) {
    num_bytes = *match_end_;
    if (!options_.include_stop)
      num_bytes -= static_cast<int64_t>(options_.stops->stop(match_index_).size());
  }
  return Take(static_cast<int64_t>(held_.size()), num_bytes);
}

}  // namespace godwit
