#include "engine/round_recorder.h"

#include <algorithm>
#include <cmath>

#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace godwit {

int64_t RoundRecorder::DeviceBytes(const RoundRecorderOptions& options) {
  return options.num_slots * DTypeBytes(DType::kF32) *
         (options.draft_d_model + (options.max_drafts + 1) * (options.vocab_size + 1));
}

absl::StatusOr<std::unique_ptr<RoundRecorder>> RoundRecorder::Create(
    Backend& backend, const RoundRecorderOptions& options) {
  std::unique_ptr<RoundRecorder> recorder(new RoundRecorder(backend, options));
  const int64_t row_bytes = options.num_slots * DTypeBytes(DType::kF32);
  const int64_t draws = options.max_drafts + 1;
  ASSIGN_OR_RETURN(recorder->normed_,
                   DeviceBuffer::Allocate(backend, row_bytes * options.draft_d_model));
  ASSIGN_OR_RETURN(recorder->target_,
                   DeviceBuffer::Allocate(backend, row_bytes * draws * options.vocab_size));
  ASSIGN_OR_RETURN(recorder->tokens_, DeviceBuffer::Allocate(backend, row_bytes * draws));
  return recorder;
}

TensorView RoundRecorder::target_probabilities() const {
  return MakeView(target_.bytes(), DType::kF32, options_.num_slots * (options_.max_drafts + 1),
                  options_.vocab_size);
}

TensorView RoundRecorder::tokens(int64_t num_rows) const {
  return MakeView(tokens_.bytes(), DType::kI32, num_rows);
}

absl::Status RoundRecorder::Download(const TensorView& from, std::vector<float>& to) {
  to.resize(static_cast<size_t>(from.elements()));
  GODWIT_CHECK(from.dense());
  return ToStatus(
      backend_->CopyToHost(to.data(), from.data, from.elements() * DTypeBytes(DType::kF32)));
}

absl::Status RoundRecorder::AddPass(const Pass& pass) {
  const TensorView normed =
      MakeView(normed_.bytes(), DType::kF32, pass.hidden.rows(), options_.draft_d_model);
  RETURN_IF_ERROR(backend_->AcceptanceHead({.x = pass.hidden,
                                            .norm = pass.final_norm,
                                            .y = normed,
                                            .rows = pass.rows,
                                            .num_rows = pass.num_rows}));
  HostPass& host = passes_.emplace_back();
  host.logit_rows.assign(pass.logit_rows.begin(), pass.logit_rows.end());
  RETURN_IF_ERROR(Download(normed, host.hidden));
  RETURN_IF_ERROR(Download(pass.margins, host.margins));
  RETURN_IF_ERROR(Download(pass.certainties, host.certainties));
  return ToStatus(backend_->Synchronize());
}

void RoundRecorder::AddDraft(const Round& round, int64_t draft_row, int32_t place, int32_t token) {
  const auto row = static_cast<size_t>(draft_row);
  const HostPass& pass = passes_[static_cast<size_t>(place)];
  const int32_t logit_row = pass.logit_rows[row];
  GODWIT_CHECK(logit_row >= 0);
  const auto vocab = static_cast<size_t>(options_.vocab_size);
  const float* const p =
      host_target_.data() + static_cast<size_t>(TargetRow(draft_row, place)) * vocab;
  const float* const q =
      host_q_.data() + static_cast<size_t>(draft_row * options_.max_drafts + place) * vocab;
  const auto d_model = static_cast<size_t>(options_.draft_d_model);
  RecordedDraft draft = {
      .batch_row = round.batch_row,
      .place = place,
      .alive = place <= round.num_accepted,
      .accepted = place < round.num_accepted,
      .features = {std::log1p(pass.margins[row]), pass.certainties[2 * row],
                   pass.certainties[2 * row + 1], std::min(round.temperature, 2.0f),
                   static_cast<float>(place)},
      .hidden = std::span(pass.hidden).subspan(static_cast<size_t>(logit_row) * d_model, d_model)};
  if (round.temperature == 0) {
    draft.before_draw = draft.after_draw = p[token];
  } else {
    double overlap = 0;
    for (size_t id = 0; id < vocab; ++id) overlap += static_cast<double>(std::min(p[id], q[id]));
    draft.before_draw = static_cast<float>(std::min(overlap, 1.0));
    draft.after_draw = std::min(1.0f, p[token] / q[token]);
  }
  recorded_.push_back(draft);
}

absl::Status RoundRecorder::Read(std::span<const Round> rounds, const TensorView& drafts,
                                 const TensorView& q) {
  recorded_.clear();
  const auto num_rounds = static_cast<int64_t>(rounds.size());
  if (num_rounds == 0) return absl::OkStatus();
  std::vector<int32_t> tokens(static_cast<size_t>(num_rounds * options_.max_drafts));
  RETURN_IF_ERROR(backend_->CopyToHost(tokens.data(), drafts.data,
                                       std::ssize(tokens) * DTypeBytes(DType::kI32)));
  RETURN_IF_ERROR(Download(RowRange(q, 0, num_rounds * options_.max_drafts), host_q_));
  RETURN_IF_ERROR(Download(
      RowRange(target_probabilities(), 0, num_rounds * (options_.max_drafts + 1)), host_target_));
  RETURN_IF_ERROR(ToStatus(backend_->Synchronize()));
  for (int64_t draft_row = 0; draft_row < num_rounds; ++draft_row) {
    const Round& round = rounds[static_cast<size_t>(draft_row)];
    if (round.coupled && round.temperature > 0) continue;
    for (int32_t place = 0; place < round.num_drafts; ++place) {
      const int32_t token = tokens[static_cast<size_t>(draft_row * options_.max_drafts + place)];
      if (token < 0) break;  // its draw failed
      AddDraft(round, draft_row, place, token);
    }
  }
  return absl::OkStatus();
}

}  // namespace godwit
