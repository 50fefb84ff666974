#include "kernels/cpu/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <limits>
#include <string>

#include "kernels/base/check.h"

namespace godwit {
namespace {

constexpr int64_t kPageBytes = 4096;
constexpr int64_t kHugePageBytes = 2 << 20;

int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

int64_t MappedBytes(int64_t num_bytes) {
  return RoundUp(num_bytes, num_bytes >= kHugePageBytes ? kHugePageBytes : kPageBytes);
}

// The first number of a file of the kernel, or nothing larger than any memory ("max", no such
// file).
int64_t ReadLimit(const char* path) {
  std::ifstream file(path);
  int64_t value = 0;
  return (file >> value) ? value : std::numeric_limits<int64_t>::max();
}

void LimitByGroup(const char* limit_path, const char* usage_path, MemoryInfo& info) {
  const int64_t limit = ReadLimit(limit_path);
  if (limit >= info.total_bytes) return;
  info.total_bytes = limit;
  const int64_t usage = std::min(ReadLimit(usage_path), limit);
  info.free_bytes = std::min(info.free_bytes, limit - usage);
}

}  // namespace

void* AcquireMemory(int64_t num_bytes) {
  GODWIT_CHECK(num_bytes > 0);
  if (num_bytes > std::numeric_limits<int64_t>::max() / 2) return nullptr;
  const int64_t mapped = MappedBytes(num_bytes);
  const bool huge = mapped % kHugePageBytes == 0;
  const int64_t slack = huge ? kHugePageBytes : 0;  // to cut an aligned piece out of
  void* const raw = mmap(nullptr, static_cast<size_t>(mapped + slack), PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  if (!huge) return raw;
  char* const begin = static_cast<char*>(raw);
  const int64_t head =
      RoundUp(reinterpret_cast<intptr_t>(raw), kHugePageBytes) - reinterpret_cast<intptr_t>(raw);
  if (head > 0) munmap(begin, static_cast<size_t>(head));
  if (head < slack) munmap(begin + head + mapped, static_cast<size_t>(slack - head));
  // Advice: where the kernel has no huge pages to give, small ones serve.
  (void)madvise(begin + head, static_cast<size_t>(mapped), MADV_HUGEPAGE);
  return begin + head;
}

void ReleaseMemory(void* data, int64_t num_bytes) {
  if (data != nullptr) munmap(data, static_cast<size_t>(MappedBytes(num_bytes)));
}

MemoryInfo ReadMemoryInfo() {
  MemoryInfo info;
  std::ifstream file("/proc/meminfo");
  std::string name;
  std::string unit;
  int64_t kibibytes = 0;
  while (file >> name >> kibibytes && std::getline(file, unit)) {
    if (name == "MemTotal:") info.total_bytes = kibibytes * 1024;
    if (name == "MemAvailable:") info.free_bytes = kibibytes * 1024;
  }
  std::ifstream statm("/proc/self/statm");
  int64_t total_pages = 0, resident_pages = 0;
  if (statm >> total_pages >> resident_pages) {
    info.used_bytes = resident_pages * sysconf(_SC_PAGESIZE);
  }
  LimitByGroup("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", info);
  LimitByGroup("/sys/fs/cgroup/memory/memory.limit_in_bytes",
               "/sys/fs/cgroup/memory/memory.usage_in_bytes", info);
  return info;
}

}  // namespace godwit
