#pragma once
// Texts of a few tokens, drawn by an engine whose model has few, counted against how likely its
// target alone makes each of them.

#include <cstdint>
#include <vector>

#include "engine/engine.h"
#include "tests/engine/engine_driver.h"

namespace godwit {

class ToyTexts {
 public:
  static constexpr int kLength = 3;

  // Of vocab_size^kLength texts that follow the request's prompt, by its temperature and its
  // frequency_penalty; the logits are those of the engine's target that reads prompt and text.
  ToyTexts(Engine& engine, const DriverRequest& request);

  const std::vector<double>& probabilities() const { return probabilities_; }
  // The first tokens of a text; the rest is not looked at.
  void Count(const std::vector<int32_t>& ids);
  // And begins to count anew.
  double PValue();

 private:
  std::vector<double> Next(Engine& engine, const DriverRequest& request,
                           const std::vector<int32_t>& text) const;
  void Enumerate(Engine& engine, const DriverRequest& request, std::vector<int32_t>& text,
                 double probability);

  int32_t vocab_size_;
  std::vector<double> probabilities_;  // by text, its first token in the highest place
  std::vector<int64_t> counts_;        // likewise
};

}  // namespace godwit
