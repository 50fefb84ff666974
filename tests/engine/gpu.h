#pragma once
// The GPU of this machine, for tests that skip where there is none.

#include <cstdlib>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "engine/backend_loader.h"

namespace godwit {

// FAILED_PRECONDITION: no plugin beside the executable (GODWIT_BIN_DIR), no driver or no GPU.
inline absl::StatusOr<std::unique_ptr<Backend, BackendDeleter>> OpenGpu() {
  const char* folder = std::getenv("GODWIT_BIN_DIR");
  std::string why;
  return CreateBackend({.name = "cuda", .plugin_folder = folder == nullptr ? "" : folder}, &why);
}

}  // namespace godwit
