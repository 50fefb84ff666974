// Products of the CPU back end at the shapes of a 1.1B Llama and of the shipped models:
//
//   bench_ops/linear/bf16/isa:amx/threads:2/rows:1/n:5632/k:2048
//
// One iteration is one call. Weights rotate over copies that together exceed every cache, as in a
// model; the tiny shapes stay in cache, as they do there. Counters: median_us and best_us of a
// call; GB/s of weights and GFLOP/s at the median; and both as a share of what this machine can do
// (cpu_roofs.h), measured at start and printed in the header.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "bench/cpu_roofs.h"
#include "bench/plain_layout.h"
#include "kernels/base/bf16.h"
#include "kernels/base/check.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/select_isa.h"

namespace godwit {
namespace {

constexpr int64_t kColdBytes = int64_t{400} << 20;
constexpr int64_t kTinyBytes = int64_t{1} << 20;  // a matrix up to this size is measured in cache

struct Shape {
  int64_t n, k;
};
struct Case {
  std::string isa;
  int threads;
  DType dtype;
  bool gated;
  int64_t rows;
  Shape shape;
};

struct Roofs {
  double bytes_per_s, operations_per_s;
};

const Roofs& RoofsOf(const Case& config) {
  static std::map<std::string, Roofs> known;
  const bool f32 = config.dtype == DType::kF32;
  const std::string key = config.isa + (f32 ? "/f32/" : "/bf16/") + std::to_string(config.threads);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  ThreadPool pool(config.threads);
  const Roofs roofs = {MeasureReadBandwidth(pool),
                       MeasureProductPeak(pool, **SelectIsa(config.isa), f32)};
  std::printf("roofs %s: read %.1f GB/s, product in first-level cache %.0f GFLOP/s\n", key.c_str(),
              roofs.bytes_per_s / 1e9, roofs.operations_per_s / 1e9);
  return known.emplace(key, roofs).first->second;
}

void* MustAllocate(Backend& backend, int64_t num_bytes) {
  void* data = nullptr;
  GODWIT_CHECK(backend.Allocate(num_bytes, &data).ok());
  return data;
}

std::vector<MatrixView> MakeMatrices(Backend& backend, const Case& config, int64_t count) {
  const auto [n, k] = config.shape;
  std::vector<float> source(static_cast<size_t>(n * k));
  std::minstd_rand random(1);
  for (float& value : source) value = static_cast<float>(random() % 2001) * 1e-3f - 1;
  std::vector<MatrixView> matrices(static_cast<size_t>(count));
  for (MatrixView& matrix : matrices) {
    GODWIT_CHECK(backend.AllocateMatrix(n, k, config.dtype, &matrix).ok());
    GODWIT_CHECK(
        backend.PackMatrixRows(matrix, 0, MakeView(source.data(), DType::kF32, n, k)).ok());
  }
  return matrices;
}

OpStatus Call(Backend& backend, const Case& config, const MatrixView& w, const MatrixView& up,
              void* x, void* y) {
  const RowInput input = {.x = MakeView(x, DType::kF32, config.rows, config.shape.k),
                          .norm = {.kind = NormKind::kRms, .epsilon = 1e-5f}};
  if (config.gated) {
    return backend.GatedLinear({.input = input,
                                .gate = w,
                                .up = up,
                                .activation = Activation::kSilu,
                                .y = MakeView(y, config.dtype, config.rows, config.shape.n)});
  }
  return backend.Linear(
      {.input = input, .w = w, .y = MakeView(y, DType::kF32, config.rows, config.shape.n)});
}

void Report(benchmark::State& state, const Case& config, std::vector<double>& seconds) {
  std::sort(seconds.begin(), seconds.end());
  const double median = seconds[seconds.size() / 2];
  const double weights =
      static_cast<double>(config.shape.n * config.shape.k) * (config.gated ? 2 : 1);
  const double bytes_per_s = weights * static_cast<double>(DTypeBytes(config.dtype)) / median;
  const double operations_per_s = 2 * weights * static_cast<double>(config.rows) / median;
  const Roofs& roofs = RoofsOf(config);
  state.counters["median_us"] = median * 1e6;
  state.counters["best_us"] = seconds.front() * 1e6;
  state.counters["GB/s"] = bytes_per_s / 1e9;
  state.counters["GFLOP/s"] = operations_per_s / 1e9;
  state.counters["%read"] = 100 * bytes_per_s / roofs.bytes_per_s;
  state.counters["%peak"] = 100 * operations_per_s / roofs.operations_per_s;
}

void BenchProduct(benchmark::State& state, const Case& config) {
  RoofsOf(config);
  auto backend = *CreateCpuBackend({.num_threads = config.threads, .isa = config.isa});
  const int64_t bytes = config.shape.n * config.shape.k * DTypeBytes(config.dtype);
  const int64_t copies = bytes <= kTinyBytes ? 2 : std::max<int64_t>(2, kColdBytes / bytes) / 2 * 2;
  const std::vector<MatrixView> matrices = MakeMatrices(*backend, config, copies);
  float* const x = static_cast<float*>(MustAllocate(*backend, config.rows * config.shape.k * 4));
  for (int64_t i = 0; i < config.rows * config.shape.k; ++i) x[i] = static_cast<float>(i % 17) - 8;
  void* const y = MustAllocate(*backend, config.rows * config.shape.n * 4);
  std::vector<double> seconds;
  size_t next = 0;
  for (auto _ : state) {
    const auto begin = std::chrono::steady_clock::now();
    GODWIT_CHECK(Call(*backend, config, matrices[next], matrices[next + 1], x, y).ok());
    seconds.push_back(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    state.SetIterationTime(seconds.back());
    next = (next + 2) % matrices.size();
  }
  Report(state, config, seconds);
}

// The same product from weights as they lie in a file: bench_ops/linear_plain_layout.
void BenchPlainLayout(benchmark::State& state, const Case& config) {
  RoofsOf(config);
  const auto [n, k] = config.shape;
  auto backend = *CreateCpuBackend({.num_threads = config.threads, .isa = config.isa});
  ThreadPool pool(config.threads);
  const int64_t copies = std::max<int64_t>(1, kColdBytes / (n * k * 2));
  uint16_t* const weights = static_cast<uint16_t*>(MustAllocate(*backend, copies * n * k * 2));
  for (int64_t i = 0; i < copies * n * k; ++i)
    weights[i] = ToBF16(static_cast<float>(i % 17) - 8).bits;
  uint16_t* const x = static_cast<uint16_t*>(MustAllocate(*backend, config.rows * k * 2));
  for (int64_t i = 0; i < config.rows * k; ++i) x[i] = ToBF16(static_cast<float>(i % 13) - 6).bits;
  float* const y = static_cast<float*>(MustAllocate(*backend, config.rows * n * 4));
  std::vector<double> seconds;
  int64_t copy = 0;
  for (auto _ : state) {
    const PlainProductArgs args = {x, weights + copy * n * k, y, config.rows, n, k};
    const auto begin = std::chrono::steady_clock::now();
    pool.Run([&](int thread) {
      const int64_t quads = n / 4;
      PlainLayoutProduct(args, quads * thread / config.threads * 4,
                         quads * (thread + 1) / config.threads * 4);
    });
    seconds.push_back(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    state.SetIterationTime(seconds.back());
    copy = (copy + 1) % copies;
  }
  Report(state, config, seconds);
}

void Register(const Case& config, bool plain_layout = false) {
  const std::string name =
      std::string("bench_ops/") +
      (plain_layout   ? "linear_plain_layout"
       : config.gated ? "gated_linear"
                      : "linear") +
      (config.dtype == DType::kF32 ? "/f32" : "/bf16") + "/isa:" + config.isa +
      "/threads:" + std::to_string(config.threads) + "/rows:" + std::to_string(config.rows) +
      "/n:" + std::to_string(config.shape.n) + "/k:" + std::to_string(config.shape.k);
  benchmark::RegisterBenchmark(name.c_str(), plain_layout ? BenchPlainLayout : BenchProduct, config)
      ->UseManualTime()
      ->Unit(benchmark::kMicrosecond);
}

void RegisterAll() {
  const int threads = 2;
  if (SelectIsa("avx512bf16").ok()) {
    for (int64_t rows : {1, 4, 8, 16, 64, 256}) {
      Register({"avx512bf16", threads, DType::kBF16, false, rows, {5632, 2048}}, true);
    }
  }
  for (const char* isa : {"portable", "avx2", "avx512bf16", "amx"}) {
    if (!SelectIsa(isa).ok()) continue;
    for (DType dtype : {DType::kBF16, DType::kF32}) {
      for (int64_t rows : {1, 2, 4, 8, 12, 16, 32, 64, 128, 256, 512})
        Register({isa, threads, dtype, false, rows, {5632, 2048}});
      for (int64_t rows : {1, 256}) {
        for (const Shape& shape :
             {Shape{2560, 2048}, Shape{2048, 2048}, Shape{2048, 5632}, Shape{32000, 2048}}) {
          Register({isa, threads, dtype, false, rows, shape});
        }
        Register({isa, threads, dtype, true, rows, {5632, 2048}});
        Register({isa, 1, dtype, false, rows, {5632, 2048}});
      }
      for (int64_t rows : {1, 8, 64}) {
        for (const Shape& shape :
             {Shape{192, 192}, Shape{768, 192}, Shape{192, 512}, Shape{1536, 384}}) {
          Register({isa, threads, dtype, false, rows, shape});
        }
      }
    }
  }
}

}  // namespace
}  // namespace godwit

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  godwit::RegisterAll();
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
