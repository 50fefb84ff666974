#pragma once
// Turns the tokens of one output into deltas of whole UTF-8 text. A delta's text, token ids and
// log-probabilities are those of the same tokens. Held back is only the shortest run of whole
// tokens that covers the longest suffix that could begin a stop string or a character.

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "scheduler/request.h"
#include "server/stop_finder.h"

namespace godwit {

struct TextDelta {
  std::string text;
  std::vector<SampledToken> tokens;
};

struct TokenWriterOptions {
  std::shared_ptr<const StopAutomaton> stops;  // required, may be empty
  bool include_stop = false;                   // show the stop string
};

class TokenWriter {
 public:
  TokenWriter(TokenWriterOptions options, PieceReader pieces)
      : options_(std::move(options)), pieces_(pieces) {}

  // New confirmed tokens, in order. Returns what can be shown now, or nothing.
  std::optional<TextDelta> Append(std::span<const SampledToken> tokens);

  // The output has ended: all that was held back, less the stop string.
  std::optional<TextDelta> Finish(const FinishInfo& finish);

  int64_t num_tokens() const { return num_tokens_; }

 private:
  struct Held {
    SampledToken token;
    int64_t end = 0;  // of its bytes in bytes_
  };
  void Read(const SampledToken& token);
  int64_t NumTokensToShow() const;
  TextDelta Take(int64_t num_tokens, int64_t num_bytes);

  TokenWriterOptions options_;
  PieceReader pieces_;
  StopAutomaton::State state_ = StopAutomaton::kStart;
  std::string bytes_;  // of held_; bounded by the output's length
  std::vector<Held> held_;
  std::optional<int64_t> match_end_;  // in bytes_: where the first stop string ended
  int32_t match_index_ = -1;
  int64_t num_tokens_ = 0;
};

}  // namespace godwit
