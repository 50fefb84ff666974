// Products of more than one row. Rows are formed in a pass of their own; then comes the Hopper
// kernel, or cuBLASLt, whose split products keep all multiprocessors busy where few tiles of many
// rows are to be had. A gated product of cuBLASLt is two products in f32 and one pass over both.

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/form_rows.cuh"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/pdl.cuh"

namespace godwit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kGatedRows = 512;  // of which the library's gate and up products are kept
constexpr int64_t kRowsStep = 16;    // an algorithm is chosen for a multiple of it
constexpr int kGatePiece = 4;        // elements a thread: 16 bytes of each product

__global__ void __launch_bounds__(kFormThreads)
    FormRowsKernel(const __grid_constant__ RowInput input, int64_t k, Bf16* formed) {
  __shared__ float shared[kFormThreads / kWarp];
  DependencyTrigger();
  DependencyWait();
  const int64_t row = blockIdx.x;
  FormRows<1>(input, row, 1, k, shared, [&](int, int64_t column, uint2 value) {
    *reinterpret_cast<uint2*>(formed + row * k + column) = value;
  });
}

// y = activation(gate) * up, n a multiple of kGatePiece; y may be f32 or bf16.
__global__ void __launch_bounds__(kThreads)
    GateKernel(const float4* gates, const float4* ups, int64_t n, int64_t num_pieces,
               Activation activation, const __grid_constant__ TensorView y) {
  DependencyTrigger();
  DependencyWait();
  const int64_t piece = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (piece >= num_pieces) return;
  const int64_t row = piece * kGatePiece / n, column = piece * kGatePiece % n;
  float4 gate = gates[piece];
  if (activation == Activation::kSilu)
    gate = {Silu(gate.x), Silu(gate.y), Silu(gate.z), Silu(gate.w)};
  const float4 product = Multiply(gate, ups[piece]);
  if (y.dtype == DType::kF32) {
    *reinterpret_cast<float4*>(Row<float>(y, row) + column) = product;
  } else {
    *reinterpret_cast<uint2*>(Row<Bf16>(y, row) + column) = PackPiece(product);
  }
}

constexpr int64_t AlignUp(int64_t n) { return DivideUp(n, 256) * 256; }

// Where an operation keeps what.
struct GemmScratch {
  GemmScratch(int64_t num_rows, int64_t k, int64_t gated_n)
      : formed(Gemm::kWorkspaceBytes),
        gate(formed + AlignUp(num_rows * k * 2)),
        up(gate + AlignUp(std::min(num_rows, kGatedRows) * gated_n * 4)),
        num_bytes(up + AlignUp(std::min(num_rows, kGatedRows) * gated_n * 4)) {}
  int64_t formed, gate, up;  // offsets; the workspace of the library comes first
  int64_t num_bytes;
};

// Descriptors of one product; destroyed with it.
struct Descriptors {
  Descriptors(const Gemm::Args& args, int64_t m) {
    const cublasOperation_t transposed = CUBLAS_OP_T;
    const cudaDataType_t y_type = args.y_f32 ? CUDA_R_32F : CUDA_R_16BF;
    status = cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    Check(cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                         sizeof(transposed)));
    // Column-major: y^T [n, m] = (w^T)^T . x^T.
    Check(cublasLtMatrixLayoutCreate(&w, CUDA_R_16BF, args.k, args.n, args.k));
    Check(cublasLtMatrixLayoutCreate(&x, CUDA_R_16BF, args.k, m, args.x_stride));
    Check(cublasLtMatrixLayoutCreate(&y, y_type, args.n, m, args.y_stride));
  }
  ~Descriptors() {
    cublasLtMatrixLayoutDestroy(y);
    cublasLtMatrixLayoutDestroy(x);
    cublasLtMatrixLayoutDestroy(w);
    cublasLtMatmulDescDestroy(operation);
  }
  void Check(cublasStatus_t next) {
    if (status == CUBLAS_STATUS_SUCCESS) status = next;
  }
  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t w = nullptr, x = nullptr, y = nullptr;
  cublasStatus_t status;
};

cudaError_t ErrorOf(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS:
      return cudaSuccess;
    case CUBLAS_STATUS_ALLOC_FAILED:
      return cudaErrorMemoryAllocation;
    case CUBLAS_STATUS_INVALID_VALUE:
    case CUBLAS_STATUS_NOT_SUPPORTED:
      return cudaErrorInvalidValue;
    default:
      return cudaErrorUnknown;
  }
}

}  // namespace

Gemm::~Gemm() {
  if (handle_ != nullptr) cublasLtDestroy(handle_);
}

cublasStatus_t Gemm::Choose(const Args& args, int64_t m, cublasLtMatmulAlgo_t* algorithm) {
  const Descriptors descriptors(args, m);
  cublasLtMatmulPreference_t preference = nullptr;
  cublasStatus_t status = descriptors.status;
  if (status == CUBLAS_STATUS_SUCCESS) status = cublasLtMatmulPreferenceCreate(&preference);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  const size_t workspace = kWorkspaceBytes;
  const uint32_t alignment = 16;
  auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value));
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment);
  cublasLtMatmulHeuristicResult_t result = {};
  int found = 0;
  status =
      cublasLtMatmulAlgoGetHeuristic(handle_, descriptors.operation, descriptors.w, descriptors.x,
                                     descriptors.y, descriptors.y, preference, 1, &result, &found);
  cublasLtMatmulPreferenceDestroy(preference);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  *algorithm = result.algo;
  return found > 0 ? result.state : CUBLAS_STATUS_NOT_SUPPORTED;
}

cublasStatus_t Gemm::Multiply(const Args& args, const cublasLtMatmulAlgo_t& algorithm,
                              void* workspace, cudaStream_t stream) {
  const Descriptors descriptors(args, args.m);
  if (descriptors.status != CUBLAS_STATUS_SUCCESS) return descriptors.status;
  const float alpha = 1, beta = args.add ? 1 : 0;
  return cublasLtMatmul(handle_, descriptors.operation, &alpha, args.w, descriptors.w, args.x,
                        descriptors.x, &beta, args.y, descriptors.y, args.y, descriptors.y,
                        &algorithm, workspace, kWorkspaceBytes, stream);
}

cudaError_t Gemm::Launch(const Args& args, void* workspace, cudaStream_t stream) {
  cublasStatus_t status = handle_ == nullptr ? cublasLtCreate(&handle_) : CUBLAS_STATUS_SUCCESS;
  if (status != CUBLAS_STATUS_SUCCESS) return ErrorOf(status);
  const int64_t rounded = DivideUp(args.m, kRowsStep) * kRowsStep;
  const Key key = {rounded,       args.n,        args.k,
                   args.x_stride, args.y_stride, args.y_f32 + 2 * args.add};
  auto found = algorithms_.find(key);
  if (found == algorithms_.end()) {
    cublasLtMatmulAlgo_t algorithm;
    status = Choose(args, rounded, &algorithm);
    if (status != CUBLAS_STATUS_SUCCESS) return ErrorOf(status);
    found = algorithms_.emplace(key, algorithm).first;
  }
  return ErrorOf(Multiply(args, found->second, workspace, stream));
}

cudaError_t LaunchFormRows(const Product& product, Bf16* formed, cudaStream_t stream) {
  return LaunchDependent(FormRowsKernel, dim3(static_cast<unsigned>(product.num_rows())),
                         dim3(kFormThreads), 0, stream, product.input, product.k, formed);
}

int64_t GemmScratchBytes(int64_t num_rows, int64_t k, int64_t gated_n) {
  return GemmScratch(num_rows, k, gated_n).num_bytes;
}

namespace {

cudaError_t LaunchLibraryProduct(const Product& product, const Bf16* x, int64_t x_stride,
                                 void* workspace, Context& context) {
  const Gemm::Args args = {.x = x,
                           .w = product.w,
                           .y = product.y.data,
                           .m = product.num_rows(),
                           .n = product.n,
                           .k = product.k,
                           .x_stride = x_stride,
                           .y_stride = product.num_rows() > 1 ? product.y.row_stride : product.n,
                           .y_f32 = product.y.dtype == DType::kF32,
                           .add = product.add};
  return context.gemm->Launch(args, workspace, context.stream);
}

// At most kGatedRows rows.
cudaError_t LaunchGatedLibraryProduct(const Product& product, const Bf16* x, int64_t x_stride,
                                      char* base, const GemmScratch& scratch, Context& context) {
  const int64_t m = product.num_rows(), n = product.n;
  Product part = product;
  part.gate = nullptr;
  part.y = MakeView(base + scratch.up, DType::kF32, m, n);
  cudaError_t error = LaunchLibraryProduct(part, x, x_stride, base, context);
  part.w = product.gate;
  part.y = MakeView(base + scratch.gate, DType::kF32, m, n);
  if (error == cudaSuccess) error = LaunchLibraryProduct(part, x, x_stride, base, context);
  if (error != cudaSuccess) return error;
  const int64_t pieces = m * n / kGatePiece;
  return LaunchDependent(
      GateKernel, dim3(static_cast<unsigned>(DivideUp(pieces, kThreads))), dim3(kThreads), 0,
      context.stream, reinterpret_cast<const float4*>(base + scratch.gate),
      reinterpret_cast<const float4*>(base + scratch.up), n, pieces, product.activation, product.y);
}

}  // namespace

cudaError_t LaunchGemmProduct(const Product& product, Context& context) {
  const int64_t num_rows = product.num_rows();
  const bool gated = product.gate != nullptr, plain = product.plain_input();
  const bool library =
      !HopperTakes(context) || (!context.deterministic && !gated && num_rows > kFewRows);
  const GemmScratch scratch(num_rows, plain ? 0 : product.k, gated && library ? product.n : 0);
  void* data = nullptr;
  cudaError_t error = context.scratch.Reserve(scratch.num_bytes, &data);
  auto* base = static_cast<char*>(data);
  const auto* x = static_cast<const Bf16*>(product.input.x.data);
  int64_t x_stride = num_rows > 1 ? product.input.x.row_stride : product.k;
  if (error == cudaSuccess && !plain) {
    auto* formed = reinterpret_cast<Bf16*>(base + scratch.formed);
    error = LaunchFormRows(product, formed, context.stream);
    x = formed;
    x_stride = product.k;
  }
  if (error != cudaSuccess) return error;
  if (!library) return LaunchHopperProduct(product, x, x_stride, context);
  if (!gated) return LaunchLibraryProduct(product, x, x_stride, base, context);
  for (int64_t first = 0; first < num_rows && error == cudaSuccess; first += kGatedRows) {
    const Product part = RowsOf(product, first, std::min(kGatedRows, num_rows - first));
    error = LaunchGatedLibraryProduct(part, x + first * x_stride, x_stride, base, scratch, context);
  }
  return error;
}

}  // namespace godwit::cuda
