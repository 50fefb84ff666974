#pragma once

#include "kernels/base/op_status.h"
#include "kernels/cpu/cpu_context.h"
#include "kernels/ops.h"

namespace godwit {

OpStatus CpuAcceptanceHead(CpuContext& context, const AcceptanceHeadArgs& args);

}  // namespace godwit
