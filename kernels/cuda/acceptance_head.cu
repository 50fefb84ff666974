// A layer of an acceptance head: one block of 128 threads a row, thread i at elements i, i + 128,
// ...; two reductions in a fixed order. A row is a few kilobytes: the launch is what it costs.

#include <cmath>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/pdl.cuh"

namespace godwit::cuda {
namespace {

constexpr int kThreads = 128;

struct Features {
  float of[kNumHeadFeatures] = {};
};

__device__ Features FeaturesOf(const AcceptanceHeadArgs& args, const SampleRow& row,
                               int64_t index) {
  if (args.margins.data == nullptr || args.certainties.data == nullptr) return {};
  const float* certainty = Row<const float>(args.certainties, index);
  return {{log1pf(*Row<const float>(args.margins, index)), certainty[0], certainty[1],
           fminf(row.temperature, 2.0f), args.place}};
}

__device__ float Dot(const Features& features, const TensorView& weights, int64_t column) {
  float sum = 0;
  for (int f = 0; f < kNumHeadFeatures; ++f)
    sum = fmaf(features.of[f], Row<const float>(weights, f)[column], sum);
  return sum;
}

__global__ void __launch_bounds__(kThreads)
    AcceptanceHeadKernel(const __grid_constant__ AcceptanceHeadArgs args) {
  __shared__ float shared[kThreads / kWarp];
  DependencyTrigger();
  DependencyWait();
  const int64_t index = blockIdx.x;
  const SampleRow& row = args.rows[index];
  if (row.slot < 0) return;
  const int64_t n = args.z.data != nullptr ? args.z.shape[1] : args.x.shape[1];
  const Features features = FeaturesOf(args, row, index);
  const float* x = args.x.data != nullptr ? Row<const float>(args.x, row.logit_row) : nullptr;
  const float* z = args.z.data != nullptr ? Row<const float>(args.z, row.logit_row) : nullptr;
  float* y = args.y.data != nullptr ? Row<float>(args.y, row.logit_row) : nullptr;
  const auto* bias = static_cast<const float*>(args.bias.data);
  const auto* readout = static_cast<const float*>(args.readout.data);
  const auto* norm_weight = static_cast<const float*>(args.norm.weight.data);
  float scale = 1;
  if (x != nullptr && args.norm.kind == NormKind::kRms) {
    float squares = 0;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) squares = fmaf(x[i], x[i], squares);
    squares = BlockSum<kThreads>(squares, shared);
    scale = 1.0f / sqrtf(squares / static_cast<float>(n) + args.norm.epsilon);
  }
  float logit = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    float value = x != nullptr ? x[i] * scale : 0;
    if (norm_weight != nullptr) value *= args.norm.weight_offset + norm_weight[i];
    if (z != nullptr) {
      float inner = z[i] + (bias != nullptr ? bias[i] : 0);
      if (args.feature_weights.data != nullptr) inner += Dot(features, args.feature_weights, i);
      value += Silu(inner);
    }
    if (y != nullptr) y[i] = value;
    if (readout != nullptr) logit = fmaf(readout[i], value, logit);
  }
  if (readout == nullptr) return;
  logit = BlockSum<kThreads>(logit, shared);
  if (threadIdx.x != 0) return;
  if (args.readout_features.data != nullptr) {
    const auto* weights = static_cast<const float*>(args.readout_features.data);
    for (int f = 0; f < kNumHeadFeatures; ++f) logit = fmaf(features.of[f], weights[f], logit);
  }
  *Row<float>(args.logits, index) = logit + args.readout_bias;
}

}  // namespace

cudaError_t LaunchAcceptanceHead(const AcceptanceHeadArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;
  return LaunchDependent(AcceptanceHeadKernel, dim3(static_cast<unsigned>(args.num_rows)),
                         dim3(kThreads), 0, stream, args);
}

}  // namespace godwit::cuda
