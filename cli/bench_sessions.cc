// `godwit bench sessions`: what it costs to fork, save and restore the state of a sequence at
// several contexts; and a document that is read once and forked for each question about it, against
// reading it again for each. Engine loop, session table and files are those of the server.

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <filesystem>
#include <functional>
#include <future>
#include <iostream>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/bench_device.h"
#include "cli/bench_report.h"
#include "cli/command.h"
#include "cli/model_flags.h"
#include "engine/engine.h"
#include "engine/rope_table.h"
#include "engine/state_file.h"
#include "kernels/base/status.h"
#include "kernels/ops.h"
#include "scheduler/engine_loop.h"

namespace godwit::cli {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

struct BenchSessionsFlags {
  ModelFlags model;
  std::string phase = "all";
  std::string contexts = "1k,128k,1M";
  int num_repeats = 20;
  int64_t document_tokens = 100'000;
  int num_questions = 50, num_reread = 3;
  int64_t question_tokens = 32, answer_tokens = 16, concurrency = 8;
  double kv_gib = 0;
  std::string folder;
  bool json = false;
  std::string output;
};

constexpr int64_t kStoreBytes = int64_t{64} << 30;  // a limit, not an allocation
constexpr double kMiB = 1024.0 * 1024.0, kGiB = 1024 * kMiB;
// Sessions of this process. A context and the document are read as kRead; what is derived from them
// lasts as long as a measurement.
constexpr SessionKey kRead = 1, kRestored = 2, kLoaded = 3, kFirstFork = 4;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::vector<int32_t> RandomTokens(int64_t count, int64_t vocab_size, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::uniform_int_distribution<int32_t> token(3, static_cast<int32_t>(vocab_size - 1));
  std::vector<int32_t> ids(static_cast<size_t>(count));
  for (int32_t& id : ids) id = token(random);
  return ids;
}

// The loop as the server runs it, for requests from this thread. No prompt is kept for others.
class Requests {
 public:
  using Tokens = std::vector<int32_t>;

  explicit Requests(Engine& engine)
      : loop_({.scheduler = {.max_tokens_per_step = engine.card().max_tokens_per_step,
                             .max_waiting_tokens = INT64_MAX,
                             .max_wait = kNever / 2,
                             .max_steps_in_flight = engine.card().max_steps_in_flight,
                             .context_length = engine.card().context_length}},
              engine, engine.caches()) {}

  // At most `concurrency` at a time, in order; what each drew. The first error ends all.
  absl::StatusOr<std::vector<Tokens>> Run(std::vector<GenerateRequest> requests,
                                          int64_t concurrency) {
    std::vector<Tokens> answers(requests.size());
    std::vector<std::shared_ptr<TokenStream>> streams(requests.size());
    size_t num_submitted = 0, num_done = 0;
    while (num_done < requests.size()) {
      while (num_submitted < requests.size() &&
             static_cast<int64_t>(num_submitted - num_done) < concurrency) {
        GenerateRequest& request = requests[num_submitted];
        request.stream = streams[num_submitted] = MakeStream();
        RETURN_IF_ERROR(loop_.Submit(std::move(request)));
        ++num_submitted;
      }
      signal_->Wait();
      for (size_t index = 0; index < num_submitted; ++index) {
        if (streams[index] == nullptr) continue;
        ASSIGN_OR_RETURN(const bool done, Take(*streams[index], answers[index]));
        if (!done) continue;
        streams[index] = nullptr;
        ++num_done;
      }
    }
    return answers;
  }

  absl::Status RunOne(GenerateRequest request) {
    std::vector<GenerateRequest> requests;
    requests.push_back(std::move(request));
    return Run(std::move(requests), 1).status();
  }

  absl::Status OnEngine(const std::function<absl::Status(SessionTable&, StepExecutor&)>& work) {
    std::promise<absl::Status> promise;
    const bool posted = loop_.Post([&](SessionTable& sessions, StepExecutor& executor) {
      promise.set_value(work(sessions, executor));
    });
    if (!posted) return absl::UnavailableError("the device was lost");
    return promise.get_future().get();
  }

 private:
  struct Signal {
    std::mutex mutex;
    std::condition_variable changed;
    bool set = false;
    void Set() {
      std::lock_guard<std::mutex> lock(mutex);
      set = true;
      changed.notify_one();
    }
    void Wait() {
      std::unique_lock<std::mutex> lock(mutex);
      changed.wait(lock, [this] { return std::exchange(set, false); });
    }
  };

  std::shared_ptr<TokenStream> MakeStream() {
    return std::make_shared<TokenStream>([signal = signal_] { signal->Set(); });
  }

  // True: the request has ended well.
  static absl::StatusOr<bool> Take(TokenStream& stream, Tokens& answer) {
    for (const TokenEvent& event : stream.Drain()) {
      for (const SampledToken& token : event.tokens) answer.push_back(token.token_id);
      if (event.kind != TokenEvent::Kind::kDone) continue;
      RETURN_IF_ERROR(event.status);
      return true;
    }
    return false;
  }

  std::shared_ptr<Signal> signal_ = std::make_shared<Signal>();
  EngineLoop loop_;
};

// A request that reads and draws nothing: its state is kept as kRead.
GenerateRequest ReadRequest(std::vector<int32_t> token_ids, int64_t start_position = 0) {
  GenerateRequest request;
  request.token_ids = std::move(token_ids);
  request.session = start_position > 0 ? kRead : 0;
  request.start_position = start_position;
  request.keep_as = kRead;
  return request;
}

// --- States

struct StateLine {
  int64_t context = 0;
  std::vector<double> fork_us;         // on the device
  std::vector<double> fork_launch_us;  // from the request for a slot until the copy is done
  std::vector<double> export_ms, write_ms, read_ms, load_ms;
  int64_t file_bytes = 0;
  std::string note;  // why there are no figures
};

class StateBench {
 public:
  StateBench(const BenchSessionsFlags& flags, std::string file, Backend& device, Engine& engine,
             Requests& requests)
      : flags_(flags),
        file_(std::move(file)),
        device_(device),
        engine_(engine),
        requests_(requests),
        layout_(MakeStateLayout(engine.card(), FingerprintText("bench"), "")) {}

  // One sequence reads as far as anything asks for and is measured at each context.
  absl::Status Run(const std::vector<int64_t>& contexts,
                   const std::function<void(StateLine)>& on_line) {
    int64_t position = 0;
    for (const int64_t context : std::set<int64_t>(contexts.begin(), contexts.end())) {
      StateLine line = {.context = context};
      const absl::Status status = Measure(std::exchange(position, context), line);
      if (!status.ok() && !absl::IsResourceExhausted(status)) return status;
      line.note = std::string(status.message());
      on_line(std::move(line));
      if (!status.ok()) break;
    }
    return requests_.OnEngine([](SessionTable& sessions, StepExecutor&) {
      sessions.Erase(kRead);
      return absl::OkStatus();
    });
  }

 private:
  absl::Status Measure(int64_t position, StateLine& line) {
    if (!engine_.caches().FitsEver(line.context + kPrefillBlock, 2)) {
      return absl::ResourceExhaustedError("no room for two");
    }
    RETURN_IF_ERROR(requests_.RunOne(
        ReadRequest(RandomTokens(line.context - position, engine_.card().config.vocab_size,
                                 static_cast<uint64_t>(line.context)),
                    position)));
    // Forks first: memory of saved states goes back to the system in whatever copy comes next.
    for (const auto measure : {&StateBench::Fork, &StateBench::Save, &StateBench::Restore}) {
      StateLine warm_up;
      RETURN_IF_ERROR((this->*measure)(warm_up));
      for (int repeat = 0; repeat < flags_.num_repeats; ++repeat) {
        RETURN_IF_ERROR((this->*measure)(line));
      }
    }
    return absl::OkStatus();
  }

  // Into a slot as a request gets it. The measurements end with it, so that its room is free again.
  absl::Status Begin(SessionTable& sessions, StepExecutor& executor, SessionKey key,
                     CacheLease& lease) {
    ASSIGN_OR_RETURN(lease, engine_.caches().Reserve(sessions.position(key) + kPrefillBlock));
    std::vector<CacheCopy> copies;
    if (!sessions.Begin(key, lease, copies)) return absl::InternalError("the state is lost");
    return executor.Copy(copies);
  }

  absl::Status Fork(StateLine& line) {
    return requests_.OnEngine([&](SessionTable& sessions, StepExecutor& executor) -> absl::Status {
      RETURN_IF_ERROR(sessions.Flush(executor));
      // Host memory of states that were erased before is given back by the next copy: milliseconds.
      RETURN_IF_ERROR(executor.Copy({}));
      RETURN_IF_ERROR(device_.Synchronize());
      CacheLease lease;
      const Clock::time_point start = Clock::now();
      RETURN_IF_ERROR(device_.SetMark(0));
      RETURN_IF_ERROR(Begin(sessions, executor, kRead, lease));
      RETURN_IF_ERROR(device_.SetMark(1));
      RETURN_IF_ERROR(device_.WaitMark(1));
      line.fork_launch_us.push_back(SecondsSince(start) * 1e6);
      double seconds = 0;
      RETURN_IF_ERROR(device_.SecondsBetween(0, 1, &seconds));
      line.fork_us.push_back(seconds * 1e6);
      return absl::OkStatus();
    });
  }

  absl::Status Save(StateLine& line) {
    Clock::time_point start = Clock::now();
    RETURN_IF_ERROR(requests_.OnEngine([&](SessionTable& sessions, StepExecutor& executor) {
      return Export(sessions, executor, kRead, saved_);
    }));
    line.export_ms.push_back(SecondsSince(start) * 1e3);
    start = Clock::now();
    RETURN_IF_ERROR(WriteStateFile(file_, layout_, *saved_, {}));
    line.write_ms.push_back(SecondsSince(start) * 1e3);
    line.file_bytes = static_cast<int64_t>(fs::file_size(file_));
    return absl::OkStatus();
  }

  static absl::Status Export(SessionTable& sessions, StepExecutor& executor, SessionKey key,
                             std::shared_ptr<const StateImage>& image) {
    ASSIGN_OR_RETURN(image, sessions.Export(key, executor));
    return absl::OkStatus();
  }

  absl::Status Restore(StateLine& line) {
    Clock::time_point start = Clock::now();
    ASSIGN_OR_RETURN(const StateFile file, ReadStateFile(file_, layout_));
    line.read_ms.push_back(SecondsSince(start) * 1e3);
    start = Clock::now();
    return requests_.OnEngine([&](SessionTable& sessions, StepExecutor& executor) -> absl::Status {
      CacheLease lease;
      RETURN_IF_ERROR(sessions.Import(kRestored, file.image->position, file.image, executor));
      RETURN_IF_ERROR(Begin(sessions, executor, kRestored, lease));
      RETURN_IF_ERROR(device_.Synchronize());
      line.load_ms.push_back(SecondsSince(start) * 1e3);
      sessions.Erase(kRestored);
      return CheckLoaded(sessions, executor, std::move(lease));
    });
  }

  // The slot holds what was saved.
  absl::Status CheckLoaded(SessionTable& sessions, StepExecutor& executor, CacheLease lease) {
    sessions.Keep(kLoaded, std::move(lease), saved_->position, saved_->last_token, {});
    std::shared_ptr<const StateImage> loaded;
    RETURN_IF_ERROR(Export(sessions, executor, kLoaded, loaded));
    sessions.Erase(kLoaded);
    if (loaded->num_bytes == saved_->num_bytes &&
        std::memcmp(loaded->bytes.get(), saved_->bytes.get(),
                    static_cast<size_t>(saved_->num_bytes)) == 0) {
      return absl::OkStatus();
    }
    return absl::InternalError("the restored state is another than the saved one");
  }

  const BenchSessionsFlags& flags_;
  const std::string file_;
  Backend& device_;
  Engine& engine_;
  Requests& requests_;
  const StateLayout layout_;
  std::shared_ptr<const StateImage> saved_;
};

// --- A document

struct DocumentResult {
  int64_t document_tokens = 0;
  double ingest_s = 0, questions_s = 0;
  double reread_s = 0;  // of num_reread questions
  int num_equal = 0;    // answers of these that are those of the forks
  int64_t num_distinct = 0;
};

class DocumentBench {
 public:
  DocumentBench(const BenchSessionsFlags& flags, Engine& engine, Requests& requests)
      : flags_(flags), engine_(engine), requests_(requests) {
    // Whole blocks: the document's tokens are then computed the same way with a question behind
    // them as without, and the answers have the same bits.
    const int64_t num_blocks = (flags.document_tokens + kPrefillBlock - 1) / kPrefillBlock;
    document_ = Tokens(num_blocks * kPrefillBlock, 1);
    for (int question = 0; question < flags.num_questions; ++question) {
      questions_.push_back(Tokens(flags.question_tokens, static_cast<uint64_t>(question) + 2));
    }
  }

  absl::StatusOr<DocumentResult> Run() {
    DocumentResult result = {.document_tokens = std::ssize(document_)};
    RETURN_IF_ERROR(WarmUp());
    Clock::time_point start = Clock::now();
    RETURN_IF_ERROR(requests_.RunOne(ReadRequest(document_)));
    result.ingest_s = SecondsSince(start);
    start = Clock::now();
    ASSIGN_OR_RETURN(const std::vector<Requests::Tokens> answers, AskForks());
    result.questions_s = SecondsSince(start);
    start = Clock::now();
    ASSIGN_OR_RETURN(const std::vector<Requests::Tokens> reread, Reread());
    result.reread_s = SecondsSince(start);
    for (size_t question = 0; question < reread.size(); ++question) {
      result.num_equal += reread[question] == answers[question];
    }
    result.num_distinct = std::ssize(std::set<Requests::Tokens>(answers.begin(), answers.end()));
    return result;
  }

 private:
  std::vector<int32_t> Tokens(int64_t count, uint64_t seed) const {
    return RandomTokens(count, engine_.card().config.vocab_size, seed);
  }

  // Clocks, caches and what a library chooses for a shape: the document is read once only.
  absl::Status WarmUp() {
    const int64_t num_tokens =
        std::min(std::ssize(document_), 2 * engine_.card().max_tokens_per_step);
    return requests_.RunOne(
        Question({document_.begin(), document_.begin() + static_cast<std::ptrdiff_t>(num_tokens)}));
  }

  GenerateRequest Question(std::vector<int32_t> token_ids) const {
    GenerateRequest request;
    request.token_ids = std::move(token_ids);
    request.sampling.temperature = 0;
    request.max_tokens = flags_.answer_tokens;
    return request;
  }

  absl::StatusOr<std::vector<Requests::Tokens>> AskForks() {
    const auto key = [](size_t question) { return kFirstFork + static_cast<SessionKey>(question); };
    std::vector<GenerateRequest> asked;
    for (size_t question = 0; question < questions_.size(); ++question) {
      RETURN_IF_ERROR(requests_.OnEngine([&](SessionTable& sessions, StepExecutor&) {
        return sessions.Fork(kRead, key(question));
      }));
      asked.push_back(Question(questions_[question]));
      asked.back().session = key(question);
      asked.back().start_position = std::ssize(document_);
    }
    ASSIGN_OR_RETURN(std::vector<Requests::Tokens> answers,
                     requests_.Run(std::move(asked), flags_.concurrency));
    RETURN_IF_ERROR(requests_.OnEngine([&](SessionTable& sessions, StepExecutor&) {
      for (size_t question = 0; question < questions_.size(); ++question) {
        sessions.Erase(key(question));
      }
      sessions.Erase(kRead);
      return absl::OkStatus();
    }));
    return answers;
  }

  absl::StatusOr<std::vector<Requests::Tokens>> Reread() {
    std::vector<GenerateRequest> asked;
    for (int question = 0; question < flags_.num_reread; ++question) {
      std::vector<int32_t> prompt = document_;
      const std::vector<int32_t>& tokens = questions_[static_cast<size_t>(question)];
      prompt.insert(prompt.end(), tokens.begin(), tokens.end());
      asked.push_back(Question(std::move(prompt)));
    }
    return requests_.Run(std::move(asked), flags_.concurrency);
  }

  const BenchSessionsFlags& flags_;
  Engine& engine_;
  Requests& requests_;
  std::vector<int32_t> document_;
  std::vector<std::vector<int32_t>> questions_;
};

// --- Report

std::vector<double> Sum(std::vector<double> first, const std::vector<double>& second) {
  for (size_t index = 0; index < first.size(); ++index) first[index] += second[index];
  return first;
}

nlohmann::ordered_json ToJson(StateLine line) {
  if (!line.note.empty()) return {{"context", line.context}, {"note", line.note}};
  std::vector<double> save_ms = Sum(line.export_ms, line.write_ms);
  std::vector<double> restore_ms = Sum(line.read_ms, line.load_ms);
  return {{"context", line.context},
          {"fork_us", Percentiles(line.fork_us)},
          {"fork_and_launch_us", Percentiles(line.fork_launch_us)},
          {"save_ms", Percentiles(save_ms)},
          {"export_ms", Percentiles(line.export_ms)},
          {"write_ms", Percentiles(line.write_ms)},
          {"restore_ms", Percentiles(restore_ms)},
          {"read_ms", Percentiles(line.read_ms)},
          {"load_ms", Percentiles(line.load_ms)},
          {"file_bytes", line.file_bytes}};
}

void Print(const nlohmann::ordered_json& line) {
  const std::string context = FormatLength(line["context"].get<int64_t>());
  if (line.contains("note")) {
    std::cout << absl::StrFormat("%7s  %s\n", context, line["note"].get<std::string>());
    return;
  }
  const auto of = [&](const char* name, const char* rank) {
    return line[name][rank].get<double>();
  };
  const double num_bytes = line["file_bytes"].get<double>();
  std::cout << absl::StrFormat("%7s%9.1f%9.1f%9.1f%9.1f%9.1f%9.1f%7.2f%9.1f%9.1f%9.1f%10.1f\n",
                               context, of("fork_us", "p50"), of("fork_us", "p90"),
                               of("fork_and_launch_us", "p50"), of("fork_and_launch_us", "p90"),
                               of("save_ms", "p50"), of("write_ms", "p50"),
                               num_bytes / of("write_ms", "p50") / 1e6, of("restore_ms", "p50"),
                               of("restore_ms", "p90"), of("read_ms", "p50"), num_bytes / kMiB)
            << std::flush;
}

double RereadTotal(const DocumentResult& result, const BenchSessionsFlags& flags) {
  return result.reread_s / flags.num_reread * flags.num_questions;
}

nlohmann::ordered_json ToJson(const DocumentResult& result, const BenchSessionsFlags& flags) {
  const double fork_s = result.ingest_s + result.questions_s;
  return {{"document_tokens", result.document_tokens},
          {"ingest_s", result.ingest_s},
          {"questions_s", result.questions_s},
          {"fork_total_s", fork_s},
          {"reread_questions", flags.num_reread},
          {"reread_s_per_question", result.reread_s / flags.num_reread},
          {"reread_total_s", RereadTotal(result, flags)},
          {"ratio", RereadTotal(result, flags) / fork_s},
          {"equal_answers", result.num_equal},
          {"distinct_answers", result.num_distinct}};
}

void Print(const DocumentResult& result, const BenchSessionsFlags& flags) {
  const double fork_s = result.ingest_s + result.questions_s;
  std::cout << absl::StrFormat(
      "document of %d tokens, %d questions of %d + %d tokens, %d at a time\n"
      "  read once and forked: %.2f s + %.2f s = %.2f s\n"
      "  read for every question: %.3f s each (%d measured), %.2f s in all\n"
      "  ratio %.1f; %d of %d answers equal, %d distinct\n",
      result.document_tokens, flags.num_questions, flags.question_tokens, flags.answer_tokens,
      flags.concurrency, result.ingest_s, result.questions_s, fork_s,
      result.reread_s / flags.num_reread, flags.num_reread, RereadTotal(result, flags),
      RereadTotal(result, flags) / fork_s, result.num_equal, flags.num_reread, result.num_distinct);
}

// A folder that goes with the object.
class ScratchFolder {
 public:
  static absl::StatusOr<std::unique_ptr<ScratchFolder>> Create(const std::string& parent) {
    std::string path =
        (parent.empty() ? fs::temp_directory_path() : fs::path(parent)) / "godwit-bench-XXXXXX";
    if (mkdtemp(path.data()) == nullptr) {
      return absl::UnavailableError(absl::StrCat(path, ": ", std::strerror(errno)));
    }
    return std::unique_ptr<ScratchFolder>(new ScratchFolder(path));
  }
  ~ScratchFolder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  const std::string& path() const { return path_; }

 private:
  explicit ScratchFolder(std::string path) : path_(std::move(path)) {}
  const std::string path_;
};

absl::Status RunStates(const BenchSessionsFlags& flags, const std::vector<int64_t>& contexts,
                       Backend& device, Engine& engine, Requests& requests,
                       nlohmann::ordered_json& results) {
  ASSIGN_OR_RETURN(const auto folder, ScratchFolder::Create(flags.folder));
  if (!flags.json) {
    std::cout << "           fork us           and launch    save ms    write         restore "
                 "ms              file\n"
                 "context      p50      p90      p50      p90      p50      p50   GB/s      p50"
                 "      p90     read       MiB"
              << std::endl;
  }
  results["states"] = nlohmann::ordered_json::array();
  StateBench bench(flags, folder->path() + "/state.safetensors", device, engine, requests);
  return bench.Run(contexts, [&](StateLine line) {
    results["states"].push_back(ToJson(std::move(line)));
    if (!flags.json) Print(results["states"].back());
  });
}

absl::Status RunDocument(const BenchSessionsFlags& flags, Engine& engine, Requests& requests,
                         nlohmann::ordered_json& results) {
  ASSIGN_OR_RETURN(const DocumentResult result, DocumentBench(flags, engine, requests).Run());
  results["document"] = ToJson(result, flags);
  if (!flags.json) Print(result, flags);
  const bool bit_equal = flags.model.deterministic || engine.card().backend == "cpu";
  if (bit_equal && result.num_equal != flags.num_reread) {
    return absl::InternalError("a fork answers otherwise than whoever reads the document again");
  }
  return absl::OkStatus();
}

absl::Status Run(const BenchSessionsFlags& flags, const std::vector<int64_t>& contexts,
                 Backend& device, Engine& engine) {
  const ModelCard& card = engine.card();
  const std::string shape = flags.model.shape.empty() ? card.config.family : flags.model.shape;
  const nlohmann::ordered_json config = {{"model", flags.model.model},
                                         {"shape", flags.model.shape},
                                         {"device", card.device},
                                         {"backend", card.backend},
                                         {"dtype", card.dtype},
                                         {"deterministic", flags.model.deterministic},
                                         {"repeats", flags.num_repeats},
                                         {"questions", flags.num_questions},
                                         {"question_tokens", flags.question_tokens},
                                         {"answer_tokens", flags.answer_tokens},
                                         {"concurrency", flags.concurrency},
                                         {"memory_plan", card.memory_plan}};
  if (!flags.json) {
    std::cout << absl::StrFormat("%s, %s; %s; %s\n", shape, card.dtype, card.device,
                                 card.memory_plan);
  }
  nlohmann::ordered_json results = nlohmann::ordered_json::object();
  Requests requests(engine);
  if (flags.phase != "document") {
    RETURN_IF_ERROR(RunStates(flags, contexts, device, engine, requests, results));
  }
  if (flags.phase != "states") RETURN_IF_ERROR(RunDocument(flags, engine, requests, results));
  if (WriteReport("sessions", config, results, flags.json, flags.output)) return absl::OkStatus();
  return absl::UnavailableError("--output: cannot write " + flags.output);
}

int RunBenchSessions(BenchSessionsFlags flags) {
  const absl::StatusOr<std::vector<int64_t>> contexts = ParseLengths(flags.contexts);
  if (!contexts.ok()) return Report(contexts.status(), kUsage);
  flags.num_reread = std::min(flags.num_reread, flags.num_questions);
  EngineOptions options = OfflineOptions(flags.model);
  // A context or document, and what is forked from it or read beside it.
  options.max_sequences = std::max<int64_t>(flags.concurrency, 2) + 2;
  options.kv_bytes = static_cast<int64_t>(flags.kv_gib * kGiB);
  options.store_bytes = kStoreBytes;
  auto backend = OpenBackend(flags.model);
  if (!backend.ok()) return Report(backend.status(), kCannotLoad);
  Backend& device = **backend;  // the engine's from here on
  const auto engine = Engine::Create(options, *std::move(backend));
  if (!engine.ok()) return Report(engine.status(), kCannotLoad);
  const absl::Status status = Run(flags, *contexts, device, **engine);
  return status.ok() ? kDone : Report(status, kFailed);
}

}  // namespace

void AddBenchSessionsCommand(CLI::App& bench, int& exit_code) {
  auto flags = std::make_shared<BenchSessionsFlags>();
  CLI::App* command = bench.add_subcommand(
      "sessions", "Fork, save and restore states; a document that many questions are asked about");
  AddModelOrShape(*command, flags->model);
  AddComputeFlags(*command, flags->model);
  command->add_option("--phase", flags->phase, "what is measured")
      ->check(CLI::IsMember({"all", "states", "document"}));
  command->add_option("--contexts", flags->contexts, "of states: tokens, e.g. 1k,128k,1M")
      ->type_name("LIST");
  command->add_option("--repeats", flags->num_repeats, "forks, saves and restores at a context")
      ->check(CLI::Range(1, 100'000));
  command->add_option("--folder", flags->folder, "where states are saved; else the system's own")
      ->type_name("DIR");
  constexpr int64_t kMaxTokens = int64_t{1} << 30;
  command
      ->add_option("--document-tokens", flags->document_tokens,
                   "its length, rounded up to a multiple of 64")
      ->check(CLI::Range(int64_t{1}, kMaxTokens));
  command->add_option("--questions", flags->num_questions, "about the document")
      ->check(CLI::Range(1, 100'000));
  command->add_option("--question-tokens", flags->question_tokens, "of each question")
      ->check(CLI::Range(int64_t{1}, kMaxTokens));
  command->add_option("--answer-tokens", flags->answer_tokens, "of each answer")
      ->check(CLI::Range(int64_t{1}, kMaxTokens));
  command
      ->add_option("--reread", flags->num_reread,
                   "questions for which the document is really read again")
      ->check(CLI::Range(1, 100'000));
  command->add_option("--concurrency", flags->concurrency, "questions at a time")
      ->check(CLI::Range(int64_t{1}, int64_t{256}));
  command
      ->add_option("--kv-memory", flags->kv_gib,
                   "GiB for KV blocks of softmax layers; 0: what is free")
      ->check(CLI::Range(0.0, 1e5));
  command->add_flag("--json", flags->json, "stdout is one JSON object");
  command->add_option("--output", flags->output, "also write the JSON there")->type_name("FILE");
  command->callback([flags, &exit_code] { exit_code = RunBenchSessions(*flags); });
}

}  // namespace godwit::cli
