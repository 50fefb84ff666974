#include "engine/backend_loader.h"

#include <dlfcn.h>
#include <unistd.h>

#include <climits>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "kernels/backend_abi.h"
#include "kernels/cpu/cpu_backend.h"

namespace godwit {
namespace {

using BackendPointer = std::unique_ptr<Backend, BackendDeleter>;

constexpr char kPluginName[] = "libgodwit_cuda.so";
constexpr size_t kMaxReasonBytes = 512;

std::string ExecutableFolder() {
  char path[PATH_MAX];
  const ssize_t length = readlink("/proc/self/exe", path, sizeof(path));
  const std::string executable(path, length > 0 ? static_cast<size_t>(length) : 0);
  return executable.substr(0, executable.rfind('/'));
}

// What another library says, on one line.
std::string OneLine(absl::string_view text) {
  return absl::StrReplaceAll(text, {{"\n", " "}, {"\r", " "}});
}

// The library stays open for the life of the process: the code of its back end lies in it.
absl::StatusOr<BackendPointer> OpenPlugin(const std::string& folder) {
  const std::string path =
      absl::StrCat(folder.empty() ? ExecutableFolder() : folder, "/", kPluginName);
  if (access(path.c_str(), F_OK) != 0) {
    return absl::FailedPreconditionError(absl::StrCat("no CUDA plugin at ", path));
  }
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr)
    return absl::FailedPreconditionError(absl::StrCat("CUDA plugin: ", OneLine(dlerror())));
  const auto create = reinterpret_cast<BackendFunction>(dlsym(library, kBackendFunction));
  if (create == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("CUDA plugin ", path, " has no function ", kBackendFunction));
  }
  char reason[kMaxReasonBytes] = "";
  Backend* backend = create(kBackendAbi, reason, sizeof(reason));
  if (backend != nullptr) return BackendPointer(backend);
  reason[sizeof(reason) - 1] = '\0';
  return absl::FailedPreconditionError(absl::StrCat(
      "CUDA plugin: ", reason[0] == '\0' ? "no back end, no reason given" : OneLine(reason)));
}

}  // namespace

absl::StatusOr<BackendPointer> CreateBackend(const BackendChoice& choice,
                                             std::string* why_not_gpu) {
  why_not_gpu->clear();
  if (choice.name != "auto" && choice.name != "cpu" && choice.name != "cuda") {
    return absl::InvalidArgumentError(
        absl::StrCat("backend '", choice.name, "' is not one of auto, cpu, cuda"));
  }
  if (choice.name != "cpu") {
    absl::StatusOr<BackendPointer> gpu = OpenPlugin(choice.plugin_folder);
    if (gpu.ok() || choice.name == "cuda") return gpu;
    *why_not_gpu = std::string(gpu.status().message());
  }
  return CreateCpuBackend({.num_threads = choice.num_threads});
}

}  // namespace godwit
