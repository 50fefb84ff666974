#pragma once
// Lightning attention of the CPU back end.

#include "kernels/base/op_status.h"
#include "kernels/cpu/cpu_context.h"
#include "kernels/ops.h"

namespace godwit {

OpStatus CpuLightningAttention(CpuContext& context, const LightningAttentionArgs& args);

}  // namespace godwit
