#pragma once
// What lightning_attention.cu does for lightning_prefill.cu: the rows outside the P-blocks.

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/launch.h"

namespace godwit::cuda {

__host__ __device__ inline int32_t KeyDim(const LightningAttentionArgs& args) {
  return args.theta.data != nullptr ? 2 * args.head_dim : args.head_dim;
}
__device__ inline bool HasBlocks(const StepRow& row) {
  return row.num_tokens > 0 && row.p_begin < row.p_end;
}

// The step's q and k after activation and rotation, in scratch: row t of q holds H * d_k f32 (or,
// where lightning_prefill.cu forms it, that many bf16 in their place), of k H * d_k act.
struct FormedLightning {
  void* q = nullptr;
  void* k = nullptr;
};

// Makes room for all tokens of the step; forms those of `rows`, or of them those outside P-blocks.
cudaError_t FormLightning(const LightningAttentionArgs& args, const LightningRows& rows,
                          bool skip_blocks, Context& context, FormedLightning* formed);

// kBeforeBlocks: rows without P-blocks whole, the others up to their first one, leaving the state
// there in the slot. kAfterBlocks: the others from their last one on, the state there being in the
// slot; then the window, for all.
enum class LightningPart : int32_t { kAll = 0, kBeforeBlocks = 1, kAfterBlocks = 2 };
cudaError_t WalkLightning(const LightningAttentionArgs& args, const LightningRows& rows,
                          LightningPart part, const FormedLightning& formed, Context& context);

}  // namespace godwit::cuda
