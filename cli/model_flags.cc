#include "cli/model_flags.h"

#include <algorithm>
#include <iostream>
#include <limits>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "engine/backend_loader.h"
#include "engine/model_shapes.h"
#include "kernels/base/status.h"

namespace godwit::cli {

namespace {

CLI::Option* AddModel(CLI::App& command, ModelFlags& flags) {
  return command
      .add_option("--model", flags.model,
                  "folder with config.json, safetensors and tokenizer.model")
      ->type_name("DIR");
}

}  // namespace

void AddModelOrShape(CLI::App& command, ModelFlags& flags) {
  CLI::App* source = command.add_option_group("source")->require_option(1);
  AddModel(*source, flags);
  source
      ->add_option("--shape", flags.shape,
                   "random weights in the shape of a known model, for measurements")
      ->check(CLI::IsMember(ShapeNames()));
}

void AddBackendFlags(CLI::App& command, ModelFlags& flags) {
  command.add_option("--backend", flags.backend, "auto: a GPU when one is usable, else the CPU")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}));
  command.add_option("--threads", flags.threads, "CPU threads; 0: one per usable core")
      ->check(CLI::Range(0, 1024));
}

void AddComputeFlags(CLI::App& command, ModelFlags& flags) {
  command
      .add_option("--dtype", flags.dtype, "weights and activations; f32 is for reference checks")
      ->check(CLI::IsMember({"bf16", "f32"}));
  AddBackendFlags(command, flags);
  command
      .add_option("--rope", flags.rope,
                  "JSON that replaces the checkpoint's RoPE scaling, e.g. "
                  "{\"type\":\"linear\",\"factor\":16}")
      ->type_name("JSON");
  command.add_flag("--deterministic", flags.deterministic,
                   "GPU: the bits of a sequence do not depend on its batch (the CPU's never do)");
}

void AddModelFlags(CLI::App& command, ModelFlags& flags) {
  AddModel(command, flags)->required();
  AddComputeFlags(command, flags);
}

CLI::Option* AddUnlimitedOutputFlag(CLI::App& command, int64_t& window) {
  return command
      .add_option("--unlimited-output", window,
                  "softmax models: output beyond the context, attending to the first 16 tokens and "
                  "at least so many of the latest; no longer context. 0: refused")
      ->type_name("TOKENS")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 30));
}

CLI::Option* AddDraftModelFlag(CLI::App& command, ModelFlags& flags) {
  return command
      .add_option("--draft-model", flags.draft_model,
                  "folder of a draft model with the same tokenizer: speculation")
      ->type_name("DIR");
}

std::string ConfigOf(const ModelFlags& flags) {
  return flags.shape.empty() ? "" : ConfigOfShape(flags.shape).value();  // CLI11 has checked it
}

DType ParseDType(const std::string& dtype) { return dtype == "f32" ? DType::kF32 : DType::kBF16; }

absl::StatusOr<std::unique_ptr<Backend, BackendDeleter>> OpenBackend(const ModelFlags& flags) {
  std::string why_not_gpu;
  auto backend = CreateBackend({flags.backend, flags.threads}, &why_not_gpu);
  if (!why_not_gpu.empty()) std::cerr << "godwit: on the CPU: " << why_not_gpu << "\n";
  return backend;
}

EngineOptions OfflineOptions(const ModelFlags& flags) {
  EngineOptions options;
  options.model_folder = flags.model;
  options.config_json = ConfigOf(flags);
  options.rope_override = flags.rope;
  options.draft_folder = flags.draft_model;
  options.dtype = ParseDType(flags.dtype);
  // Whoever runs a model offline decides how far: the checkpoint's length is a limit for serving.
  options.context_length = std::numeric_limits<int32_t>::max();
  if (flags.unlimited_output > 0) {
    options.unlimited_output = flags.unlimited_output;
    options.context_length = CacheGeometry::BoundFor(flags.unlimited_output);
  }
  options.deterministic = flags.deterministic;
  return options;
}

absl::StatusOr<std::unique_ptr<Engine>> LoadOfflineEngine(const ModelFlags& flags, int64_t chunk,
                                                          int64_t max_sequences) {
  ASSIGN_OR_RETURN(auto backend, OpenBackend(flags));
  EngineOptions options = OfflineOptions(flags);
  options.max_sequences = max_sequences;
  if (chunk > 0) options.max_tokens_per_step = std::max<int64_t>(chunk, kPrefillBlock);
  return Engine::Create(options, std::move(backend));
}

absl::StatusOr<std::vector<int32_t>> ParseTokenIds(const std::string& text) {
  std::vector<int32_t> ids;
  if (text.empty()) return ids;
  for (absl::string_view part : absl::StrSplit(text, ',')) {
    int32_t id = 0;
    if (!absl::SimpleAtoi(part, &id) || id < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("token ids: '", part, "' is not an integer in [0, 2147483647]"));
    }
    ids.push_back(id);
  }
  return ids;
}

}  // namespace godwit::cli
