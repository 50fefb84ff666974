#pragma once
// Where the draws and scores of one step in flight land: on the device, and on the host once the
// queue has run.

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/device_buffer.h"
#include "engine/sampling_params.h"
#include "kernels/backend.h"

namespace godwit {

inline constexpr int64_t kLogitRows = 64;  // rows of logits that are held at once

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

  const OutputArrays& device_draws() const { return device_draws_; }
  const OutputArrays& device_scores() const { return device_scores_; }

  // Queues the copies of what the step wrote.
  absl::Status ReadBack(int64_t num_draws, bool draw_tops, int64_t num_scores, bool score_tops);

  // After Synchronize.
  const OutputArrays& draws() const { return host_draws_; }
  const OutputArrays& scores() const { return host_scores_; }

  // Where entry `index` of a run of scores that began at `begin` has its `num_top` most likely.
  static int64_t ScoreTop(int64_t begin, int64_t index, int64_t num_top) {
    const int64_t block = index / kLogitRows * kLogitRows;
    return (begin + block) * kMaxTopLogprobs + (index - block) * num_top;
  }

 private:
  StepOutputs(Backend& backend, DeviceBuffer buffer, int64_t max_draws, int64_t max_scores);
  absl::Status Copy(const OutputArrays& to, const OutputArrays& from, int64_t count, bool tops);

  Backend* backend_;
  DeviceBuffer buffer_;
  std::vector<int32_t> host_;
  OutputArrays device_draws_, device_scores_, host_draws_, host_scores_;
};

}  // namespace godwit
