#pragma once
// Sampling on the CPU back end.

#include "kernels/base/op_status.h"
#include "kernels/cpu/cpu_context.h"
#include "kernels/ops.h"

namespace godwit {

// INTERNAL, naming the lowest such row: its logits hold a NaN or +inf. Where every token is banned
// the lowest of the largest is drawn: token 0.
OpStatus CpuSample(CpuContext& context, const SampleArgs& args);

}  // namespace godwit
