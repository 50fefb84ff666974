#pragma once
// Where the draws and scores of steps land: on the device, where the next step finds the tokens it
// continues with, and on the host once the queue has run.

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/batch.h"
#include "engine/device_buffer.h"
#include "engine/sampling_params.h"
#include "kernels/backend.h"

namespace godwit {

inline constexpr int64_t kLogitRows = 64;  // rows of logits that are scored at once

// Token and log-probabilities of n entries. Entry i's most likely tokens lie at i * kMaxTopLogprobs
// where drawn; scores are written in blocks of kLogitRows, each dense over its own number of them
// (StepOutputs::ScoreTop).
struct OutputArrays {
  int32_t* tokens = nullptr;      // [n]; draws only
  float* logprobs = nullptr;      // [n]
  int32_t* top_ids = nullptr;     // [n * kMaxTopLogprobs]
  float* top_logprobs = nullptr;  // [n * kMaxTopLogprobs]
};

class StepOutputs {
 public:
  static absl::StatusOr<StepOutputs> Create(Backend& backend, int64_t max_draws,
                                            int64_t max_scores);
  static int64_t DeviceBytes(int64_t max_draws, int64_t max_scores);

  // One set for all steps: they run in order, and what the host needs is copied before the next
  // step draws.
  const OutputArrays& device_draws() const { return device_draws_; }
  const OutputArrays& device_scores() const { return device_scores_; }

  // What of a step's outputs anybody asked for.
  struct Wanted {
    int64_t num_draws = 0;
    bool draw_logprobs = false, draw_tops = false;
    int64_t num_scores = 0;
    bool score_tops = false;
  };
  // Queues one copy for the draws and one for the scores, where there are any.
  absl::Status ReadBack(StepId step, const Wanted& wanted);

  // Once the queue has passed them.
  const OutputArrays& draws(StepId step) const { return host_draws_[step % kMaxStepsInFlight]; }
  const OutputArrays& scores(StepId step) const { return host_scores_[step % kMaxStepsInFlight]; }

  // Where entry `index` of a run of scores that began at `begin` has its `num_top` most likely.
  static int64_t ScoreTop(int64_t begin, int64_t index, int64_t num_top) {
    const int64_t block = index / kLogitRows * kLogitRows;
    return (begin + block) * kMaxTopLogprobs + (index - block) * num_top;
  }

 private:
  explicit StepOutputs(Backend& backend) : backend_(&backend) {}
  // Of `count` entries of arrays made for `capacity`: tokens, and as asked for what follows them.
  absl::Status Copy(const OutputArrays& to, const OutputArrays& from, int64_t count,
                    int64_t capacity, bool logprobs, bool tops);

  Backend* backend_;
  int64_t max_draws_ = 0, max_scores_ = 0;
  DeviceBuffer device_;
  HostBuffer hosts_[kMaxStepsInFlight];
  OutputArrays device_draws_, device_scores_;
  OutputArrays host_draws_[kMaxStepsInFlight], host_scores_[kMaxStepsInFlight];
};

}  // namespace godwit
