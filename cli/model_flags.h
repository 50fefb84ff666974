#pragma once
// The flags that name a model and how it computes, shared by every command that loads one.

#include <CLI/CLI.hpp>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "tokenizer/tokenizer.h"

namespace godwit::cli {

struct ModelFlags {
  std::string model;
  std::string shape;  // of a known model, with random weights, instead of `model`
  std::string dtype = "bf16";
  std::string backend = "auto";
  std::string rope;
  std::string draft_model;
  int threads = 0;
  int64_t unlimited_output = 0;  // EngineOptions's
  bool deterministic = false;
};

void AddModelOrShape(CLI::App& command, ModelFlags& flags);  // --model or --shape, one of them
void AddBackendFlags(CLI::App& command, ModelFlags& flags);  // --backend, --threads
void AddComputeFlags(CLI::App& command, ModelFlags& flags);  // all but --model and --draft-model
void AddModelFlags(CLI::App& command, ModelFlags& flags);    // those and --model, required
CLI::Option* AddUnlimitedOutputFlag(CLI::App& command, int64_t& window);
CLI::Option* AddDraftModelFlag(CLI::App& command, ModelFlags& flags);

// config.json of --shape; "" without it.
std::string ConfigOf(const ModelFlags& flags);

DType ParseDType(const std::string& dtype);  // "bf16", "f32"; CLI11 has checked it

// The back end that the flags choose. Why a GPU is not used goes to stderr.
absl::StatusOr<std::unique_ptr<Backend, BackendDeleter>> OpenBackend(const ModelFlags& flags);

// What the flags say of an engine, for one that no server schedules.
EngineOptions OfflineOptions(const ModelFlags& flags);

// Back end and engine for offline sequences; `chunk` > 0 is the largest number of prompt tokens
// computed at once. Why a GPU is not used goes to stderr.
absl::StatusOr<std::unique_ptr<Engine>> LoadOfflineEngine(const ModelFlags& flags, int64_t chunk,
                                                          int64_t max_sequences = 1);

// "1,5,9" -> ids. INVALID_ARGUMENT names the first part that is no number in [0, 2^31).
absl::StatusOr<std::vector<int32_t>> ParseTokenIds(const std::string& text);

}  // namespace godwit::cli
