#pragma once
// Shape, dtype and bounds checks shared by all back ends; each returns kInvalidArgument naming op,
// tensor, expected and found. Data behind pointers (token ids, step rows) is not read here: the
// engine checked it.

#include "kernels/base/op_status.h"
#include "kernels/ops.h"

namespace godwit {

// Widest attention head: back ends keep a head on the stack or in registers.
inline constexpr int32_t kMaxHeadDim = 1024;

OpStatus Validate(const EmbedTokensArgs& args);
OpStatus Validate(const LinearArgs& args);
OpStatus Validate(const GatedLinearArgs& args);
OpStatus Validate(const GatherRowsArgs& args);
OpStatus Validate(const LightningAttentionArgs& args);
OpStatus Validate(const RopeArgs& args);
OpStatus Validate(const PagedAttentionArgs& args);
OpStatus Validate(const TurnKeysArgs& args);
OpStatus Validate(const CountTokensArgs& args);
OpStatus Validate(const SampleArgs& args);
OpStatus Validate(const AcceptanceHeadArgs& args);
OpStatus Validate(const VerifyTokensArgs& args);
OpStatus Validate(const ScoreTokensArgs& args);

}  // namespace godwit
