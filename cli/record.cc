// `godwit record`: rounds of a served pair with all drafts and no stop, and what an acceptance head
// learns from: train/acceptance_head.py reads it.

#include <cstdint>
#include <fstream>
#include <iostream>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/command.h"
#include "cli/model_flags.h"
#include "cli/step_driver.h"
#include "engine/engine.h"
#include "engine/safetensors.h"
#include "kernels/base/status.h"
#include "tokenizer/tokenizer.h"

namespace godwit::cli {
namespace {

struct RecordFlags {
  ModelFlags model;
  int64_t num_prompts = 100, prompt_length = 64, num_tokens = 128, batch = 1;
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

// The seed of a request tells which prompt a row of a step goes on from.
GenerateRequest MakeRecordedRequest(const RecordFlags& flags, std::vector<int32_t> prompt,
                                    int32_t index) {
  GenerateRequest request =
      MakeRequest(std::move(prompt), flags.sampling.temperature,
                  flags.seed + static_cast<uint64_t>(index), flags.num_tokens);
  request.sampling = flags.sampling;
  request.seed_is_given = false;
  request.max_draft_tokens = flags.max_drafts;
  return request;
}

absl::StatusOr<Records> RecordAll(Engine& engine, const RecordFlags& flags) {
  std::vector<std::vector<int32_t>> prompts;
  if (flags.prompts.empty()) {
    ASSIGN_OR_RETURN(prompts,
                     WritePrompts(engine, flags.seed, flags.num_prompts, flags.prompt_length));
  } else {
    ASSIGN_OR_RETURN(prompts, ReadPrompts(flags));
  }
  std::vector<GenerateRequest> requests;
  for (std::vector<int32_t>& prompt : prompts) {
    requests.push_back(
        MakeRecordedRequest(flags, std::move(prompt), static_cast<int32_t>(requests.size())));
  }
  Records records = {.hidden_size = engine.card().draft_config.d_model};
  int32_t num_rounds = 0;
  const auto on_step = [&](std::span<const BatchRow> rows, const StepResult&) {
    int32_t last_row = -1;
    for (const RecordedDraft& draft : engine.recorded()) {
      if (draft.batch_row != last_row) ++num_rounds;
      last_row = draft.batch_row;
      const uint64_t seed = rows[static_cast<size_t>(draft.batch_row)].outputs[0].seed;
      records.Add(draft, num_rounds - 1, static_cast<int32_t>(seed - flags.seed));
    }
  };
  RETURN_IF_ERROR(Drive(engine, std::move(requests), flags.batch, on_step).status());
  return records;
}

int RunRecord(const RecordFlags& flags) {
  EngineOptions engine_options = OfflineOptions(flags.model);
  engine_options.max_sequences = flags.batch;
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
  command->add_option("--batch", flags->batch, "prompts at a time")->check(CLI::Range(1, 1024));
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
