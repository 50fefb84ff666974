#pragma once
// What an evaluation asks: a model in this process, or one behind a server.

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "cli/client.h"
#include "cli/model_flags.h"

namespace godwit::cli {

struct EvalTargetFlags {
  ModelFlags model;    // model.model: a folder, evaluated offline; "": the server of `client`
  ClientFlags client;  // model.rope is sent with each request then
};

void AddEvalTargetFlags(CLI::App& command, EvalTargetFlags& flags);

struct EvalTarget {
  std::string name;         // folder, or address
  bool concurrent = false;  // the functions may be called by several threads at once

  // With BOS where the model wants one.
  std::function<absl::StatusOr<std::vector<int32_t>>(const std::string& text)> tokenize;
  // Greedy, until EOS or max_tokens.
  std::function<absl::StatusOr<std::vector<int32_t>>(const std::vector<int32_t>& prompt,
                                                     int64_t max_tokens)>
      generate;
  std::function<absl::StatusOr<std::string>(const std::vector<int32_t>& ids)> text;
  // Log-probability of each token after the first.
  std::function<absl::StatusOr<std::vector<float>>(const std::vector<int32_t>& ids)> score;
};

// Loads the model, or connects.
absl::StatusOr<EvalTarget> OpenEvalTarget(const EvalTargetFlags& flags);

}  // namespace godwit::cli
