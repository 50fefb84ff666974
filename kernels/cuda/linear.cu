// Linear, GatedLinear: which kernel computes which rows, and the plain one, which takes every type
// and shape.
//
// Plain: rows are formed once into scratch (norm, gate, rounding), then a warp computes one output
// feature for kRowTile rows. Lane l sums k = l, l + 32, ... in ascending order, then the lanes are
// added in a fixed tree. Weights pass once per kRowTile rows; bound by memory up to there, by FMA
// beyond (no tensor cores). For f32 models and odd shapes.

#include <algorithm>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear.h"

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
      if (args.activation == Activation::kSilu) g = Silu(g);
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
  const dim3 grid(static_cast<unsigned>(DivideUp(args.n, kWarps)),
                  static_cast<unsigned>(DivideUp(args.num_rows, kRowTile)));
  ProductKernel<Act, kGated><<<grid, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

template <bool kGated>
cudaError_t LaunchAnyProduct(DType act, const RowInput& input, const ProductArgs& args,
                             Scratch& scratch, cudaStream_t stream) {
  return act == DType::kBF16 ? LaunchProduct<Bf16, kGated>(input, args, scratch, stream)
                             : LaunchProduct<float, kGated>(input, args, scratch, stream);
}

cudaError_t LaunchPlainProduct(const Product& product, DType act, Context& context) {
  const ProductArgs args = {.formed = nullptr,
                            .w = product.w,
                            .gate = product.gate,
                            .num_rows = product.num_rows(),
                            .n = product.n,
                            .k = product.k,
                            .y = product.y,
                            .add = product.add,
                            .activation = product.activation};
  return product.gate == nullptr
             ? LaunchAnyProduct<false>(act, product.input, args, context.scratch, context.stream)
             : LaunchAnyProduct<true>(act, product.input, args, context.scratch, context.stream);
}

// Aligned bf16: the fast kernels' operands.
bool FastTakes(const Product& product, DType act, const Context& context) {
  return act == DType::kBF16 && context.compute_capability >= 90 && product.k % 32 == 0 &&
         Aligned(product.input.x) &&
         (product.input.gate.data == nullptr || Aligned(product.input.gate));
}

// In parts, so that scratch does not grow with the step, and formed rows are still in the
// second-level cache when they are multiplied.
template <typename Launch>
cudaError_t InParts(const Product& product, int64_t part_rows, const Launch& launch) {
  const int64_t num_rows = product.num_rows();
  cudaError_t error = cudaSuccess;
  for (int64_t first = 0; first < num_rows && error == cudaSuccess; first += part_rows) {
    error = launch(RowsOf(product, first, std::min(part_rows, num_rows - first)));
  }
  return error;
}

// Where bits need not be kept apart from the number of rows, a single one takes the stream kernel
// and many the library. Elsewhere all rows have one kernel's sums: path D is path P.
cudaError_t LaunchAny(const Product& product, DType act, Context& context) {
  const bool aligned = product.n % 8 == 0 && Aligned(product.y);
  const bool gemm = HopperTakes(context) || (aligned && !context.deterministic);
  const bool fast = FastTakes(product, act, context);
  if (fast && !context.deterministic && StreamTakes(product)) {
    return LaunchStreamProduct(product, context);
  }
  if (!fast || !gemm) {
    return InParts(product, kMaxProductRows,
                   [&](const Product& part) { return LaunchPlainProduct(part, act, context); });
  }
  return InParts(product, aligned ? kMaxProductRows : kFewRows,
                 [&](const Product& part) { return LaunchGemmProduct(part, context); });
}

}  // namespace

Product RowsOf(const Product& product, int64_t first, int64_t count) {
  Product rows = product;
  rows.input.x = RowRange(product.input.x, first, count);
  if (product.input.gate) rows.input.gate = RowRange(product.input.gate, first, count);
  rows.y = RowRange(product.y, first, count);
  return rows;
}

cudaError_t LaunchLinear(const LinearArgs& args, Context& context) {
  const Product product = {.input = args.input,
                           .w = static_cast<const Bf16*>(args.w.data),
                           .gate = nullptr,
                           .n = args.w.num_rows,
                           .k = args.w.num_columns,
                           .y = args.y,
                           .add = args.epilogue == Epilogue::kAdd,
                           .activation = Activation::kNone};
  return LaunchAny(product, args.w.dtype, context);
}

cudaError_t LaunchGatedLinear(const GatedLinearArgs& args, Context& context) {
  const Product product = {.input = args.input,
                           .w = static_cast<const Bf16*>(args.up.data),
                           .gate = static_cast<const Bf16*>(args.gate.data),
                           .n = args.up.num_rows,
                           .k = args.up.num_columns,
                           .y = args.y,
                           .add = false,
                           .activation = args.activation};
  return LaunchAny(product, args.up.dtype, context);
}

int64_t LinearScratchBytes(const BackendLimits& limits) {
  const int64_t num_rows = std::min(limits.max_tokens, kMaxProductRows);
  return std::max(GemmScratchBytes(num_rows, limits.max_input_columns, limits.max_gated_columns),
                  num_rows * limits.max_input_columns * DTypeBytes(DType::kF32));
}

}  // namespace godwit::cuda
