#pragma once
// Verification of drafts on the CPU back end.

#include "kernels/base/op_status.h"
#include "kernels/cpu/cpu_context.h"
#include "kernels/ops.h"

namespace godwit {

OpStatus CpuVerifyTokens(CpuContext& context, const VerifyTokensArgs& args);

}  // namespace godwit
