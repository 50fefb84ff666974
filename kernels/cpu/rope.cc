#include "kernels/cpu/rope.h"

#include "kernels/cpu/vector_ops.h"

namespace godwit {

OpStatus CpuRope(CpuContext& context, const RopeArgs& args) {
  const int64_t* const positions = static_cast<const int64_t*>(args.positions.data);
  const float factor = static_cast<float>(args.attention_factor);
  context.pool.ForEach(args.positions.rows(), [&](int64_t token) {
    float* const cos = args.cos.row<float>(token);
    float* const sin = args.sin.row<float>(token);
    context.isa.sin_cos(
        {.position = static_cast<double>(positions[token * args.positions.row_stride]),
         .frequency = args.inv_freq,
         .n = args.num_freqs,
         .cos = cos,
         .sin = sin});
    if (factor == 1.0f) return;
    for (int32_t i = 0; i < args.num_freqs; ++i) {
      cos[i] *= factor;
      sin[i] *= factor;
    }
  });
  return {};
}

}  // namespace godwit
