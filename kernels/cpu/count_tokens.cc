#include "kernels/cpu/count_tokens.h"

#include "kernels/base/check.h"

namespace godwit {

OpStatus CpuCountTokens(CpuContext&, const CountTokensArgs& args) {
  uint32_t* const counts = args.counts.row<uint32_t>(args.slot);
  const int64_t num_tokens = args.token_ids.rows();
  for (int64_t i = 0; i < num_tokens; ++i) {
    const int32_t token_id = *args.token_ids.row<const int32_t>(i);
    GODWIT_CHECK(token_id >= 0 && token_id < args.counts.shape[1]);
    if (args.is_prompt != 0) {
      counts[token_id] |= kPromptBit;
    } else {
      ++counts[token_id];
    }
  }
  return {};
}

}  // namespace godwit
