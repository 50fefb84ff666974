#pragma once

#include "kernels/cpu/cpu_context.h"
#include "kernels/ops.h"

namespace godwit {

OpStatus CpuEmbedTokens(CpuContext& context, const EmbedTokensArgs& args);

}  // namespace godwit
