#include "server/request_registry.h"

#include "absl/strings/str_cat.h"
#include "server/status_mapping.h"

namespace godwit {

absl::Status RequestRegistry::Add(const std::string& id) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (ids_.insert(id).second) return absl::OkStatus();
  return WithErrorInfo(
      WithResource(absl::AlreadyExistsError(absl::StrCat("request_id ", id, " is running")),
                   "request", id),
      "DUPLICATE_REQUEST_ID");
}

void RequestRegistry::Remove(const std::string& id) {
  std::lock_guard<std::mutex> lock(mutex_);
  ids_.erase(id);
}

int64_t RequestRegistry::size() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<int64_t>(ids_.size());
}

}  // namespace godwit
