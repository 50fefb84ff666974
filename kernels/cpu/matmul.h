#pragma once
// The product behind Linear and GatedLinear, on top of the kernels of product_args.h.

#include "kernels/cpu/cpu_context.h"
#include "kernels/ops.h"

namespace godwit {

struct MatmulArgs {
  RowInput input;
  MatrixView w;
  MatrixView up;  // absent: no gating
  Activation activation = Activation::kNone;
  Epilogue epilogue = Epilogue::kStore;
  TensorView y;
};

OpStatus Matmul(CpuContext& context, const MatmulArgs& args);

}  // namespace godwit
