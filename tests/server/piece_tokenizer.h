#pragma once
// A tokenizer whose vocabulary is a list of pieces: id = index. For tests of the server's text
// handling.

#include <string>
#include <utility>
#include <vector>

#include "tokenizer/tokenizer.h"

namespace godwit {

class PieceTokenizer final : public Tokenizer {
 public:
  explicit PieceTokenizer(std::vector<std::string> pieces, bool drops_first_space = false)
      : pieces_(std::move(pieces)), drops_first_space_(drops_first_space) {}

  // Longest match first; bytes that begin no piece are skipped.
  std::vector<int32_t> Encode(std::string_view text) const override {
    std::vector<int32_t> ids;
    while (!text.empty()) {
      int32_t best = -1;
      for (int32_t id = 0; id < vocab_size(); ++id) {
        const bool longer = best < 0 || pieces_[id].size() > pieces_[best].size();
        if (!pieces_[id].empty() && text.starts_with(pieces_[id]) && longer) best = id;
      }
      text.remove_prefix(best < 0 ? 1 : pieces_[best].size());
      if (best >= 0) ids.push_back(best);
    }
    return ids;
  }
  std::string Decode(const std::vector<int32_t>& token_ids) const override {
    std::string text;
    for (int32_t id : token_ids) text += Piece(id);
    return text;
  }
  std::string_view Piece(int32_t token_id) const override {
    if (token_id < 0 || token_id >= vocab_size()) return {};
    return pieces_[token_id];
  }
  bool drops_first_space() const override { return drops_first_space_; }
  int32_t vocab_size() const override { return static_cast<int32_t>(pieces_.size()); }
  int32_t bos_id() const override { return -1; }
  int32_t eos_id() const override { return -1; }

 private:
  std::vector<std::string> pieces_;
  bool drops_first_space_;
};

}  // namespace godwit
