// `godwit bench context`: does the millionth token cost what the first did? Decodes the same model at a short and at a long
// context in turn; the ratio of the step times with its 95 % interval, and the resident memory at both.

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
#include "cli/bench_report.h"
#include "cli/command.h"
#include "cli/model_flags.h"
#include "engine/engine.h"
#include "engine/rope_table.h"
#include "kernels/base/status.h"

namespace godwit::cli {
namespace {

struct BenchContextFlags {
  ModelFlags model;
  int64_t short_context = 1000, long_context = 100'000;
  int num_pairs = 120, steps_per_block = 32;
  bool json = false;
  std::string output;
};

constexpr int64_t kChunk = 2048;  // prompt tokens per step

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
      : engine_(engine), rope_(*RopeOfRequest(engine.card().config, nullptr, context + num_decode)), lease_(*engine.caches().Reserve(context + num_decode)), context_(context) {
    sampling_.temperature = 0;
    output_ = {.lease = &lease_, .sampling = &sampling_};
  }

  absl::Status Prefill(uint64_t seed) {
    std::mt19937_64 random(seed);
    std::uniform_int_distribution<int32_t> token(
        3, static_cast<int32_t>(engine_.card().config.vocab_size - 1));
    for (int64_t begin = 0; begin < context_; begin += kChunk) {
      std::vector<int32_t> ids(std::min(kChunk, context_ - begin));
      for (int32_t& id : ids) id = token(random);
      BatchRow row = {.token_ids = ids, .first_position = begin, .confirmed_position = begin,
                      .prompt_length = context_, .rope = rope_.get(), .lease = &lease_};
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
                            .rope = rope_.get(), .lease = &lease_, .outputs = {&output_, 1}}));
    }
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / num_steps;
  }

 private:
  absl::Status Step(const BatchRow& row) {
    ASSIGN_OR_RETURN(const StepId id, engine_.Submit({&row, 1}));
    return engine_.Collect(id).status();
  }

  Engine& engine_;
  std::shared_ptr<const RopeTable> rope_;
  CacheLease lease_;
  int64_t context_;
  SamplingParams sampling_;
  RowOutput output_;
};

struct Ratio {
  double mean = 0, low = 0, high = 0;  // 95 % interval of the mean
};

Ratio MeanRatio(const std::vector<double>& ratios) {
  const auto count = static_cast<double>(ratios.size());
  const double mean = std::accumulate(ratios.begin(), ratios.end(), 0.0) / count;
  double square = 0;
  for (const double ratio : ratios) square += (ratio - mean) * (ratio - mean);
  // 2.09: the t quantile of 19 degrees, the fewest pairs allowed; more pairs make the interval a little too wide.
  const double half_width = 2.09 * std::sqrt(square / (count - 1) / count);
  return {mean, mean - half_width, mean + half_width};
}

struct Blocks {
  std::vector<double> short_us, long_us, ratios;  // per pair: microseconds per step, long over short
};

absl::StatusOr<Blocks> Measure(const BenchContextFlags& flags, Decoder& near, Decoder& far) {
  Blocks blocks;
  for (int pair = -1; pair < flags.num_pairs; ++pair) {  // pair -1 warms up
    // The order alternates, so that a drift of the machine does not favour one side.
    double near_s = 0, far_s = 0;
    for (int turn = 0; turn < 2; ++turn) {
      const bool is_near = (turn == 0) == (pair % 2 == 0);
      ASSIGN_OR_RETURN((is_near ? near_s : far_s), (is_near ? near : far).Decode(flags.steps_per_block));
    }
    if (pair < 0) continue;
    blocks.short_us.push_back(near_s * 1e6);
    blocks.long_us.push_back(far_s * 1e6);
    blocks.ratios.push_back(far_s / near_s);
  }
  return blocks;
}

absl::Status Run(const BenchContextFlags& flags, Engine& engine) {
  const int64_t num_decode = int64_t{flags.num_pairs + 1} * flags.steps_per_block + 1;
  {
    // Touches both slots and the whole workspace, so that what grows afterwards is the context's.
    Decoder first(engine, 2 * kChunk, 1), second(engine, 2 * kChunk, 1);
    RETURN_IF_ERROR(first.Prefill(3));
    RETURN_IF_ERROR(second.Prefill(4));
  }
  Decoder near(engine, flags.short_context, num_decode), far(engine, flags.long_context, num_decode);
  RETURN_IF_ERROR(near.Prefill(1));
  const double resident_short = ResidentMiB();
  RETURN_IF_ERROR(far.Prefill(2));
  const double resident_long = ResidentMiB();
  ASSIGN_OR_RETURN(Blocks blocks, Measure(flags, near, far));
  const Ratio ratio = MeanRatio(blocks.ratios);
  const nlohmann::ordered_json config = {
      {"model", flags.model.model}, {"backend", engine.card().backend}, {"dtype", engine.card().dtype},
      {"short", flags.short_context}, {"long", flags.long_context}, {"pairs", flags.num_pairs},
      {"steps", flags.steps_per_block}};
  const nlohmann::ordered_json results = {
      {"step_us_short", Percentiles(blocks.short_us)}, {"step_us_long", Percentiles(blocks.long_us)},
      {"ratio", ratio.mean}, {"ratio_low", ratio.low}, {"ratio_high", ratio.high},
      {"resident_mib_short", resident_short}, {"resident_mib_long", resident_long}};
  if (!flags.json) {
    std::cout << absl::StrFormat(
        "step at context %d: %.1f us (median); at %d: %.1f us\n"
        "ratio long/short %.4f, 95 %% interval [%.4f, %.4f], %d pairs\n"
        "resident memory after each prefill: %.1f MiB, %.1f MiB\n",
        flags.short_context, results["step_us_short"]["p50"].get<double>(), flags.long_context,
        results["step_us_long"]["p50"].get<double>(), ratio.mean, ratio.low, ratio.high, flags.num_pairs,
        resident_short, resident_long);
  }
  if (!WriteReport("context", config, results, flags.json, flags.output)) {
    return absl::UnavailableError("--output: cannot write " + flags.output);
  }
  return absl::OkStatus();
}

int RunBenchContext(const BenchContextFlags& flags) {
  auto engine = LoadOfflineEngine(flags.model, 0, 2);
  if (!engine.ok()) return Report(engine.status(), kCannotLoad);
  const absl::Status status = Run(flags, **engine);
  return status.ok() ? kDone : Report(status, kFailed);
}

}  // namespace

void AddBenchContextCommand(CLI::App& bench, int& exit_code) {
  auto flags = std::make_shared<BenchContextFlags>();
  CLI::App* command = bench.add_subcommand("context", "Decode time at a short and at a long context, in turn");
  AddModelFlags(*command, flags->model);
  constexpr int64_t kMaxContext = int64_t{1} << 30;
  command->add_option("--short", flags->short_context, "tokens")->check(CLI::Range(int64_t{1}, kMaxContext));
  command->add_option("--long", flags->long_context, "tokens")->check(CLI::Range(int64_t{1}, kMaxContext));
  command->add_option("--pairs", flags->num_pairs, "pairs of blocks, in turn")->check(CLI::Range(20, 100'000));
  command->add_option("--steps", flags->steps_per_block, "decode steps of a block")->check(CLI::Range(1, 100'000));
  command->add_flag("--json", flags->json, "stdout is one JSON object");
  command->add_option("--output", flags->output, "also write the JSON there")->type_name("FILE");
  command->callback([flags, &exit_code] { exit_code = RunBenchContext(*flags); });
}

}  // namespace godwit::cli
