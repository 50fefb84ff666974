// `godwit record`: rounds of a served pair with all drafts and no stop, and what an acceptance head
// learns from: train/acceptance_head.py reads it.

#include <cstdint>
#include <fstream>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/command.h"
#include "cli/model_flags.h"
#include "engine/offline.h"
#include "engine/safetensors.h"
#include "kernels/base/status.h"
#include "tokenizer/tokenizer.h"

namespace godwit::cli {
namespace {

struct RecordFlags {
  ModelFlags model;
  int64_t num_prompts = 100, prompt_length = 64, num_tokens = 128;
  std::string prompts, output;
  int max_drafts = 12;
  SamplingParams sampling = {.temperature = 1};
  uint64_t seed = 1;
};

// One row per draft.
struct Records {
  int64_t hidden_size = 0;
  std::vector<float> hidden, features, before_draw, after_draw;
  std::vector<int32_t> place, alive, accepted, round, prompt;

  void Add(const RecordedDraft& draft, int32_t round_index, int32_t prompt_index) {
    hidden.insert(hidden.end(), draft.hidden.begin(), draft.hidden.end());
    features.insert(features.end(), std::begin(draft.features), std::end(draft.features));
    before_draw.push_back(draft.before_draw);
    after_draw.push_back(draft.after_draw);
    place.push_back(draft.place);
    alive.push_back(draft.alive ? 1 : 0);
    accepted.push_back(draft.accepted ? 1 : 0);
    round.push_back(round_index);
    prompt.push_back(prompt_index);
  }

  absl::Status Write(const std::string& path) const {
    const auto n = static_cast<int64_t>(place.size());
    return WriteSafetensors(path, {{"hidden", "F32", {n, hidden_size}, hidden.data()},
                                   {"features", "F32", {n, kNumHeadFeatures}, features.data()},
                                   {"before_draw", "F32", {n}, before_draw.data()},
                                   {"after_draw", "F32", {n}, after_draw.data()},
                                   {"place", "I32", {n}, place.data()},
                                   {"alive", "I32", {n}, alive.data()},
                                   {"accepted", "I32", {n}, accepted.data()},
                                   {"round", "I32", {n}, round.data()},
                                   {"prompt", "I32", {n}, prompt.data()}});
  }
};

// What the target itself writes from the beginning of a text, at temperature 1.
absl::StatusOr<std::vector<int32_t>> WritePrompt(Engine& engine, uint64_t seed, int64_t length) {
  std::vector<int32_t> prompt = {engine.card().config.bos_token_id.value_or(0)};
  OfflineGenerateOptions options = {.seed = seed, .max_tokens = length - 1, .ignore_eos = true};
  ASSIGN_OR_RETURN(const OfflineGenerateResult result, GenerateOffline(engine, prompt, options));
  for (const SampledToken& token : result.tokens) prompt.push_back(token.token_id);
  return prompt;
}

// One prompt a line of the file.
absl::StatusOr<std::vector<std::vector<int32_t>>> ReadPrompts(const RecordFlags& flags) {
  std::string error;
  const std::unique_ptr<Tokenizer> tokenizer = LoadTokenizer(flags.model.model, &error);
  if (tokenizer == nullptr) return absl::InvalidArgumentError(error);
  std::ifstream file(flags.prompts);
  if (!file) return absl::NotFoundError(absl::StrCat(flags.prompts, ": cannot be read"));
  std::vector<std::vector<int32_t>> prompts;
  for (std::string line; std::ssize(prompts) < flags.num_prompts && std::getline(file, line);) {
    if (!line.empty()) prompts.push_back(tokenizer->Encode(line));
  }
  if (prompts.empty()) return absl::InvalidArgumentError(absl::StrCat(flags.prompts, ": no lines"));
  return prompts;
}

absl::Status RecordPrompt(Engine& engine, const RecordFlags& flags,
                          const std::vector<int32_t>& prompt, int32_t index, int32_t& num_rounds,
                          Records& records) {
  OfflineGenerateOptions options = {.sampling = flags.sampling,
                                    .seed = flags.seed + static_cast<uint64_t>(index),
                                    .max_tokens = flags.num_tokens,
                                    .ignore_eos = true,
                                    .max_draft_tokens = flags.max_drafts,
                                    .coupled = false};
  options.on_round = [&] {
    for (const RecordedDraft& draft : engine.recorded()) records.Add(draft, num_rounds, index);
    ++num_rounds;
  };
  return GenerateOffline(engine, prompt, options).status();
}

absl::StatusOr<Records> RecordAll(Engine& engine, const RecordFlags& flags) {
  std::vector<std::vector<int32_t>> prompts;
  if (!flags.prompts.empty()) {
    ASSIGN_OR_RETURN(prompts, ReadPrompts(flags));
  }
  const int64_t count = flags.prompts.empty() ? flags.num_prompts : std::ssize(prompts);
  Records records = {.hidden_size = engine.card().draft_config.d_model};
  int32_t num_rounds = 0;
  for (int32_t index = 0; index < count; ++index) {
    if (flags.prompts.empty()) {
      ASSIGN_OR_RETURN(
          prompts.emplace_back(),
          WritePrompt(engine, flags.seed + static_cast<uint64_t>(index), flags.prompt_length));
    }
    RETURN_IF_ERROR(RecordPrompt(engine, flags, prompts[static_cast<size_t>(index)], index,
                                 num_rounds, records));
    std::cerr << absl::StrFormat("\rprompt %d of %d", index + 1, count);
  }
  std::cerr << std::endl;
  return records;
}

int RunRecord(const RecordFlags& flags) {
  EngineOptions engine_options = OfflineOptions(flags.model);
  engine_options.max_sequences = 1;
  engine_options.records_rounds = true;
  auto backend = OpenBackend(flags.model);
  if (!backend.ok()) return Report(backend.status(), kCannotLoad);
  auto engine = Engine::Create(engine_options, *std::move(backend));
  if (!engine.ok()) return Report(engine.status(), kCannotLoad);
  const absl::StatusOr<Records> records = RecordAll(**engine, flags);
  if (!records.ok()) {
    return Report(records.status(), absl::IsInvalidArgument(records.status()) ? kUsage : kFailed);
  }
  if (const absl::Status written = records->Write(flags.output); !written.ok()) {
    return Report(written, kFailed);
  }
  double alive = 0, accepted = 0;
  for (size_t draft = 0; draft < records->place.size(); ++draft) {
    alive += records->alive[draft];
    accepted += records->accepted[draft];
  }
  std::cout << absl::StrFormat("%d drafts; %.0f were judged, %.4f of them accepted\n",
                               records->place.size(), alive, accepted / std::max(alive, 1.0));
  return kDone;
}

}  // namespace

void AddRecordCommand(CLI::App& app, int& exit_code) {
  auto flags = std::make_shared<RecordFlags>();
  CLI::App* command = app.add_subcommand(
      "record", "Rounds of a pair of models, to train an acceptance head from (offline)");
  AddModelFlags(*command, flags->model);
  AddDraftModelFlag(*command, flags->model)->required();
  command->add_option("--output", flags->output, "safetensors file to write, one row per draft")
      ->required()
      ->type_name("FILE");
  command
      ->add_option("--file", flags->prompts,
                   "text with a prompt a line; else the model writes them")
      ->type_name("FILE");
  command->add_option("--prompts", flags->num_prompts, "at most")->check(CLI::Range(1, 10'000'000));
  command
      ->add_option("--prompt-length", flags->prompt_length, "tokens of those that the model writes")
      ->check(CLI::Range(2, 100'000));
  command->add_option("--tokens", flags->num_tokens, "generated after each prompt")
      ->check(CLI::Range(2, 1'000'000));
  command->add_option("--max-drafts", flags->max_drafts, "of every round")
      ->check(CLI::Range(1, kMaxDraftTokens));
  command->add_option("--temperature", flags->sampling.temperature, "0: greedy")
      ->check(CLI::Range(0.0f, 100.0f));
  command->add_option("--top-k", flags->sampling.top_k, "0: all")->check(CLI::Range(0, 1 << 30));
  command->add_option("--top-p", flags->sampling.top_p)->check(CLI::Range(0.0f, 1.0f));
  command->add_option("--min-p", flags->sampling.min_p)->check(CLI::Range(0.0f, 1.0f));
  command->add_option("--seed", flags->seed, "of prompts and texts");
  command->callback([flags, &exit_code] { exit_code = RunRecord(*flags); });
}

}  // namespace godwit::cli
