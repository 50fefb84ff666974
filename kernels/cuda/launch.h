#pragma once
// What cuda_backend.cu launches: one function per op, arguments already validated. Asynchronous on `stream`; the returned
// error is that of the launch. Correct and portable (sm_80 and later) first: each output has one fixed order of summation,
// so that the bits of a row depend neither on the batch nor on the cuts.

#include <cuda_runtime.h>

#include "kernels/ops.h"

namespace godwit::cuda {

// Grows on demand; a step after the first of its size allocates nothing. Freed with the back end.
class Scratch {
 public:
  ~Scratch() { cudaFree(data_); }
  // At least num_bytes of device memory, valid until the next call. Earlier contents are lost.
  cudaError_t Reserve(int64_t num_bytes, void** data);

 private:
  void* data_ = nullptr;
  int64_t num_bytes_ = 0;
};

cudaError_t LaunchEmbedTokens(const EmbedTokensArgs& args, cudaStream_t stream);
cudaError_t LaunchGatherRows(const GatherRowsArgs& args, cudaStream_t stream);
cudaError_t LaunchRope(const RopeArgs& args, cudaStream_t stream);
cudaError_t LaunchCountTokens(const CountTokensArgs& args, cudaStream_t stream);
cudaError_t LaunchLinear(const LinearArgs& args, Scratch& scratch, cudaStream_t stream);
cudaError_t LaunchGatedLinear(const GatedLinearArgs& args, Scratch& scratch, cudaStream_t stream);
cudaError_t LaunchLightningAttention(const LightningAttentionArgs& args, Scratch& scratch,
                                     cudaStream_t stream);
cudaError_t LaunchPagedAttention(const PagedAttentionArgs& args, cudaStream_t stream);
// `bad_row` (device, set to -1 before) receives a row whose logits hold NaN or +inf.
cudaError_t LaunchSample(const SampleArgs& args, Scratch& scratch, int32_t* bad_row,
                         cudaStream_t stream);
cudaError_t LaunchScoreTokens(const ScoreTokensArgs& args, int32_t* bad_row, cudaStream_t stream);

}  // namespace godwit::cuda
