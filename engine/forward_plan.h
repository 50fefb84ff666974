#pragma once
// One step as flat arrays, made from the batch rows once per step and read by every layer.
//
// Example: a decode row at position 70 and a 3-token prefill at 0 -> token_ids [t70, p0, p1, p2], positions [70, 0, 1, 2],
// rows [{first_token 0, num_tokens 1}, {first_token 1, num_tokens 3, is_prefill}], num_decode_tokens 1, logit_rows [0, 3].

#include <cstdint>

#include "kernels/base/tensor.h"
#include "kernels/ops.h"

namespace godwit {

struct ForwardPlan {           // device data
  TensorView token_ids;        // i32 [T]; decode tokens first
  TensorView positions;        // i64 [T]
  const StepRow* rows = nullptr;  // [num_rows]
  int32_t num_rows = 0;
  const int32_t* block_tables = nullptr;
  int64_t num_tokens = 0;      // T
  int64_t num_decode_tokens = 0;
};

}  // namespace godwit
