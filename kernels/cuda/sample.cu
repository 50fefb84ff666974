// Sampling and scoring: a cluster of blocks a row (sample_row.cuh), 4 blocks a multiprocessor.

#include <cmath>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/pdl.cuh"
#include "kernels/cuda/sample_row.cuh"

namespace godwit::cuda {
namespace {

// The distribution of the plan, normalised, to [V].
template <int kCluster>
__device__ void WriteProbabilities(RowOps<kCluster>& ops, const DrawPlan& plan,
                                   float* probabilities) {
  const Probabilities p(ops, plan);
  ops.ForEach([&](float value, uint32_t id) {
    if (id < ops.vocab_size()) probabilities[id] = p(value, id);
  });
}

template <int kCluster>
__global__ void __launch_bounds__(kRowThreads, 4)
    SampleKernel(SampleArgs args, RowLayout layout, float4* scratch) {
  extern __shared__ float4 values[];
  __shared__ RowShared shared;
  DependencyTrigger();  // an acceptance head loads its weight meanwhile
  DependencyWait();
  const int64_t index = blockIdx.x / kCluster;
  const SampleRow& row = args.rows[index];
  if (row.slot < 0) return;
  const int64_t vocab_size = args.logits.shape[1];
  const float* logits = Row<const float>(args.logits, row.logit_row);
  RowOps<kCluster> ops(shared, PartOfBlock<kCluster>(layout, vocab_size, values, scratch));
  const uint64_t largest = ops.template Load<true>(logits);
  if (largest == kBadKey) {
    if (ops.writes()) *Row<int32_t>(args.tokens, index) = -1;
    return;
  }
  uint32_t* counts = args.counts.data != nullptr ? Row<uint32_t>(args.counts, row.slot) : nullptr;
  float* margin = args.margins.data != nullptr ? Row<float>(args.margins, index) : nullptr;
  float* certainty =
      args.certainties.data != nullptr ? Row<float>(args.certainties, index) : nullptr;
  const DrawPlan plan = PrepareDraw(ops, row, largest, counts, margin, certainty);
  const int32_t token = DrawToken(ops, row, plan, row.position);
  if (ops.writes()) {
    *Row<int32_t>(args.tokens, index) = token;
    if (counts != nullptr) ++counts[token];
  }
  if (row.probability_row >= 0) {
    WriteProbabilities(ops, plan, Row<float>(args.probabilities, row.probability_row));
  }
  WriteLogprobs(ops, args, row, plan, token, index);
}

template <int kCluster>
__global__ void __launch_bounds__(kRowThreads, 4)
    ScoreKernel(ScoreTokensArgs args, RowLayout layout, float4* scratch) {
  extern __shared__ float4 values[];
  __shared__ RowShared shared;
  DependencyWait();
  const int64_t index = blockIdx.x / kCluster;
  const float* logits = Row<const float>(args.logits, index);
  RowOps<kCluster> ops(shared,
                       PartOfBlock<kCluster>(layout, args.logits.shape[1], values, scratch));
  const uint64_t largest = ops.template Load<true>(logits);
  if (largest == kBadKey) {
    if (ops.writes()) *Row<float>(args.logprobs, index) = NAN;
    return;
  }
  const double log_sum = ops.LogSumExp(ValueOf(largest));
  const int32_t target = *Row<const int32_t>(args.targets, index);
  if (ops.writes()) {
    *Row<float>(args.logprobs, index) =
        target < 0 ? 0 : static_cast<float>(logits[target] - log_sum);
  }
  if (args.num_top == 0) return;
  ops.WriteTop(ValueOf(largest), log_sum, args.num_top, Row<int32_t>(args.top_ids, index),
               Row<float>(args.top_logprobs, index));
}

}  // namespace

cudaError_t LaunchSample(const SampleArgs& args, Context& context) {
  if (args.num_rows == 0) return cudaSuccess;
  const RowLayout layout = LayoutOf(args.logits.shape[1], context.compute_capability);
  const auto kernel = layout.cluster == 1 ? SampleKernel<1> : SampleKernel<kMaxCluster>;
  return LaunchRows<SampleArgs>(kernel, args, layout, args.num_rows, context);
}

cudaError_t LaunchScoreTokens(const ScoreTokensArgs& args, Context& context) {
  if (args.logits.rows() == 0) return cudaSuccess;
  const RowLayout layout = LayoutOf(args.logits.shape[1], context.compute_capability);
  const auto kernel = layout.cluster == 1 ? ScoreKernel<1> : ScoreKernel<kMaxCluster>;
  return LaunchRows<ScoreTokensArgs>(kernel, args, layout, args.logits.rows(), context);
}

int64_t SampleScratchBytes(const BackendLimits& limits, int compute_capability) {
  if (limits.vocab_size == 0) return 0;
  return LayoutOf(limits.vocab_size, compute_capability).scratch_bytes(limits.max_draws);
}

}  // namespace godwit::cuda
