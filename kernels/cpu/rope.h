#pragma once
// The rotation table of a step on the CPU back end.

#include "kernels/base/op_status.h"
#include "kernels/cpu/cpu_context.h"
#include "kernels/ops.h"

namespace godwit {

OpStatus CpuRope(CpuContext& context, const RopeArgs& args);

}  // namespace godwit
