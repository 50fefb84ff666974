// `godwit score`: logits and perplexity of given tokens, without a server.

#include <cstring>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "cli/command.h"
#include "cli/model_flags.h"
#include "engine/offline.h"
#include "engine/safetensors.h"
#include "kernels/base/status.h"

namespace godwit::cli {
namespace {

struct ScoreFlags {
  ModelFlags model;
  std::string tokens, output;
  int64_t chunk = 0;
  bool json = false;
};

// FILE.safetensors with an i32 tensor `tokens` [T], or ids.
absl::StatusOr<std::vector<int32_t>> ReadTokens(const std::string& tokens) {
  if (!tokens.ends_with(".safetensors")) return ParseTokenIds(tokens);
  ASSIGN_OR_RETURN(auto reader, SafetensorsReader::OpenFile(tokens));
  const StoredTensor* tensor = reader->Find("tokens");
  if (tensor == nullptr) return absl::NotFoundError(absl::StrCat(tokens, ": tensor 'tokens' is missing"));
  if (tensor->dtype != "I32" || tensor->shape.size() != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat(tokens, ": tensor 'tokens': expected I32 of rank 1, found ", tensor->dtype,
                     " [", absl::StrJoin(tensor->shape, ", "), "]"));
  }
  std::vector<int32_t> ids(static_cast<size_t>(tensor->shape[0]));
  std::memcpy(ids.data(), tensor->data, ids.size() * sizeof(int32_t));
  return ids;
}

int RunScore(const ScoreFlags& flags) {
  auto ids = ReadTokens(flags.tokens);
  if (!ids.ok()) return Report(ids.status(), kUsage);
  auto engine = LoadOfflineEngine(flags.model, flags.chunk);
  if (!engine.ok()) return Report(engine.status(), kCannotLoad);
  const int64_t vocab_size = (*engine)->card().config.vocab_size;
  const auto num_tokens = static_cast<int64_t>(ids->size());
  std::vector<float> logits(flags.output.empty() ? 0 : ids->size() * static_cast<size_t>(vocab_size));
  auto result = ScoreOffline(**engine, *ids, flags.chunk, flags.output.empty() ? nullptr : logits.data());
  if (!result.ok()) {
    return Report(result.status(), absl::IsInvalidArgument(result.status()) ? kUsage : kFailed);
  }
  if (!flags.output.empty()) {
    const absl::Status written =
        WriteSafetensors(flags.output, {{"logits", "F32", {num_tokens, vocab_size}, logits.data()}});
    if (!written.ok()) return Report(written, kFailed);
  }
  if (flags.json) {
    const nlohmann::ordered_json report = {{"num_tokens", num_tokens},
                                           {"total_logprob", result->total_logprob},
                                           {"perplexity", result->perplexity},
                                           {"seconds", result->seconds}};
    std::cout << report.dump() << std::endl;
  } else {
    std::cout << absl::StrFormat("perplexity %.6g over %d tokens, %.3f s\n", result->perplexity,
                                 num_tokens, result->seconds);
  }
  return kDone;
}

}  // namespace

void AddScoreCommand(CLI::App& app, int& exit_code) {
  auto flags = std::make_shared<ScoreFlags>();
  CLI::App* command = app.add_subcommand("score", "Logits and perplexity of given tokens (offline)");
  AddModelFlags(*command, flags->model);
  command->add_option("--tokens", flags->tokens, "safetensors file with i32 `tokens` [T], or ids: 1,5,9")
      ->required()
      ->type_name("FILE|IDS");
  command->add_option("--output", flags->output, "safetensors file to write: `logits` f32 [T, vocab]")
      ->type_name("FILE");
  command->add_option("--chunk", flags->chunk, "prompt tokens computed at once, any N; 0: the engine's choice")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 20));
  command->add_flag("--json", flags->json, "stdout is one JSON object");
  command->callback([flags, &exit_code] { exit_code = RunScore(*flags); });
}

}  // namespace godwit::cli
