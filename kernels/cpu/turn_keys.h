#pragma once
#include "kernels/cpu/cpu_context.h"
#include "kernels/ops.h"

namespace godwit {

OpStatus CpuTurnKeys(CpuContext& context, const TurnKeysArgs& args);

}  // namespace godwit
