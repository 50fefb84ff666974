#include "bench/cpu_roofs.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels/base/check.h"
#include "kernels/cpu/memory.h"
#include "kernels/cpu/product_args.h"

namespace godwit {
namespace {

constexpr int64_t kBufferBytes = int64_t{512} << 20;
constexpr int kPasses = 12;
constexpr int64_t kStreams = 4;  // one stream a thread leaves the memory idle between pages
constexpr int64_t kLine = 64;
constexpr int64_t kPrefetchBytes = 4096;

double Seconds(std::chrono::steady_clock::duration time) {
  return std::chrono::duration<double>(time).count();
}

// The sum keeps the loads alive.
uint64_t ReadAll(const char* data, int64_t num_bytes) {
  const int64_t share = num_bytes / kStreams / kLine * kLine;
  uint64_t sum[kStreams] = {};
  for (int64_t offset = 0; offset < share; offset += kLine) {
    for (int64_t stream = 0; stream < kStreams; ++stream) {
      const char* const line = data + stream * share + offset;
      __builtin_prefetch(line + kPrefetchBytes);
      uint64_t word;
      std::memcpy(&word, line, sizeof(word));
      sum[stream] += word;
    }
  }
  return sum[0] + sum[1] + sum[2] + sum[3];
}

}  // namespace

double MeasureReadBandwidth(ThreadPool& pool) {
  char* const data = static_cast<char*>(AcquireMemory(kBufferBytes));
  GODWIT_CHECK(data != nullptr);
  std::memset(data, 1, kBufferBytes);
  const int64_t share = kBufferBytes / pool.num_threads();
  std::vector<uint64_t> sums(static_cast<size_t>(pool.num_threads()) * 8);
  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto begin = std::chrono::steady_clock::now();
    pool.Run([&](int thread) {
      sums[static_cast<size_t>(thread) * 8] += ReadAll(data + thread * share, share);
    });
    best = std::max(best, static_cast<double>(kBufferBytes) /
                              Seconds(std::chrono::steady_clock::now() - begin));
  }
  uint64_t sum = 0;
  for (uint64_t value : sums) sum += value;
  GODWIT_CHECK(sum != 0);
  ReleaseMemory(data, kBufferBytes);
  return best;
}

double MeasureProductPeak(ThreadPool& pool, const IsaTable& isa, bool f32) {
  constexpr int64_t kRows = 96, kDepth = 256, kRowBytes = kDepth * 4 + 64,
                    kPanelBytes = kDepth * 64;
  constexpr int64_t kThreadBytes = kRows * kRowBytes + 2 * kPanelBytes + kRows * 32 * 4;
  constexpr int kCalls = 2000;
  const int64_t num_bytes = kThreadBytes * pool.num_threads();
  char* const memory = static_cast<char*>(AcquireMemory(num_bytes));
  GODWIT_CHECK(memory != nullptr);
  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto begin = std::chrono::steady_clock::now();
    pool.Run([&](int thread) {
      char* const mine = memory + thread * kThreadBytes;
      const PackedProductArgs args = {
          .a = mine,
          .a_stride_bytes = kRowBytes,
          .num_rows = kRows,
          .b = mine + kRows * kRowBytes,
          .b_panel_bytes = kPanelBytes,
          .num_panels = 2,
          .k = kDepth,
          .c = reinterpret_cast<float*>(mine + kRows * kRowBytes + 2 * kPanelBytes),
          .c_stride = 32};
      for (int call = 0; call < kCalls; ++call)
        f32 ? isa.product_f32(args) : isa.product_bf16(args);
    });
    const double operations = 2.0 * kRows * kDepth * 32 * kCalls * pool.num_threads();
    best = std::max(best, operations / Seconds(std::chrono::steady_clock::now() - begin));
  }
  ReleaseMemory(memory, num_bytes);
  return best;
}

}  // namespace godwit
