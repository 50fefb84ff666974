#include "server/served_model.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/status_mapping.h"

namespace godwit {

ServedModel::ServedModel(std::string name, ModelCard card,
                         std::shared_ptr<const Tokenizer> tokenizer, RequestLimits limits)
    : name_(std::move(name)),
      card_(std::move(card)),
      tokenizer_(std::move(tokenizer)),
      limits_(limits),
      eos_token_ids_(card_.config.eos_token_ids),
      bos_token_id_(card_.config.bos_token_id) {
  limits_.max_n = static_cast<int32_t>(std::min<int64_t>(limits_.max_n, card_.geometry.num_slots));
  if (tokenizer_ == nullptr) return;
  if (eos_token_ids_.empty() && tokenizer_->eos_id() >= 0) eos_token_ids_ = {tokenizer_->eos_id()};
  if (!bos_token_id_.has_value() && tokenizer_->bos_id() >= 0) bos_token_id_ = tokenizer_->bos_id();
}

absl::Status ServedModel::CheckName(const std::string& name) const {
  if (name.empty() || name == name_) return absl::OkStatus();
  return WithResource(
      absl::NotFoundError(absl::StrCat("model not found; this server serves ", name_)), "model",
      name);
}

absl::StatusOr<const Tokenizer*> ServedModel::RequireTokenizer() const {
  if (tokenizer_ != nullptr) return tokenizer_.get();
  return WithErrorInfo(absl::FailedPreconditionError(
                           absl::StrCat("model ", name_, " has no tokenizer; use token ids")),
                       "NO_TOKENIZER");
}

std::vector<int32_t> ServedModel::EncodePrompt(absl::string_view text, bool with_bos) const {
  std::vector<int32_t> ids = tokenizer_->Encode(std::string_view(text.data(), text.size()));
  if (with_bos) ids.insert(ids.begin(), *bos_token_id_);
  return ids;
}

bool ServedModel::StartsText(const std::vector<int32_t>& prompt) const {
  if (tokenizer_ == nullptr || !tokenizer_->drops_first_space()) return false;
  return std::all_of(prompt.begin(), prompt.end(),
                     [this](int32_t id) { return tokenizer_->Piece(id).empty(); });
}

}  // namespace godwit
