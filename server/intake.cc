#include "server/intake.h"

namespace godwit {

absl::Status RunIntake(const ServiceContext& services, size_t num_text_bytes,
                       std::function<void()> work) {
  if (static_cast<int64_t>(num_text_bytes) <= kInlinePromptBytes) {
    work();
    return absl::OkStatus();
  }
  if (services.intake.Post(std::move(work))) return absl::OkStatus();
  return SubmitError(
      absl::ResourceExhaustedError("too many long prompts are being split into tokens"));
}

}  // namespace godwit
