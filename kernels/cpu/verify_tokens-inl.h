#pragma once
// The tokens of one sequence that stand, for any rule of the form of StandardRule. One task per
// sequence: it ends at the first rejection, so that the positions after it cost nothing.

#include <algorithm>
#include <cmath>

#include "kernels/base/accept_rule.h"
#include "kernels/base/check.h"
#include "kernels/cpu/draw.h"
#include "kernels/cpu/vector_ops.h"
#include "kernels/ops.h"

namespace godwit {

template <typename Rule>
class VerifyTask {
 public:
  // scratch: [3, PadRow(V)].
  VerifyTask(const IsaTable& isa, const VerifyTokensArgs& args, int32_t index, float* scratch)
      : isa_(isa),
        args_(args),
        index_(index),
        verify_(args.verify_rows[index]),
        first_(args.rows[verify_.first_row]),
        vocab_(args.logits.shape[1]),
        logits_(scratch),
        weights_(scratch + PadRow(vocab_)),
        residual_(scratch + 2 * PadRow(vocab_)),
        counts_(args.counts.row<uint32_t>(first_.slot)),
        num_drafts_(verify_.num_drafts) {}

  void Run() {
    TakeBackDrafts();
    bool accepted = true;
    int32_t position = 0;
    for (; accepted; ++position) {
      const int64_t token = TokenAt(position, accepted);
      const int64_t output = verify_.first_row + position;
      *args_.tokens.row<int32_t>(output) = static_cast<int32_t>(token);
      if (token < 0) continue;
      ++counts_[token];
      const SampleRow& row = args_.rows[output];
      WriteLogprobs(isa_, row, args_.logits.row<const float>(row.logit_row), vocab_, token,
                    args_.logprobs, args_.top_ids, args_.top_logprobs, output);
    }
    *args_.num_tokens.row<int32_t>(index_) = position;
  }

 private:
  int32_t Draft(int32_t position) const {
    return *args_.drafts.row<const int32_t>(verify_.first_draft + position);
  }

  void TakeBackDrafts() {
    const int32_t num_drawn = verify_.num_drafts + verify_.num_dropped;
    for (int32_t position = num_drawn - 1; position >= 0; --position) {
      const int32_t draft = Draft(position);
      if (draft < 0) {
        num_drafts_ = std::min(num_drafts_, position);
        continue;
      }
      GODWIT_CHECK(draft < vocab_ && counts_[draft] > 0);
      --counts_[draft];
    }
  }

  // The token that stands at `position`; accepted: it is the draft, and the next one counts too.
  int64_t TokenAt(int32_t position, bool& accepted) {
    const SampleRow& row = args_.rows[verify_.first_row + position];
    const float* const raw = args_.logits.row<const float>(row.logit_row);
    accepted = false;
    if (HasBadLogits(isa_, raw, vocab_)) return -1;
    const DrawPlan plan = PrepareDraw(isa_, row, raw, counts_, vocab_, logits_, weights_);
    const bool has_draft = position < num_drafts_;
    if (verify_.rule == AcceptRule::kMatch) {
      const int64_t token = DrawToken(isa_, row, plan, row.position, logits_, vocab_);
      accepted = has_draft && token == Draft(position);
      return token;
    }
    const int64_t replace_noise = NoisePosition(first_.position, Rule::ReplaceStream(position));
    if (!has_draft) return DrawToken(isa_, row, plan, replace_noise, logits_, vocab_);
    WriteProbabilities(isa_, plan, logits_, vocab_, weights_);
    const float* const q = args_.probabilities.row<const float>(verify_.first_draft + position);
    const int32_t draft = Draft(position);
    const double u = UniformOf(row.seed, row.output_index,
                               NoisePosition(first_.position, Rule::AcceptStream(position)));
    if (Rule::Accepts(position, num_drafts_, u, weights_[draft], q[draft])) {
      accepted = true;
      return draft;
    }
    return Replace(row, plan, q, replace_noise);
  }

  // weights_ holds p.
  int64_t Replace(const SampleRow& row, const DrawPlan& plan, const float* q, int64_t noise) {
    float most = 0;
    for (int64_t id = 0; id < vocab_; ++id) {
      residual_[id] = Rule::Replacement(weights_[id], q[id]);
      most = std::max(most, residual_[id]);
    }
    if (most == 0) return DrawToken(isa_, row, plan, noise, logits_, vocab_);
    for (int64_t id = 0; id < vocab_; ++id) residual_[id] = std::log(residual_[id]);
    return DrawToken(isa_, row, {}, noise, residual_, vocab_);
  }

  const IsaTable& isa_;
  const VerifyTokensArgs& args_;
  const int32_t index_;
  const VerifyRow& verify_;
  const SampleRow& first_;
  const int64_t vocab_;
  float* const logits_;
  float* const weights_;
  float* const residual_;
  uint32_t* const counts_;
  int32_t num_drafts_;  // up to the first that failed
};

}  // namespace godwit
