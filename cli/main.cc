#include <csignal>

#include "absl/synchronization/mutex.h"
#include "cli/command.h"
#include "server/version.h"

int main(int argc, char** argv) {
  // Debian's Abseil is built with deadlock detection on: 43 ns a lock instead of 13 ns.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  std::signal(SIGPIPE, SIG_IGN);  // a closed pipe is a write error, not a death

  CLI::App app{"Godwit: an inference server for long-context generation"};
  app.set_version_flag("--version", godwit::kVersion);
  app.require_subcommand(0, 1);  // so that an unknown one is named, below
  app.get_formatter()->column_width(44);
  app.option_defaults()->always_capture_default();
  app.footer(
      "Exit codes: 0 done, 1 failed, 2 usage, 3 the model or the back end cannot be loaded.");
  int exit_code = godwit::cli::kDone;
  godwit::cli::AddServeCommand(app, exit_code);
  godwit::cli::AddCompleteCommand(app, exit_code);
  godwit::cli::AddGenerateCommand(app, exit_code);
  godwit::cli::AddRecordCommand(app, exit_code);
  godwit::cli::AddScoreCommand(app, exit_code);
  godwit::cli::AddInspectCommand(app, exit_code);
  godwit::cli::AddEvalCommand(app, exit_code);
  godwit::cli::AddSessionsCommand(app, exit_code);
  godwit::cli::AddHealthCommand(app, exit_code);
  CLI::App* bench = app.add_subcommand("bench", "Benchmarks")->require_subcommand(1);
  godwit::cli::AddBenchServeCommand(*bench, exit_code);
  godwit::cli::AddBenchContextCommand(*bench, exit_code);
  godwit::cli::AddBenchEngineCommand(*bench, exit_code);
  godwit::cli::AddBenchKernelsCommand(*bench, exit_code);
  godwit::cli::AddBenchSessionsCommand(*bench, exit_code);
  godwit::cli::AddBenchSpeculateCommand(*bench, exit_code);
  try {  // CLI11 reports by exception, --help included
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? godwit::cli::kDone : godwit::cli::kUsage;
  }
  if (app.get_subcommands().empty()) {
    std::cerr << app.help();
    return godwit::cli::kUsage;
  }
  return exit_code;
}
