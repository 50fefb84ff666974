#pragma once
// Chooses and creates the back end of --backend=auto|cpu|cuda.

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/backend.h"

namespace godwit {

struct BackendChoice {
  std::string name = "auto";  // "auto": CUDA when its plugin, a driver and a GPU are there, else
                              // CPU and one line says why
  int num_threads = 0;        // CPU: 0 = one per usable core
  std::string plugin_folder;  // where libgodwit_cuda.so lies; "": beside the executable
};

// On "auto" with no usable GPU `*why_not_gpu` receives one line (else ""). "cuda" without one is
// FAILED_PRECONDITION with it.
absl::StatusOr<std::unique_ptr<Backend, BackendDeleter>> CreateBackend(const BackendChoice& choice,
                                                                       std::string* why_not_gpu);

}  // namespace godwit
