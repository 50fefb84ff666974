#include "kernels/cpu/linear.h"

#include "kernels/cpu/matmul.h"

namespace godwit {

// num_decode_tokens is not read: path D and path P are one sum (matmul.h).
OpStatus CpuLinear(CpuContext& context, const LinearArgs& args) {
  return Matmul(context,
                {.input = args.input, .w = args.w, .epilogue = args.epilogue, .y = args.y});
}

OpStatus CpuGatedLinear(CpuContext& context, const GatedLinearArgs& args) {
  return Matmul(context, {.input = args.input,
                          .w = args.gate,
                          .up = args.up,
                          .activation = args.activation,
                          .y = args.y});
}

}  // namespace godwit
