#pragma once
// One step as flat arrays, made from the batch rows once per step and read by every layer.
//
// Example: a decode row at position 70 and a 3-token prefill at 0 -> token_ids [t70, p0, p1, p2],
// positions [70, 0, 1, 2], rows [{first_token 0, num_tokens 1}, {first_token 1, num_tokens 3,
// is_prefill}], num_decode_tokens 1.

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "engine/batch.h"
#include "kernels/base/tensor.h"
#include "kernels/ops.h"

namespace godwit {

struct ForwardPlan {     // device data
  TensorView token_ids;  // i32 [T]; decode tokens first; ~index into drawn where only the device
                         // knows the token
  TensorView drawn;      // i32: what the last step drew
  TensorView positions;  // i64 [T]
  TensorView rope_table_ids;            // i32 [T]; absent for a model without RoPE, as the next
  const double* rope_tables = nullptr;  // RopeArgs.tables
  int32_t num_rope_tables = 0;
  const StepRow* rows = nullptr;  // [num_rows]
  int32_t num_rows = 0;
  int32_t num_decode_rows = 0;
  const int32_t* block_tables = nullptr;
  const BlockTurn* turns = nullptr;  // before the rows: sequences that drop a block in this step
  int32_t num_turns = 0;
  int64_t num_tokens = 0;  // T
  int64_t num_decode_tokens = 0;
};

// A decode row that is verified together with what the draft model proposed, be it all dropped.
inline bool HasDrafts(const BatchRow& row) {
  return row.token_ids.empty() && row.max_draft_tokens + row.num_dropped > 0;
}

// What a slot holds after the last submitted step; the next step starts from it.
struct SlotState {
  int64_t position = 0;       // tokens in the state
  int64_t base = 0;           // where the stored lightning bases stand, a multiple of kWindow
  int32_t last_token = 0;     // drawn but not computed: the input of the next decode step
  StepId pending_step = -1;   // the step that drew it, while only the device knows it
  int32_t pending_draw = -1;  // its index among that step's draws
  bool unresolved = false;    // a step with drafts is in flight: position and token are unknown
};

struct StepLimits {
  int64_t max_tokens = 0;  // of a step
  int64_t num_slots = 0;   // also the most rows, and the most draws
  int64_t window_rows = 0;
  int64_t vocab_size = 0;
  int64_t first_draft = 0;   // where the drafts of a step's rows lie among ForwardPlan.drawn
  int64_t bound_tokens = 0;  // CacheGeometry's
  int64_t max_drafts = 0;    // of a row: those of the r-th row with drafts begin at r * max_drafts
};

// Host arrays of one step; their memory is kept from step to step.
struct StepArrays {
  std::vector<int32_t> token_ids;       // [T]; ~draw where only the last step's draw says
  std::vector<int64_t> positions;       // [T]; in the text, as RoPE and draws count them
  std::vector<int32_t> rope_table_ids;  // [T]; of RopeStore
  std::vector<StepRow> rows;  // decode rows, then prefill rows, each in the order of the batch
  std::vector<int32_t> row_of_batch;  // index into rows, by batch row
  std::vector<int32_t> block_tables;
  std::vector<BlockTurn> turns;
  int64_t num_decode_tokens = 0;
  int32_t num_decode_rows = 0;
  int32_t num_draft_rows = 0;  // rows with drafts
};

// Not thread-safe.
class StepPlanner {
 public:
  explicit StepPlanner(const StepLimits& limits);

  // Before the draft model ran: rows ask for drafts. INVALID_ARGUMENT: a token id outside the
  // vocabulary (names row, index and id). Everything else that is wrong with a batch is our own bug
  // and ends the process: position, room, residence, a slot used twice, limits.
  absl::Status Check(std::span<const BatchRow> rows, std::span<const SlotState> slots);

  // Of rows that passed Check, with max_draft_tokens lowered to the drafts that there are. Makes
  // room in bounded leases. Valid until the next call.
  const StepArrays& Plan(std::span<const BatchRow> rows, std::span<const SlotState> slots);

  // Fills the planned step, all of whose rows decode, with padding.
  void Pad(int64_t num_rows, int64_t num_tokens);

 private:
  void CheckLease(const CacheLease* lease);
  void CheckRow(const BatchRow& row, const SlotState& state) const;
  void AddRow(const BatchRow& row, const SlotState& state);

  StepLimits limits_;
  StepArrays arrays_;
  std::vector<int64_t> last_use_;  // by slot: the call of Check that saw it last
  int64_t num_checks_ = 0;
};

// The state that the row starts from: what the slot holds, or the beginning for a lease that was
// never used.
SlotState StartState(const CacheLease& lease, std::span<const SlotState> slots);

// What a step does to a slot's position and base; computes StepRow's fields from the state and the
// batch row, whose lease has room.
StepRow MakeStepRow(const BatchRow& row, const SlotState& state);

// Decode steps are padded to few numbers of rows, and those with drafts to few numbers of tokens,
// so that few recordings serve all.
int64_t PaddedRows(int64_t num_rows, int64_t most);
int64_t PaddedTokens(int64_t num_tokens, int64_t most);
// For what varies much from step to step and costs little: powers of two, with steps_per_doubling 2
// those times 1.5 too. No product's tile ends between two of them.
int64_t PaddedCoarsely(int64_t count, int64_t most, int steps_per_doubling);

// Appends the blocks of the lease that hold its first `end` tokens, dropped ones not counted.
void AppendBlocks(const CacheLease& lease, int64_t end, std::vector<int32_t>& block_tables);

}  // namespace godwit
