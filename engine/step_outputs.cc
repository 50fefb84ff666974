#include "engine/step_outputs.h"

#include <utility>

#include "kernels/base/status.h"

namespace godwit {
namespace {

// i32 and f32 alike: 4 bytes per element.
constexpr int64_t kElementBytes = 4;
constexpr int64_t kElementsPerEntry = 2 + 2 * kMaxTopLogprobs;

OutputArrays Carve(char* data, int64_t count) {
  OutputArrays arrays;
  arrays.tokens = reinterpret_cast<int32_t*>(data);
  arrays.logprobs = reinterpret_cast<float*>(data + count * kElementBytes);
  arrays.top_ids = reinterpret_cast<int32_t*>(data + 2 * count * kElementBytes);
  arrays.top_logprobs =
      reinterpret_cast<float*>(data + (2 + kMaxTopLogprobs) * count * kElementBytes);
  return arrays;
}

}  // namespace

int64_t StepOutputs::DeviceBytes(int64_t max_draws, int64_t max_scores) {
  return (max_draws + max_scores) * kElementsPerEntry * kElementBytes;
}

absl::StatusOr<StepOutputs> StepOutputs::Create(Backend& backend, int64_t max_draws,
                                                int64_t max_scores) {
  const int64_t num_bytes = DeviceBytes(max_draws, max_scores);
  const int64_t draw_bytes = DeviceBytes(max_draws, 0);
  StepOutputs outputs(backend);
  outputs.max_draws_ = max_draws;
  outputs.max_scores_ = max_scores;
  ASSIGN_OR_RETURN(outputs.device_, DeviceBuffer::Allocate(backend, num_bytes));
  outputs.device_draws_ = Carve(outputs.device_.bytes(), max_draws);
  outputs.device_scores_ = Carve(outputs.device_.bytes() + draw_bytes, max_scores);
  for (int index = 0; index < kMaxStepsInFlight; ++index) {
    ASSIGN_OR_RETURN(outputs.hosts_[index], HostBuffer::Allocate(backend, num_bytes));
    outputs.host_draws_[index] = Carve(outputs.hosts_[index].bytes(), max_draws);
    outputs.host_scores_[index] = Carve(outputs.hosts_[index].bytes() + draw_bytes, max_scores);
  }
  return outputs;
}

absl::Status StepOutputs::Copy(const OutputArrays& to, const OutputArrays& from, int64_t count,
                               int64_t capacity, bool logprobs, bool tops) {
  if (count == 0) return absl::OkStatus();
  // The arrays lie behind one another, so what is wanted is a prefix: a second copy would cost a
  // step more than the few kilobytes of unused entries do.
  const int64_t elements = tops       ? (2 + kMaxTopLogprobs) * capacity + kMaxTopLogprobs * count
                           : logprobs ? capacity + count
                                      : count;
  return ToStatus(backend_->CopyToHost(to.tokens, from.tokens, elements * kElementBytes));
}

absl::Status StepOutputs::ReadBack(StepId step, const Wanted& wanted) {
  const int64_t index = step % kMaxStepsInFlight;
  RETURN_IF_ERROR(Copy(host_draws_[index], device_draws_, wanted.num_draws, max_draws_,
                       wanted.draw_logprobs, wanted.draw_tops));
  return Copy(host_scores_[index], device_scores_, wanted.num_scores, max_scores_, true,
              wanted.score_tops);
}

}  // namespace godwit
