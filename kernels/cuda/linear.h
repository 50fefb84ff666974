#pragma once
// The ways of a product in bf16; linear.cu chooses between them.

#include <cublasLt.h>

#include <map>
#include <tuple>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/launch.h"

namespace godwit::cuda {

// y = input . w^T, or activation(input . gate^T) * (input . w^T), for all rows of the input.
struct Product {
  RowInput input;
  const Bf16* w = nullptr;     // [n, k]
  const Bf16* gate = nullptr;  // [n, k], or null: not gated
  int64_t n = 0;
  int64_t k = 0;
  TensorView y;  // [num_rows, n] f32 or bf16
  bool add = false;
  Activation activation = Activation::kNone;

  int64_t num_rows() const { return input.x.rows(); }
  // x is the operand itself: nothing is formed.
  bool plain_input() const {
    return input.norm.kind == NormKind::kNone && input.gate.data == nullptr &&
           input.x.dtype == DType::kBF16;
  }
};

inline constexpr int64_t kMaxProductRows = 4096;  // that one launch is given
inline constexpr int64_t kFewRows = 128;          // for which the Hopper kernel reads weights once

// Rows first, first + 1, ... of the product's input and output.
Product RowsOf(const Product& product, int64_t first, int64_t count);

// Rows of the input into `formed` [num_rows, k], dense.
cudaError_t LaunchFormRows(const Product& product, Bf16* formed, cudaStream_t stream);

// linear_stream.cu: one row.
bool StreamTakes(const Product& product);
cudaError_t LaunchStreamProduct(const Product& product, Context& context);

// linear_gemm.cu: rows formed in front, then cuBLASLt or the Hopper kernel.
cudaError_t LaunchGemmProduct(const Product& product, Context& context);
int64_t GemmScratchBytes(int64_t num_rows, int64_t k, int64_t gated_n);

// linear_hopper.cu: x [num_rows, k] is the formed input, its stride a multiple of 8; so are, beyond
// kFewRows, n and the stride of y.
bool HopperTakes(const Context& context);
cudaError_t LaunchHopperProduct(const Product& product, const Bf16* x, int64_t x_stride,
                                Context& context);

// Matrix products of cuBLASLt with algorithms chosen once.
class Gemm {
 public:
  ~Gemm();
  static constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;

  // y[m, n] = x[m, k] . w[n, k]^T, plus y with add.
  struct Args {
    const Bf16* x;
    const Bf16* w;
    void* y;
    int64_t m, n, k, x_stride, y_stride;
    bool y_f32, add;
  };
  cudaError_t Launch(const Args& args, void* workspace, cudaStream_t stream);

 private:
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int>;
  cublasStatus_t Choose(const Args& args, int64_t m, cublasLtMatmulAlgo_t* algorithm);
  cublasStatus_t Multiply(const Args& args, const cublasLtMatmulAlgo_t& algorithm, void* workspace,
                          cudaStream_t stream);

  cublasLtHandle_t handle_ = nullptr;
  std::map<Key, cublasLtMatmulAlgo_t> algorithms_;
};

}  // namespace godwit::cuda
