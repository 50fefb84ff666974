#include "kernels/cpu/draw.h"

#include <algorithm>
#include <cmath>

#include "kernels/base/check.h"
#include "kernels/cpu/selection.h"
#include "kernels/cpu/vector_ops.h"

namespace godwit {
namespace {

void AddBiases(const SampleRow& row, float* logits, int64_t vocab) {
  for (int32_t i = 0; i < row.num_biases; ++i) {
    const TokenBias& bias = row.biases[i];
    GODWIT_CHECK(bias.token_id >= 0 && bias.token_id < vocab);
    logits[bias.token_id] += bias.bias;
  }
}

void ApplyPenalties(const SampleRow& row, const uint32_t* counts, float* logits, int64_t vocab) {
  if (row.repetition_penalty == 1 && row.presence_penalty == 0 && row.frequency_penalty == 0)
    return;
  for (int64_t id = 0; id < vocab; ++id) {
    if (counts[id] == 0) continue;
    float logit = logits[id];
    logit = logit > 0 ? logit / row.repetition_penalty : logit * row.repetition_penalty;
    const uint32_t in_output = counts[id] & ~kPromptBit;
    if (in_output > 0) {
      logit -= row.presence_penalty + row.frequency_penalty * static_cast<float>(in_output);
    }
    logits[id] = logit;
  }
}

// Removes (-inf) what top_k, top_p and min_p do not keep. The largest logit is 0; `weights` is
// working memory.
void Filter(const IsaTable& isa, const SampleRow& row, float* logits, float* weights,
            int64_t vocab) {
  if (row.top_k > 0 && row.top_k < vocab) {
    KeepPrefix(isa, LargestPrefix(isa, logits, vocab, row.top_k), logits, vocab);
  }
  if (row.top_p >= 1 && row.min_p <= 0) return;
  SumExpArgs sum = {.x = logits, .n = vocab, .max = 0, .y = weights};
  isa.sum_exp(sum);
  if (row.top_p < 1) {
    const double target = static_cast<double>(row.top_p) * sum.sum;
    KeepPrefix(isa, WeightedPrefix(isa, logits, weights, vocab, target), logits, vocab);
  }
  if (row.min_p <= 0) return;
  // weights[id] is the probability over that of the likeliest token, whose own is 1 and stays
  // whatever min_p is.
  isa.keep_at_least(
      {.x = logits, .by = weights, .n = vocab, .threshold = std::min(row.min_p, 1.0f)});
}

// max: the largest. 0 where the second is not finite.
float Margin(const float* logits, int64_t vocab, float max) {
  float second = -INFINITY;
  bool is_first = true;
  for (int64_t id = 0; id < vocab; ++id) {
    if (logits[id] <= second) continue;
    if (logits[id] == max && is_first) {
      is_first = false;
    } else {
      second = logits[id];
    }
  }
  return std::isfinite(second) ? max - second : 0;
}

// Of softmax(logits), whose largest logit is `max`; `weights` is working memory.
void FindCertainty(const IsaTable& isa, const float* logits, float* weights, int64_t vocab,
                   float max, DrawPlan& plan) {
  if (max == -INFINITY) return;
  SumExpArgs sum = {.x = logits, .n = vocab, .max = max, .y = weights};
  isa.sum_exp(sum);
  double weighted = 0;  // logits relative to the largest
  for (int64_t id = 0; id < vocab; ++id) {
    if (weights[id] > 0) weighted += static_cast<double>(weights[id] * (logits[id] - max));
  }
  plan.top_probability = static_cast<float>(1 / sum.sum);
  plan.entropy = static_cast<float>(std::log(sum.sum) - weighted / sum.sum);
}

}  // namespace

bool HasBadLogits(const IsaTable& isa, const float* raw, int64_t vocab) {
  ScanLogitsArgs scan = {.x = raw, .n = vocab};
  isa.scan_logits(scan);
  return scan.bad;
}

DrawPlan PrepareDraw(const IsaTable& isa, const SampleRow& row, const float* raw,
                     const uint32_t* counts, int64_t vocab, float* logits, float* weights,
                     const DrawWants& wants) {
  std::copy(raw, raw + vocab, logits);
  AddBiases(row, logits, vocab);
  if (counts != nullptr) ApplyPenalties(row, counts, logits, vocab);
  ScanLogitsArgs scan = {.x = logits, .n = vocab};
  isa.scan_logits(scan);
  DrawPlan plan;
  if (wants.margin) plan.margin = Margin(logits, vocab, scan.max);
  if (wants.certainty) FindCertainty(isa, logits, weights, vocab, scan.max, plan);
  if (row.temperature == 0 || scan.max == -INFINITY) {
    plan.is_argmax = true;
    plan.argmax = std::find(logits, logits + vocab, scan.max) - logits;
    return plan;
  }
  // Relative to the largest: a tiny temperature drives the others to -inf, never the largest to
  // inf.
  isa.temper({.x = logits, .n = vocab, .max = scan.max, .temperature = row.temperature});
  Filter(isa, row, logits, weights, vocab);
  return plan;
}

int64_t DrawToken(const IsaTable& isa, const SampleRow& row, const DrawPlan& plan, int64_t position,
                  const float* logits, int64_t vocab) {
  if (plan.is_argmax) return plan.argmax;
  const auto bits = static_cast<uint64_t>(position);
  GumbelArgmaxArgs draw = {
      .x = logits,
      .n = vocab,
      .seed = row.seed,
      .counter = {static_cast<uint32_t>(row.output_index), static_cast<uint32_t>(bits),
                  static_cast<uint32_t>(bits >> 32)}};
  isa.gumbel_argmax(draw);
  return draw.index;
}

void WriteProbabilities(const IsaTable& isa, const DrawPlan& plan, const float* logits,
                        int64_t vocab, float* probabilities) {
  if (plan.is_argmax) {
    std::fill(probabilities, probabilities + vocab, 0.0f);
    probabilities[plan.argmax] = 1;
    return;
  }
  SumExpArgs sum = {.x = logits, .n = vocab, .max = 0, .y = probabilities};
  isa.sum_exp(sum);
  const auto scale = static_cast<float>(1 / sum.sum);
  for (int64_t id = 0; id < vocab; ++id) probabilities[id] *= scale;
}

void WriteLogprobs(const IsaTable& isa, const SampleRow& row, const float* raw, int64_t vocab,
                   int64_t token, const TensorView& logprobs, const TensorView& top_ids,
                   const TensorView& top_logprobs, int64_t output) {
  if (row.num_logprobs < 0) return;
  const LogSoftmax softmax = ComputeLogSoftmax(isa, raw, vocab);
  *logprobs.row<float>(output) = softmax.At(raw[token]);
  if (row.num_logprobs == 0) return;
  GODWIT_CHECK(row.num_logprobs <= top_ids.shape[1]);
  TopLogprobs(isa, softmax, raw, vocab, row.num_logprobs, top_ids.row<int32_t>(output),
              top_logprobs.row<float>(output));
}

}  // namespace godwit
