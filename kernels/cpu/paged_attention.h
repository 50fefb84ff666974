#pragma once
// Softmax attention over paged KV on the CPU back end.
//
// A block holds, per kv head, its keys as columns [head_dim, 16] and its values as rows [16,
// head_dim]: 16 scores are then one product of vectors, with no sum across lanes and no
// transposition.

#include "kernels/base/op_status.h"
#include "kernels/cpu/cpu_context.h"
#include "kernels/ops.h"

namespace godwit {

OpStatus CpuPagedAttention(CpuContext& context, const PagedAttentionArgs& args);

}  // namespace godwit
