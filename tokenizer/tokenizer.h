#pragma once
// Text <-> token ids. A leaf: includes nothing of Godwit.

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace godwit {

// Thread-safe, immutable. Never throws; any bytes are valid input to Encode (invalid UTF-8 is the
// caller's to refuse).
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  // No BOS or EOS is added.
  virtual std::vector<int32_t> Encode(std::string_view text) const = 0;
  // Whole-sequence decoding, as the model's own tokenizer does it (control pieces give nothing).
  virtual std::string Decode(const std::vector<int32_t>& token_ids) const = 0;

  // The bytes one token adds to the text of a continuation: "▁the" -> " the", byte pieces -> their
  // byte, control pieces -> "". Concatenated over ids it is Decode up to the dummy space at the
  // very start.
  virtual std::string_view Piece(int32_t token_id) const = 0;
  // True when Encode puts a space before the text's first word (sentencepiece add_dummy_prefix), so
  // that Decode drops it.
  virtual bool drops_first_space() const = 0;

  virtual int32_t vocab_size() const = 0;
  virtual int32_t bos_id() const = 0;  // -1: none
  virtual int32_t eos_id() const = 0;  // -1: none
};

// Reads `folder`/tokenizer.model (sentencepiece). On failure returns null and sets *error to one
// line naming the file. Exported by libgodwit_spm.so, all else there is hidden.
__attribute__((visibility("default"))) std::unique_ptr<Tokenizer> LoadTokenizer(
    const std::string& folder, std::string* error);

}  // namespace godwit
