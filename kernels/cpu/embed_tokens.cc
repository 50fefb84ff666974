#include "kernels/cpu/embed_tokens.h"

#include <algorithm>
#include <cstdint>

#include "kernels/base/check.h"
#include "kernels/cpu/packed_matrix.h"

namespace godwit {
namespace {
constexpr int64_t kTokensPerTask = 8;  // below this a task costs less than waking a thread
}  // namespace

OpStatus CpuEmbedTokens(CpuContext& context, const EmbedTokensArgs& args) {
  const int64_t num_tokens = args.token_ids.rows();
  const int64_t num_tasks = (num_tokens + kTokensPerTask - 1) / kTokensPerTask;
  context.pool.ForEach(num_tasks, [&](int64_t task) {
    const int64_t end = std::min((task + 1) * kTokensPerTask, num_tokens);
    for (int64_t token = task * kTokensPerTask; token < end; ++token) {
      int64_t id = *args.token_ids.row<const int32_t>(token);
      if (id < 0) {
        GODWIT_CHECK(args.drawn && ~id < args.drawn.rows());
        id = std::max(*args.drawn.row<const int32_t>(~id), 0);
      }
      GODWIT_CHECK(id >= 0 && id < args.table.num_rows);
      UnpackMatrixRow(args.table, id, args.scale, args.y.row<float>(token));
    }
  });
  return {};
}

}  // namespace godwit
