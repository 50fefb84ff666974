#include "engine/forward_plan.h"

#include <algorithm>
#include <optional>

#include "absl/strings/str_cat.h"
#include "engine/rope_store.h"
#include "kernels/base/check.h"

namespace godwit {
namespace {

int64_t RoundDown(int64_t value, int64_t multiple) { return value / multiple * multiple; }
int64_t RoundUp(int64_t value, int64_t multiple) {
  return RoundDown(value + multiple - 1, multiple);
}

bool IsPrefill(const BatchRow& row) { return !row.token_ids.empty(); }
int64_t NumTokens(const BatchRow& row) {
  return IsPrefill(row) ? std::ssize(row.token_ids) : 1 + row.max_draft_tokens;
}

}  // namespace

SlotState StartState(const CacheLease& lease, std::span<const SlotState> slots) {
  return lease.fresh() ? SlotState{} : slots[static_cast<size_t>(lease.slot())];
}

StepRow MakeStepRow(const BatchRow& row, const SlotState& state) {
  const int64_t num_tokens = NumTokens(row);
  const int64_t end = state.position + num_tokens;
  StepRow step_row = {.num_tokens = static_cast<int32_t>(num_tokens),
                      .slot = row.lease->slot(),
                      .is_prefill = IsPrefill(row),
                      .position = state.position - row.lease->dropped(),
                      .base = state.base};
  if (!IsPrefill(row)) {
    // Rows after what the host has confirmed may still be taken back, so they stay in the window.
    step_row.base_after = std::max(state.base, RoundDown(row.confirmed_position, kWindow));
    return step_row;
  }
  step_row.base_after = RoundDown(end, kWindow);
  const int64_t p_begin = RoundUp(state.position, kPrefillBlock);
  const int64_t p_end = RoundDown(end, kPrefillBlock);
  if (p_begin < p_end) {
    step_row.p_begin = p_begin;
    step_row.p_end = p_end;
  }
  return step_row;
}

void AppendBlocks(const CacheLease& lease, int64_t end, std::vector<int32_t>& block_tables) {
  const std::vector<int32_t>& blocks = lease.blocks();
  const int64_t num_blocks = std::min(std::ssize(blocks), RoundUp(end, kPagedBlock) / kPagedBlock);
  block_tables.insert(block_tables.end(), blocks.begin(), blocks.begin() + num_blocks);
}

// At most an eighth of the rows is padding beyond 32 rows.
int64_t PaddedRows(int64_t num_rows, int64_t most) {
  const int64_t step = num_rows <= 4     ? 1
                       : num_rows <= 16  ? 4
                       : num_rows <= 64  ? 8
                       : num_rows <= 256 ? 16
                                         : 64;
  return std::min((num_rows + step - 1) / step * step, most);
}

// Finer than rows below 16: these are the drafts of one sequence, whose product a row more or less
// may change.
int64_t PaddedTokens(int64_t num_tokens, int64_t most) {
  return num_tokens <= 16 ? std::min(num_tokens, most) : PaddedRows(num_tokens, most);
}

int64_t PaddedCoarsely(int64_t count, int64_t most, int steps_per_doubling) {
  int64_t below = 1;  // the power of two
  while (2 * below < count) below *= 2;
  if (count <= 1) return std::min(count, most);
  const int64_t step = std::max<int64_t>(below / steps_per_doubling, 1);
  return std::min((count + step - 1) / step * step, most);
}

StepPlanner::StepPlanner(const StepLimits& limits)
    : limits_(limits), last_use_(static_cast<size_t>(limits.num_slots), 0) {
  arrays_.token_ids.reserve(static_cast<size_t>(limits.max_tokens));
  arrays_.positions.reserve(static_cast<size_t>(limits.max_tokens));
  arrays_.rope_table_ids.reserve(static_cast<size_t>(limits.max_tokens));
  arrays_.rows.reserve(static_cast<size_t>(limits.num_slots));
  arrays_.row_of_batch.reserve(static_cast<size_t>(limits.num_slots));
}

void StepPlanner::CheckLease(const CacheLease* lease) {
  GODWIT_CHECK(lease != nullptr);
  GODWIT_CHECK(lease->resident());
  int64_t& last_use = last_use_[static_cast<size_t>(lease->slot())];
  GODWIT_CHECK(last_use != num_checks_);
  last_use = num_checks_;
}

void StepPlanner::CheckRow(const BatchRow& row, const SlotState& state) const {
  const int64_t end = state.position + NumTokens(row);
  GODWIT_CHECK(end <= row.lease->reserved_tokens());
  GODWIT_CHECK(!row.lease->bounded() || (NumTokens(row) == 1 && !IsPrefill(row)) ||
               (IsPrefill(row) && end <= limits_.bound_tokens));
  GODWIT_CHECK(row.max_draft_tokens >= 0);
  GODWIT_CHECK(!state.unresolved);
  GODWIT_CHECK(row.confirmed_position >= 0);
  GODWIT_CHECK(row.confirmed_position <= state.position);
  if (IsPrefill(row)) {
    GODWIT_CHECK(row.first_position == state.position);
    GODWIT_CHECK(row.score_targets.empty() || row.score_targets.size() == row.token_ids.size());
  } else {
    GODWIT_CHECK(state.position > 0);
    GODWIT_CHECK(state.pending_step >= 0 || state.last_token >= 0);
    GODWIT_CHECK(!row.outputs.empty());
    GODWIT_CHECK(end - state.base <= limits_.window_rows);
    GODWIT_CHECK(row.score_targets.empty());
    GODWIT_CHECK(row.logits == nullptr);
    GODWIT_CHECK(row.max_draft_tokens <= limits_.max_drafts);
    // Where drafts are accepted, the input of the next step is found on the host.
    GODWIT_CHECK(row.max_draft_tokens == 0 || state.pending_step < 0);
  }
  if (row.outputs.empty()) return;
  GODWIT_CHECK(row.outputs[0].lease == row.lease);
  GODWIT_CHECK(row.outputs.size() == 1 || IsPrefill(row));
  for (const RowOutput& output : row.outputs) GODWIT_CHECK(output.sampling != nullptr);
  for (const RowOutput& fork : row.outputs.subspan(1)) {
    GODWIT_CHECK(fork.lease->fresh());
    GODWIT_CHECK(end <= fork.lease->reserved_tokens());
  }
}

absl::Status StepPlanner::Check(std::span<const BatchRow> rows, std::span<const SlotState> slots) {
  GODWIT_CHECK(!rows.empty());
  ++num_checks_;
  int64_t num_tokens = 0;
  for (const BatchRow& row : rows) {
    CheckLease(row.lease);
    for (const RowOutput& output : row.outputs) {
      if (output.lease != row.lease) CheckLease(output.lease);
    }
    CheckRow(row, StartState(*row.lease, slots));
    num_tokens += NumTokens(row);
  }
  GODWIT_CHECK(num_tokens <= limits_.max_tokens);
  for (size_t row = 0; row < rows.size(); ++row) {
    for (size_t index = 0; index < rows[row].token_ids.size(); ++index) {
      const int32_t token_id = rows[row].token_ids[index];
      if (token_id >= 0 && token_id < limits_.vocab_size) continue;
      return absl::InvalidArgumentError(absl::StrCat("row ", row, ": token id ", token_id,
                                                     " at index ", index, " not in [0, ",
                                                     limits_.vocab_size, ")"));
    }
    for (const int32_t target : rows[row].score_targets) {
      if (target >= -1 && target < limits_.vocab_size) continue;
      return absl::InvalidArgumentError(absl::StrCat("row ", row, ": score target ", target,
                                                     " not in [-1, ", limits_.vocab_size, ")"));
    }
  }
  return absl::OkStatus();
}

void StepPlanner::AddRow(const BatchRow& row, const SlotState& state) {
  const int32_t table_id = row.rope == nullptr ? 0 : RopeStore::TableOf(row.lease->slot());
  if (row.lease->bounded() && !IsPrefill(row)) {
    if (const std::optional<SinkTurn> turn = row.lease->MakeRoom(state.position)) {
      arrays_.turns.push_back({turn->from_block, turn->to_block, table_id, turn->delta});
    }
  }
  StepRow step_row = MakeStepRow(row, state);
  step_row.first_token = static_cast<int32_t>(arrays_.token_ids.size());
  step_row.block_table = std::ssize(arrays_.block_tables);
  if (!IsPrefill(row)) {
    arrays_.token_ids.push_back(state.pending_step >= 0 ? ~state.pending_draw : state.last_token);
    if (HasDrafts(row)) {
      const int64_t first = limits_.first_draft + arrays_.num_draft_rows++ * limits_.max_drafts;
      for (int draft = 0; draft < row.max_draft_tokens; ++draft) {
        arrays_.token_ids.push_back(~static_cast<int32_t>(first + draft));
      }
    }
    arrays_.num_decode_tokens += step_row.num_tokens;
    ++arrays_.num_decode_rows;
  } else {
    arrays_.token_ids.insert(arrays_.token_ids.end(), row.token_ids.begin(), row.token_ids.end());
  }
  for (int64_t offset = 0; offset < step_row.num_tokens; ++offset) {
    arrays_.positions.push_back(state.position + offset);
  }
  arrays_.rope_table_ids.insert(arrays_.rope_table_ids.end(),
                                static_cast<size_t>(step_row.num_tokens), table_id);
  AppendBlocks(*row.lease, step_row.position + step_row.num_tokens, arrays_.block_tables);
  arrays_.rows.push_back(step_row);
}

const StepArrays& StepPlanner::Plan(std::span<const BatchRow> rows,
                                    std::span<const SlotState> slots) {
  arrays_.token_ids.clear();
  arrays_.positions.clear();
  arrays_.rope_table_ids.clear();
  arrays_.rows.clear();
  arrays_.row_of_batch.assign(rows.size(), 0);
  arrays_.block_tables.clear();
  arrays_.turns.clear();
  arrays_.num_decode_tokens = 0;
  arrays_.num_decode_rows = 0;
  arrays_.num_draft_rows = 0;
  for (const bool is_prefill : {false, true}) {
    for (size_t batch_row = 0; batch_row < rows.size(); ++batch_row) {
      if (IsPrefill(rows[batch_row]) != is_prefill) continue;
      arrays_.row_of_batch[batch_row] = static_cast<int32_t>(arrays_.rows.size());
      AddRow(rows[batch_row], StartState(*rows[batch_row].lease, slots));
    }
  }
  return arrays_;
}

void StepPlanner::Pad(int64_t num_rows, int64_t num_tokens) {
  GODWIT_CHECK(arrays_.num_decode_tokens == std::ssize(arrays_.token_ids));
  GODWIT_CHECK(num_rows >= std::ssize(arrays_.rows));
  GODWIT_CHECK(num_tokens >= std::ssize(arrays_.token_ids) && num_tokens <= limits_.max_tokens);
  const auto size = static_cast<size_t>(num_tokens);
  arrays_.token_ids.resize(size, 0);
  arrays_.positions.resize(size, 0);
  arrays_.rope_table_ids.resize(size, 0);
  arrays_.rows.resize(static_cast<size_t>(num_rows));  // of no tokens
  arrays_.num_decode_tokens = num_tokens;
  arrays_.num_decode_rows = static_cast<int32_t>(num_rows);
}

}  // namespace godwit
