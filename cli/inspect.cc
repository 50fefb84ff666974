// `godwit inspect DIR`: what a model is and what it costs, before anyone serves it.

#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "cli/command.h"
#include "cli/model_flags.h"
#include "engine/rope_table.h"
#include "engine/safetensors.h"

namespace godwit::cli {
namespace {

struct InspectFlags {
  ModelFlags model;
  bool tensors = false, json = false;
};

double MiB(int64_t num_bytes) { return static_cast<double>(num_bytes) / (1024.0 * 1024.0); }

// What a server would serve it with; an engine made to inspect has no limit.
int64_t ContextLength(const ModelCard& card) {
  return card.config.context_length > 0 ? card.config.context_length : card.context_length;
}

nlohmann::ordered_json RopeJson(const ModelCard& card) {
  if (!card.config.rope) return nullptr;
  const RopeConfig& rope = *card.config.rope;
  return {{"type", rope.type},
          {"theta", rope.theta},
          {"factor", rope.factor},
          {"rotary_dim", rope.rotary_dim},
          {"original_length", rope.original_length},
          {"depends_on_length", DependsOnLength(rope)},
          {"regime", card.rope_regime.ToString()}};
}

nlohmann::ordered_json CardJson(const ModelCard& card) {
  nlohmann::ordered_json components = nlohmann::ordered_json::array();
  for (const StateComponent& component : card.geometry.components) {
    components.push_back({{"name", component.name},
                          {"base_bytes", component.base_bytes},
                          {"row_bytes", component.row_bytes},
                          {"paged", component.paged()}});
  }
  return {{"family", card.config.family},
          {"parameters", card.num_parameters},
          {"dtype", card.dtype},
          {"backend", card.backend},
          {"vocab_size", card.config.vocab_size},
          {"d_model", card.config.d_model},
          {"layers", card.config.num_layers},
          {"heads", card.config.num_heads},
          {"kv_heads", card.config.num_kv_heads},
          {"head_dim", card.config.head_dim},
          {"context_length", ContextLength(card)},
          {"context_note", card.config.context_note},
          {"rope", RopeJson(card)},
          {"weight_bytes", card.weight_bytes},
          {"workspace_bytes", card.workspace_bytes},
          {"state_bytes_per_sequence", card.geometry.slot_bytes()},
          {"kv_bytes_per_token", card.geometry.kv_bytes_per_token()},
          {"components", components}};
}

void PrintCard(const ModelCard& card) {
  const ModelConfig& config = card.config;
  std::cout << absl::StrFormat(
      "family          %s, %.2f M parameters, %s on %s\n"
      "shape           %d layers, d_model %d, %d heads (%d kv) of %d, d_ff %d, vocabulary %d\n"
      "context         %d tokens\n"
      "memory plan     weights %.1f MiB, workspace %.1f MiB\n"
      "per sequence    state %.3f MiB (any length) + KV %d bytes per token\n",
      config.family, static_cast<double>(card.num_parameters) / 1e6, card.dtype, card.backend,
      config.num_layers, config.d_model, config.num_heads, config.num_kv_heads, config.head_dim,
      config.d_ff, config.vocab_size, ContextLength(card), MiB(card.weight_bytes),
      MiB(card.workspace_bytes), MiB(card.geometry.slot_bytes()), card.geometry.kv_bytes_per_token());
  if (config.rope) {
    std::cout << absl::StrFormat("rope            %s, factor %g, theta %g, %d of %d dimensions, from %d tokens%s\n",
                                 config.rope->type, config.rope->factor, config.rope->theta,
                                 config.rope->rotary_dim, config.head_dim, config.rope->original_length,
                                 DependsOnLength(*config.rope) ? ", by the length of each request" : "");
  }
  if (!config.context_note.empty()) std::cout << "note            " << config.context_note << "\n";
  for (const StateComponent& component : card.geometry.components) {
    std::cout << absl::StrFormat("  %-24s base %d bytes", component.name, component.base_bytes);
    if (component.windowed()) {
      std::cout << absl::StrFormat(", window %d rows of %d", card.geometry.window_rows, component.row_bytes);
    } else if (component.paged()) {
      std::cout << absl::StrFormat(", %d bytes per token", component.row_bytes);
    }
    std::cout << "\n";
  }
}

int RunInspect(const InspectFlags& flags) {
  auto engine = LoadOfflineEngine(flags.model, 0);
  if (!engine.ok()) return Report(engine.status(), kCannotLoad);
  auto reader = SafetensorsReader::OpenFolder(flags.model.model);
  if (!reader.ok()) return Report(reader.status(), kCannotLoad);
  nlohmann::ordered_json report = CardJson((*engine)->card());
  if (!flags.json) PrintCard((*engine)->card());
  for (const auto& [name, tensor] : (*reader)->tensors()) {
    if (flags.json) {
      report["tensors"].push_back({{"name", name}, {"dtype", tensor.dtype}, {"shape", tensor.shape}});
    } else if (flags.tensors) {
      std::cout << absl::StrFormat("  %-56s %-5s [%s]\n", name, tensor.dtype,
                                   absl::StrJoin(tensor.shape, ", "));
    }
  }
  if (flags.json) std::cout << report.dump(2) << std::endl;
  return kDone;
}

}  // namespace

void AddInspectCommand(CLI::App& app, int& exit_code) {
  auto flags = std::make_shared<InspectFlags>();
  CLI::App* command = app.add_subcommand("inspect", "Card, tensors and memory plan of a model");
  command->add_option("model", flags->model.model, "folder of the model")->required()->type_name("DIR");
  command->add_option("--dtype", flags->model.dtype, "weights and activations")
      ->check(CLI::IsMember({"bf16", "f32"}));
  command->add_option("--backend", flags->model.backend, "auto: a GPU when one is usable, else the CPU")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}));
  command->add_option("--rope", flags->model.rope, "JSON that replaces the checkpoint's RoPE scaling")
      ->type_name("JSON");
  command->add_flag("--tensors", flags->tensors, "also list the tensors");
  command->add_flag("--json", flags->json, "stdout is one JSON object");
  command->callback([flags, &exit_code] { exit_code = RunInspect(*flags); });
}

}  // namespace godwit::cli
