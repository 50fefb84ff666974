#include "engine/draw_list.h"

#include <algorithm>
#include <limits>

#include "kernels/base/check.h"

namespace godwit {
namespace {

constexpr int64_t kMaxBiases = kMaxLogitBiases + kMaxEndTokenIds;  // of a draw
constexpr int64_t kMaxBiasSets = 2;  // of a sequence in a step: before and from min_tokens on

}  // namespace

void AppendBiases(const SamplingParams& sampling, int64_t output_index,
                  std::vector<TokenBias>& biases) {
  const auto first = static_cast<std::ptrdiff_t>(biases.size());
  biases.insert(biases.end(), sampling.logit_bias.begin(), sampling.logit_bias.end());
  if (output_index >= sampling.min_tokens) return;
  constexpr float kBan = -std::numeric_limits<float>::infinity();
  for (const int32_t token_id : sampling.end_token_ids) {
    const auto found =
        std::find_if(biases.begin() + first, biases.end(),
                     [&](const TokenBias& bias) { return bias.token_id == token_id; });
    if (found == biases.end()) {
      biases.push_back({token_id, kBan});
    } else {
      found->bias = kBan;
    }
  }
}

DrawList::DrawList(int64_t max_rows, int64_t vocab_size) : vocab_size_(vocab_size) {
  rows_.reserve(static_cast<size_t>(max_rows));
  row_biases_.reserve(static_cast<size_t>(max_rows));
}

int64_t DrawList::ArenaBytes(int64_t max_rows, int64_t max_sequences) {
  return StepArena::Footprint(max_rows * int64_t{sizeof(SampleRow)}) +
         max_sequences * kMaxBiasSets *
             StepArena::Footprint(kMaxBiases * int64_t{sizeof(TokenBias)});
}

void DrawList::Clear() {
  rows_.clear();
  row_biases_.clear();
  bias_sets_.clear();
  num_pushed_ = 0;
}

DrawList::BiasSet* DrawList::BiasesFor(const SamplingParams& sampling, int64_t output_index) {
  const bool banned = output_index < sampling.min_tokens && !sampling.end_token_ids.empty();
  if (sampling.logit_bias.empty() && !banned) return nullptr;
  const auto [found, added] = bias_sets_.try_emplace({&sampling, banned});
  BiasSet& set = found->second;
  if (!added) return &set;
  AppendBiases(sampling, output_index, set.biases);
  GODWIT_CHECK(std::ssize(set.biases) <= kMaxBiases);
  for (const TokenBias& bias : set.biases) {
    GODWIT_CHECK(bias.token_id >= 0 && bias.token_id < vocab_size_);
  }
  return &set;
}

SampleRow& DrawList::Add(const RowOutput& output, int64_t position, int64_t prompt_length) {
  const SamplingParams& sampling = *output.sampling;
  GODWIT_CHECK(position >= prompt_length);
  GODWIT_CHECK(sampling.num_logprobs <= kMaxTopLogprobs);
  BiasSet* const biases = BiasesFor(sampling, position - prompt_length);
  row_biases_.push_back(biases);
  return rows_.emplace_back(
      SampleRow{.slot = output.lease->slot(),
                .output_index = output.output_index,
                .num_logprobs = sampling.num_logprobs,
                .position = position,
                .seed = output.seed,
                .temperature = sampling.temperature,
                .top_p = sampling.top_p,
                .min_p = sampling.min_p,
                .repetition_penalty = sampling.repetition_penalty,
                .presence_penalty = sampling.presence_penalty,
                .frequency_penalty = sampling.frequency_penalty,
                .top_k = sampling.top_k,
                .num_biases = biases == nullptr ? 0 : static_cast<int32_t>(biases->biases.size())});
}

void DrawList::AddPadding() {
  row_biases_.push_back(nullptr);
  rows_.push_back({.slot = -1});
}

SampleRow* DrawList::PushRows(StepArena& arena) {
  SampleRow* device = nullptr;
  uploaded_ = arena.Reserve(size() - num_pushed_, &device);
  num_pushed_ = size();
  return device;
}

void DrawList::PushBiases(StepArena& arena) {
  const size_t first = rows_.size() - uploaded_.size();
  for (size_t row = first; row < rows_.size(); ++row) {
    if (BiasSet* const set = row_biases_[row]; set != nullptr) {
      if (set->device == nullptr) set->device = arena.Push(set->biases);
      rows_[row].biases = set->device;
    }
    uploaded_[row - first] = rows_[row];
  }
}

}  // namespace godwit
