// Server::Create: loads what CreateWithParts serves.

#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/state_file.h"
#include "kernels/base/status.h"
#include "server/server_impl.h"

namespace godwit {
namespace {

std::string NameOfFolder(const std::string& folder) {
  std::filesystem::path path = std::filesystem::absolute(folder).lexically_normal();
  if (!path.has_filename()) path = path.parent_path();  // "models/tale/"
  return path.filename().string();
}

// Null when the folder has none; an error when it has one that cannot be read.
absl::StatusOr<std::shared_ptr<const Tokenizer>> TokenizerOf(const std::string& folder,
                                                             std::string* notes) {
  if (folder.empty()) return std::shared_ptr<const Tokenizer>();  // a shape without weights
  std::error_code error;
  if (!std::filesystem::exists(std::filesystem::path(folder) / "tokenizer.model", error)) {
    absl::StrAppend(notes, folder, " has no tokenizer.model: token ids only\n");
    return std::shared_ptr<const Tokenizer>();
  }
  std::string why;
  std::unique_ptr<Tokenizer> tokenizer = LoadTokenizer(folder, &why);
  if (tokenizer == nullptr) return absl::InvalidArgumentError(why);
  return std::shared_ptr<const Tokenizer>(std::move(tokenizer));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Server>> Server::Create(const ServerOptions& options,
                                                       std::string* notes) {
  RETURN_IF_ERROR(ValidateServerOptions(options));
  ServerOptions named = options;
  if (named.model_name.empty()) named.model_name = NameOfFolder(options.engine.model_folder);
  std::string why_not_gpu;
  ASSIGN_OR_RETURN(auto backend, CreateBackend(options.backend, &why_not_gpu));
  if (!why_not_gpu.empty()) absl::StrAppend(notes, "godwit: on the CPU: ", why_not_gpu, "\n");
  ASSIGN_OR_RETURN(std::unique_ptr<Engine> engine,
                   Engine::Create(options.engine, std::move(backend)));
  const std::string& context_note = engine->card().config.context_note;
  if (options.engine.context_length == 0 && !context_note.empty())
    absl::StrAppend(notes, context_note, "\n");
  ServerParts parts = {
      .card = engine->card(), .executor = engine.get(), .caches = &engine->caches()};
  if (options.engine.config_json.empty()) {
    ASSIGN_OR_RETURN(parts.model_fingerprint, FingerprintModel(options.engine.model_folder));
  } else {
    parts.model_fingerprint = FingerprintText(options.engine.config_json);
  }
  if (!options.engine.draft_folder.empty()) {
    ASSIGN_OR_RETURN(parts.draft_fingerprint, FingerprintModel(options.engine.draft_folder));
  }
  ASSIGN_OR_RETURN(parts.tokenizer, TokenizerOf(options.engine.model_folder, notes));
  if (parts.tokenizer != nullptr && parts.tokenizer->vocab_size() > parts.card.config.vocab_size) {
    return absl::InvalidArgumentError(absl::StrCat(
        options.engine.model_folder, "/tokenizer.model: ", parts.tokenizer->vocab_size(),
        " tokens, the model has ", parts.card.config.vocab_size));
  }
  ASSIGN_OR_RETURN(std::unique_ptr<Server> server, CreateWithParts(named, parts));
  server->impl_->engine = std::move(engine);
  return server;
}

}  // namespace godwit
