// One task per draw: the logits of its row are copied and changed in the order of ops.h. No step
// sorts the row.

#include "kernels/cpu/sample.h"

#include <atomic>

#include "kernels/base/check.h"
#include "kernels/cpu/draw.h"
#include "kernels/cpu/vector_ops.h"

namespace godwit {
namespace {

void SampleOne(const IsaTable& isa, const SampleArgs& args, int32_t index, float* scratch) {
  const SampleRow& row = args.rows[index];
  if (row.slot < 0) return;
  const int64_t vocab = args.logits.shape[1];
  const float* const raw = args.logits.row<const float>(row.logit_row);
  float* const logits = scratch;
  float* const weights = scratch + PadRow(vocab);
  if (HasBadLogits(isa, raw, vocab)) {
    *args.tokens.row<int32_t>(index) = -1;
    return;
  }
  const uint32_t* const counts = args.counts ? args.counts.row<const uint32_t>(row.slot) : nullptr;
  const DrawPlan plan = PrepareDraw(
      isa, row, raw, counts, vocab, logits, weights,
      {.margin = args.margins.data != nullptr, .certainty = args.certainties.data != nullptr});
  if (args.margins) *args.margins.row<float>(index) = plan.margin;
  if (args.certainties) {
    float* const certainty = args.certainties.row<float>(index);
    certainty[0] = plan.top_probability;
    certainty[1] = plan.entropy;
  }
  const int64_t token = DrawToken(isa, row, plan, row.position, logits, vocab);
  *args.tokens.row<int32_t>(index) = static_cast<int32_t>(token);
  if (args.counts) ++args.counts.row<uint32_t>(row.slot)[token];
  if (row.probability_row >= 0) {
    GODWIT_CHECK(row.probability_row < args.probabilities.rows());
    WriteProbabilities(isa, plan, logits, vocab,
                       args.probabilities.row<float>(row.probability_row));
  }
  WriteLogprobs(isa, row, raw, vocab, token, args.logprobs, args.top_ids, args.top_logprobs, index);
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
