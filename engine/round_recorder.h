#pragma once
// What an acceptance head learns from: each draft of the rounds that an engine runs, with the draft
// model's state when it was drawn and how likely the target was to accept it, by the distributions
// that served. For `godwit record`, not for serving: it keeps whole distributions and waits for
// copies.

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/device_buffer.h"
#include "kernels/backend.h"

namespace godwit {

struct RecordedDraft {
  int32_t batch_row = 0;  // of the step
  int32_t place = 0;      // in the round
  bool alive = false;     // all before it were accepted
  bool accepted = false;  // and so was it
  // How likely it was to be accepted if all before it were: before it was drawn, sum of min(p, q),
  // and as it was drawn, min(1, p / q). A greedy row has one answer for both, 0 or 1.
  float before_draw = 0, after_draw = 0;
  float features[kNumHeadFeatures] = {};  // AcceptanceHeadArgs
  // After the draft model's final norm, of the token before the draft: [d_model].
  std::span<const float> hidden;
};

struct RoundRecorderOptions {
  int64_t num_slots = 0;
  int64_t max_drafts = 0;  // of a row
  int64_t vocab_size = 0;
  int64_t draft_d_model = 0;
};

// Not thread-safe. Of one step at a time.
class RoundRecorder {
 public:
  // The back end outlives it.
  static absl::StatusOr<std::unique_ptr<RoundRecorder>> Create(Backend& backend,
                                                               const RoundRecorderOptions& options);
  static int64_t DeviceBytes(const RoundRecorderOptions& options);

  // The draft model's side: the draws of pass `index`, once Sample has run. logit_rows: per draft
  // row, of `hidden`, which is before the final norm; -1: it draws no more.
  struct Pass {
    TensorView hidden;  // [R, d_model] f32
    NormSpec final_norm;
    const SampleRow* rows = nullptr;  // [num_rows], device
    int32_t num_rows = 0;
    std::span<const int32_t> logit_rows;
    TensorView margins;      // [num_rows]
    TensorView certainties;  // [num_rows, 2]
  };
  void Begin() { passes_.clear(); }
  absl::Status AddPass(const Pass& pass);

  // The target's side: draw t of the r-th row with drafts writes its distribution to row
  // TargetRow(r, t) of target_probabilities; its tokens go nowhere.
  int32_t TargetRow(int64_t draft_row, int64_t token) const {
    return static_cast<int32_t>(draft_row * (options_.max_drafts + 1) + token);
  }
  TensorView target_probabilities() const;
  TensorView tokens(int64_t num_rows) const;

  // Of the step that has just ended: its rows with drafts, in order. drafts, q: where the draft
  // model left them, draft i of row r at r * max_drafts + i.
  struct Round {
    int32_t batch_row = 0;
    int32_t num_drafts = 0, num_accepted = 0;
    float temperature = 0;
    bool coupled = false;  // and not greedy: has no q, and is left out
  };
  absl::Status Read(std::span<const Round> rounds, const TensorView& drafts, const TensorView& q);
  // What Read found; valid until it is called again.
  std::span<const RecordedDraft> drafts() const { return recorded_; }

 private:
  struct HostPass {
    std::vector<float> hidden, margins, certainties;
    std::vector<int32_t> logit_rows;
  };

  RoundRecorder(Backend& backend, const RoundRecorderOptions& options)
      : backend_(&backend), options_(options) {}
  absl::Status Download(const TensorView& from, std::vector<float>& to);
  void AddDraft(const Round& round, int64_t draft_row, int32_t place, int32_t token);

  Backend* backend_;
  RoundRecorderOptions options_;
  DeviceBuffer normed_;  // [num_slots, draft_d_model] f32
  DeviceBuffer target_;  // [num_slots * (max_drafts + 1), vocab] f32
  DeviceBuffer tokens_;  // [num_slots * (max_drafts + 1)] i32

  std::vector<HostPass> passes_;
  std::vector<float> host_target_, host_q_;
  std::vector<RecordedDraft> recorded_;
};

}  // namespace godwit
