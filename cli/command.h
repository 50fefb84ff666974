#pragma once
// The subcommands of `godwit`: each file adds one to the CLI11 app and stores its exit code.

#include <CLI/CLI.hpp>
#include <iostream>

#include "absl/status/status.h"

namespace godwit::cli {

// 0 done, 1 other failures, 2 usage, 3 the model or the back end cannot be loaded.
enum ExitCode : int { kDone = 0, kFailed = 1, kUsage = 2, kCannotLoad = 3 };

void AddServeCommand(CLI::App& app, int& exit_code);
void AddCompleteCommand(CLI::App& app, int& exit_code);
void AddGenerateCommand(CLI::App& app, int& exit_code);
void AddRecordCommand(CLI::App& app, int& exit_code);
void AddScoreCommand(CLI::App& app, int& exit_code);
void AddInspectCommand(CLI::App& app, int& exit_code);
void AddEvalCommand(CLI::App& app, int& exit_code);
void AddSessionsCommand(CLI::App& app, int& exit_code);
void AddHealthCommand(CLI::App& app, int& exit_code);
// Under `godwit bench`.
void AddBenchServeCommand(CLI::App& bench, int& exit_code);
void AddBenchContextCommand(CLI::App& bench, int& exit_code);
void AddBenchEngineCommand(CLI::App& bench, int& exit_code);
void AddBenchKernelsCommand(CLI::App& bench, int& exit_code);
void AddBenchSessionsCommand(CLI::App& bench, int& exit_code);
void AddBenchSpeculateCommand(CLI::App& bench, int& exit_code);

// One line on stderr; returns `code`.
inline int Report(const absl::Status& status, ExitCode code) {
  std::cerr << "godwit: " << status.message() << "\n";
  return code;
}

}  // namespace godwit::cli
