// Which drafts of a sequence stand: a cluster of blocks a sequence (sample_row.cuh), position by
// position until a draft is rejected, so that what follows costs nothing. A position is what Sample
// makes of a row; under kStandard an exchange for the sum of p and one for p of the draft come on
// top, and a rejection forms the residual in the row's place.

#include <cmath>

#include "kernels/base/accept_rule.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/pdl.cuh"
#include "kernels/cuda/sample_row.cuh"

namespace godwit::cuda {
namespace {

struct VerifiedToken {
  int32_t token = -1;
  bool accepted = false;  // it is the draft, and the next one counts too
};

// A position of a round of speculation.
struct Position {
  int64_t round = 0;  // where the round begins
  int32_t index = 0;
  int32_t num_drafts = 0;    // of the round
  int32_t draft = -1;        // -1: none here
  const float* q = nullptr;  // the draft's distribution, [V]
};

// The token of the kStandard rule.
template <int kCluster>
__device__ VerifiedToken VerifyStandard(RowOps<kCluster>& ops, const SampleRow& row,
                                        const DrawPlan& plan, const Position& at) {
  const int64_t noise = NoisePosition(at.round, StandardRule::ReplaceStream(at.index));
  if (at.draft < 0) return {DrawToken(ops, row, plan, noise), false};
  const Probabilities p(ops, plan);
  const float p_draft = p(ops.ValueAt(at.draft), static_cast<uint32_t>(at.draft));
  const double u = UniformOf(row.seed, row.output_index,
                             NoisePosition(at.round, StandardRule::AcceptStream(at.index)));
  if (StandardRule::Accepts(at.index, at.num_drafts, u, p_draft, at.q[at.draft])) {
    return {at.draft, true};
  }
  const auto residual = [&](float value, uint32_t id) {
    return id < ops.vocab_size() ? StandardRule::Replacement(p(value, id), at.q[id]) : 0.0f;
  };
  uint64_t most = 0;
  ops.ForEach([&](float value, uint32_t id) { most = max(most, KeyOf(residual(value, id), id)); });
  most = ops.team().MaxKey(most);
  // Where rounding leaves nothing of it.
  if (ValueOf(most) == 0) return {DrawToken(ops, row, plan, noise), false};
  ops.ForEach([&](float& value, uint32_t id) { value = logf(residual(value, id)); });
  return {IdOf(ops.Draw(row, noise)), false};
}

template <int kCluster>
__global__ void __launch_bounds__(kRowThreads, 2)
    VerifyKernel(VerifyTokensArgs args, RowLayout layout, float4* scratch) {
  extern __shared__ float4 values[];
  __shared__ RowShared shared;
  DependencyWait();
  const int64_t sequence = blockIdx.x / kCluster;
  const VerifyRow verify = args.verify_rows[sequence];
  const SampleRow* const rows = args.rows + verify.first_row;
  if (rows[0].slot < 0) return;  // padding: all blocks of the cluster leave
  uint32_t* const counts = Row<uint32_t>(args.counts, rows[0].slot);
  const int64_t vocab_size = args.logits.shape[1];
  RowOps<kCluster> ops(shared, PartOfBlock<kCluster>(layout, vocab_size, values, scratch));
  const auto draft_at = [&](int32_t index) {
    return *Row<const int32_t>(args.drafts, verify.first_draft + index);
  };
  int32_t num_drafts = 0;  // up to the first that failed
  while (num_drafts < verify.num_drafts && draft_at(num_drafts) >= 0) ++num_drafts;
  if (ops.writes()) {
    for (int32_t index = 0; index < verify.num_drafts + verify.num_dropped; ++index) {
      if (draft_at(index) >= 0) --counts[draft_at(index)];
    }
  }
  ops.team().WaitForStart();

  // Counts are written by one thread and read by all: an exchange lies between, in either order.
  VerifiedToken verified = {.accepted = true};
  int32_t index = 0;
  for (; verified.accepted; ++index) {
    const SampleRow& row = rows[index];
    const int64_t output = verify.first_row + index;
    const uint64_t largest = ops.template Load<false>(Row<const float>(args.logits, row.logit_row));
    if (largest == kBadKey) {
      if (ops.writes()) *Row<int32_t>(args.tokens, output) = -1;
      verified = {};
      continue;
    }
    const DrawPlan plan = PrepareDraw(ops, row, largest, counts);
    const int32_t draft = index < num_drafts ? draft_at(index) : -1;
    if (verify.rule == AcceptRule::kMatch) {
      verified.token = DrawToken(ops, row, plan, row.position);
      verified.accepted = verified.token == draft;
    } else {
      Position at = {.round = rows[0].position, .index = index, .num_drafts = num_drafts};
      at.draft = draft;
      if (draft >= 0) at.q = Row<const float>(args.probabilities, verify.first_draft + index);
      verified = VerifyStandard(ops, row, plan, at);
    }
    if (ops.writes()) {
      *Row<int32_t>(args.tokens, output) = verified.token;
      ++counts[verified.token];
    }
    // What was drawn from may be the residual by now.
    WriteLogprobs(ops, args, row, plan, verified.token, output);
  }
  if (ops.writes()) *Row<int32_t>(args.num_tokens, sequence) = index;
}

}  // namespace

cudaError_t LaunchVerifyTokens(const VerifyTokensArgs& args, Context& context) {
  if (args.num_verify_rows == 0) return cudaSuccess;
  const RowLayout layout = LayoutOf(args.logits.shape[1], context.compute_capability);
  const auto kernel = layout.cluster == 1 ? VerifyKernel<1> : VerifyKernel<kMaxCluster>;
  return LaunchRows<VerifyTokensArgs>(kernel, args, layout, args.num_verify_rows, context);
}

}  // namespace godwit::cuda
