// Does the millionth token cost what the first did? Decodes the same model at a short and at a long context in turn and
// prints the ratio of the step times with its 95 % interval, and the resident memory at both.
//
//   build/cpu/bench/decode_by_context --model models/godwit-tale --short 1000 --long 100000 --pairs 40

#include <CLI/CLI.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <iostream>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "engine/backend_loader.h"
#include "engine/engine.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace godwit {
namespace {

struct Flags {
  std::string model, backend = "cpu";
  int64_t short_context = 1000, long_context = 100'000;
  int num_pairs = 40, steps_per_block = 32, num_threads = 0;
};

double ResidentMiB() {
  std::ifstream statm("/proc/self/statm");
  int64_t total = 0, resident = 0;
  statm >> total >> resident;
  return static_cast<double>(resident) * 4096 / (1024 * 1024);
}

// One sequence on the engine: prefilled to a context, then decoded in blocks of steps.
class Decoder {
 public:
  Decoder(Engine& engine, int64_t context, int64_t num_decode)
      : engine_(engine), lease_(*engine.caches().Reserve(context + num_decode)), context_(context) {
    sampling_.temperature = 0;
    output_ = {.lease = &lease_, .sampling = &sampling_};
  }

  absl::Status Prefill(uint64_t seed) {
    std::mt19937_64 random(seed);
    std::uniform_int_distribution<int32_t> token(
        3, static_cast<int32_t>(engine_.card().config.vocab_size - 1));
    constexpr int64_t kChunk = 2048;
    for (int64_t begin = 0; begin < context_; begin += kChunk) {
      std::vector<int32_t> ids(std::min(kChunk, context_ - begin));
      for (int32_t& id : ids) id = token(random);
      BatchRow row = {.token_ids = ids, .first_position = begin, .confirmed_position = begin,
                      .prompt_length = context_, .lease = &lease_};
      if (begin + kChunk >= context_) row.outputs = {&output_, 1};
      RETURN_IF_ERROR(Step(row));
    }
    return absl::OkStatus();
  }

  // Seconds per step.
  absl::StatusOr<double> Decode(int num_steps) {
    const auto start = std::chrono::steady_clock::now();
    for (int step = 0; step < num_steps; ++step) {
      RETURN_IF_ERROR(Step({.confirmed_position = lease_.position(), .prompt_length = context_,
                            .lease = &lease_, .outputs = {&output_, 1}}));
    }
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / num_steps;
  }

 private:
  absl::Status Step(const BatchRow& row) {
    ASSIGN_OR_RETURN(const StepId id, engine_.Submit({&row, 1}));
    return engine_.Collect(id).status();
  }

  Engine& engine_;
  CacheLease lease_;
  int64_t context_;
  SamplingParams sampling_;
  RowOutput output_;
};

absl::StatusOr<std::unique_ptr<Engine>> Load(const Flags& flags) {
  std::string why_not_gpu;
  ASSIGN_OR_RETURN(auto backend, CreateBackend({flags.backend, flags.num_threads}, &why_not_gpu));
  EngineOptions options;
  options.model_folder = flags.model;
  options.max_sequences = 2;
  return Engine::Create(options, std::move(backend));
}

void PrintRatio(const std::vector<double>& ratios) {
  const auto count = static_cast<double>(ratios.size());
  const double mean = std::accumulate(ratios.begin(), ratios.end(), 0.0) / count;
  double square = 0;
  for (const double ratio : ratios) square += (ratio - mean) * (ratio - mean);
  // 1.96: the pairs are many and independent; the t quantile of 39 degrees would be 2.02.
  const double half_width = 1.96 * std::sqrt(square / (count - 1) / count);
  std::cout << absl::StrFormat("ratio long/short: %.4f, 95 %% interval [%.4f, %.4f], %d pairs\n", mean,
                               mean - half_width, mean + half_width, static_cast<int>(count));
}

absl::Status Run(const Flags& flags) {
  ASSIGN_OR_RETURN(auto engine, Load(flags));
  const int64_t num_decode = int64_t{flags.num_pairs + 1} * flags.steps_per_block + 1;
  Decoder near(*engine, flags.short_context, num_decode), far(*engine, flags.long_context, num_decode);
  RETURN_IF_ERROR(near.Prefill(1));
  const double resident_short = ResidentMiB();
  RETURN_IF_ERROR(far.Prefill(2));
  const double resident_long = ResidentMiB();
  RETURN_IF_ERROR(near.Decode(flags.steps_per_block).status());
  RETURN_IF_ERROR(far.Decode(flags.steps_per_block).status());
  std::vector<double> ratios, short_s, long_s;
  for (int pair = 0; pair < flags.num_pairs; ++pair) {
    // The order alternates, so that a drift of the machine does not favour one side.
    if (pair % 2 == 0) {
      ASSIGN_OR_RETURN(short_s.emplace_back(), near.Decode(flags.steps_per_block));
      ASSIGN_OR_RETURN(long_s.emplace_back(), far.Decode(flags.steps_per_block));
    } else {
      ASSIGN_OR_RETURN(long_s.emplace_back(), far.Decode(flags.steps_per_block));
      ASSIGN_OR_RETURN(short_s.emplace_back(), near.Decode(flags.steps_per_block));
    }
    ratios.push_back(long_s.back() / short_s.back());
  }
  std::nth_element(short_s.begin(), short_s.begin() + short_s.size() / 2, short_s.end());
  std::nth_element(long_s.begin(), long_s.begin() + long_s.size() / 2, long_s.end());
  std::cout << absl::StrFormat(
      "%s, %s\nmedian step at context %d: %.1f us; at %d: %.1f us\n"
      "resident memory after each prefill: %.1f MiB, %.1f MiB\n",
      flags.model, engine->card().backend, flags.short_context, short_s[short_s.size() / 2] * 1e6,
      flags.long_context, long_s[long_s.size() / 2] * 1e6, resident_short, resident_long);
  PrintRatio(ratios);
  return absl::OkStatus();
}

}  // namespace
}  // namespace godwit

int main(int argc, char** argv) {
  CLI::App app{"Decode time at a short and at a long context, in turn"};
  godwit::Flags flags;
  app.add_option("--model", flags.model, "folder")->required();
  app.add_option("--backend", flags.backend);
  app.add_option("--threads", flags.num_threads);
  app.add_option("--short", flags.short_context)->check(CLI::Range(int64_t{1}, int64_t{1} << 30));
  app.add_option("--long", flags.long_context)->check(CLI::Range(int64_t{1}, int64_t{1} << 30));
  app.add_option("--pairs", flags.num_pairs)->check(CLI::Range(20, 100000));
  app.add_option("--steps", flags.steps_per_block)->check(CLI::Range(1, 100000));
  CLI11_PARSE(app, argc, argv);
  const absl::Status status = godwit::Run(flags);
  if (!status.ok()) std::cerr << status.message() << "\n";
  return status.ok() ? 0 : 1;
}
