#pragma once
// Token counts of a slot on the CPU back end.

#include "kernels/base/op_status.h"
#include "kernels/cpu/cpu_context.h"
#include "kernels/ops.h"

namespace godwit {

OpStatus CpuCountTokens(CpuContext& context, const CountTokensArgs& args);

}  // namespace godwit
