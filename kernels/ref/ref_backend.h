#pragma once
// The truth for tests: every op of ops.h as the obvious loops, with double accumulators, on one
// thread. Whole models run on it too. Never linked into the server.

#include <memory>

#include "kernels/backend.h"

namespace godwit {

// Never fails. A matrix is kept as row-major f32, whatever its dtype says (PackMatrixRows rounds to
// that dtype first).
std::unique_ptr<Backend, BackendDeleter> CreateRefBackend();

// The ops alone, on host memory, for tests that compare with them. Each assumes that Validate
// passed.
void RefEmbedTokens(const EmbedTokensArgs& args);
void RefLinear(const LinearArgs& args);
void RefGatedLinear(const GatedLinearArgs& args);
void RefGatherRows(const GatherRowsArgs& args);
void RefLightningAttention(const LightningAttentionArgs& args);
void RefRope(const RopeArgs& args);
void RefPagedAttention(const PagedAttentionArgs& args);
void RefTurnKeys(const TurnKeysArgs& args);
void RefCountTokens(const CountTokensArgs& args);
// False: a row of logits holds a NaN or +inf.
void RefSample(const SampleArgs& args);
void RefAcceptanceHead(const AcceptanceHeadArgs& args);
void RefVerifyTokens(const VerifyTokensArgs& args);
void RefScoreTokens(const ScoreTokensArgs& args);

}  // namespace godwit
