#pragma once
// The model as the services see it. Immutable while the server runs; shared by all threads.

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "engine/engine.h"
#include "server/limits.h"
#include "tokenizer/tokenizer.h"

namespace godwit {

class ServedModel {
 public:
  // tokenizer may be null: token ids only.
  ServedModel(std::string name, ModelCard card, std::shared_ptr<const Tokenizer> tokenizer,
              RequestLimits limits);

  const std::string& name() const { return name_; }
  const ModelCard& card() const { return card_; }
  const Tokenizer* tokenizer() const { return tokenizer_.get(); }
  const RequestLimits& limits() const { return limits_; }  // max_n is at most the number of slots

  int64_t vocab_size() const { return card_.config.vocab_size; }
  int64_t context_length() const { return card_.context_length; }
  // What the checkpoint declares, else what the tokenizer does.
  const std::vector<int32_t>& eos_token_ids() const { return eos_token_ids_; }
  std::optional<int32_t> bos_token_id() const { return bos_token_id_; }
  // A text prompt begins with bos_token_id().
  bool add_bos() const { return card_.config.add_bos && bos_token_id_.has_value(); }

  // "" is this model; NOT_FOUND otherwise.
  absl::Status CheckName(const std::string& name) const;
  // FAILED_PRECONDITION without one.
  absl::StatusOr<const Tokenizer*> RequireTokenizer() const;

  // The tokens of a text as a prompt. `text` is valid UTF-8; the caller has checked its size.
  std::vector<int32_t> EncodePrompt(absl::string_view text, bool with_bos) const;
  // True when a continuation of these tokens is the start of a visible text.
  bool StartsText(const std::vector<int32_t>& prompt) const;

 private:
  std::string name_;
  ModelCard card_;
  std::shared_ptr<const Tokenizer> tokenizer_;
  RequestLimits limits_;
  std::vector<int32_t> eos_token_ids_;
  std::optional<int32_t> bos_token_id_;
};

}  // namespace godwit
