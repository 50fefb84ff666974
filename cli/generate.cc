// `godwit generate`: a completion without a server.

#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>

#include "cli/command.h"
#include "cli/model_flags.h"
#include "engine/draft_policy.h"
#include "engine/offline.h"
#include "kernels/base/status.h"

namespace godwit::cli {
namespace {

struct GenerateFlags {
  ModelFlags model;
  std::optional<std::string> prompt;
  std::string token_ids;
  int64_t max_tokens = 128;
  float temperature = 1, top_p = 1, min_p = 0;
  int32_t top_k = 0;
  std::optional<uint64_t> seed;
  int64_t chunk = 0;
  int max_draft_tokens = 4;
  std::string draft_policy = "fixed";
  float draft_threshold = 0.5f;
  bool ignore_eos = false, json = false;
};

absl::StatusOr<std::vector<int32_t>> PromptIds(const GenerateFlags& flags,
                                               const Tokenizer* tokenizer,
                                               const ModelConfig& config) {
  if (!flags.prompt) return ParseTokenIds(flags.token_ids);
  std::vector<int32_t> ids = tokenizer->Encode(*flags.prompt);
  if (config.add_bos && config.bos_token_id) ids.insert(ids.begin(), *config.bos_token_id);
  return ids;
}

std::vector<int32_t> TokenIds(const std::vector<SampledToken>& tokens) {
  std::vector<int32_t> ids;
  for (const SampledToken& token : tokens) ids.push_back(token.token_id);
  return ids;
}

// The text the tokens add to the prompt: pieces, not Decode, which would drop a leading space.
std::string Text(const Tokenizer* tokenizer, const std::vector<int32_t>& ids) {
  std::string text;
  if (tokenizer == nullptr) return text;
  for (const int32_t id : ids) text += tokenizer->Piece(id);
  return text;
}

nlohmann::ordered_json ToJson(const Tokenizer* tokenizer, const std::vector<int32_t>& prompt,
                              const OfflineGenerateResult& result, uint64_t seed) {
  const std::vector<int32_t> ids = TokenIds(result.tokens);
  return {{"token_ids", ids},
          {"text", tokenizer == nullptr ? nlohmann::ordered_json(nullptr)
                                        : nlohmann::ordered_json(Text(tokenizer, ids))},
          {"finish_reason", result.ended_by_eos ? "eos" : "length"},
          {"prompt_token_ids", prompt},
          {"seed", seed},
          {"dropped_tokens", result.num_dropped},
          {"num_drafts", result.num_drafts},
          {"num_accepted", result.num_accepted},
          {"prefill_seconds", result.prefill_seconds},
          {"decode_seconds", result.decode_seconds}};
}

int RunGenerate(const GenerateFlags& flags) {
  std::string tokenizer_error;
  const std::unique_ptr<Tokenizer> tokenizer = LoadTokenizer(flags.model.model, &tokenizer_error);
  if (tokenizer == nullptr && flags.prompt) {
    return Report(absl::NotFoundError("--prompt needs a tokenizer: " + tokenizer_error),
                  kCannotLoad);
  }
  if (absl::StatusOr<std::vector<int32_t>> ids = ParseTokenIds(flags.token_ids); !ids.ok()) {
    return Report(ids.status(), kUsage);
  }
  auto engine = LoadOfflineEngine(flags.model, flags.chunk);
  if (!engine.ok()) return Report(engine.status(), kCannotLoad);
  auto prompt = PromptIds(flags, tokenizer.get(), (*engine)->card().config);
  if (!prompt.ok()) return Report(prompt.status(), kUsage);

  OfflineGenerateOptions options;
  options.sampling.temperature = flags.temperature;
  options.sampling.top_k = flags.top_k;
  options.sampling.top_p = flags.top_p;
  options.sampling.min_p = flags.min_p;
  options.seed = flags.seed ? *flags.seed : std::random_device{}();
  options.max_tokens = flags.max_tokens;
  options.ignore_eos = flags.ignore_eos;
  options.chunk = flags.chunk;
  if (!flags.model.draft_model.empty()) options.max_draft_tokens = flags.max_draft_tokens;
  options.draft_policy = *ParseDraftPolicy(flags.draft_policy);  // CLI11 has checked it
  options.draft_threshold = flags.draft_threshold;
  options.coupled = flags.seed.has_value();
  if (!flags.json) {
    options.on_token = [&](const SampledToken& token) {
      if (tokenizer != nullptr) {
        std::cout << tokenizer->Piece(token.token_id) << std::flush;
      } else {
        std::cout << token.token_id << " " << std::flush;
      }
    };
  }
  auto result = GenerateOffline(**engine, *prompt, options);
  if (!result.ok()) {
    return Report(result.status(), absl::IsInvalidArgument(result.status()) ? kUsage : kFailed);
  }
  if (flags.json) {
    // Invalid UTF-8 (a character cut by max_tokens) becomes U+FFFD.
    std::cout << ToJson(tokenizer.get(), *prompt, *result, options.seed)
                     .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace)
              << std::endl;
  } else {
    std::cout << std::endl;
  }
  return kDone;
}

}  // namespace

void AddGenerateCommand(CLI::App& app, int& exit_code) {
  auto flags = std::make_shared<GenerateFlags>();
  CLI::App* command = app.add_subcommand("generate", "A completion without a server (offline)");
  AddModelFlags(*command, flags->model);
  AddDraftModelFlag(*command, flags->model);
  AddUnlimitedOutputFlag(*command, flags->model.unlimited_output);
  command
      ->add_option("--max-draft-tokens", flags->max_draft_tokens,
                   "proposed in a step, with --draft-model")
      ->check(CLI::Range(1, kMaxDraftTokens));
  command->add_option("--draft-policy", flags->draft_policy, "how many of these a step proposes")
      ->check(CLI::IsMember({"fixed", "margin", "throughput", "specdecpp"}));
  command
      ->add_option("--draft-threshold", flags->draft_threshold,
                   "margin, specdecpp: the probability of a rejection at which they stop")
      ->check(CLI::Range(0.0f, 1.0f));
  auto* input = command->add_option_group("input")->require_option(1);
  input->add_option("--prompt", flags->prompt, "text");
  input->add_option("--token-ids", flags->token_ids, "e.g. 1,5,9");
  command->add_option("--max-tokens", flags->max_tokens, "tokens to generate at most")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 31));
  command->add_option("--temperature", flags->temperature, "[0, 100]; 0 = greedy");
  command->add_option("--top-k", flags->top_k, "0 = all");
  command->add_option("--top-p", flags->top_p, "(0, 1]");
  command->add_option("--min-p", flags->min_p, "[0, 1]");
  command->add_option("--seed", flags->seed, "absent: a random one, named in the JSON");
  command
      ->add_option("--chunk", flags->chunk,
                   "prompt tokens computed at once, any N; 0: the engine's choice")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 20));
  command->add_flag("--ignore-eos", flags->ignore_eos, "go on after the end of text");
  command->add_flag("--json", flags->json,
                    "stdout is one JSON object: token_ids and text of the completion");
  command->callback([flags, &exit_code] { exit_code = RunGenerate(*flags); });
}

}  // namespace godwit::cli
