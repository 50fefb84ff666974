// Tokenizer over sentencepiece, in a shared library of its own: sentencepiece's protobuf-lite and
// the protobuf of gRPC must not meet at link time (cmake/Grpc.cmake). The only file that includes
// sentencepiece; no Abseil here.

#include <sentencepiece_processor.h>

#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <utility>

#include "tokenizer/tokenizer.h"

namespace godwit {
namespace {

constexpr std::string_view kSpaceMark = "\xE2\x96\x81";  // U+2581, a space inside a piece
constexpr std::uintmax_t kMaxModelBytes = 256u << 20;    // far above any known vocabulary

std::string WithSpaces(std::string_view piece) {
  std::string text;
  for (size_t at = 0; at < piece.size();) {
    if (piece.substr(at).starts_with(kSpaceMark)) {
      text += ' ';
      at += kSpaceMark.size();
    } else {
      text += piece[at++];
    }
  }
  return text;
}

class SpmTokenizer final : public Tokenizer {
 public:
  // On failure returns one line.
  std::string Load(const std::string& path) {
    const auto status = processor_.Load(path);
    if (!status.ok()) return status.ToString();
    if (processor_.GetPieceSize() <= 0) return "the vocabulary is empty";
    pieces_.reserve(processor_.GetPieceSize());
    for (int id = 0; id < processor_.GetPieceSize(); ++id) pieces_.push_back(PieceText(id));
    // The processor does not tell its own setting: see what it does.
    std::vector<int> ids;
    processor_.Encode("a", &ids);
    drops_first_space_ =
        !ids.empty() && std::string_view(processor_.IdToPiece(ids[0])).starts_with(kSpaceMark);
    return "";
  }

  std::vector<int32_t> Encode(std::string_view text) const override {
    std::vector<int> ids;
    processor_.Encode(text, &ids);
    return ids;
  }

  std::string Decode(const std::vector<int32_t>& token_ids) const override {
    std::string text;
    processor_.Decode(token_ids, &text);
    return text;
  }

  std::string_view Piece(int32_t token_id) const override {
    if (token_id < 0 || token_id >= vocab_size()) return {};
    return pieces_[token_id];
  }

  bool drops_first_space() const override { return drops_first_space_; }
  int32_t vocab_size() const override { return static_cast<int32_t>(pieces_.size()); }
  int32_t bos_id() const override { return processor_.bos_id(); }
  int32_t eos_id() const override { return processor_.eos_id(); }

 private:
  std::string PieceText(int id) const {
    if (processor_.IsControl(id)) return "";
    if (processor_.IsUnknown(id)) {
      std::string text;  // the surface of the unknown, " ⁇ " unless the model says otherwise
      processor_.Decode(std::vector<int>{id}, &text);
      return text;
    }
    const std::string& piece = processor_.IdToPiece(id);
    if (processor_.IsByte(id)) {  // "<0x0A>"
      return std::string(1,
                         static_cast<char>(std::strtol(piece.substr(3, 2).c_str(), nullptr, 16)));
    }
    return WithSpaces(piece);
  }

  sentencepiece::SentencePieceProcessor processor_;
  std::vector<std::string> pieces_;  // by id
  bool drops_first_space_ = false;
};

}  // namespace

std::unique_ptr<Tokenizer> LoadTokenizer(const std::string& folder, std::string* error) {
  const std::string path = (std::filesystem::path(folder) / "tokenizer.model").string();
  std::error_code io;
  const std::uintmax_t num_bytes = std::filesystem::file_size(path, io);
  if (io) {
    *error = path + ": " + io.message();
    return nullptr;
  }
  if (num_bytes > kMaxModelBytes) {
    *error = path + ": " + std::to_string(num_bytes) + " bytes, at most " +
             std::to_string(kMaxModelBytes);
    return nullptr;
  }
  try {
    auto tokenizer = std::make_unique<SpmTokenizer>();
    std::string why = tokenizer->Load(path);
    if (why.empty()) return tokenizer;
    *error = path + ": not a sentencepiece model: " + why;
  } catch (const std::exception& e) {  // bad_alloc on a hostile file
    *error = path + ": not a sentencepiece model: " + e.what();
  }
  return nullptr;
}

}  // namespace godwit
