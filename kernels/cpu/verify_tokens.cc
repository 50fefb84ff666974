#include "kernels/cpu/verify_tokens.h"

#include <atomic>

#include "kernels/cpu/verify_tokens-inl.h"

namespace godwit {

OpStatus CpuVerifyTokens(CpuContext& context, const VerifyTokensArgs& args) {
  if (args.num_verify_rows == 0) return {};
  const int64_t elements = 3 * PadRow(args.logits.shape[1]);
  float* const scratch = static_cast<float*>(context.scratch.Get(
      elements * context.pool.num_threads() * static_cast<int64_t>(sizeof(float))));
  if (scratch == nullptr) {
    return context.Fail(OpCode::kResourceExhausted, "VerifyTokens: no memory for scratch");
  }
  std::atomic<int32_t> next = 0;
  auto body = [&](int thread) {
    for (int32_t row = next.fetch_add(1, std::memory_order_relaxed); row < args.num_verify_rows;
         row = next.fetch_add(1, std::memory_order_relaxed)) {
      if (args.rows[args.verify_rows[row].first_row].slot < 0) continue;
      VerifyTask<StandardRule>(context.isa, args, row, scratch + thread * elements).Run();
    }
  };
  if (args.num_verify_rows == 1) {
    body(0);
  } else {
    context.pool.Run(body);
  }
  return {};
}

}  // namespace godwit
