#include "tests/engine/toy_texts.h"

#include <algorithm>
#include <cmath>
#include <span>

#include "kernels/base/check.h"
#include "tests/chi_square.h"

namespace godwit {

ToyTexts::ToyTexts(Engine& engine, const DriverRequest& request)
    : vocab_size_(static_cast<int32_t>(engine.card().config.vocab_size)) {
  std::vector<int32_t> text;
  Enumerate(engine, request, text, 1);
  counts_.resize(probabilities_.size());
}

void ToyTexts::Enumerate(Engine& engine, const DriverRequest& request, std::vector<int32_t>& text,
                         double probability) {
  if (text.size() == kLength) {
    probabilities_.push_back(probability);
    return;
  }
  const std::vector<double> next = Next(engine, request, text);
  for (int32_t id = 0; id < vocab_size_; ++id) {
    text.push_back(id);
    Enumerate(engine, request, text, probability * next[static_cast<size_t>(id)]);
    text.pop_back();
  }
}

// The distribution of the token after `text`, by definition.
std::vector<double> ToyTexts::Next(Engine& engine, const DriverRequest& request,
                                   const std::vector<int32_t>& text) const {
  std::vector<int32_t> tokens = request.prompt;
  tokens.insert(tokens.end(), text.begin(), text.end());
  absl::StatusOr<CacheLease> lease = engine.caches().Reserve(std::ssize(tokens));
  GODWIT_CHECK(lease.ok());
  std::vector<float> logits(tokens.size() * static_cast<size_t>(vocab_size_));
  const BatchRow row = {.token_ids = tokens,
                        .prompt_length = std::ssize(tokens),
                        .lease = &*lease,
                        .logits = logits.data()};
  const absl::StatusOr<StepId> step = engine.Submit(std::span(&row, 1));
  GODWIT_CHECK(step.ok() && engine.Collect(*step).ok());
  std::vector<double> p(logits.end() - vocab_size_, logits.end());
  double sum = 0;
  for (int32_t id = 0; id < vocab_size_; ++id) {
    double& value = p[static_cast<size_t>(id)];
    value -= static_cast<double>(request.sampling.frequency_penalty) *
             static_cast<double>(std::count(text.begin(), text.end(), id));
    sum += value = std::exp(value / static_cast<double>(request.sampling.temperature));
  }
  for (double& value : p) value /= sum;
  return p;
}

void ToyTexts::Count(const std::vector<int32_t>& ids) {
  GODWIT_CHECK(std::ssize(ids) >= kLength);
  int64_t text = 0;
  for (size_t place = 0; place < kLength; ++place) text = text * vocab_size_ + ids[place];
  ++counts_[static_cast<size_t>(text)];
}

double ToyTexts::PValue() {
  const double p = ChiSquarePValue(counts_, probabilities_);
  std::fill(counts_.begin(), counts_.end(), 0);
  return p;
}

}  // namespace godwit
