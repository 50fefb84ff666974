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
  ASSIGN_OR_RETURN(DeviceBuffer buffer,
                   DeviceBuffer::Allocate(backend, DeviceBytes(max_draws, max_scores)));
  return StepOutputs(backend, std::move(buffer), max_draws, max_scores);
}

StepOutputs::StepOutputs(Backend& backend, DeviceBuffer buffer, int64_t max_draws,
                         int64_t max_scores)
    : backend_(&backend),
      buffer_(std::move(buffer)),
      host_(static_cast<size_t>((max_draws + max_scores) * kElementsPerEntry)) {
  const int64_t draw_bytes = max_draws * kElementsPerEntry * kElementBytes;
  char* host = reinterpret_cast<char*>(host_.data());
  device_draws_ = Carve(buffer_.bytes(), max_draws);
  device_scores_ = Carve(buffer_.bytes() + draw_bytes, max_scores);
  host_draws_ = Carve(host, max_draws);
  host_scores_ = Carve(host + draw_bytes, max_scores);
}

absl::Status StepOutputs::Copy(const OutputArrays& to, const OutputArrays& from, int64_t count,
                               bool tops) {
  if (count == 0) return absl::OkStatus();
  RETURN_IF_ERROR(backend_->CopyToHost(to.tokens, from.tokens, count * kElementBytes));
  RETURN_IF_ERROR(backend_->CopyToHost(to.logprobs, from.logprobs, count * kElementBytes));
  if (!tops) return absl::OkStatus();
  const int64_t top_bytes = count * kMaxTopLogprobs * kElementBytes;
  RETURN_IF_ERROR(backend_->CopyToHost(to.top_ids, from.top_ids, top_bytes));
  return ToStatus(backend_->CopyToHost(to.top_logprobs, from.top_logprobs, top_bytes));
}

absl::Status StepOutputs::ReadBack(int64_t num_draws, bool draw_tops, int64_t num_scores,
                                   bool score_tops) {
  RETURN_IF_ERROR(Copy(host_draws_, device_draws_, num_draws, draw_tops));
  return Copy(host_scores_, device_scores_, num_scores, score_tops);
}

}  // namespace godwit
