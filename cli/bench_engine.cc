// `godwit bench engine`: decode steps at several batches and contexts and prefill at several
// lengths, each as a share of what the device can do, on a model of a folder or on a known shape
// with random weights. The engine runs as under the scheduler, with as many steps in flight.

#include <algorithm>
#include <chrono>
#include <deque>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/bench_device.h"
#include "cli/bench_report.h"
#include "cli/command.h"
#include "cli/model_flags.h"
#include "engine/engine.h"
#include "kernels/base/status.h"

namespace godwit::cli {
namespace {

using Clock = std::chrono::steady_clock;

struct BenchEngineFlags {
  ModelFlags model;
  std::string phase = "all";
  std::string contexts = "1k", batches = "1", lengths = "4k";
  int num_steps = 128, num_repeats = 5;
  int64_t max_tokens_per_step = 0;
  double kv_gib = 0;
  bool json = false;
  std::string output;
};

struct Plan {
  std::vector<int64_t> contexts, batches, lengths;
};

constexpr int kWarmupSteps = 24;              // more than one fold of the state
constexpr int64_t kLongestRepeat = 64 << 10;  // a longer prefill is run once
constexpr double kMiB = 1024.0 * 1024.0;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// What steps took, each from the end of the step before.
struct StepTimes {
  std::vector<double> period_us;  // on the clock
  std::vector<double> idle_us;    // of which the device had no work
  // Submit and Collect without the wait for the device. A queue that is full makes Submit wait too,
  // which nobody can tell from work: of prompts the least is the work.
  std::vector<double> host_us;
};

// Keeps as many steps in flight as the engine takes.
class Pipeline {
 public:
  explicit Pipeline(Engine& engine) : engine_(engine), last_end_(Clock::now()) {}

  // Before the rows of a step are made, so that they know what has been collected.
  absl::Status MakeRoom() {
    return std::ssize(in_flight_) == engine_.card().max_steps_in_flight ? CollectOldest()
                                                                        : absl::OkStatus();
  }

  // After MakeRoom. `rows` and what they point to stay as they are until the step is collected.
  absl::Status Submit(std::span<const BatchRow> rows) {
    const Clock::time_point start = Clock::now();
    ASSIGN_OR_RETURN(const StepId id, engine_.Submit(rows));
    in_flight_.push_back({id, SecondsSince(start)});
    return absl::OkStatus();
  }

  absl::Status Finish() {
    while (!in_flight_.empty()) RETURN_IF_ERROR(CollectOldest());
    return absl::OkStatus();
  }

  // Those collected so far are forgotten.
  void Restart() { times_ = {}; }
  StepTimes& times() { return times_; }

 private:
  struct Step {
    StepId id = 0;
    double submit_seconds = 0;
  };

  absl::Status CollectOldest() {
    const Step step = in_flight_.front();
    in_flight_.pop_front();
    const Clock::time_point start = Clock::now();
    ASSIGN_OR_RETURN(const StepResult result, engine_.Collect(step.id));
    for (const RowResult& row : result.rows) RETURN_IF_ERROR(row.status);
    const Clock::time_point end = Clock::now();
    const double period =
        std::chrono::duration<double>(end - std::exchange(last_end_, end)).count();
    const double collect = std::chrono::duration<double>(end - start).count();
    times_.period_us.push_back(period * 1e6);
    times_.idle_us.push_back(
        result.idle_seconds.value_or(std::max(period - result.forward_seconds, 0.0)) * 1e6);
    times_.host_us.push_back((step.submit_seconds + collect - result.wait_seconds) * 1e6);
    return absl::OkStatus();
  }

  Engine& engine_;
  std::deque<Step> in_flight_;
  StepTimes times_;
  Clock::time_point last_end_;
};

// A sequence that only reads: prefilled further and further.
class Reader {
 public:
  static absl::StatusOr<std::unique_ptr<Reader>> Create(Engine& engine, int64_t num_tokens) {
    ASSIGN_OR_RETURN(CacheLease lease, engine.caches().Reserve(num_tokens));
    return std::unique_ptr<Reader>(new Reader(engine, std::move(lease)));
  }

  const CacheLease& lease() const { return lease_; }
  double seconds() const { return seconds_; }  // of all prefills so far

  absl::Status PrefillTo(int64_t position, StepTimes& times) {
    const int64_t chunk = engine_.card().max_tokens_per_step / kPrefillBlock * kPrefillBlock;
    Pipeline pipeline(engine_);
    const Clock::time_point start = Clock::now();
    std::deque<std::vector<int32_t>> prompts;  // of steps in flight
    std::deque<BatchRow> rows;
    for (int64_t begin = lease_.position(); begin < position; begin += chunk) {
      RETURN_IF_ERROR(pipeline.MakeRoom());
      prompts.push_back(RandomTokens(std::min(chunk, position - begin)));
      rows.push_back({.token_ids = prompts.back(),
                      .first_position = begin,
                      .confirmed_position = lease_.position(),
                      .prompt_length = position,
                      .lease = &lease_});
      RETURN_IF_ERROR(pipeline.Submit({&rows.back(), 1}));
      if (std::ssize(rows) > kMaxStepsInFlight) {
        rows.pop_front();
        prompts.pop_front();
      }
    }
    RETURN_IF_ERROR(pipeline.Finish());
    seconds_ += SecondsSince(start);
    times = std::move(pipeline.times());
    return absl::OkStatus();
  }

 private:
  Reader(Engine& engine, CacheLease lease) : engine_(engine), lease_(std::move(lease)) {}

  std::vector<int32_t> RandomTokens(int64_t count) {
    std::uniform_int_distribution<int32_t> token(
        0, static_cast<int32_t>(engine_.card().config.vocab_size - 1));
    std::vector<int32_t> ids(static_cast<size_t>(count));
    for (int32_t& id : ids) id = token(random_);
    return ids;
  }

  Engine& engine_;
  CacheLease lease_;
  std::minstd_rand random_{1};
  double seconds_ = 0;
};

// Sequences that begin as copies of one and decode together.
class Decoders {
 public:
  Decoders(Engine& engine, const CacheLease& from) : engine_(engine), from_(from) {}

  absl::Status Fork(int64_t count, int64_t num_steps) {
    const int64_t position = from_.position();
    for (int64_t row = 0; row < count; ++row) {
      ASSIGN_OR_RETURN(CacheLease lease, engine_.caches().Reserve(position + num_steps));
      const CacheCopy copy = engine_.caches().Fork(from_, lease);
      RETURN_IF_ERROR(engine_.Copy({&copy, 1}));
      leases_.push_back(std::move(lease));
    }
    return absl::OkStatus();
  }

  // Greedy. Two sets of rows in turn, because those of a step in flight may not change.
  absl::Status Decode(int num_steps, Pipeline& pipeline) {
    const SamplingParams sampling = {.temperature = 0};
    std::vector<RowOutput> outputs;
    for (CacheLease& lease : leases_) outputs.push_back({.lease = &lease, .sampling = &sampling});
    std::vector<BatchRow> rows[kMaxStepsInFlight];
    for (int step = 0; step < num_steps; ++step) {
      RETURN_IF_ERROR(pipeline.MakeRoom());
      std::vector<BatchRow>& batch = rows[step % kMaxStepsInFlight];
      batch.clear();
      for (size_t row = 0; row < leases_.size(); ++row) {
        batch.push_back({.confirmed_position = leases_[row].position(),
                         .prompt_length = from_.position(),
                         .lease = &leases_[row],
                         .outputs = {&outputs[row], 1}});
      }
      RETURN_IF_ERROR(pipeline.Submit(batch));
    }
    return pipeline.Finish();
  }

 private:
  Engine& engine_;
  const CacheLease& from_;
  std::vector<CacheLease> leases_;
};

struct Line {
  std::string phase;
  int64_t batch = 0, context = 0;
  double median_us = 0, p99_us = 0;  // per step
  double tokens_per_s = 0;
  double percent = 0;  // decode: of the memory floor; prefill: of the product rate
  double host_us = 0, idle_us = 0;
  int64_t used_bytes = 0;
  std::string note;  // why there are no figures
};

class Bench {
 public:
  Bench(const BenchEngineFlags& flags, Plan plan, const Backend& backend, DeviceCeilings ceilings,
        Engine& engine)
      : flags_(flags),
        plan_(std::move(plan)),
        backend_(backend),
        ceilings_(ceilings),
        engine_(engine) {}

  // One sequence reads as far as anything asks for; at each context it is forked to the batch.
  absl::Status Run(const std::function<void(const Line&)>& on_line) {
    const bool decodes = flags_.phase != "prefill", prefills = flags_.phase != "decode";
    std::set<int64_t> stops;
    if (decodes) stops.insert(plan_.contexts.begin(), plan_.contexts.end());
    if (prefills) stops.insert(plan_.lengths.begin(), plan_.lengths.end());
    const auto wanted = [](const std::vector<int64_t>& list, int64_t value) {
      return std::find(list.begin(), list.end(), value) != list.end();
    };
    while (!stops.empty() && !engine_.caches().Fits(*stops.rbegin())) {
      on_line({.phase = flags_.phase, .context = *stops.rbegin(), .note = "no room for one"});
      stops.erase(std::prev(stops.end()));
    }
    if (stops.empty()) return absl::OkStatus();
    ASSIGN_OR_RETURN(const auto reader, Reader::Create(engine_, *stops.rbegin()));
    StepTimes times;
    for (const int64_t stop : stops) {
      RETURN_IF_ERROR(reader->PrefillTo(stop, times));
      if (prefills && wanted(plan_.lengths, stop)) {
        ASSIGN_OR_RETURN(const Line line, MeasurePrefill(stop, reader->seconds(), times));
        on_line(line);
      }
      if (!decodes || !wanted(plan_.contexts, stop)) continue;
      for (const int64_t batch : plan_.batches) {
        ASSIGN_OR_RETURN(const Line line, MeasureDecode(reader->lease(), batch));
        on_line(line);
      }
    }
    return absl::OkStatus();
  }

 private:
  // `seconds`, `times`: of the sequence that read so far. Short prompts are read again, the first
  // time to warm up: clocks, caches and what a library chooses for a shape.
  absl::StatusOr<Line> MeasurePrefill(int64_t length, double seconds, StepTimes times) {
    std::vector<double> runs;
    const double sustained = SustainedSeconds(backend_.Info());
    double total = 0;
    for (int run = -1; (run < flags_.num_repeats || total < sustained) && length <= kLongestRepeat;
         ++run) {
      auto again = Reader::Create(engine_, length);
      if (absl::IsResourceExhausted(again.status())) break;
      RETURN_IF_ERROR(again.status());
      RETURN_IF_ERROR((*again)->PrefillTo(length, times));
      total += (*again)->seconds();
      if (run >= 0) runs.push_back((*again)->seconds());
    }
    if (sustained > 0) runs.erase(runs.begin(), runs.begin() + std::ssize(runs) / 2);
    if (runs.empty()) runs.push_back(seconds);
    const auto work = std::min_element(times.host_us.begin(), times.host_us.end());
    const double host_us = work == times.host_us.end() ? 0 : *work;
    Line line = MakeLine("prefill", 1, length, std::move(times));
    line.host_us = host_us;
    line.tokens_per_s = static_cast<double>(length) / Median(runs);
    line.percent = 100 * line.tokens_per_s * FlopsPerToken() / ceilings_.flops_per_s;
    return line;
  }

  absl::StatusOr<Line> MeasureDecode(const CacheLease& from, int64_t batch) {
    Decoders decoders(engine_, from);
    const int num_steps = kWarmupSteps + flags_.num_steps;
    if (const absl::Status forked = decoders.Fork(batch, num_steps); !forked.ok()) {
      if (!absl::IsResourceExhausted(forked)) return forked;
      return Line{.phase = "decode",
                  .batch = batch,
                  .context = from.position(),
                  .note = std::string(forked.message())};
    }
    Pipeline pipeline(engine_);
    RETURN_IF_ERROR(decoders.Decode(kWarmupSteps, pipeline));
    pipeline.Restart();
    const Clock::time_point start = Clock::now();
    RETURN_IF_ERROR(decoders.Decode(flags_.num_steps, pipeline));
    const double seconds = SecondsSince(start);
    Line line = MakeLine("decode", batch, from.position(), pipeline.times());
    line.tokens_per_s = static_cast<double>(batch * flags_.num_steps) / seconds;
    line.percent = 100 * FloorSeconds(batch, from.position()) / (line.median_us * 1e-6);
    return line;
  }

  Line MakeLine(const std::string& phase, int64_t batch, int64_t context, StepTimes times) const {
    Line line = {.phase = phase, .batch = batch, .context = context};
    const nlohmann::ordered_json period = Percentiles(times.period_us);
    line.median_us = period["p50"].get<double>();
    line.p99_us = period["p99"].get<double>();
    line.host_us = Median(std::move(times.host_us));
    line.idle_us = Median(std::move(times.idle_us));
    line.used_bytes = backend_.Info().used_bytes;
    return line;
  }

  // Bytes of a table of the vocabulary: read for a few rows where another matrix is the head.
  int64_t embedding_parameters() const {
    const ModelConfig& config = engine_.card().config;
    return config.vocab_size * config.d_model;
  }

  // Weights and states once, at the rate of a copy.
  double FloorSeconds(int64_t batch, int64_t context) const {
    const ModelCard& card = engine_.card();
    int64_t num_bytes = card.weight_bytes;
    if (!card.config.tie_word_embeddings) {
      num_bytes -= embedding_parameters() * (card.dtype == "f32" ? 4 : 2);
    }
    num_bytes += batch * context * card.geometry.kv_bytes_per_token();
    for (const StateComponent& component : card.geometry.components) {
      if (component.block > 0) num_bytes += batch * component.base_bytes;
    }
    return static_cast<double>(num_bytes) / ceilings_.copy_bytes_per_s;
  }

  // Of the products with weights; attention is not counted, and the head runs for no prompt token.
  double FlopsPerToken() const {
    const ModelCard& card = engine_.card();
    const int64_t tables = card.config.tie_word_embeddings ? 1 : 2;
    return 2 * static_cast<double>(card.num_parameters - tables * embedding_parameters());
  }

  const BenchEngineFlags& flags_;
  const Plan plan_;
  const Backend& backend_;
  const DeviceCeilings ceilings_;
  Engine& engine_;
};

// How far lines differ that should not: one phase and batch over all its contexts.
struct Spread {
  std::string phase;
  int64_t batch = 0, shortest = 0, longest = 0;
  double tokens_per_s = 0, used_bytes = 0;  // largest / smallest - 1
};

std::vector<Spread> Spreads(const std::vector<Line>& lines) {
  std::map<std::pair<std::string, int64_t>, std::vector<const Line*>> groups;
  for (const Line& line : lines) {
    if (line.note.empty()) groups[{line.phase, line.batch}].push_back(&line);
  }
  std::vector<Spread> spreads;
  for (const auto& [group, members] : groups) {
    if (members.size() < 2) continue;
    const auto range = [&](auto value) {
      const auto [least, most] =
          std::minmax_element(members.begin(), members.end(),
                              [&](const Line* a, const Line* b) { return value(*a) < value(*b); });
      return std::pair(static_cast<double>(value(**least)), static_cast<double>(value(**most)));
    };
    const auto [slowest, fastest] = range([](const Line& line) { return line.tokens_per_s; });
    const auto [least, most] = range([](const Line& line) { return line.used_bytes; });
    const auto [shortest, longest] = range([](const Line& line) { return line.context; });
    spreads.push_back({.phase = group.first,
                       .batch = group.second,
                       .shortest = static_cast<int64_t>(shortest),
                       .longest = static_cast<int64_t>(longest),
                       .tokens_per_s = fastest / slowest - 1,
                       .used_bytes = most / least - 1});
  }
  return spreads;
}

nlohmann::ordered_json ToJson(const Spread& spread) {
  return {{"phase", spread.phase},
          {"batch", spread.batch},
          {"shortest", spread.shortest},
          {"longest", spread.longest},
          {"tokens_per_s_within", spread.tokens_per_s},
          {"memory_within", spread.used_bytes}};
}

void Print(const Spread& spread) {
  std::cout << absl::StrFormat(
      "%s, batch %d, %s to %s: tok/s equal within %.2f %%, memory in use within %.2f %%\n",
      spread.phase, spread.batch, FormatLength(spread.shortest), FormatLength(spread.longest),
      100 * spread.tokens_per_s, 100 * spread.used_bytes);
}

nlohmann::ordered_json ToJson(const Line& line) {
  if (!line.note.empty()) {
    return {{"phase", line.phase},
            {"batch", line.batch},
            {"context", line.context},
            {"note", line.note}};
  }
  return {{"phase", line.phase},
          {"batch", line.batch},
          {"context", line.context},
          {"step_us_median", line.median_us},
          {"step_us_p99", line.p99_us},
          {"tokens_per_s", line.tokens_per_s},
          {line.phase == "decode" ? "percent_of_memory_floor" : "percent_of_product_rate",
           line.percent},
          {"host_us", line.host_us},
          {"device_idle_us", line.idle_us},
          {"used_mib", static_cast<double>(line.used_bytes) / kMiB}};
}

void PrintLine(const Line& line, const std::string& shape, const std::string& dtype) {
  const std::string name = absl::StrFormat("%-8s%-12s%6d%9s  %-5s", line.phase, shape, line.batch,
                                           FormatLength(line.context), dtype);
  if (!line.note.empty()) {
    std::cout << name << "  " << line.note << std::endl;
    return;
  }
  std::cout << name
            << absl::StrFormat("%12.1f%12.1f%12.1f%8.1f%9.1f%9.1f%10.0f", line.median_us,
                               line.p99_us, line.tokens_per_s, line.percent, line.host_us,
                               line.idle_us, static_cast<double>(line.used_bytes) / kMiB)
            << std::endl;
}

absl::StatusOr<Plan> ParsePlan(const BenchEngineFlags& flags) {
  Plan plan;
  ASSIGN_OR_RETURN(plan.contexts, ParseLengths(flags.contexts));
  ASSIGN_OR_RETURN(plan.batches, ParseLengths(flags.batches));
  ASSIGN_OR_RETURN(plan.lengths, ParseLengths(flags.lengths));
  return plan;
}

EngineOptions MakeOptions(const BenchEngineFlags& flags, const Plan& plan) {
  EngineOptions options = OfflineOptions(flags.model);
  options.max_sequences = *std::max_element(plan.batches.begin(), plan.batches.end()) + 1;
  options.max_tokens_per_step = flags.max_tokens_per_step;
  options.kv_bytes = static_cast<int64_t>(flags.kv_gib * 1024 * kMiB);
  return options;
}

absl::Status Report(const BenchEngineFlags& flags, const ModelCard& card, const DeviceInfo& device,
                    const DeviceCeilings& ceilings, const std::vector<Line>& lines) {
  const nlohmann::ordered_json config = {{"model", flags.model.model},
                                         {"shape", flags.model.shape},
                                         {"device", device.description},
                                         {"backend", card.backend},
                                         {"dtype", card.dtype},
                                         {"parameters", card.num_parameters},
                                         {"deterministic", flags.model.deterministic},
                                         {"max_tokens_per_step", card.max_tokens_per_step},
                                         {"steps_in_flight", card.max_steps_in_flight},
                                         {"copy_gb_per_s", ceilings.copy_bytes_per_s / 1e9},
                                         {"product_tflop_per_s", ceilings.flops_per_s / 1e12},
                                         {"memory_plan", card.memory_plan}};
  nlohmann::ordered_json results = {{"lines", nlohmann::ordered_json::array()},
                                    {"spreads", nlohmann::ordered_json::array()}};
  for (const Line& line : lines) results["lines"].push_back(ToJson(line));
  for (const Spread& spread : Spreads(lines)) {
    if (!flags.json) Print(spread);
    results["spreads"].push_back(ToJson(spread));
  }
  if (WriteReport("engine", config, std::move(results), flags.json, flags.output)) {
    return absl::OkStatus();
  }
  return absl::UnavailableError("--output: cannot write " + flags.output);
}

absl::Status Run(const BenchEngineFlags& flags, const Plan& plan, const Backend& backend,
                 const DeviceCeilings& ceilings, Engine& engine) {
  const ModelCard& card = engine.card();
  const std::string shape = flags.model.shape.empty() ? card.config.family : flags.model.shape;
  if (!flags.json) {
    std::cout << Describe(backend.Info(), ceilings, ParseDType(flags.model.dtype)) << "\n"
              << absl::StrFormat("%s, %.2f M parameters, %d steps in flight; %s\n", shape,
                                 static_cast<double>(card.num_parameters) / 1e6,
                                 card.max_steps_in_flight, card.memory_plan)
              << "phase   shape        batch  context  dtype     step us      p99 us       tok/s"
                 "  %floor  host us  idle us  used MiB"
              << std::endl;
  }
  std::vector<Line> lines;
  RETURN_IF_ERROR(Bench(flags, plan, backend, ceilings, engine).Run([&](const Line& line) {
    if (!flags.json) PrintLine(line, shape, card.dtype);
    lines.push_back(line);
  }));
  return Report(flags, card, backend.Info(), ceilings, lines);
}

int RunBenchEngine(const BenchEngineFlags& flags) {
  const absl::StatusOr<Plan> plan = ParsePlan(flags);
  if (!plan.ok()) return Report(plan.status(), kUsage);
  const EngineOptions options = MakeOptions(flags, *plan);
  auto backend = OpenBackend(flags.model);
  if (!backend.ok()) return Report(backend.status(), kCannotLoad);
  const Backend& device = **backend;  // the engine's from here on
  const auto ceilings = MeasureCeilings(**backend, options.dtype);
  if (!ceilings.ok()) return Report(ceilings.status(), kFailed);
  const auto engine = Engine::Create(options, *std::move(backend));
  if (!engine.ok()) return Report(engine.status(), kCannotLoad);
  const absl::Status status = Run(flags, *plan, device, *ceilings, **engine);
  return status.ok() ? kDone : Report(status, kFailed);
}

}  // namespace

void AddBenchEngineCommand(CLI::App& bench, int& exit_code) {
  auto flags = std::make_shared<BenchEngineFlags>();
  CLI::App* command = bench.add_subcommand(
      "engine", "Decode and prefill of a model, or of a known shape with random weights");
  AddModelOrShape(*command, flags->model);
  AddComputeFlags(*command, flags->model);
  command->add_option("--phase", flags->phase, "what is measured")
      ->check(CLI::IsMember({"all", "decode", "prefill"}));
  command->add_option("--contexts", flags->contexts, "of decode steps: tokens, e.g. 1k,32k,1M")
      ->type_name("LIST");
  command->add_option("--batches", flags->batches, "sequences of a decode step, e.g. 1,256")
      ->type_name("LIST");
  command->add_option("--lengths", flags->lengths, "of prefills: tokens, e.g. 4k,64k,1M")
      ->type_name("LIST");
  command->add_option("--steps", flags->num_steps, "decode steps that are measured")
      ->check(CLI::Range(8, 1 << 20));
  command->add_option("--repeats", flags->num_repeats, "of a prefill of at most 64k tokens")
      ->check(CLI::Range(1, 1000));
  command
      ->add_option("--max-tokens-per-step", flags->max_tokens_per_step,
                   "prompt tokens of a step; 0: 2048, on a GPU 8192")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 20));
  command
      ->add_option("--kv-memory", flags->kv_gib,
                   "GiB for KV blocks of softmax layers; 0: what is free")
      ->check(CLI::Range(0.0, 1e5));
  command->add_flag("--json", flags->json, "stdout is one JSON object");
  command->add_option("--output", flags->output, "also write the JSON there")->type_name("FILE");
  command->callback([flags, &exit_code] { exit_code = RunBenchEngine(*flags); });
}

}  // namespace godwit::cli
