#include "kernels/cpu/score_tokens.h"

#include <limits>

#include "kernels/base/check.h"
#include "kernels/cpu/selection.h"

namespace godwit {

OpStatus CpuScoreTokens(CpuContext& context, const ScoreTokensArgs& args) {
  const int64_t vocab = args.logits.shape[1];
  context.pool.ForEach(args.logits.rows(), [&](int64_t row) {
    const float* const logits = args.logits.row<const float>(row);
    const LogSoftmax softmax = ComputeLogSoftmax(context.isa, logits, vocab);
    if (softmax.bad) {
      *args.logprobs.row<float>(row) = std::numeric_limits<float>::quiet_NaN();
      return;
    }
    const int32_t target = *args.targets.row<const int32_t>(row);
    GODWIT_CHECK(target >= -1 && target < vocab);
    *args.logprobs.row<float>(row) = target < 0 ? 0.0f : softmax.At(logits[target]);
    if (args.num_top == 0) return;
    TopLogprobs(context.isa, softmax, logits, vocab, args.num_top, args.top_ids.row<int32_t>(row),
                args.top_logprobs.row<float>(row));
  });
  return {};
}

}  // namespace godwit
