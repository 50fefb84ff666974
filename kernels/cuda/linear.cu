// Linear, GatedLinear: rows are formed once into scratch (norm, gate, rounding), then a warp
// computes one output feature for kRowTile rows. Lane l sums k = l, l + 32, ... in ascending order,
// then the lanes are added in a fixed tree: the bits of a row depend on k alone, so decode and
// prefill are the same sum. Bytes: weights once per kRowTile rows, coalesced; bound by memory up to
// kRowTile rows, by FMA beyond (no tensor cores).

#include <algorithm>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/launch.h"

namespace godwit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRowTile = 8;  // 8 accumulators a lane, 16 with a gate

template <typename Act>
__global__ void __launch_bounds__(kThreads) FormRowsKernel(RowInput input, int64_t k, Act* formed) {
  __shared__ float shared[kWarps];
  const int64_t row = blockIdx.x;
  float scale = 1;
  if (input.norm.kind == NormKind::kRms) {
    float squares = 0;
    for (int64_t i = threadIdx.x; i < k; i += kThreads) {
      const float x = LoadAny(input.x, row, i);
      squares += x * x;
    }
    squares = BlockSum<kThreads>(squares, shared);
    scale = 1.0f / sqrtf(squares / static_cast<float>(k) + input.norm.epsilon);
  }
  for (int64_t i = threadIdx.x; i < k; i += kThreads) {
    float x = LoadAny(input.x, row, i) * scale;
    if (input.norm.kind == NormKind::kRms && input.norm.weight.data != nullptr) {
      x *= input.norm.weight_offset + static_cast<const float*>(input.norm.weight.data)[i];
    }
    if (input.gate.data != nullptr) x *= LoadAny(input.gate, row, i);
    Store(formed + row * k + i, x);
  }
}

struct ProductArgs {
  const void* formed;  // [num_rows, k] act
  const void* w;       // [n, k]
  const void* gate;    // [n, k], or null
  int64_t num_rows, n, k;
  TensorView y;
  int add;  // y += instead of y =
  Activation activation;
};

template <typename Act, bool kGated>
__global__ void __launch_bounds__(kThreads) ProductKernel(ProductArgs args) {
  const int lane = threadIdx.x % kWarp;
  const int64_t feature = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  const int64_t first_row = int64_t{blockIdx.y} * kRowTile;
  if (feature >= args.n) return;
  const int num_rows = static_cast<int>(min(int64_t{kRowTile}, args.num_rows - first_row));
  const Act* x = static_cast<const Act*>(args.formed) + first_row * args.k;
  const Act* w = static_cast<const Act*>(args.w) + feature * args.k;
  const Act* gate = static_cast<const Act*>(args.gate) + (kGated ? feature * args.k : 0);
  float sums[kRowTile] = {}, gate_sums[kRowTile] = {};
  for (int64_t i = lane; i < args.k; i += kWarp) {
    const float weight = Load(w + i);
    const float gate_weight = kGated ? Load(gate + i) : 0;
#pragma unroll
    for (int row = 0; row < kRowTile; ++row) {
      if (row >= num_rows) break;
      const float value = Load(x + row * args.k + i);
      sums[row] = fmaf(value, weight, sums[row]);
      if (kGated) gate_sums[row] = fmaf(value, gate_weight, gate_sums[row]);
    }
  }
#pragma unroll
  for (int row = 0; row < kRowTile; ++row) {
    if (row >= num_rows) break;
    float sum = WarpSum(sums[row]);
    if (kGated) {
      float g = WarpSum(gate_sums[row]);
      if (args.activation == Activation::kSilu) g = g / (1.0f + expf(-g));
      sum *= g;
    }
    if (lane != 0) continue;
    if (args.add) sum += LoadAny(args.y, first_row + row, feature);
    StoreAny(args.y, first_row + row, feature, sum);
  }
}

template <typename Act, bool kGated>
cudaError_t LaunchProduct(const RowInput& input, ProductArgs args, Scratch& scratch,
                          cudaStream_t stream) {
  void* formed = nullptr;
  const int64_t num_bytes = args.num_rows * args.k * static_cast<int64_t>(sizeof(Act));
  if (const cudaError_t error = scratch.Reserve(num_bytes, &formed); error != cudaSuccess)
    return error;
  FormRowsKernel<Act><<<static_cast<unsigned>(args.num_rows), kThreads, 0, stream>>>(
      input, args.k, static_cast<Act*>(formed));
  args.formed = formed;
  // Row tiles go along grid.y, which ends at 65,535.
  constexpr int64_t kMaxRows = int64_t{65535} * kRowTile;
  if (args.num_rows > kMaxRows) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(DivideUp(args.n, kWarps)),
                  static_cast<unsigned>(DivideUp(args.num_rows, kRowTile)));
  ProductKernel<Act, kGated><<<grid, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

template <bool kGated>
cudaError_t LaunchAnyProduct(DType act, const RowInput& input, const ProductArgs& args,
                             Scratch& scratch, cudaStream_t stream) {
  if (args.num_rows == 0 || args.n == 0) return cudaSuccess;
  return act == DType::kBF16 ? LaunchProduct<Bf16, kGated>(input, args, scratch, stream)
                             : LaunchProduct<float, kGated>(input, args, scratch, stream);
}

}  // namespace

cudaError_t LaunchLinear(const LinearArgs& args, Context& context) {
  const ProductArgs product = {.formed = nullptr,
                               .w = args.w.data,
                               .gate = nullptr,
                               .num_rows = args.input.x.rows(),
                               .n = args.w.num_rows,
                               .k = args.w.num_columns,
                               .y = args.y,
                               .add = args.epilogue == Epilogue::kAdd,
                               .activation = Activation::kNone};
  return LaunchAnyProduct<false>(args.w.dtype, args.input, product, context.scratch,
                                 context.stream);
}

cudaError_t LaunchGatedLinear(const GatedLinearArgs& args, Context& context) {
  const ProductArgs product = {.formed = nullptr,
                               .w = args.up.data,
                               .gate = args.gate.data,
                               .num_rows = args.input.x.rows(),
                               .n = args.up.num_rows,
                               .k = args.up.num_columns,
                               .y = args.y,
                               .add = 0,
                               .activation = args.activation};
  return LaunchAnyProduct<true>(args.up.dtype, args.input, product, context.scratch,
                                context.stream);
}

int64_t LinearScratchBytes(const BackendLimits&) { return 0; }

}  // namespace godwit::cuda
