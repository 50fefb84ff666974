#include "kernels/cpu/rope.h"

#include "kernels/cpu/vector_ops.h"

namespace godwit {

OpStatus CpuRope(CpuContext& context, const RopeArgs& args) {
  context.pool.ForEach(args.positions.rows(), [&](int64_t token) {
    const double* const table =
        args.tables + int64_t{*args.table_ids.row<const int32_t>(token)} * (args.num_freqs + 1);
    const float factor = static_cast<float>(table[args.num_freqs]);
    float* const cos = args.cos.row<float>(token);
    float* const sin = args.sin.row<float>(token);
    context.isa.sin_cos({.position = static_cast<double>(*args.positions.row<const int64_t>(token)),
                         .frequency = table,
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
