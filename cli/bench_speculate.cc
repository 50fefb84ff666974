// `godwit bench speculate`: the same prompts and seeds without speculation, with each fixed number
// of drafts and with every policy, through the scheduler, interleaved unit by unit (a unit is as
// many prompts as run side by side), over the steps in which all of them run. Tokens per second,
// how often the target ran (verification rate) and what was thrown away (discard rate), each per
// token of output; intervals by paired bootstrap over the units. Whatever has a knob, the fixed
// number too, is chosen on one half of the units and counted on the other, both ways.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <iostream>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/bench_report.h"
#include "cli/command.h"
#include "cli/model_flags.h"
#include "cli/speculation_oracle.h"
#include "cli/step_driver.h"
#include "cli/svg_chart.h"
#include "engine/draft_policy.h"
#include "engine/offline.h"
#include "kernels/base/status.h"

namespace godwit::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kMinUnits = 6;

struct BenchSpeculateFlags {
  ModelFlags model;
  int64_t num_prompts = 40, prompt_length = 64, num_tokens = 128;
  int64_t max_seconds = 1'000'000;
  std::vector<int64_t> batches = {1};
  std::vector<int> fixed;  // numbers of drafts; empty: all up to max_drafts
  int max_drafts = 12;
  float temperature = 1;
  bool coupled = false, overhead = false;
  uint64_t seed = 1;
  bool json = false;
  std::string output, picture;
};

// One unit in one way.
struct Run {
  double seconds = 0, draft_seconds = 0;
  int64_t num_tokens = 0, num_steps = 0, num_sequence_steps = 0;
  int64_t num_drafts = 0, num_dropped = 0, num_accepted = 0;
  std::vector<DrivenStep> steps;

  void Add(const Run& other) {
    seconds += other.seconds;
    draft_seconds += other.draft_seconds;
    num_tokens += other.num_tokens;
    num_steps += other.num_steps;
    num_sequence_steps += other.num_sequence_steps;
    num_drafts += other.num_drafts;
    num_dropped += other.num_dropped;
    num_accepted += other.num_accepted;
    steps.insert(steps.end(), other.steps.begin(), other.steps.end());
  }
  double PerToken(int64_t count) const {
    return static_cast<double>(count) / static_cast<double>(num_tokens);
  }
  double verification_rate() const { return PerToken(num_sequence_steps); }
  double discard_rate() const { return PerToken(num_drafts + num_dropped - num_accepted); }
};

// All units in one way.
struct Arm {
  std::string name, family;  // of one family, the best is chosen
  int num_drafts = 0;
  DraftPolicy policy = DraftPolicy::kFixed;
  float threshold = 0;
  bool has_draft_model = true;
  std::vector<Run> runs;
};

using Units = std::vector<size_t>;

Run Sum(const Arm& arm, const Units& units) {
  Run sum;
  for (const size_t unit : units) sum.Add(arm.runs[unit]);
  return sum;
}

double TokensPerSecond(const Arm& arm, const Units& units) {
  const Run sum = Sum(arm, units);
  return static_cast<double>(sum.num_tokens) / sum.seconds;
}

Units AllUnits(const Arm& arm) {
  Units units(arm.runs.size());
  for (size_t unit = 0; unit < units.size(); ++unit) units[unit] = unit;
  return units;
}

struct Interval {
  double value = 0, low = 0, high = 0;
};

Json ToJson(const Interval& interval) { return {interval.value, interval.low, interval.high}; }

// Tokens per second of `arm` over those of `base`, with its 95 % interval over the units.
Interval Ratio(const Arm& arm, const Arm& base, std::mt19937_64& random) {
  constexpr int kResamples = 1000;
  const Units units = AllUnits(arm);
  std::uniform_int_distribution<size_t> pick(0, units.size() - 1);
  std::vector<double> ratios;
  Units sample(units.size());
  for (int resample = 0; resample < kResamples; ++resample) {
    for (size_t& unit : sample) unit = units[pick(random)];
    ratios.push_back(TokensPerSecond(arm, sample) / TokensPerSecond(base, sample));
  }
  std::sort(ratios.begin(), ratios.end());
  return {.value = TokensPerSecond(arm, units) / TokensPerSecond(base, units),
          .low = ratios[kResamples * 25 / 1000],
          .high = ratios[kResamples * 975 / 1000]};
}

// The best of some families as one arm: on each half of the units, what was best on the other.
Arm BestOf(const std::vector<Arm>& arms, const std::vector<std::string>& families) {
  Units halves[2];
  for (size_t unit = 0; unit < arms[0].runs.size(); ++unit) halves[unit % 2].push_back(unit);
  Arm best;
  best.runs.resize(arms[0].runs.size());
  for (int half = 0; half < 2; ++half) {
    const Arm* chosen = nullptr;
    for (const Arm& arm : arms) {
      if (std::find(families.begin(), families.end(), arm.family) == families.end()) continue;
      if (chosen == nullptr ||
          TokensPerSecond(arm, halves[1 - half]) > TokensPerSecond(*chosen, halves[1 - half])) {
        chosen = &arm;
      }
    }
    absl::StrAppend(&best.name, half == 0 ? "" : " / ", chosen->name);
    for (const size_t unit : halves[half]) best.runs[unit] = chosen->runs[unit];
  }
  return best;
}

// --- Runs

std::vector<Arm> MakeArms(const BenchSpeculateFlags& flags, const ModelCard& card) {
  std::vector<Arm> arms = {{.name = "off", .family = "off"}};
  std::vector<int> fixed = flags.fixed;
  for (int drafts = 1; flags.fixed.empty() && drafts <= flags.max_drafts; ++drafts) {
    fixed.push_back(drafts);
  }
  for (const int drafts : fixed) {
    arms.push_back(
        {.name = absl::StrCat("fixed ", drafts), .family = "fixed", .num_drafts = drafts});
  }
  for (const DraftPolicy policy : {DraftPolicy::kMargin, DraftPolicy::kSpecDecPP}) {
    if (policy == DraftPolicy::kSpecDecPP && !card.has_acceptance_head) continue;
    const std::string name(DraftPolicyName(policy));
    for (const float threshold : {0.2f, 0.4f, 0.6f, 0.8f}) {
      arms.push_back({.name = absl::StrFormat("%s %.1f", name, threshold),
                      .family = name,
                      .num_drafts = flags.max_drafts,
                      .policy = policy,
                      .threshold = threshold});
    }
  }
  arms.push_back({.name = "throughput",
                  .family = "throughput",
                  .num_drafts = flags.max_drafts,
                  .policy = DraftPolicy::kThroughput});
  if (flags.overhead) {
    arms.push_back({.name = "no draft model", .family = "none", .has_draft_model = false});
  }
  return arms;
}

struct Engines {
  std::unique_ptr<Engine> engine, without_draft;  // the latter with --overhead
};

absl::StatusOr<std::unique_ptr<Engine>> LoadEngine(const ModelFlags& flags, int64_t batch) {
  ASSIGN_OR_RETURN(auto backend, OpenBackend(flags));
  EngineOptions options = OfflineOptions(flags);
  options.max_sequences = batch;
  return Engine::Create(options, std::move(backend));
}

absl::StatusOr<DrivenRun> RunUnit(Engine& engine, const BenchSpeculateFlags& flags,
                                  std::span<const std::vector<int32_t>> prompts, uint64_t seed,
                                  const Arm& arm) {
  std::vector<GenerateRequest> requests;
  for (const std::vector<int32_t>& prompt : prompts) {
    GenerateRequest& request =
        requests.emplace_back(MakeRequest(prompt, flags.temperature, seed++, flags.num_tokens));
    request.seed_is_given = flags.coupled;
    request.max_draft_tokens = arm.num_drafts;
    request.draft_policy = arm.policy;
    request.draft_threshold = arm.threshold;
  }
  return Drive(engine, std::move(requests), 0);
}

// Of the steps in which all sequences run: with those that are left when some have ended, it is
// another load, and whoever drafts further for some sequences than for others has more of it.
Run Summary(const DrivenRun& driven, int64_t batch) {
  Run run;
  for (const DrivenStep& step : driven.steps) {
    if (step.num_rows - step.num_drafts != batch) continue;
    run.seconds += step.seconds;
    run.draft_seconds += step.draft_seconds;
    run.num_tokens += step.num_tokens;
    run.num_drafts += step.num_drafts;
    run.num_dropped += step.num_dropped;
    ++run.num_steps;
    run.steps.push_back(step);
  }
  run.num_sequence_steps = batch * run.num_steps;
  run.num_accepted = run.num_tokens - run.num_sequence_steps;
  return run;
}

// Texts of the units without speculation, with their prompts, for the oracle.
using Texts = std::vector<std::vector<int32_t>>;

absl::StatusOr<std::vector<Arm>> RunArms(const Engines& engines, const BenchSpeculateFlags& flags,
                                         int64_t batch, Texts& texts) {
  std::vector<Arm> arms = MakeArms(flags, engines.engine->card());
  const int64_t num_units = std::max(flags.num_prompts / batch, kMinUnits);
  ASSIGN_OR_RETURN(const auto prompts, WritePrompts(*engines.engine, flags.seed,
                                                    batch * (num_units + 1), flags.prompt_length));
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(flags.max_seconds);
  for (int64_t index = -1; index < num_units; ++index) {
    if (index >= kMinUnits && std::chrono::steady_clock::now() > end) break;
    const auto first = static_cast<size_t>((index + 1) * batch);
    const auto unit_prompts = std::span(prompts).subspan(first, static_cast<size_t>(batch));
    for (size_t turn = 0; turn < arms.size(); ++turn) {
      // Another one begins each time, so that a drift of the machine favours none.
      Arm& arm = arms[(turn + static_cast<size_t>(index + 1)) % arms.size()];
      Engine& engine = arm.has_draft_model ? *engines.engine : *engines.without_draft;
      ASSIGN_OR_RETURN(const DrivenRun driven,
                       RunUnit(engine, flags, unit_prompts, flags.seed + first, arm));
      if (index < 0) continue;  // the first unit warms up
      arm.runs.push_back(Summary(driven, batch));
      if (arm.family != "off") continue;
      for (size_t row = 0; row < unit_prompts.size(); ++row) {
        std::vector<int32_t>& text = texts.emplace_back(unit_prompts[row]);
        for (const SampledToken& token : driven.outputs[row].tokens) {
          text.push_back(token.token_id);
        }
      }
    }
    if (index >= 0) {
      std::cerr << absl::StrFormat("\rbatch %d: %d of %d", batch, index + 1, num_units);
    }
  }
  std::cerr << std::endl;
  return arms;
}

// --- Results

Json ArmToJson(const Arm& arm, const Arm& off, std::mt19937_64& random) {
  const Run sum = Sum(arm, AllUnits(arm));
  const auto drafts = static_cast<double>(sum.num_drafts);
  const auto drawn = static_cast<double>(sum.num_drafts + sum.num_dropped);
  return {
      {"name", arm.name},
      {"family", arm.family},
      {"tokens_per_s", TokensPerSecond(arm, AllUnits(arm))},
      {"speedup", ToJson(Ratio(arm, off, random))},
      {"verification_rate", sum.verification_rate()},
      {"discard_rate", sum.discard_rate()},
      {"acceptance", drafts > 0 ? static_cast<double>(sum.num_accepted) / drafts : 0},
      {"accepted_per_step",
       static_cast<double>(sum.num_accepted) / static_cast<double>(sum.num_sequence_steps)},
      {"dropped_per_token", sum.PerToken(sum.num_dropped)},
      {"draft_ms", drawn > 0 ? 1e3 * sum.draft_seconds / drawn : 0},
      {"step_ms", 1e3 * (sum.seconds - sum.draft_seconds) / static_cast<double>(sum.num_steps)}};
}

// (verification rate, discard rate) of some ways to speculate.
using Trade = std::vector<std::pair<double, double>>;

// At this verification rate, by a line between two of them; nothing beyond.
std::optional<double> DiscardAt(Trade points, double verification_rate) {
  std::sort(points.begin(), points.end());
  for (size_t point = 1; point < points.size(); ++point) {
    const auto& [v0, d0] = points[point - 1];
    const auto& [v1, d1] = points[point];
    if (verification_rate < v0 || verification_rate > v1 || v1 <= v0) continue;
    return d0 + (d1 - d0) * (verification_rate - v0) / (v1 - v0);
  }
  return std::nullopt;
}

Trade TradeOfFixed(const std::vector<Arm>& arms) {
  Trade points;
  for (const Arm& arm : arms) {
    if (arm.family != "off" && arm.family != "fixed") continue;
    const Run sum = Sum(arm, AllUnits(arm));
    points.emplace_back(sum.verification_rate(), sum.discard_rate());
  }
  return points;
}

Json Comparisons(const std::vector<Arm>& arms, std::mt19937_64& random) {
  const Arm best_fixed = BestOf(arms, {"fixed"}), best_plain = BestOf(arms, {"off", "fixed"});
  Json results = {{"best_fixed", best_fixed.name},
                  {"best_fixed_over_off", ToJson(Ratio(best_fixed, arms[0], random))},
                  {"best_of_off_and_fixed", best_plain.name}};
  for (const std::string family : {"margin", "specdecpp", "throughput"}) {
    if (std::none_of(arms.begin(), arms.end(),
                     [&](const Arm& arm) { return arm.family == family; })) {
      continue;
    }
    const Arm best = BestOf(arms, {family});
    const Run sum = Sum(best, AllUnits(best));
    Json of = {{"name", family},
               {"chosen", best.name},
               {"over_best_fixed", ToJson(Ratio(best, best_fixed, random))},
               {"over_best_of_off_and_fixed", ToJson(Ratio(best, best_plain, random))}};
    of["verification_rate"] = sum.verification_rate();
    if (const auto fixed = DiscardAt(TradeOfFixed(arms), sum.verification_rate())) {
      of["discarded_less_at_equal_verification"] = 1 - sum.discard_rate() / *fixed;
    }
    results["policies"].push_back(std::move(of));
  }
  const auto none =
      std::find_if(arms.begin(), arms.end(), [](const Arm& arm) { return !arm.has_draft_model; });
  // Seconds of a step with a draft model that is not used, over those without one.
  if (none != arms.end()) results["overhead"] = ToJson(Ratio(*none, arms[0], random));
  return results;
}

// The lower quartile: as things are when nothing else holds them up, on a machine that others use
// less than half of the time too.
double Typical(std::vector<double>& values) {
  const auto quarter = values.begin() + std::ssize(values) / 4;
  std::nth_element(values.begin(), quarter, values.end());
  return *quarter;
}

// Of the arms with fixed numbers, in steps that verify so many of every sequence. Numbers that were
// not run lie on a line between their neighbours, or on that through the ends.
RoundCosts MeasuredCosts(const std::vector<Arm>& arms, int64_t batch, int max_drafts) {
  RoundCosts costs;
  std::vector<double> pass_seconds;  // of the arms with drafts
  std::vector<int> pass_counts;
  int last = 0;
  for (const Arm& arm : arms) {
    if (arm.family != "off" && arm.family != "fixed") continue;
    const Run sum = Sum(arm, AllUnits(arm));
    std::vector<double> steps, passes;
    for (const DrivenStep& step : sum.steps) {
      if (step.num_rows != batch * (1 + arm.num_drafts)) continue;
      steps.push_back(step.seconds - step.draft_seconds);
      passes.push_back(step.draft_seconds);
    }
    if (arm.num_drafts > 0 && !passes.empty()) {
      pass_counts.push_back(arm.num_drafts);
      pass_seconds.push_back(Typical(passes));
    }
    if (steps.empty())
      steps.push_back((sum.seconds - sum.draft_seconds) / static_cast<double>(sum.num_steps));
    const double step = Typical(steps);
    const double before = costs.verify.empty() ? step : costs.verify.back();
    for (int drafts = last + 1; drafts < arm.num_drafts; ++drafts) {
      costs.verify.push_back(before + (step - before) * (drafts - last) / (arm.num_drafts - last));
    }
    costs.verify.push_back(step);
    last = arm.num_drafts;
  }
  const double more =
      last > 0 ? std::max((costs.verify.back() - costs.verify.front()) / last, 0.0) : 0;
  while (std::ssize(costs.verify) <= max_drafts) costs.verify.push_back(costs.verify.back() + more);
  if (!pass_counts.empty()) {
    const int few = pass_counts.front(), many = pass_counts.back();
    costs.pass = many > few ? (pass_seconds.back() - pass_seconds.front()) / (many - few)
                            : pass_seconds.front() / few;
    costs.first_pass = pass_seconds.front() - (few - 1) * costs.pass;
  }
  return costs;
}

// The same runs of one sequence, each of whose steps took what such a step typically takes: by its
// rows, and by its passes, with head and decisions, as they took in that arm over those of fixed
// numbers. What is left is what policies do, whatever else the machine did meanwhile.
std::vector<Arm> AtTypicalCosts(std::vector<Arm> arms, const RoundCosts& costs) {
  for (Arm& arm : arms) {
    std::vector<double> ratios;
    for (const Run& run : arm.runs) {
      for (const DrivenStep& step : run.steps) {
        if (step.num_drawn() == 0) continue;
        ratios.push_back(step.draft_seconds / costs.Passes(step.num_drawn()));
      }
    }
    const double ratio = ratios.empty() ? 1 : Typical(ratios);
    for (Run& run : arm.runs) {
      run.seconds = 0;
      for (const DrivenStep& step : run.steps) {
        run.seconds += costs.verify[static_cast<size_t>(step.num_rows - 1)] +
                       ratio * costs.Passes(step.num_drawn());
      }
    }
  }
  return arms;
}

Json ToJson(const std::string& name, const SimulatedRounds& rounds, double off) {
  return {{"name", name},
          {"speedup", rounds.tokens_per_second() / off},
          {"verification_rate", rounds.verification_rate()},
          {"discard_rate", rounds.discard_rate()}};
}

absl::StatusOr<std::vector<AcceptanceTrace>> TraceTexts(Engine& engine,
                                                        const BenchSpeculateFlags& flags,
                                                        const Texts& texts) {
  ModelFlags draft_flags = flags.model;
  draft_flags.model = flags.model.draft_model;
  draft_flags.draft_model.clear();
  ASSIGN_OR_RETURN(const auto draft, LoadOfflineEngine(draft_flags, 0));
  std::vector<AcceptanceTrace> traces;
  for (const std::vector<int32_t>& text : texts) {
    ASSIGN_OR_RETURN(traces.emplace_back(),
                     TraceAcceptance(engine, *draft, text, flags.prompt_length, flags.temperature));
  }
  return traces;
}

double Mean(const std::vector<AcceptanceTrace>& traces) {
  double sum = 0, count = 0;
  for (const AcceptanceTrace& trace : traces) {
    for (const double p : trace) sum += p;
    count += static_cast<double>(trace.size());
  }
  return sum / count;
}

// What the policies could have gained on the same texts at the measured costs.
Json OracleToJson(const std::vector<AcceptanceTrace>& traces, const RoundCosts& costs) {
  const double off = SimulateFixed(traces, costs, 0).tokens_per_second();
  Json fixed_rounds, threshold_rounds, verify_ms;
  SimulatedRounds best_fixed;
  for (int drafts = 1; drafts < static_cast<int>(costs.verify.size()); ++drafts) {
    const SimulatedRounds fixed = SimulateFixed(traces, costs, drafts);
    fixed_rounds.push_back(ToJson(absl::StrCat("fixed ", drafts), fixed, off));
    if (best_fixed.num_tokens == 0 || fixed.tokens_per_second() > best_fixed.tokens_per_second()) {
      best_fixed = fixed;
    }
  }
  for (const double threshold : {0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95}) {
    threshold_rounds.push_back(ToJson(absl::StrFormat("true acceptance %.2f", threshold),
                                      SimulateThreshold(traces, costs, threshold), off));
  }
  for (const double seconds : costs.verify) verify_ms.push_back(1e3 * seconds);
  return {{"mean_acceptance", Mean(traces)},
          {"first_draft_ms", 1e3 * costs.first_pass},
          {"draft_ms", 1e3 * costs.pass},
          {"verify_ms", verify_ms},
          {"rounds",
           {ToJson("best fixed", best_fixed, off),
            ToJson("true acceptance", SimulateTrueAcceptance(traces, costs), off),
            ToJson("clairvoyant", SimulateClairvoyant(traces, costs), off)}},
          {"fixed", fixed_rounds},
          {"by_threshold", threshold_rounds}};
}

Trade TradeOf(const Json& rounds) {
  Trade points;
  for (const Json& round : rounds) {
    points.emplace_back(round["verification_rate"], round["discard_rate"]);
  }
  return points;
}

// Of what the oracle gains over not drafting, and over the best fixed number, what a policy gained;
// and what the oracle discards where it verifies as often.
void AddShares(const Json& oracle, Json& comparisons) {
  const double fixed = oracle["rounds"][0]["speedup"], best = oracle["rounds"][1]["speedup"];
  const double measured_fixed = comparisons["best_fixed_over_off"][0];
  for (Json& policy : comparisons["policies"]) {
    const double over_fixed = policy["over_best_fixed"][0];
    policy["share_of_oracle_over_off"] = (over_fixed * measured_fixed - 1) / (best - 1);
    policy["share_of_oracle_over_fixed"] = (over_fixed - 1) / (best / fixed - 1);
    const double verified = policy["verification_rate"];
    const auto of_fixed = DiscardAt(TradeOf(oracle["fixed"]), verified);
    const auto of_oracle = DiscardAt(TradeOf(oracle["by_threshold"]), verified);
    if (of_fixed && of_oracle) {
      policy["oracle_discards_less_at_equal_verification"] = 1 - *of_oracle / *of_fixed;
    }
  }
}

absl::StatusOr<Json> RunLoad(const BenchSpeculateFlags& flags, int64_t batch, Json& description) {
  Engines engines;
  ASSIGN_OR_RETURN(engines.engine, LoadEngine(flags.model, batch));
  if (flags.overhead) {
    ModelFlags plain = flags.model;
    plain.draft_model.clear();
    ASSIGN_OR_RETURN(engines.without_draft, LoadEngine(plain, batch));
  }
  description = {{"backend", engines.engine->card().backend},
                 {"device", engines.engine->card().device}};
  Texts texts;
  ASSIGN_OR_RETURN(const std::vector<Arm> arms, RunArms(engines, flags, batch, texts));
  std::mt19937_64 random(flags.seed);
  Json load = {{"batch", batch}, {"units", arms[0].runs.size()}};
  for (const Arm& arm : arms) load["arms"].push_back(ArmToJson(arm, arms[0], random));
  // A draft, and a verified row on average, in units of a plain step; and a step, by drafts.
  const RoundCosts costs = MeasuredCosts(arms, batch, flags.max_drafts);
  const double most = static_cast<double>(costs.verify.size() - 1);
  load["first_draft_cost"] = costs.first_pass / costs.verify[0];
  load["draft_cost"] = costs.pass / costs.verify[0];
  load["row_cost"] =
      (costs.verify.back() - costs.verify[0]) / most / static_cast<double>(batch) / costs.verify[0];
  for (const double seconds : costs.verify) {
    load["verify_cost"].push_back(seconds / costs.verify[0]);
  }
  load.update(Comparisons(arms, random));
  if (batch == 1 && !flags.coupled) {
    ASSIGN_OR_RETURN(const auto traces, TraceTexts(*engines.engine, flags, texts));
    load["oracle"] = OracleToJson(traces, costs);
    const std::vector<Arm> at_typical = AtTypicalCosts(arms, costs);
    for (size_t index = 0; index < arms.size(); ++index) {
      load["arms"][index]["speedup_at_typical_costs"] =
          ToJson(Ratio(at_typical[index], at_typical[0], random));
    }
    load["at_typical_costs"] = Comparisons(at_typical, random);
    AddShares(load["oracle"], load);
    AddShares(load["oracle"], load["at_typical_costs"]);
  }
  return load;
}

std::string Format(const Json& interval) {
  return absl::StrFormat("%.3f [%.3f, %.3f]", interval[0].get<double>(), interval[1].get<double>(),
                         interval[2].get<double>());
}

void PrintComparisons(const Json& of) {
  std::cout << "best fixed number (" << of["best_fixed"].get<std::string>()
            << ") over off: " << Format(of["best_fixed_over_off"]) << "\n";
  for (const Json& policy : of["policies"]) {
    std::cout << policy["name"].get<std::string>() << " (" << policy["chosen"].get<std::string>()
              << ") over it: " << Format(policy["over_best_fixed"]) << ", over the best of off and "
              << "fixed: " << Format(policy["over_best_of_off_and_fixed"]);
    const auto print = [&](const char* key, const char* before, const char* after) {
      if (!policy.contains(key)) return;
      std::cout << absl::StrFormat("%s%.0f %%%s", before, 100 * policy[key].get<double>(), after);
    };
    print("discarded_less_at_equal_verification", "; discards ", " less at equal verification");
    print("oracle_discards_less_at_equal_verification", " (the oracle ", ")");
    print("share_of_oracle_over_off", "; ", " of the oracle's gain");
    print("share_of_oracle_over_fixed", " (over fixed ", ")");
    std::cout << "\n";
  }
}

void PrintLoad(const Json& load) {
  std::cout << absl::StrFormat(
      "batch %d, %d units: the first draft pass of a step costs %.3f of a plain step, the next "
      "%.3f, a verified row %.4f; a step with 1, 2, ... drafts:",
      load["batch"].get<int64_t>(), load["units"].get<int64_t>(),
      load["first_draft_cost"].get<double>(), load["draft_cost"].get<double>(),
      load["row_cost"].get<double>());
  for (size_t drafts = 1; drafts < load["verify_cost"].size(); ++drafts) {
    std::cout << absl::StrFormat(" %.2f", load["verify_cost"][drafts].get<double>());
  }
  const bool has_oracle = load.contains("oracle");
  std::cout << "\n                  tokens/s  speedup               verified  discarded  accepted"
            << (has_oracle ? "  speedup at typical costs" : "") << "\n";
  for (const Json& arm : load["arms"]) {
    std::cout << absl::StrFormat("%-16s  %8.1f  %-20s  %7.3f  %8.3f  %8.3f  %s\n",
                                 arm["name"].get<std::string>(), arm["tokens_per_s"].get<double>(),
                                 Format(arm["speedup"]), arm["verification_rate"].get<double>(),
                                 arm["discard_rate"].get<double>(),
                                 arm["accepted_per_step"].get<double>(),
                                 has_oracle ? Format(arm["speedup_at_typical_costs"]) : "");
  }
  PrintComparisons(load);
  if (load.contains("overhead")) {
    std::cout << "a step with an unused draft model over one without: " << Format(load["overhead"])
              << "\n";
  }
  if (!has_oracle) return;
  std::cout << "with every step at its typical cost:\n";
  PrintComparisons(load["at_typical_costs"]);
  for (const Json& rounds : load["oracle"]["rounds"]) {
    std::cout << absl::StrFormat(
        "on the recorded texts, %-16s %.3f of plain; verified %.3f, discarded %.3f\n",
        rounds["name"].get<std::string>() + ":", rounds["speedup"].get<double>(),
        rounds["verification_rate"].get<double>(), rounds["discard_rate"].get<double>());
  }
}

// Discard rate against verification rate: what fixed numbers trade, and the policies beside them.
bool WritePicture(const Json& load, const std::string& path) {
  Chart chart = {.title = "Speculation: what is thrown away for how few steps of the model",
                 .x_label = "verification rate: steps of the model per token",
                 .y_label = "discard rate: wasted drafts per token",
                 .x_digits = 2};
  double most = 0;
  for (const std::string family : {"fixed", "margin", "specdecpp", "throughput"}) {
    ChartSeries series = {.name = family};
    for (const Json& arm : load["arms"]) {
      if (arm["family"] != family) continue;
      series.x.push_back(arm["verification_rate"]);
      series.y.push_back(arm["discard_rate"]);
      most = std::max(most, series.y.back());
    }
    if (!series.x.empty()) chart.series.push_back(std::move(series));
  }
  if (load.contains("oracle")) {
    ChartSeries series = {.name = "true acceptance"};
    for (const auto& [verified, discarded] : TradeOf(load["oracle"]["by_threshold"])) {
      series.x.push_back(verified);
      series.y.push_back(discarded);
    }
    chart.series.push_back(std::move(series));
  }
  chart.y_max = std::ceil(most * 4) / 4;
  std::ofstream file(path);
  file << ToSvg(chart);
  return static_cast<bool>(file.flush());
}

int RunBenchSpeculate(const BenchSpeculateFlags& flags) {
  Json results, description;
  for (const int64_t batch : flags.batches) {
    auto load = RunLoad(flags, batch, description);
    if (!load.ok()) return Report(load.status(), kFailed);
    if (!flags.json) PrintLoad(*load);
    results["loads"].push_back(*std::move(load));
  }
  if (!flags.picture.empty() && !WritePicture(results["loads"][0], flags.picture)) {
    return Report(absl::UnavailableError(absl::StrCat("cannot write ", flags.picture)), kFailed);
  }
  const Json config = {{"model", flags.model.model},
                       {"draft_model", flags.model.draft_model},
                       {"backend", description["backend"]},
                       {"device", description["device"]},
                       {"dtype", flags.model.dtype},
                       {"num_prompts", flags.num_prompts},
                       {"prompt_length", flags.prompt_length},
                       {"num_tokens", flags.num_tokens},
                       {"temperature", flags.temperature},
                       {"coupled", flags.coupled},
                       {"seed", flags.seed}};
  return WriteReport("speculate", config, results, flags.json, flags.output) ? kDone : kFailed;
}

}  // namespace

void AddBenchSpeculateCommand(CLI::App& bench, int& exit_code) {
  auto flags = std::make_shared<BenchSpeculateFlags>();
  CLI::App* command = bench.add_subcommand(
      "speculate",
      "Tokens per second by every policy and number of drafts, on the same prompts (offline)");
  AddModelFlags(*command, flags->model);
  AddDraftModelFlag(*command, flags->model)->required();
  command->add_option("--prompts", flags->num_prompts, "that the model writes itself")
      ->check(CLI::Range(2, 100'000));
  command->add_option("--seconds", flags->max_seconds, "of a load; then no more prompts begin")
      ->check(CLI::Range(1, 1'000'000));
  command->add_option("--prompt-length", flags->prompt_length, "tokens")
      ->check(CLI::Range(2, 100'000));
  command->add_option("--tokens", flags->num_tokens, "generated after each prompt")
      ->check(CLI::Range(2, 1'000'000));
  command->add_option("--batch", flags->batches, "sequences at once, of each load")
      ->delimiter(',')
      ->check(CLI::Range(1, 4096));
  command
      ->add_option("--max-drafts", flags->max_drafts,
                   "the most drafts of a step; all fixed numbers from 1 are run")
      ->check(CLI::Range(1, kMaxDraftTokens));
  command->add_option("--fixed", flags->fixed, "run only these fixed numbers, ascending")
      ->delimiter(',')
      ->check(CLI::Range(1, kMaxDraftTokens));
  command->add_option("--temperature", flags->temperature, "0: greedy")
      ->check(CLI::Range(0.0f, 100.0f));
  command->add_flag("--coupled", flags->coupled, "accept as for a request with a seed");
  command->add_flag("--overhead", flags->overhead,
                    "also without a draft model: what one costs that is not used");
  command->add_option("--seed", flags->seed, "of prompts and texts");
  command->add_flag("--json", flags->json, "the report as JSON on stdout");
  command->add_option("--output", flags->output, "file for the JSON report")->type_name("FILE");
  command->add_option("--picture", flags->picture, "file for the chart, SVG")->type_name("FILE");
  command->callback([flags, &exit_code] { exit_code = RunBenchSpeculate(*flags); });
}

}  // namespace godwit::cli
