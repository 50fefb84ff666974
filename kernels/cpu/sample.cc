// One task per draw: the logits of its row are copied and changed in the order of ops.h. No step
// sorts the row.

#include "kernels/cpu/sample.h"

#include <algorithm>
#include <atomic>
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

int64_t Draw(const IsaTable& isa, const SampleRow& row, float* logits, float* weights,
             int64_t vocab) {
  ScanLogitsArgs scan = {.x = logits, .n = vocab};
  isa.scan_logits(scan);
  if (row.temperature == 0 || scan.max == -INFINITY) {
    return std::find(logits, logits + vocab, scan.max) - logits;
  }
  // Relative to the largest: a tiny temperature drives the others to -inf, never the largest to
  // inf.
  isa.temper({.x = logits, .n = vocab, .max = scan.max, .temperature = row.temperature});
  Filter(isa, row, logits, weights, vocab);
  const uint64_t position = static_cast<uint64_t>(row.position);
  GumbelArgmaxArgs draw = {
      .x = logits,
      .n = vocab,
      .seed = row.seed,
      .counter = {static_cast<uint32_t>(row.output_index), static_cast<uint32_t>(position),
                  static_cast<uint32_t>(position >> 32)}};
  isa.gumbel_argmax(draw);
  return draw.index;
}

void SampleOne(const IsaTable& isa, const SampleArgs& args, int32_t index, float* scratch) {
  const SampleRow& row = args.rows[index];
  if (row.slot < 0) return;
  const int64_t vocab = args.logits.shape[1];
  const float* const raw = args.logits.row<const float>(row.logit_row);
  float* const logits = scratch;
  float* const weights = scratch + PadRow(vocab);
  ScanLogitsArgs scan = {.x = raw, .n = vocab};
  isa.scan_logits(scan);
  if (scan.bad) {
    *args.tokens.row<int32_t>(index) = -1;
    return;
  }
  std::copy(raw, raw + vocab, logits);
  AddBiases(row, logits, vocab);
  if (args.counts) ApplyPenalties(row, args.counts.row<const uint32_t>(row.slot), logits, vocab);
  const int64_t token = Draw(isa, row, logits, weights, vocab);
  *args.tokens.row<int32_t>(index) = static_cast<int32_t>(token);
  if (args.counts) ++args.counts.row<uint32_t>(row.slot)[token];
  if (row.num_logprobs < 0) return;
  const LogSoftmax softmax = ComputeLogSoftmax(isa, raw, vocab);
  *args.logprobs.row<float>(index) = softmax.At(raw[token]);
  if (row.num_logprobs == 0) return;
  GODWIT_CHECK(row.num_logprobs <= args.top_ids.shape[1]);
  TopLogprobs(isa, softmax, raw, vocab, row.num_logprobs, args.top_ids.row<int32_t>(index),
              args.top_logprobs.row<float>(index));
}

}  // namespace

OpStatus CpuSample(CpuContext& context, const SampleArgs& args) {
  if (args.num_rows == 0) return {};
  const int64_t elements = 2 * PadRow(args.logits.shape[1]);
  float* const scratch = static_cast<float*>(context.scratch.Get(
      elements * context.pool.num_threads() * static_cast<int64_t>(sizeof(float))));
  if (scratch == nullptr) {
    return context.Fail(OpCode::kResourceExhausted, "Sample: no memory for scratch");
  }
  std::atomic<int32_t> next = 0;
  auto body = [&](int thread) {
    for (int32_t row = next.fetch_add(1, std::memory_order_relaxed); row < args.num_rows;
         row = next.fetch_add(1, std::memory_order_relaxed)) {
      SampleOne(context.isa, args, row, scratch + thread * elements);
    }
  };
  if (args.num_rows == 1) {
    body(0);
  } else {
    context.pool.Run(body);
  }
  return {};
}

}  // namespace godwit
