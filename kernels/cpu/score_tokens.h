#pragma once
// Log-probabilities of given tokens on the CPU back end.

#include "kernels/base/op_status.h"
#include "kernels/cpu/cpu_context.h"
#include "kernels/ops.h"

namespace godwit {

// INTERNAL, naming the lowest such row: logits hold a NaN or +inf.
OpStatus CpuScoreTokens(CpuContext& context, const ScoreTokensArgs& args);

}  // namespace godwit
