#pragma once
// How the tokens of a step are drawn, as device rows: parameters, random key, and the biases of
// each, which rows of one request share.

#include <cstdint>
#include <map>
#include <span>
#include <utility>
#include <vector>

#include "engine/batch.h"
#include "engine/step_arena.h"
#include "kernels/ops.h"

namespace godwit {

// The biases of one draw: logit_bias, and a ban of end_token_ids before min_tokens. No token twice.
void AppendBiases(const SamplingParams& sampling, int64_t output_index,
                  std::vector<TokenBias>& biases);

// Not thread-safe.
class DrawList {
 public:
  DrawList(int64_t max_rows, int64_t vocab_size);

  // Bytes of an arena that max_rows rows of max_sequences sequences take at most.
  static int64_t ArenaBytes(int64_t max_rows, int64_t max_sequences);

  void Clear();

  // The draw of the token at `position` of the sequence. The row is valid until the next call.
  SampleRow& Add(const RowOutput& output, int64_t position, int64_t prompt_length);
  void AddPadding();

  int64_t size() const { return static_cast<int64_t>(rows_.size()); }

  // Of the rows added since the last call; in this order, both before the arena is uploaded. Rows
  // keep their size from step to step (StepArena), biases do not.
  SampleRow* PushRows(StepArena& arena);
  void PushBiases(StepArena& arena);

 private:
  struct BiasSet {
    std::vector<TokenBias> biases;
    const TokenBias* device = nullptr;  // once pushed
  };
  BiasSet* BiasesFor(const SamplingParams& sampling, int64_t output_index);

  int64_t vocab_size_;
  std::vector<SampleRow> rows_;
  std::vector<BiasSet*> row_biases_;                                     // per row, null: none
  std::map<std::pair<const SamplingParams*, bool>, BiasSet> bias_sets_;  // by parameters and ban
  std::span<SampleRow> uploaded_;  // the rows that were pushed last
  int64_t num_pushed_ = 0;
};

// Drafts of the output are accepted while they equal the target's own draws.
inline bool IsCoupled(const RowOutput& output) {
  return output.coupled || output.sampling->temperature == 0;
}

}  // namespace godwit
