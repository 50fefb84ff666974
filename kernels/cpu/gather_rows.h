#pragma once

#include "kernels/cpu/cpu_context.h"
#include "kernels/ops.h"

namespace godwit {

OpStatus CpuGatherRows(CpuContext& context, const GatherRowsArgs& args);

}  // namespace godwit
