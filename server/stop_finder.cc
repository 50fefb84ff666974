#include "server/stop_finder.h"

#include <utility>

namespace godwit {

StopAutomaton::StopAutomaton(std::vector<std::string> stops) : stops_(std::move(stops)), nodes_(1) {
  for (size_t index = 0; index < stops_.size(); ++index) Insert(static_cast<int32_t>(index));
  LinkFailures();
}

StopAutomaton::State StopAutomaton::Child(State state, uint8_t byte) const {
  State child = nodes_[state].first_child;
  while (child >= 0 && nodes_[child].byte != byte) child = nodes_[child].next_sibling;
  return child;
}

void StopAutomaton::Insert(int32_t index) {
  State state = kStart;
  for (const char c : stops_[index]) {
    const uint8_t byte = static_cast<uint8_t>(c);
    State child = Child(state, byte);
    if (child < 0) {
      child = static_cast<State>(nodes_.size());
      nodes_.push_back({.byte = byte,
                        .depth = nodes_[state].depth + 1,
                        .next_sibling = nodes_[state].first_child});
      nodes_[state].first_child = child;
    }
    state = child;
  }
  // Of two equal strings the first is reported.
  if (nodes_[state].match < 0) nodes_[state].match = index;
}

void StopAutomaton::LinkFailures() {
  std::vector<State> queue = {kStart};  // breadth first: a failure link leads to a smaller depth
  for (size_t at = 0; at < queue.size(); ++at) {
    const State state = queue[at];
    for (State child = nodes_[state].first_child; child >= 0; child = nodes_[child].next_sibling) {
      Node& node = nodes_[child];
      if (state != kStart) node.fail = Next(nodes_[state].fail, node.byte);
      // What ends here is this node's own string, else the longest one that ends with it.
      if (node.match < 0) node.match = nodes_[node.fail].match;
      queue.push_back(child);
    }
  }
}

StopAutomaton::State StopAutomaton::Next(State state, uint8_t byte) const {
  while (true) {
    const State child = Child(state, byte);
    if (child >= 0) return child;
    if (state == kStart) return kStart;
    state = nodes_[state].fail;
  }
}

std::string_view PieceReader::Next(int32_t token_id) {
  if (tokenizer_ == nullptr) return {};
  std::string_view piece = tokenizer_->Piece(token_id);
  if (drop_first_space_ && !piece.empty()) {
    drop_first_space_ = false;
    if (piece.front() == ' ') piece.remove_prefix(1);
  }
  return piece;
}

std::optional<StopMatch> StopFinder::operator()(std::span<const SampledToken> new_tokens) {
  for (size_t token = 0; token < new_tokens.size(); ++token) {
    for (const char c : pieces_.Next(new_tokens[token].token_id)) {
      state_ = automaton_->Next(state_, static_cast<uint8_t>(c));
      const int32_t stop_index = automaton_->match(state_);
      if (stop_index >= 0) {
        return StopMatch{.last_token = static_cast<int64_t>(token), .stop_index = stop_index};
      }
    }
  }
  return std::nullopt;
}

}  // namespace godwit
