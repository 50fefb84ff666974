// `godwit bench speculate`: the same prompts and seeds without speculation and with each number of
// drafts, interleaved prompt by prompt. Tokens per second, how often the target ran (verification
// rate) and what was thrown away (discard rate), each per token of output; intervals by paired
// bootstrap over the prompts.

#include <algorithm>
#include <cmath>
#include <iostream>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/bench_report.h"
#include "cli/command.h"
#include "cli/model_flags.h"
#include "engine/offline.h"
#include "kernels/base/status.h"

namespace godwit::cli {
namespace {

struct BenchSpeculateFlags {
  ModelFlags model;
  int64_t num_prompts = 40, prompt_length = 64, num_tokens = 128;
  int max_drafts = 12;
  float temperature = 1;
  bool coupled = false;
  uint64_t seed = 1;
  bool json = false;
  std::string output;
};

// One prompt with one number of drafts.
struct Run {
  double seconds = 0, draft_seconds = 0, verify_seconds = 0;
  int64_t num_tokens = 0, num_steps = 0, num_drafts = 0, num_accepted = 0;
};

// All prompts in one way. Fixed numbers come first, 0: no speculation.
struct Arm {
  std::string name;
  int num_drafts = 0;
  DraftPolicy policy = DraftPolicy::kFixed;
  float threshold = 0;
  std::vector<Run> runs;
};

using PromptIndices = std::vector<size_t>;

Run Sum(const Arm& arm, const PromptIndices& prompts) {
  Run sum;
  for (const size_t prompt : prompts) {
    const Run& run = arm.runs[prompt];
    sum.seconds += run.seconds;
    sum.draft_seconds += run.draft_seconds;
    sum.verify_seconds += run.verify_seconds;
    sum.num_tokens += run.num_tokens;
    sum.num_steps += run.num_steps;
    sum.num_drafts += run.num_drafts;
    sum.num_accepted += run.num_accepted;
  }
  return sum;
}

double TokensPerSecond(const Arm& arm, const PromptIndices& prompts) {
  const Run sum = Sum(arm, prompts);
  return static_cast<double>(sum.num_tokens) / sum.seconds;
}

struct Interval {
  double value = 0, low = 0, high = 0;
};

// Tokens per second of `arm` over those of `base`, with its 95 % interval over the prompts.
Interval Ratio(const Arm& arm, const Arm& base, const PromptIndices& prompts,
               std::mt19937_64& random) {
  constexpr int kResamples = 1000;
  std::uniform_int_distribution<size_t> pick(0, prompts.size() - 1);
  std::vector<double> ratios;
  PromptIndices sample(prompts.size());
  for (int resample = 0; resample < kResamples; ++resample) {
    for (size_t& prompt : sample) prompt = prompts[pick(random)];
    ratios.push_back(TokensPerSecond(arm, sample) / TokensPerSecond(base, sample));
  }
  std::sort(ratios.begin(), ratios.end());
  return {.value = TokensPerSecond(arm, prompts) / TokensPerSecond(base, prompts),
          .low = ratios[kResamples * 25 / 1000],
          .high = ratios[kResamples * 975 / 1000]};
}

// What the target itself writes from the beginning of a text: the bench needs no files, and drafts
// meet the text they serve.
absl::StatusOr<std::vector<int32_t>> MakePrompt(Engine& engine, uint64_t seed, int64_t length) {
  const ModelConfig& config = engine.card().config;
  const std::vector<int32_t> start = {config.bos_token_id.value_or(0)};
  OfflineGenerateOptions options = {.seed = seed, .max_tokens = length - 1, .ignore_eos = true};
  ASSIGN_OR_RETURN(const OfflineGenerateResult result, GenerateOffline(engine, start, options));
  std::vector<int32_t> prompt = start;
  for (const SampledToken& token : result.tokens) prompt.push_back(token.token_id);
  return prompt;
}

absl::StatusOr<Run> RunPrompt(Engine& engine, const BenchSpeculateFlags& flags,
                              const std::vector<int32_t>& prompt, uint64_t seed, const Arm& arm) {
  OfflineGenerateOptions options = {.seed = seed,
                                    .max_tokens = flags.num_tokens,
                                    .ignore_eos = true,
                                    .max_draft_tokens = arm.num_drafts,
                                    .draft_policy = arm.policy,
                                    .draft_threshold = arm.threshold,
                                    .coupled = flags.coupled};
  options.sampling.temperature = flags.temperature;
  ASSIGN_OR_RETURN(const OfflineGenerateResult result, GenerateOffline(engine, prompt, options));
  return Run{.seconds = result.decode_seconds,
             .draft_seconds = result.draft_seconds,
             .verify_seconds = result.verify_seconds,
             .num_tokens = std::ssize(result.tokens) - 1,  // the prompt drew the first
             .num_steps = result.num_steps,
             .num_drafts = result.num_drafts,
             .num_accepted = result.num_accepted};
}

absl::StatusOr<std::vector<Arm>> RunArms(Engine& engine, const BenchSpeculateFlags& flags) {
  std::vector<Arm> arms;
  for (int drafts = 0; drafts <= flags.max_drafts; ++drafts) {
    arms.push_back({.name = absl::StrCat(drafts), .num_drafts = drafts});
  }
  for (const float threshold : {0.4f, 0.6f, 0.8f}) {
    arms.push_back({.name = absl::StrFormat("margin %.1f", threshold),
                    .num_drafts = flags.max_drafts,
                    .policy = DraftPolicy::kMargin,
                    .threshold = threshold});
  }
  arms.push_back(
      {.name = "throughput", .num_drafts = flags.max_drafts, .policy = DraftPolicy::kThroughput});
  for (int64_t index = -1; index < flags.num_prompts; ++index) {
    const uint64_t seed = flags.seed + static_cast<uint64_t>(index + 1);
    ASSIGN_OR_RETURN(const std::vector<int32_t> prompt,
                     MakePrompt(engine, seed, flags.prompt_length));
    for (size_t turn = 0; turn < arms.size(); ++turn) {
      // Another one begins each time, so that a drift of the machine favours none.
      Arm& arm = arms[(turn + static_cast<size_t>(index + 1)) % arms.size()];
      ASSIGN_OR_RETURN(const Run run, RunPrompt(engine, flags, prompt, seed, arm));
      if (index >= 0) arm.runs.push_back(run);  // the first prompt warms up
    }
    if (index >= 0) std::cerr << absl::StrFormat("\rprompt %d of %d", index + 1, flags.num_prompts);
  }
  std::cerr << std::endl;
  return arms;
}

const Arm& BestFixed(const std::vector<Arm>& arms, int max_drafts, const PromptIndices& prompts) {
  return *std::max_element(arms.begin() + 1, arms.begin() + 1 + max_drafts,
                           [&](const Arm& a, const Arm& b) {
                             return TokensPerSecond(a, prompts) < TokensPerSecond(b, prompts);
                           });
}

nlohmann::ordered_json ArmToJson(const Arm& arm, const Arm& off, const PromptIndices& all,
                                 std::mt19937_64& random) {
  const Run sum = Sum(arm, all);
  const auto tokens = static_cast<double>(sum.num_tokens),
             steps = static_cast<double>(sum.num_steps);
  const auto drafts = static_cast<double>(sum.num_drafts),
             accepted = static_cast<double>(sum.num_accepted);
  const Interval speedup = Ratio(arm, off, all, random);
  return {{"name", arm.name},
          {"drafts", arm.num_drafts},
          {"tokens_per_s", TokensPerSecond(arm, all)},
          {"speedup", speedup.value},
          {"speedup_low", speedup.low},
          {"speedup_high", speedup.high},
          {"verification_rate", steps / tokens},
          {"discard_rate", (drafts - accepted) / tokens},
          {"acceptance", drafts > 0 ? accepted / drafts : 0},
          {"tokens_per_step", tokens / steps},
          {"draft_ms_per_token", drafts > 0 ? 1e3 * sum.draft_seconds / drafts : 0},
          {"verify_ms_per_step", 1e3 * sum.verify_seconds / steps}};
}

nlohmann::ordered_json Results(const std::vector<Arm>& arms, const BenchSpeculateFlags& flags) {
  PromptIndices all, even, odd;
  for (size_t prompt = 0; prompt < arms[0].runs.size(); ++prompt) {
    all.push_back(prompt);
    (prompt % 2 == 0 ? even : odd).push_back(prompt);
  }
  std::mt19937_64 random(flags.seed);
  nlohmann::ordered_json results;
  for (const Arm& arm : arms) results["arms"].push_back(ArmToJson(arm, arms[0], all, random));
  // Chosen on one half of the prompts, reported on the other.
  const Arm& best = BestFixed(arms, flags.max_drafts, even);
  const Interval gain = Ratio(best, arms[0], odd, random);
  results["best_fixed"] = {{"drafts", best.num_drafts},
                           {"speedup", gain.value},
                           {"speedup_low", gain.low},
                           {"speedup_high", gain.high}};
  for (const Arm& arm : arms) {
    if (arm.policy == DraftPolicy::kFixed) continue;
    const Interval over_best = Ratio(arm, best, odd, random);
    results["over_best_fixed"].push_back({{"name", arm.name},
                                          {"ratio", over_best.value},
                                          {"ratio_low", over_best.low},
                                          {"ratio_high", over_best.high}});
  }
  // Time of one draft, and of one more verified row, in units of a plain step.
  const double plain = results["arms"][0]["verify_ms_per_step"];
  const auto most_drafts = static_cast<size_t>(flags.max_drafts);
  const double most = results["arms"][most_drafts]["verify_ms_per_step"];
  const double draft = results["arms"][most_drafts]["draft_ms_per_token"];
  results["plain_step_ms"] = plain;
  results["draft_cost"] = draft / plain;
  results["row_cost"] = (most - plain) / flags.max_drafts / plain;
  return results;
}

void PrintTable(const nlohmann::ordered_json& results) {
  std::cout << absl::StrFormat(
      "plain step %.3f ms; a draft costs %.3f of it, a verified row %.3f\n",
      results["plain_step_ms"].get<double>(), results["draft_cost"].get<double>(),
      results["row_cost"].get<double>());
  std::cout
      << "drafts      tokens/s  speedup            tokens/step  verified  discarded  accepted\n";
  for (const auto& arm : results["arms"]) {
    std::cout << absl::StrFormat(
        "%-10s  %8.1f  %.3f [%.3f, %.3f]  %8.3f     %6.3f    %6.3f     %6.3f\n",
        arm["name"].get<std::string>(), arm["tokens_per_s"].get<double>(),
        arm["speedup"].get<double>(), arm["speedup_low"].get<double>(),
        arm["speedup_high"].get<double>(), arm["tokens_per_step"].get<double>(),
        arm["verification_rate"].get<double>(), arm["discard_rate"].get<double>(),
        arm["acceptance"].get<double>());
  }
  const auto& best = results["best_fixed"];
  std::cout << absl::StrFormat(
      "best number of drafts on one half of the prompts: %d; on the other %.3f [%.3f, %.3f]\n",
      best["drafts"].get<int>(), best["speedup"].get<double>(), best["speedup_low"].get<double>(),
      best["speedup_high"].get<double>());
  for (const auto& arm : results["over_best_fixed"]) {
    std::cout << absl::StrFormat("%s over that, on the other half: %.3f [%.3f, %.3f]\n",
                                 arm["name"].get<std::string>(), arm["ratio"].get<double>(),
                                 arm["ratio_low"].get<double>(), arm["ratio_high"].get<double>());
  }
}

int RunBenchSpeculate(const BenchSpeculateFlags& flags) {
  auto engine = LoadOfflineEngine(flags.model, 0);
  if (!engine.ok()) return Report(engine.status(), kCannotLoad);
  auto arms = RunArms(**engine, flags);
  if (!arms.ok()) return Report(arms.status(), kFailed);
  const nlohmann::ordered_json results = Results(*arms, flags);
  if (!flags.json) PrintTable(results);
  const nlohmann::ordered_json config = {{"model", flags.model.model},
                                         {"draft_model", flags.model.draft_model},
                                         {"backend", (*engine)->card().backend},
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
      "Tokens per second with each number of drafts, on the same prompts and seeds (offline)");
  AddModelFlags(*command, flags->model);
  AddDraftModelFlag(*command, flags->model)->required();
  command->add_option("--prompts", flags->num_prompts, "that the model writes itself")
      ->check(CLI::Range(2, 100'000));
  command->add_option("--prompt-length", flags->prompt_length, "tokens")
      ->check(CLI::Range(2, 100'000));
  command->add_option("--tokens", flags->num_tokens, "generated after each prompt")
      ->check(CLI::Range(2, 1'000'000));
  command
      ->add_option("--max-drafts", flags->max_drafts,
                   "the most drafts of a step; all from 1 are run")
      ->check(CLI::Range(1, kMaxDraftTokens));
  command->add_option("--temperature", flags->temperature, "0: greedy")
      ->check(CLI::Range(0.0f, 100.0f));
  command->add_flag("--coupled", flags->coupled, "accept as for a request with a seed");
  command->add_option("--seed", flags->seed, "of prompts and texts");
  command->add_flag("--json", flags->json, "the report as JSON on stdout");
  command->add_option("--output", flags->output, "file for the JSON report")->type_name("FILE");
  command->callback([flags, &exit_code] { exit_code = RunBenchSpeculate(*flags); });
}

}  // namespace godwit::cli
