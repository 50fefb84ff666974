#pragma once

#include "kernels/cpu/cpu_context.h"
#include "kernels/ops.h"

namespace godwit {

OpStatus CpuLinear(CpuContext& context, const LinearArgs& args);
OpStatus CpuGatedLinear(CpuContext& context, const GatedLinearArgs& args);

}  // namespace godwit
