#pragma once
// The CPU back end: the embedded default. Computes when called (Synchronize returns at once).

#include <memory>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/backend.h"

namespace godwit {

struct CpuOptions {
  int num_threads = 0;       // 0: one per core this process may use
  absl::string_view isa;     // "": the best this machine has; else "portable", "avx2", "avx512bf16", "amx" (tests, benches)
};

// INVALID_ARGUMENT: unknown isa, threads not in [1, 1024]; FAILED_PRECONDITION: this machine lacks that isa.
absl::StatusOr<std::unique_ptr<Backend, BackendDeleter>> CreateCpuBackend(const CpuOptions& options);

}  // namespace godwit
