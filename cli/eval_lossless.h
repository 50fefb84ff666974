#pragma once

#include <CLI/CLI.hpp>

namespace godwit::cli {

// `godwit eval lossless`. Exit code kFailed when a token differs.
void AddEvalLosslessCommand(CLI::App& eval, int& exit_code);

}  // namespace godwit::cli
