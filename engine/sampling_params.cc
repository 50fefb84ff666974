#include "engine/sampling_params.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "kernels/base/status.h"

namespace godwit {
namespace {

absl::Status OutOfRange(absl::string_view field, double value, absl::string_view range) {
  return absl::InvalidArgumentError(absl::StrCat(field, " ", value, " not in ", range));
}

// Written so that a NaN is out of range.
absl::Status CheckFilters(const SamplingParams& sampling) {
  if (!(sampling.temperature >= 0 && sampling.temperature <= 100)) {
    return OutOfRange("temperature", sampling.temperature, "[0, 100]");
  }
  if (sampling.top_k < 0) return OutOfRange("top_k", sampling.top_k, "[0, 2^31 - 1]");
  if (!(sampling.top_p > 0 && sampling.top_p <= 1)) {
    return OutOfRange("top_p", sampling.top_p, "(0, 1]");
  }
  if (!(sampling.min_p >= 0 && sampling.min_p <= 1)) {
    return OutOfRange("min_p", sampling.min_p, "[0, 1]");
  }
  return absl::OkStatus();
}

absl::Status CheckPenalties(const SamplingParams& sampling) {
  if (!(sampling.repetition_penalty > 0 && sampling.repetition_penalty <= 100)) {
    return OutOfRange("repetition_penalty", sampling.repetition_penalty, "(0, 100]");
  }
  if (!(sampling.presence_penalty >= -2 && sampling.presence_penalty <= 2)) {
    return OutOfRange("presence_penalty", sampling.presence_penalty, "[-2, 2]");
  }
  if (!(sampling.frequency_penalty >= -2 && sampling.frequency_penalty <= 2)) {
    return OutOfRange("frequency_penalty", sampling.frequency_penalty, "[-2, 2]");
  }
  return absl::OkStatus();
}

absl::Status CheckTokenId(absl::string_view field, int32_t token_id, int64_t vocab_size) {
  if (token_id >= 0 && token_id < vocab_size) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, " token id ", token_id, " not in [0, ", vocab_size, ")"));
}

absl::Status CheckCount(absl::string_view field, size_t count, int limit) {
  if (count <= static_cast<size_t>(limit)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, " has ", count, " entries, the limit is ", limit));
}

absl::Status CheckBiases(const SamplingParams& sampling, int64_t vocab_size) {
  RETURN_IF_ERROR(CheckCount("logit_bias", sampling.logit_bias.size(), kMaxLogitBiases));
  std::vector<int32_t> ids;
  ids.reserve(sampling.logit_bias.size());
  for (const TokenBias& bias : sampling.logit_bias) {
    RETURN_IF_ERROR(CheckTokenId("logit_bias", bias.token_id, vocab_size));
    if (!(bias.bias >= -100 && bias.bias <= 100)) {
      return absl::InvalidArgumentError(absl::StrCat("logit_bias of token id ", bias.token_id, " ",
                                                     bias.bias, " not in [-100, 100]"));
    }
    ids.push_back(bias.token_id);
  }
  std::sort(ids.begin(), ids.end());
  if (const auto twice = std::adjacent_find(ids.begin(), ids.end()); twice != ids.end()) {
    return absl::InvalidArgumentError(absl::StrCat("logit_bias names token id ", *twice, " twice"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ValidateSampling(const SamplingParams& sampling, int64_t vocab_size) {
  RETURN_IF_ERROR(CheckFilters(sampling));
  RETURN_IF_ERROR(CheckPenalties(sampling));
  RETURN_IF_ERROR(CheckBiases(sampling, vocab_size));
  const int64_t most_logprobs = std::min<int64_t>(kMaxTopLogprobs, vocab_size);
  if (sampling.num_logprobs < -1 || sampling.num_logprobs > most_logprobs) {
    return OutOfRange("num_logprobs", sampling.num_logprobs,
                      absl::StrCat("[-1, ", most_logprobs, "]"));
  }
  if (sampling.min_tokens < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("min_tokens ", sampling.min_tokens, " not >= 0"));
  }
  RETURN_IF_ERROR(CheckCount("end_token_ids", sampling.end_token_ids.size(), kMaxEndTokenIds));
  for (const int32_t token_id : sampling.end_token_ids) {
    RETURN_IF_ERROR(CheckTokenId("end_token_ids", token_id, vocab_size));
  }
  return absl::OkStatus();
}

}  // namespace godwit
