// oneDNN's BF16 product with prepacked weights, at the shapes of ops_bench: a yardstick, built
// where libdnnl-dev is installed; the server does not use it. ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16
// holds it to vdpbf16ps where there is AMX, and OMP_NUM_THREADS sets its threads.
//
//   bench_ops/onednn_prepacked/bf16/rows:256/n:5632/k:2048

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <oneapi/dnnl/dnnl.hpp>
#include <vector>

namespace godwit {
namespace {

constexpr int64_t kN = 5632;
constexpr int64_t kK = 2048;
constexpr int64_t kCopies = 18;  // of the weights: 415 MB, more than any cache

void BenchOneDnn(benchmark::State& state) {
  using dnnl::memory;
  using Tag = memory::format_tag;
  using Type = memory::data_type;
  const int64_t rows = state.range(0);
  const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  dnnl::stream stream(engine);
  const memory::desc x_desc({rows, kK}, Type::bf16, Tag::ab);
  const memory::desc y_desc({rows, kN}, Type::f32, Tag::ab);
  const memory::desc any_desc({kK, kN}, Type::bf16, Tag::any);
  const dnnl::matmul::primitive_desc product_desc(dnnl::matmul::desc(x_desc, any_desc, y_desc),
                                                  engine);
  const dnnl::matmul product(product_desc);
  memory x(x_desc, engine);
  memory y(y_desc, engine);
  std::fill_n(static_cast<uint16_t*>(x.get_data_handle()), rows * kK, uint16_t{0x3f80});
  std::vector<memory> weights;
  for (int64_t copy = 0; copy < kCopies; ++copy) {
    weights.emplace_back(product_desc.weights_desc(), engine);
    std::fill_n(static_cast<uint16_t*>(weights.back().get_data_handle()),
                weights.back().get_desc().get_size() / 2, uint16_t{0x3f80});
  }
  std::vector<double> seconds;
  size_t copy = 0;
  for (auto _ : state) {
    const auto begin = std::chrono::steady_clock::now();
    product.execute(stream,
                    {{DNNL_ARG_SRC, x}, {DNNL_ARG_WEIGHTS, weights[copy]}, {DNNL_ARG_DST, y}});
    stream.wait();
    seconds.push_back(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    state.SetIterationTime(seconds.back());
    copy = (copy + 1) % weights.size();
  }
  std::sort(seconds.begin(), seconds.end());
  const double median = seconds[seconds.size() / 2];
  state.counters["median_us"] = median * 1e6;
  state.counters["best_us"] = seconds.front() * 1e6;
  state.counters["GB/s"] = kN * kK * 2 / median / 1e9;
  state.counters["GFLOP/s"] = 2.0 * kN * kK * static_cast<double>(rows) / median / 1e9;
}

}  // namespace
}  // namespace godwit

BENCHMARK(godwit::BenchOneDnn)
    ->Name("bench_ops/onednn_prepacked/bf16/n:5632/k:2048/rows")
    ->Arg(1)
    ->Arg(8)
    ->Arg(16)
    ->Arg(64)
    ->Arg(256)
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond);
