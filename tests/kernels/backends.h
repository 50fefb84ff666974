#pragma once
// The back ends that a test of the ops runs over.

#include <cstdlib>
#include <ostream>
#include <string>

#include "engine/backend_loader.h"
#include "tests/kernels/device_arena.h"

namespace godwit {

// The plugin of this build, or the one in the folder GODWIT_BIN_DIR names.
inline BackendPtr MakeCudaBackend(std::string* reason) {
  const char* folder = std::getenv("GODWIT_BIN_DIR");
  std::string why_not_gpu;
  auto backend = CreateBackend(
      {.name = "cuda", .num_threads = 0, .plugin_folder = folder == nullptr ? "" : folder},
      &why_not_gpu);
  if (backend.ok()) return *std::move(backend);
  *reason = std::string(backend.status().message());
  return nullptr;
}

// One row per back end; null and a reason where this machine has none.
struct BackendRow {
  const char* name;
  BackendPtr (*make)(std::string* reason);
  bool is_cpu = true;
};
inline void PrintTo(const BackendRow& row, std::ostream* out) { *out << row.name; }

inline const BackendRow kBackends[] = {
    {"cpu_portable", [](std::string* reason) { return MakeCpuBackend("portable", 2, reason); }},
    {"cpu_avx2", [](std::string* reason) { return MakeCpuBackend("avx2", 2, reason); }},
    {"cpu_avx512bf16", [](std::string* reason) { return MakeCpuBackend("avx512bf16", 2, reason); }},
    {"cpu_amx", [](std::string* reason) { return MakeCpuBackend("amx", 2, reason); }},
    {"cuda", MakeCudaBackend, false},
};

}  // namespace godwit
