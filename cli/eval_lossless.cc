// `godwit eval lossless`: greedy text with speculation against text without, token for token and
// log-probability for log-probability, through scheduler and engine: every policy and number of
// drafts, batches of several sizes, ends inside drafts, preemption.

#include "cli/eval_lossless.h"

#include <algorithm>
#include <cstring>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/command.h"
#include "cli/model_flags.h"
#include "cli/step_driver.h"
#include "engine/draft_policy.h"
#include "engine/offline.h"
#include "engine/rope_table.h"
#include "kernels/base/status.h"

namespace godwit::cli {
namespace {

struct LosslessFlags {
  ModelFlags model;
  int64_t num_prompts = 24, num_tokens = 48, max_prompt_length = 96;
  std::vector<int64_t> batches = {1, 7, 64};
  int max_drafts = 12;
  uint64_t seed = 1;
  bool json = false;
};

// One way to speculate.
struct Way {
  DraftPolicy policy = DraftPolicy::kFixed;
  int num_drafts = 0;
};

struct Case {
  std::vector<int32_t> prompt;
  std::vector<SampledToken> reference;  // without speculation, num_tokens of them
  int64_t max_tokens = 0;               // where the checked text ends, at the latest
  int32_t stop_token_id = -1;           // or here; -1: nowhere
  size_t num_expected = 0;              // tokens of the reference up to there
};

struct Tally {
  int64_t num_texts = 0, num_tokens = 0, num_drafts = 0, num_accepted = 0, num_preemptions = 0;
  int64_t differing_texts = 0, differing_tokens = 0, differing_logprobs = 0;
};

GenerateRequest RequestFor(const Case& of, int64_t max_tokens) {
  GenerateRequest request = {.token_ids = of.prompt, .max_tokens = max_tokens};
  request.sampling.temperature = 0;
  request.sampling.num_logprobs = 0;
  return request;
}

std::vector<Way> Ways(const ModelCard& card, int max_drafts) {
  std::vector<Way> ways;
  for (int drafts = 1; drafts <= max_drafts; ++drafts) {
    for (const DraftPolicy policy : {DraftPolicy::kFixed, DraftPolicy::kMargin,
                                     DraftPolicy::kThroughput, DraftPolicy::kSpecDecPP}) {
      if (policy == DraftPolicy::kSpecDecPP && !card.has_acceptance_head) continue;
      ways.push_back({policy, drafts});
    }
  }
  return ways;
}

// Prompts that the model itself writes, of many lengths, and how it goes on greedily.
absl::StatusOr<std::vector<Case>> MakeCases(Engine& engine, const LosslessFlags& flags) {
  std::vector<Case> cases(static_cast<size_t>(flags.num_prompts));
  std::vector<GenerateRequest> requests;
  for (size_t index = 0; index < cases.size(); ++index) {
    Case& of = cases[index];
    of.prompt = {engine.card().config.bos_token_id.value_or(0)};
    const auto length = 1 + static_cast<int64_t>(index) * 37 % flags.max_prompt_length;
    requests.push_back(RequestFor(of, length));
    requests.back().sampling.temperature = 1;
    requests.back().seed = flags.seed + index;
  }
  ASSIGN_OR_RETURN(DrivenRun written, Drive(engine, std::move(requests), 0));
  requests.clear();
  for (size_t index = 0; index < cases.size(); ++index) {
    for (const SampledToken& token : written.outputs[index].tokens) {
      cases[index].prompt.push_back(token.token_id);
    }
    requests.push_back(RequestFor(cases[index], flags.num_tokens));
  }
  ASSIGN_OR_RETURN(DrivenRun reference, Drive(engine, std::move(requests), 0));
  for (size_t index = 0; index < cases.size(); ++index) {
    Case& of = cases[index];
    of.reference = std::move(reference.outputs[index].tokens);
    of.max_tokens = flags.num_tokens - static_cast<int64_t>(index % 5);
    of.num_expected = static_cast<size_t>(of.max_tokens);
    if (index % 3 != 0) continue;
    // Ends where a token of its own first appears.
    of.stop_token_id = of.reference[of.num_expected * (1 + index % 7) / 8].token_id;
    const auto stop =
        std::find_if(of.reference.begin(), of.reference.end(),
                     [&](const SampledToken& token) { return token.token_id == of.stop_token_id; });
    of.num_expected = std::min(of.num_expected, static_cast<size_t>(stop - of.reference.begin()));
  }
  return cases;
}

void Compare(const Case& expected, const DrivenOutput& actual, Tally& tally) {
  ++tally.num_texts;
  tally.num_tokens += std::ssize(actual.tokens);
  tally.num_drafts += actual.speculation.num_drafts;
  tally.num_accepted += actual.speculation.num_accepted;
  const size_t most = std::max(expected.num_expected, actual.tokens.size());
  int64_t differing = 0;
  for (size_t index = 0; index < most; ++index) {
    const bool both = index < expected.num_expected && index < actual.tokens.size();
    if (!both || actual.tokens[index].token_id != expected.reference[index].token_id) {
      ++differing;
      continue;
    }
    tally.differing_logprobs += std::memcmp(&actual.tokens[index].logprob,
                                            &expected.reference[index].logprob, sizeof(float)) != 0;
  }
  tally.differing_tokens += differing;
  tally.differing_texts += differing > 0;
}

// All cases, each in another way, in an engine of that many slots; some come with priority, so that
// others are preempted for them.
absl::StatusOr<Tally> CheckBatch(const LosslessFlags& flags, const std::vector<Case>& cases,
                                 int64_t batch, size_t first_way) {
  ASSIGN_OR_RETURN(auto backend, OpenBackend(flags.model));
  EngineOptions options = OfflineOptions(flags.model);
  options.max_sequences = batch;
  options.swap_bytes = int64_t{1} << 30;
  ASSIGN_OR_RETURN(auto engine, Engine::Create(options, std::move(backend)));
  const std::vector<Way> ways = Ways(engine->card(), flags.max_drafts);
  std::vector<GenerateRequest> requests;
  for (size_t index = 0; index < cases.size(); ++index) {
    const Way& way = ways[(first_way + index) % ways.size()];
    GenerateRequest& request =
        requests.emplace_back(RequestFor(cases[index], cases[index].max_tokens));
    if (cases[index].stop_token_id >= 0) request.stop_token_ids = {cases[index].stop_token_id};
    request.max_draft_tokens = way.num_drafts;
    request.draft_policy = way.policy;
    request.draft_threshold = 0.2f + 0.1f * static_cast<float>(index % 7);
    request.priority = index % 5 == 4 ? 1 : 0;
  }
  ASSIGN_OR_RETURN(const DrivenRun run, Drive(*engine, std::move(requests), batch + 2 + batch / 4));
  Tally tally = {.num_preemptions = run.num_preemptions};
  for (size_t index = 0; index < cases.size(); ++index) {
    Compare(cases[index], run.outputs[index], tally);
  }
  return tally;
}

nlohmann::ordered_json ToJson(int64_t batch, const Tally& tally) {
  return {{"batch", batch},
          {"texts", tally.num_texts},
          {"tokens", tally.num_tokens},
          {"drafts", tally.num_drafts},
          {"accepted", tally.num_accepted},
          {"preemptions", tally.num_preemptions},
          {"differing_texts", tally.differing_texts},
          {"differing_tokens", tally.differing_tokens},
          {"differing_logprobs", tally.differing_logprobs}};
}

int RunLossless(const LosslessFlags& flags) {
  ModelFlags plain = flags.model;
  plain.draft_model.clear();
  auto engine = LoadOfflineEngine(plain, 0, 64);
  if (!engine.ok()) return Report(engine.status(), kCannotLoad);
  auto cases = MakeCases(**engine, flags);
  if (!cases.ok()) return Report(cases.status(), kFailed);
  engine->reset();
  int64_t num_differing = 0, num_preemptions = 0;
  nlohmann::ordered_json results;
  for (size_t index = 0; index < flags.batches.size(); ++index) {
    const int64_t batch = flags.batches[index];
    auto tally = CheckBatch(flags, *cases, batch, index * 13);
    if (!tally.ok()) return Report(tally.status(), kFailed);
    num_differing += tally->differing_tokens;
    num_preemptions += tally->num_preemptions;
    results.push_back(ToJson(batch, *tally));
    if (flags.json) continue;
    std::cout << absl::StrFormat(
        "batch %3d: %d texts, %d tokens, %d drafts of which %d accepted, %d preemptions; "
        "differing: "
        "%d texts, %d tokens, %d log-probabilities\n",
        batch, tally->num_texts, tally->num_tokens, tally->num_drafts, tally->num_accepted,
        tally->num_preemptions, tally->differing_texts, tally->differing_tokens,
        tally->differing_logprobs);
  }
  if (flags.json) std::cout << results.dump() << std::endl;
  if (num_preemptions == 0)
    std::cerr << "godwit: nothing was preempted, which is to be checked too\n";
  return num_differing == 0 ? kDone : kFailed;
}

}  // namespace

void AddEvalLosslessCommand(CLI::App& eval, int& exit_code) {
  auto flags = std::make_shared<LosslessFlags>();
  CLI::App* command = eval.add_subcommand(
      "lossless", "Greedy text with speculation against text without, token for token (offline)");
  AddModelFlags(*command, flags->model);
  AddDraftModelFlag(*command, flags->model)->required();
  command->add_option("--prompts", flags->num_prompts, "that the model writes itself")
      ->check(CLI::Range(1, 100'000));
  command->add_option("--tokens", flags->num_tokens, "generated after each prompt")
      ->check(CLI::Range(16, 1'000'000));
  command->add_option("--max-prompt-length", flags->max_prompt_length, "tokens")
      ->check(CLI::Range(1, 100'000));
  command->add_option("--batch", flags->batches, "sequences at once; each checks all prompts")
      ->delimiter(',')
      ->check(CLI::Range(1, 4096));
  command
      ->add_option("--max-drafts", flags->max_drafts,
                   "the most drafts of a step; the requests have every number from 1, by every "
                   "policy")
      ->check(CLI::Range(1, kMaxDraftTokens));
  command->add_option("--seed", flags->seed, "of the prompts");
  command->add_flag("--json", flags->json, "the counts as JSON on stdout");
  command->callback([flags, &exit_code] { exit_code = RunLossless(*flags); });
}

}  // namespace godwit::cli
