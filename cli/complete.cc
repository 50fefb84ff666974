// `godwit complete`: a completion from a server, streamed to the terminal.

#include <sys/ioctl.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_format.h"
#include "cli/client.h"
#include "cli/command.h"
#include "cli/model_flags.h"
#include "godwit/v1/inference.grpc.pb.h"
#include "kernels/base/status.h"

namespace godwit::cli {
namespace {

using Clock = std::chrono::steady_clock;

struct CompleteFlags {
  ClientFlags client;
  std::string prompt, prompt_file, token_ids, request_id, session, save_as;
  std::optional<float> temperature, top_p, min_p, repetition_penalty, presence_penalty,
      frequency_penalty;
  std::optional<int32_t> top_k, n, priority;
  std::optional<int64_t> max_tokens, min_tokens, time_limit_ms;
  std::optional<uint64_t> seed;
  std::vector<std::string> stop;
  bool ignore_eos = false, echo = false, quiet = false;
};

volatile std::sig_atomic_t g_interrupted = 0;  // a handler may touch nothing more

absl::StatusOr<v1::GenerateRequest> MakeRequest(const CompleteFlags& flags) {
  v1::GenerateRequest request;
  request.set_request_id(flags.request_id);
  if (!flags.token_ids.empty()) {
    ASSIGN_OR_RETURN(std::vector<int32_t> ids, ParseTokenIds(flags.token_ids));
    request.mutable_token_ids()->mutable_ids()->Assign(ids.begin(), ids.end());
  } else if (!flags.prompt_file.empty()) {
    std::ifstream file(flags.prompt_file, std::ios::binary);
    if (!file) return absl::NotFoundError("--prompt-file: cannot read " + flags.prompt_file);
    request.set_prompt(std::string(std::istreambuf_iterator<char>(file), {}));
  } else if (!flags.prompt.empty() || flags.session.empty()) {
    request.set_prompt(flags.prompt);
  }
  if (!flags.session.empty()) request.mutable_state()->set_session_id(flags.session);
  if (!flags.save_as.empty()) request.mutable_state()->set_save_as(flags.save_as);
  v1::SamplingOptions& sampling = *request.mutable_sampling();
  if (flags.temperature) sampling.set_temperature(*flags.temperature);
  if (flags.top_k) sampling.set_top_k(*flags.top_k);
  if (flags.top_p) sampling.set_top_p(*flags.top_p);
  if (flags.min_p) sampling.set_min_p(*flags.min_p);
  if (flags.repetition_penalty) sampling.set_repetition_penalty(*flags.repetition_penalty);
  if (flags.presence_penalty) sampling.set_presence_penalty(*flags.presence_penalty);
  if (flags.frequency_penalty) sampling.set_frequency_penalty(*flags.frequency_penalty);
  if (flags.seed) sampling.set_seed(*flags.seed);
  if (flags.n) sampling.set_n(*flags.n);
  v1::StoppingOptions& stopping = *request.mutable_stopping();
  if (flags.max_tokens) stopping.set_max_tokens(*flags.max_tokens);
  if (flags.min_tokens) stopping.set_min_tokens(*flags.min_tokens);
  if (flags.time_limit_ms) stopping.set_time_limit_ms(*flags.time_limit_ms);
  if (flags.ignore_eos) stopping.set_ignore_eos(true);
  for (const std::string& stop : flags.stop) stopping.add_stop(stop);
  if (flags.echo) request.mutable_response()->set_echo(true);
  if (flags.priority) request.mutable_scheduling()->set_priority(*flags.priority);
  return request;
}

// Tokens per second, live on the terminal's last row while the text scrolls in the rows above it.
class RateLine {
 public:
  explicit RateLine(bool on_terminal) : start_(Clock::now()) {
    winsize size{};
    if (!on_terminal || ioctl(STDERR_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_row < 3) return;
    row_ = size.ws_row;
    // A line feed makes room, then: save the cursor, scroll only above the last row, restore, go up.
    std::cerr << absl::StrFormat("\n\0337\033[1;%dr\0338\033[A", row_ - 1) << std::flush;
  }
  ~RateLine() { Remove(); }
  RateLine(const RateLine&) = delete;
  RateLine& operator=(const RateLine&) = delete;

  void Count(int64_t num_tokens) {
    if (num_tokens == 0) return;
    if (num_tokens_ == 0) {
      first_token_ = Clock::now();
      first_burst_ = num_tokens;
    }
    num_tokens_ += num_tokens;
    last_token_ = Clock::now();
  }

  void Show() {
    const auto now = Clock::now();
    if (row_ == 0 || now - last_shown_ < std::chrono::milliseconds(100)) return;
    last_shown_ = now;
    std::cerr << absl::StrFormat("\0337\033[%d;1H\033[2K%s\0338", row_, Text()) << std::flush;
  }

  void Remove() {
    if (row_ == 0) return;
    std::cerr << absl::StrFormat("\0337\033[%d;1H\033[2K\033[r\0338", row_) << std::flush;
    row_ = 0;
  }

  std::string Text() const {
    const double seconds = std::chrono::duration<double>(last_token_ - first_token_).count();
    const double rate =
        seconds > 0 ? static_cast<double>(num_tokens_ - first_burst_) / seconds : 0;
    return absl::StrFormat("%d tokens, %.0f tokens/s, first after %.0f ms", num_tokens_, rate,
                           std::chrono::duration<double, std::milli>(first_token_ - start_).count());
  }

 private:
  int row_ = 0;  // of the terminal, 0: not shown
  Clock::time_point start_, first_token_ = start_, last_token_ = start_, last_shown_ = start_;
  int64_t num_tokens_ = 0, first_burst_ = 0;
};

const char* ReasonText(v1::FinishReason reason) {
  switch (reason) {
    case v1::FINISH_REASON_STOP_EOS: return "end of text";
    case v1::FINISH_REASON_STOP_TOKEN: return "stop token";
    case v1::FINISH_REASON_STOP_STRING: return "stop string";
    case v1::FINISH_REASON_LENGTH: return "max_tokens";
    case v1::FINISH_REASON_TIME_LIMIT: return "time limit";
    default: return "unknown";
  }
}

// Prints what the stream brings. With n > 1 each output is a paragraph of its own: outputs after the
// first are kept until the first is complete.
class Printer {
 public:
  explicit Printer(const CompleteFlags& flags, int32_t n)
      : texts_(n), rate_(!flags.quiet && isatty(STDOUT_FILENO) == 1 && isatty(STDERR_FILENO) == 1),
        quiet_(flags.quiet) {}

  void Handle(const v1::GenerateEvent& event) {
    received_ = true;
    if (event.has_prompt() && !event.prompt().text().empty()) Write(event.prompt().text());
    if (event.has_delta()) {
      rate_.Count(event.delta().token_ids_size());
      if (event.output_index() == 0) {
        Write(event.delta().text());
      } else {
        texts_[event.output_index()] += event.delta().text();
      }
      rate_.Show();
    }
    if (event.has_finished()) reason_ = event.finished().reason();
    if (event.has_summary()) summary_ = event.summary();
  }

  void Finish(bool complete) {
    rate_.Remove();
    if (!complete && !received_) return;  // refused: there is only the error to tell
    for (size_t output = 1; output < texts_.size(); ++output) {
      Write("\n\n--- output " + std::to_string(output) + "\n" + texts_[output]);
    }
    std::cout << std::endl;
    if (quiet_) return;
    std::cerr << "[" << rate_.Text();
    if (complete) {
      std::cerr << absl::StrFormat("; prompt %d tokens in %.0f ms; ended by %s; seed %u",
                                   summary_.usage().prompt_tokens(),
                                   summary_.timings().prefill_ms(), ReasonText(reason_),
                                   summary_.seed());
    }
    std::cerr << "]" << std::endl;
  }

 private:
  void Write(const std::string& text) { std::cout << text << std::flush; }

  std::vector<std::string> texts_;  // by output index; [0] is printed as it comes
  RateLine rate_;
  bool quiet_;
  bool received_ = false;
  v1::FinishReason reason_ = v1::FINISH_REASON_UNSPECIFIED;
  v1::Summary summary_;
};

// Cancels the call when Ctrl-C was pressed: TryCancel may not be called from a signal handler.
class InterruptWatcher {
 public:
  explicit InterruptWatcher(grpc::ClientContext& context)
      : thread_([this, &context] {
          while (!done_.load()) {
            if (g_interrupted != 0) {
              context.TryCancel();
              return;
            }
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
          }
        }) {}
  ~InterruptWatcher() {
    done_.store(true);
    thread_.join();
  }

 private:
  std::atomic<bool> done_{false};
  std::thread thread_;
};

int RunComplete(const CompleteFlags& flags) {
  absl::StatusOr<Client> client = Connect(flags.client);
  if (!client.ok()) return Report(client.status(), kUsage);
  if (flags.prompt.empty() && flags.prompt_file.empty() && flags.token_ids.empty() &&
      flags.session.empty()) {
    return Report(absl::InvalidArgumentError("--prompt, --prompt-file, --token-ids or --session is needed"),
                  kUsage);
  }
  absl::StatusOr<v1::GenerateRequest> request = MakeRequest(flags);
  if (!request.ok()) return Report(request.status(), kUsage);

  std::signal(SIGINT, [](int) { g_interrupted = 1; });
  grpc::ClientContext context;
  client->Prepare(context);
  Printer printer(flags, flags.n.value_or(1));
  grpc::Status status;
  {
    InterruptWatcher watcher(context);
    auto stub = v1::Inference::NewStub(client->channel);
    auto reader = stub->GenerateStream(&context, *request);
    v1::GenerateEvent event;
    while (reader->Read(&event)) printer.Handle(event);
    status = reader->Finish();
  }
  printer.Finish(status.ok());
  if (status.ok()) return kDone;
  std::cerr << "godwit: " << (g_interrupted != 0 ? "cancelled" : Describe(status)) << "\n";
  return kFailed;
}

}  // namespace

void AddCompleteCommand(CLI::App& app, int& exit_code) {
  auto flags = std::make_shared<CompleteFlags>();
  CLI::App* command =
      app.add_subcommand("complete", "Stream a completion from a server; Ctrl-C cancels it");
  AddClientFlags(*command, flags->client);
  auto* input = command->add_option_group("input")->require_option(0, 1);
  input->add_option("--prompt", flags->prompt, "text");
  input->add_option("--prompt-file", flags->prompt_file, "file with the text")->type_name("FILE");
  input->add_option("--token-ids", flags->token_ids, "e.g. 1,5,9");
  command->add_option("--session", flags->session,
                      "go on with this session and keep what is left; without input where it ended");
  command->add_option("--save-as", flags->save_as, "also write the state as a snapshot of this name");
  command->add_option("--max-tokens", flags->max_tokens, "tokens per output; absent: the server's default");
  command->add_option("--min-tokens", flags->min_tokens, "no end of text before that many tokens");
  command->add_option("--temperature", flags->temperature, "0 = greedy; absent: 1");
  command->add_option("--top-k", flags->top_k, "0 = all");
  command->add_option("--top-p", flags->top_p, "(0, 1]");
  command->add_option("--min-p", flags->min_p, "[0, 1]");
  command->add_option("--repetition-penalty", flags->repetition_penalty, "(0, 100]");
  command->add_option("--presence-penalty", flags->presence_penalty, "[-2, 2]");
  command->add_option("--frequency-penalty", flags->frequency_penalty, "[-2, 2]");
  command->add_option("--seed", flags->seed, "absent: the server draws one");
  command->add_option("-n,--n", flags->n, "outputs")->check(CLI::Range(1, 1024));
  command->add_option("--stop", flags->stop, "stop string; may be given several times");
  command->add_option("--priority", flags->priority, "higher runs first; [-100, 100]");
  command->add_option("--time-limit-ms", flags->time_limit_ms, "end OK after that long");
  command->add_option("--request-id", flags->request_id, "echoed by the server");
  command->add_flag("--ignore-eos", flags->ignore_eos, "go on after the end of text");
  command->add_flag("--echo", flags->echo, "print the prompt first");
  command->add_flag("-q,--quiet", flags->quiet, "the text only");
  command->callback([flags, &exit_code] { exit_code = RunComplete(*flags); });
}

}  // namespace godwit::cli
