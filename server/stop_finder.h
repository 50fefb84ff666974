#pragma once
// Finds stop strings in the bytes of a growing output. Stop strings are found byte by byte, so that
// the result does not depend on how the text is split into tokens: the first one that is complete
// wins, the longest of those that end at the same byte.

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "scheduler/request.h"
#include "tokenizer/tokenizer.h"

namespace godwit {

// Aho-Corasick automaton over the bytes of the stop strings. Immutable; shared by the finder and
// the writer of each output.
class StopAutomaton {
 public:
  using State = int32_t;
  static constexpr State kStart = 0;

  // No empty strings. At most kMaxStopStrings * kMaxStopBytes states.
  explicit StopAutomaton(std::vector<std::string> stops);

  State Next(State state, uint8_t byte) const;  // amortised O(1)
  // Length of the longest suffix of what was read that begins a stop string.
  int64_t depth(State state) const { return nodes_[state].depth; }
  // Index of the stop string that is complete in this state, the longest if several; -1: none.
  int32_t match(State state) const { return nodes_[state].match; }
  const std::string& stop(int32_t index) const { return stops_[index]; }
  bool empty() const { return stops_.empty(); }

 private:
  struct Node {
    uint8_t byte = 0;
    int32_t depth = 0, match = -1;
    State fail = kStart, first_child = -1, next_sibling = -1;
  };
  State Child(State state, uint8_t byte) const;  // -1: none
  void Insert(int32_t index);
  void LinkFailures();

  std::vector<std::string> stops_;
  std::vector<Node> nodes_;
};

// The bytes of the tokens of one output, in order.
class PieceReader {
 public:
  // tokenizer may be null: every piece is empty. drop_first_space: the output is the start of a
  // text (nothing visible before it), so that the space that the tokenizer puts before a first word
  // is dropped.
  PieceReader(const Tokenizer* tokenizer, bool drop_first_space)
      : tokenizer_(tokenizer), drop_first_space_(drop_first_space) {}

  std::string_view Next(int32_t token_id);

 private:
  const Tokenizer* tokenizer_;
  bool drop_first_space_;
};

// A FindStop: runs on the engine thread with the new tokens of one output. No lock; about 10 ns a
// byte.
class StopFinder {
 public:
  StopFinder(std::shared_ptr<const StopAutomaton> automaton, PieceReader pieces)
      : automaton_(std::move(automaton)), pieces_(pieces) {}

  std::optional<StopMatch> operator()(std::span<const SampledToken> new_tokens);

 private:
  std::shared_ptr<const StopAutomaton> automaton_;
  PieceReader pieces_;
  StopAutomaton::State state_ = StopAutomaton::kStart;
};

}  // namespace godwit
