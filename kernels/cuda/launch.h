#pragma once
// What cuda_backend.cu launches: one function per op, arguments already validated. Asynchronous on
// `stream`; the returned error is that of the launch. Correct and portable (sm_80 and later) first:
// each output has one fixed order of summation, so that the bits of a row depend neither on the
// batch nor on the cuts.

#include <cuda_runtime.h>

#include "kernels/backend.h"

namespace godwit::cuda {

// Grows on demand; within the limits that the back end reserved for, a step allocates nothing.
// Freed with the back end.
class Scratch {
 public:
  ~Scratch() { cudaFree(data_); }
  // At least num_bytes of device memory, aligned to 256 bytes, valid until the next call. Earlier
  // contents are lost.
  cudaError_t Reserve(int64_t num_bytes, void** data);

  int64_t num_growths() const { return num_growths_; }

 private:
  void* data_ = nullptr;
  int64_t num_bytes_ = 0;
  int64_t num_growths_ = 0;
};

class Gemm;  // linear.h
inline constexpr int64_t kNumCounters = 131072;

// What a launch may use besides its arguments. One op at a time, in stream order.
struct Context {
  cudaStream_t stream = nullptr;
  Scratch& scratch;
  Gemm* gemm = nullptr;          // for LaunchLinear and LaunchGatedLinear
  uint32_t* counters = nullptr;  // kNumCounters, zero before and after each op
  int num_multiprocessors = 0;
  // Whose kernels to launch: 90 for Hopper. Less than the device's where the plugin holds none for
  // it, or they do not fit.
  int compute_capability = 0;
  bool deterministic = false;  // BackendLimits
};

// `ranges` is host memory, read before the call returns.
cudaError_t LaunchCopyRanges(const CopyRange* ranges, int64_t num_ranges, cudaStream_t stream);
cudaError_t LaunchEmbedTokens(const EmbedTokensArgs& args, cudaStream_t stream);
cudaError_t LaunchGatherRows(const GatherRowsArgs& args, cudaStream_t stream);
cudaError_t LaunchRope(const RopeArgs& args, cudaStream_t stream);
cudaError_t LaunchTurnKeys(const TurnKeysArgs& args, cudaStream_t stream);
cudaError_t LaunchCountTokens(const CountTokensArgs& args, cudaStream_t stream);
cudaError_t LaunchFillZero(const ByteRange* ranges, int64_t num_ranges, cudaStream_t stream);
cudaError_t LaunchFillRandom(const MatrixView& matrix, uint64_t seed, float scale,
                             cudaStream_t stream);
cudaError_t LaunchLinear(const LinearArgs& args, Context& context);
cudaError_t LaunchGatedLinear(const GatedLinearArgs& args, Context& context);
// Decode rows and prefill rows have kernels of their own (lightning_step.cu, lightning_prefill.cu);
// each launches nothing when the step has none of its rows. LaunchLightningRows takes any type and
// shape: what they leave to it.
struct LightningRows {
  int32_t first_row = 0;
  int32_t num_rows = 0;
  int64_t first_token = 0;
  int64_t num_tokens = 0;
};
cudaError_t LaunchLightningRows(const LightningAttentionArgs& args, const LightningRows& rows,
                                Context& context);
cudaError_t LaunchLightningStep(const LightningAttentionArgs& args, Context& context);
cudaError_t LaunchLightningPrefill(const LightningAttentionArgs& args, Context& context);
cudaError_t LaunchPagedDecode(const PagedAttentionArgs& args, Context& context);
cudaError_t LaunchPagedPrefill(const PagedAttentionArgs& args, Context& context);
// The general kernels, for what the others do not take: any shape and type, some rows and their
// tokens. Tokens of no row (padding) are left alone.
cudaError_t LaunchPagedPlain(const PagedAttentionArgs& args, int32_t first_row, int32_t num_rows,
                             int64_t first_token, int64_t num_tokens, cudaStream_t stream);
cudaError_t LaunchSample(const SampleArgs& args, Context& context);
cudaError_t LaunchAcceptanceHead(const AcceptanceHeadArgs& args, cudaStream_t stream);
cudaError_t LaunchVerifyTokens(const VerifyTokensArgs& args, Context& context);
cudaError_t LaunchScoreTokens(const ScoreTokensArgs& args, Context& context);

// Bytes of scratch that each op takes at most within the limits.
int64_t LinearScratchBytes(const BackendLimits& limits);
int64_t LightningScratchBytes(const BackendLimits& limits);
int64_t PagedDecodeScratchBytes(const BackendLimits& limits);
int64_t PagedPrefillScratchBytes(const BackendLimits& limits);
int64_t PagedScratchBytes(const BackendLimits& limits);
int64_t SampleScratchBytes(const BackendLimits& limits, int compute_capability);

}  // namespace godwit::cuda
