#pragma once
// The steps of one draw, shared by Sample and VerifyTokens: a row of logits becomes the
// distribution that its token is drawn from.

#include <cstdint>

#include "kernels/base/tensor.h"
#include "kernels/cpu/isa.h"
#include "kernels/ops.h"

namespace godwit {

// What a token is drawn from: an argmax, or the logits that were kept, relative to the largest.
struct DrawPlan {
  bool is_argmax = false;
  int64_t argmax = 0;
  // After bias and penalties, as far as asked for (SampleArgs).
  float margin = 0;
  float top_probability = 1, entropy = 0;
};

// What else PrepareDraw finds out.
struct DrawWants {
  bool margin = false, certainty = false;
};

// logits <- raw with bias, penalties, temperature and filters (-inf: not kept). counts: of the
// row's slot, or null. `weights`: working memory, [V] rounded up. raw holds no NaN or +inf.
DrawPlan PrepareDraw(const IsaTable& isa, const SampleRow& row, const float* raw,
                     const uint32_t* counts, int64_t vocab, float* logits, float* weights,
                     const DrawWants& wants = {});

// The token that SampleRow's Gumbel noise at `position` picks.
int64_t DrawToken(const IsaTable& isa, const SampleRow& row, const DrawPlan& plan, int64_t position,
                  const float* logits, int64_t vocab);

// The distribution of the plan, normalised. May be `logits` itself.
void WriteProbabilities(const IsaTable& isa, const DrawPlan& plan, const float* logits,
                        int64_t vocab, float* probabilities);

// True: a NaN or +inf, and nothing can be drawn.
bool HasBadLogits(const IsaTable& isa, const float* raw, int64_t vocab);

// Log-probabilities of the drawn token and of the likeliest ones, as the row asks for.
void WriteLogprobs(const IsaTable& isa, const SampleRow& row, const float* raw, int64_t vocab,
                   int64_t token, const TensorView& logprobs, const TensorView& top_ids,
                   const TensorView& top_logprobs, int64_t output);

}  // namespace godwit
