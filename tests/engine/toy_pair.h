#pragma once
// An engine with a target and a draft model of a few tokens, that can be made to err. It is told
// the time by what it ran, so that its policies decide alike in every run of a test.

#include <cstdint>
#include <memory>

#include "engine/engine.h"
#include "tests/engine/engine_driver.h"
#include "tests/engine/tiny_model.h"
#include "tests/planted_mistakes.h"

namespace godwit {

struct ToyPairOptions {
  TinyFamily target = TinyFamily::kTransnormer;  // and a draft of the other family
  bool with_head = false;                        // of random weights: it stops anywhere
  Mistake mistake = Mistake::kNone;
  // The mistake of a policy: what it sees of a draft is how likely the drawn token was. By itself
  // it changes no token, for all margins are for is to decide how far to draft.
  bool shows_draws = false;
};

class ToyPair {
 public:
  static constexpr int kVocabSize = 5;
  static constexpr int64_t kMaxSequences = 240;

  explicit ToyPair(const ToyPairOptions& options);
  ToyPair(const ToyPair&) = delete;
  ToyPair& operator=(const ToyPair&) = delete;

  Engine& engine() { return *engine_; }

 private:
  double seconds_ = 0;
  const TinyModel target_, draft_;
  std::unique_ptr<Engine> engine_;
};

// A few tokens more than ToyTexts counts, so that drafts go beyond them. Neither plain temperature
// nor without penalties, and by the standard rule.
DriverRequest ToyRequest();

}  // namespace godwit
