// `godwit eval`: does the model use what it was given far back? Retrieval and perplexity by length,
// of a server or of a model in this process; one JSON, a table and a picture.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/command.h"
#include "cli/eval_lossless.h"
#include "cli/eval_target.h"
#include "cli/eval_tasks.h"
#include "cli/svg_chart.h"
#include "kernels/base/status.h"
#include "server/version.h"

namespace godwit::cli {
namespace {

using Json = nlohmann::ordered_json;

struct EvalFlags {
  EvalTargetFlags target;
  std::vector<std::string> files;
  std::vector<int64_t> lengths;
  std::string text_file, prompt_template = "none", output, picture;
  int64_t num_samples = 20, max_cases = 0;
  uint64_t seed = 1;
  int concurrency = 8;
  bool json = false;
};

// --- Cases to scores. ---

// What an answer is worth, by name of the score.
using Scores = std::map<std::string, double>;

struct Task {
  std::string name, x_label;
  int64_t max_tokens = kGiraffeTokens;
  std::function<Scores(const EvalCase& asked, const std::string& answer,
                       const std::string& first35)>
      score;
};

struct Outcome {
  int64_t num_tokens = 0;  // of the prompt
  bool refused = false;    // longer than the context
  std::string answer;
  Scores scores;
};

// Two ways of one answer: the first 35 tokens are what Giraffe's protocol would have generated.
absl::StatusOr<Outcome> Ask(const EvalTarget& target, const Task& task, const EvalCase& asked) {
  Outcome outcome;
  ASSIGN_OR_RETURN(const std::vector<int32_t> prompt, target.tokenize(asked.prompt));
  outcome.num_tokens = std::ssize(prompt);
  absl::StatusOr<std::vector<int32_t>> ids = target.generate(prompt, task.max_tokens);
  if (absl::IsInvalidArgument(ids.status())) {
    outcome.refused = true;
    outcome.answer = std::string(ids.status().message());
    return outcome;
  }
  RETURN_IF_ERROR(ids.status());
  std::string first;
  ASSIGN_OR_RETURN(outcome.answer, target.text(*ids));
  if (std::ssize(*ids) > kGiraffeTokens) ids->resize(kGiraffeTokens);
  ASSIGN_OR_RETURN(first, target.text(*ids));
  outcome.scores = task.score(asked, outcome.answer, first);
  return outcome;
}

absl::StatusOr<std::vector<Outcome>> AskAll(const EvalTarget& target, const Task& task,
                                            const std::vector<EvalCase>& cases, int concurrency) {
  std::vector<Outcome> outcomes(cases.size());
  std::atomic<size_t> next{0};
  std::mutex mutex;  // guards status
  absl::Status status;
  const auto work = [&] {
    for (size_t at = next++; at < cases.size(); at = next++) {
      absl::StatusOr<Outcome> outcome = Ask(target, task, cases[at]);
      if (outcome.ok()) {
        outcomes[at] = *std::move(outcome);
        continue;
      }
      const std::lock_guard lock(mutex);
      if (status.ok()) status = outcome.status();
      next = cases.size();
    }
  };
  std::vector<std::thread> threads;
  for (int thread = 1; thread < (target.concurrent ? concurrency : 1); ++thread)
    threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  RETURN_IF_ERROR(status);
  return outcomes;
}

// --- Report. ---

struct Bucket {
  int64_t bucket = 0, count = 0, refused = 0;
  double tokens = 0;                    // mean
  std::map<std::string, double> means;  // of what was answered
};

std::vector<Bucket> ByBucket(const std::vector<EvalCase>& cases,
                             const std::vector<Outcome>& outcomes) {
  std::map<int64_t, Bucket> buckets;
  for (size_t at = 0; at < cases.size(); ++at) {
    Bucket& bucket = buckets[cases[at].bucket];
    bucket.bucket = cases[at].bucket;
    bucket.tokens += static_cast<double>(outcomes[at].num_tokens);
    ++bucket.count;
    bucket.refused += outcomes[at].refused;
    for (const auto& [name, score] : outcomes[at].scores) bucket.means[name] += score;
  }
  std::vector<Bucket> list;
  for (auto& [key, bucket] : buckets) {
    bucket.tokens /= static_cast<double>(bucket.count);
    for (auto& [name, sum] : bucket.means)
      sum /= static_cast<double>(bucket.count - bucket.refused);
    list.push_back(bucket);
  }
  return list;
}

Json BucketsJson(const std::vector<Bucket>& buckets, bool is_share) {
  Json list = Json::array();
  for (const Bucket& bucket : buckets) {
    Json row = {{"bucket", bucket.bucket},
                {"count", bucket.count},
                {"refused", bucket.refused},
                {"mean_tokens", bucket.tokens}};
    for (const auto& [name, mean] : bucket.means) {
      row[name] = mean;
      const auto answered = static_cast<double>(bucket.count - bucket.refused);
      if (is_share) row[name + "_standard_error"] = std::sqrt(mean * (1 - mean) / answered);
    }
    list.push_back(row);
  }
  return list;
}

void PrintTable(const std::vector<Bucket>& buckets, const std::string& bucket_name) {
  std::vector<std::string> names;
  for (const Bucket& bucket : buckets) {
    for (const auto& [name, mean] : bucket.means) {
      if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
    }
  }
  std::cout << absl::StrFormat("%10s %7s %8s %10s", bucket_name, "cases", "refused", "tokens");
  for (const std::string& name : names) std::cout << absl::StrFormat(" %16s", name);
  std::cout << "\n";
  for (const Bucket& bucket : buckets) {
    std::cout << absl::StrFormat("%10d %7d %8d %10.0f", bucket.bucket, bucket.count, bucket.refused,
                                 bucket.tokens);
    for (const std::string& name : names) {
      const auto found = bucket.means.find(name);
      std::cout << (found == bucket.means.end() ? absl::StrFormat(" %16s", "-")
                                                : absl::StrFormat(" %16.4g", found->second));
    }
    std::cout << "\n";
  }
}

Chart MakeChart(const std::string& title, const std::vector<Bucket>& buckets, bool is_share) {
  Chart chart{.title = title,
              .x_label = "prompt tokens",
              .y_label = is_share ? "share retrieved" : "perplexity"};
  std::map<std::string, ChartSeries> series;
  double highest = 1;
  for (const Bucket& bucket : buckets) {
    for (const auto& [name, mean] : bucket.means) {
      series[name].name = name;
      series[name].x.push_back(bucket.tokens);
      series[name].y.push_back(mean);
      highest = std::max(highest, mean);
    }
  }
  if (!is_share) chart.y_max = highest * 1.1;
  for (auto& [name, line] : series) chart.series.push_back(std::move(line));
  return chart;
}

absl::Status WriteFile(const std::string& flag, const std::string& path,
                       const std::string& content) {
  std::ofstream file(path, std::ios::binary);
  file << content;
  if (file.flush()) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat(flag, ": cannot write ", path));
}

absl::Status ReportBuckets(const EvalFlags& flags, const std::string& name,
                           const std::string& bucket_name, const std::string& target, bool is_share,
                           const std::vector<Bucket>& buckets, Json cases) {
  const Json report = {
      {"eval", name},
      {"version", kVersion},
      {"config",
       {{"target", target},
        {"rope", flags.target.model.rope},
        {"template", flags.prompt_template},
        {"seed", flags.seed}}},
      {"results", {{"buckets", BucketsJson(buckets, is_share)}, {"cases", std::move(cases)}}}};
  const std::string text = report.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
  if (flags.json) {
    std::cout << text << std::flush;
  } else {
    PrintTable(buckets, bucket_name);
  }
  if (!flags.output.empty()) RETURN_IF_ERROR(WriteFile("--output", flags.output, text));
  if (flags.picture.empty()) return absl::OkStatus();
  const std::string title = absl::StrCat(
      name, ": ", target, flags.target.model.rope.empty() ? "" : " ", flags.target.model.rope);
  return WriteFile("--picture", flags.picture, ToSvg(MakeChart(title, buckets, is_share)));
}

absl::Status RunTask(const EvalFlags& flags, const EvalTarget& target, const Task& task,
                     std::vector<EvalCase> cases) {
  if (flags.prompt_template == "vicuna") {
    for (EvalCase& made : cases) made.prompt = VicunaPrompt(made.prompt);
  }
  if (flags.max_cases > 0) {  // of each bucket
    std::map<int64_t, int64_t> counts;
    std::erase_if(cases,
                  [&](const EvalCase& made) { return ++counts[made.bucket] > flags.max_cases; });
  }
  ASSIGN_OR_RETURN(const std::vector<Outcome> outcomes,
                   AskAll(target, task, cases, flags.concurrency));
  Json list = Json::array();
  for (size_t at = 0; at < cases.size(); ++at) {
    Json row = {{"bucket", cases[at].bucket},        {"depth", cases[at].depth},
                {"tokens", outcomes[at].num_tokens}, {"refused", outcomes[at].refused},
                {"expected", cases[at].expected},    {"answer", outcomes[at].answer}};
    for (const auto& [name, score] : outcomes[at].scores) row[name] = score;
    list.push_back(std::move(row));
  }
  return ReportBuckets(flags, task.name, task.x_label, target.name, true, ByBucket(cases, outcomes),
                       std::move(list));
}

// --- The tasks. ---

Scores ScoreInteger(const EvalCase& asked, const std::string&, const std::string& first35) {
  return {{"accuracy", FirstInteger(first35) == asked.expected}};
}

absl::Status RunLines(const EvalFlags& flags, const EvalTarget& target) {
  std::vector<EvalCase> cases;
  const auto append = [&cases](std::vector<EvalCase> more) {
    cases.insert(cases.end(), std::make_move_iterator(more.begin()),
                 std::make_move_iterator(more.end()));
  };
  for (const std::string& file : flags.files) {
    ASSIGN_OR_RETURN(std::vector<EvalCase> read, ReadLines(file));
    append(std::move(read));
  }
  if (flags.files.empty()) {
    for (const int64_t length : flags.lengths)
      append(MakeLines(length, flags.num_samples, flags.seed));
  }
  const Task task = {
      .name = "lines",
      .x_label = "lines",
      .max_tokens = kLongChatTokens,
      .score = [](const EvalCase& asked, const std::string& answer, const std::string& first35) {
        return Scores{{"longchat", LastInteger(answer) == asked.expected},
                      {"giraffe", FirstInteger(first35) == asked.expected}};
      }};
  return RunTask(flags, target, task, std::move(cases));
}

absl::StatusOr<std::string> ReadText(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError("cannot read " + path);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

// Prompts of about `length` tokens: `make` takes bytes, and the tokenizer says how many a token
// has.
template <typename Make>
absl::StatusOr<std::vector<EvalCase>> OfLengths(const EvalFlags& flags, const EvalTarget& target,
                                                Make make) {
  constexpr int64_t kShort = 2'000, kLong = 12'000;  // bytes
  const auto tokens_of = [&](int64_t num_bytes) -> absl::StatusOr<double> {
    ASSIGN_OR_RETURN(const auto ids, target.tokenize(make(num_bytes, 1)[0].prompt));
    return static_cast<double>(ids.size());
  };
  ASSIGN_OR_RETURN(const double few, tokens_of(kShort));
  ASSIGN_OR_RETURN(const double many, tokens_of(kLong));
  const double per_byte = (many - few) / (kLong - kShort), fixed = few - per_byte * kShort;
  std::vector<EvalCase> cases;
  for (const int64_t length : flags.lengths) {
    const double num_bytes = std::max((static_cast<double>(length) - fixed) / per_byte, 0.0);
    for (EvalCase& made : make(static_cast<int64_t>(num_bytes), flags.num_samples)) {
      made.bucket = length;
      cases.push_back(std::move(made));
    }
  }
  return cases;
}

absl::Status RunPasskey(const EvalFlags& flags, const EvalTarget& target) {
  ASSIGN_OR_RETURN(std::vector<EvalCase> cases,
                   OfLengths(flags, target, [&](int64_t num_bytes, int64_t count) {
                     return MakePasskey(num_bytes, count, flags.seed);
                   }));
  return RunTask(flags, target, {.name = "passkey", .x_label = "length", .score = ScoreInteger},
                 std::move(cases));
}

absl::Status RunNeedle(const EvalFlags& flags, const EvalTarget& target) {
  if (!flags.files.empty()) {
    std::vector<EvalCase> cases;
    for (const std::string& file : flags.files) {
      ASSIGN_OR_RETURN(std::vector<EvalCase> read, ReadMultiRound(file));
      cases.insert(cases.end(), read.begin(), read.end());
    }
    const Task task = {
        .name = "niah",
        .x_label = "length",
        .max_tokens = 256,
        .score = [](const EvalCase& asked, const std::string& answer, const std::string&) {
          return Scores{{"line_recall", LineRecall(answer, asked.expected)}};
        }};
    return RunTask(flags, target, task, std::move(cases));
  }
  if (flags.text_file.empty())
    return absl::InvalidArgumentError("niah needs --file, or --text for a haystack");
  ASSIGN_OR_RETURN(const std::string haystack, ReadText(flags.text_file));
  if (haystack.empty()) return absl::InvalidArgumentError(flags.text_file + " is empty");
  ASSIGN_OR_RETURN(std::vector<EvalCase> cases,
                   OfLengths(flags, target, [&](int64_t num_bytes, int64_t count) {
                     return MakeNeedle(haystack, num_bytes, count, flags.seed);
                   }));
  return RunTask(flags, target, {.name = "niah", .x_label = "length", .score = ScoreInteger},
                 std::move(cases));
}

// Windows of each length at even distances in the text. `perplexity` is over all of a window,
// `last` over its last 256 tokens or half: what the whole context helps with.
absl::Status RunPerplexity(const EvalFlags& flags, const EvalTarget& target) {
  if (flags.text_file.empty())
    return absl::InvalidArgumentError("perplexity-by-length needs --text");
  ASSIGN_OR_RETURN(const std::string text, ReadText(flags.text_file));
  ASSIGN_OR_RETURN(const std::vector<int32_t> all, target.tokenize(text));
  std::vector<Bucket> buckets;
  for (const int64_t length : flags.lengths) {
    if (length < 2 || length > std::ssize(all)) {
      return absl::InvalidArgumentError(
          absl::StrCat("length ", length, " not in [2, ", all.size(), "], the tokens of --text"));
    }
    Bucket bucket{.bucket = length, .tokens = static_cast<double>(length)};
    double total = 0, last_total = 0;
    int64_t num_scored = 0, num_last = 0;
    const int64_t last = std::min<int64_t>(256, length / 2), slack = std::ssize(all) - length;
    const int64_t count = std::min(flags.num_samples, slack + 1);
    for (int64_t sample = 0; sample < count; ++sample) {
      const int64_t begin = count < 2 ? 0 : slack * sample / (count - 1);
      std::vector<int32_t> window(all.begin() + begin, all.begin() + begin + length);
      window[0] = all[0];  // BOS, where there is one
      const absl::StatusOr<std::vector<float>> scores = target.score(window);
      ++bucket.count;
      if (absl::IsInvalidArgument(scores.status())) {
        ++bucket.refused;
        continue;
      }
      RETURN_IF_ERROR(scores.status());
      for (int64_t at = 0; at < std::ssize(*scores); ++at) {
        const double score = (*scores)[static_cast<size_t>(at)];
        total -= score;
        ++num_scored;
        if (at < std::ssize(*scores) - last) continue;
        last_total -= score;
        ++num_last;
      }
    }
    if (num_scored > 0) {
      bucket.means["perplexity"] = std::exp(total / static_cast<double>(num_scored));
      bucket.means["last"] = std::exp(last_total / static_cast<double>(num_last));
    }
    buckets.push_back(bucket);
  }
  return ReportBuckets(flags, "perplexity-by-length", "length", target.name, false, buckets,
                       Json::array());
}

// --- Flags. ---

using Run = absl::Status (*)(const EvalFlags& flags, const EvalTarget& target);

int RunEval(const EvalFlags& flags, Run run) {
  absl::StatusOr<EvalTarget> target = OpenEvalTarget(flags.target);
  if (!target.ok()) return Report(target.status(), kCannotLoad);
  const absl::Status status = run(flags, *target);
  if (status.ok()) return kDone;
  return Report(status,
                absl::IsInvalidArgument(status) || absl::IsNotFound(status) ? kUsage : kFailed);
}

CLI::App* AddTask(CLI::App& eval, const char* name, const char* description,
                  std::vector<int64_t> lengths, Run run, std::shared_ptr<EvalFlags>& flags,
                  int& exit_code) {
  flags = std::make_shared<EvalFlags>();
  flags->lengths = std::move(lengths);
  CLI::App* command = eval.add_subcommand(name, description);
  AddEvalTargetFlags(*command, flags->target);
  command
      ->add_option("--lengths", flags->lengths,
                   "of the cases made here: lines of a record, else tokens")
      ->delimiter(',')
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 30));
  command->add_option("--samples", flags->num_samples, "cases made here for each length")
      ->check(CLI::Range(int64_t{1}, int64_t{100'000}));
  command->add_option("--seed", flags->seed, "of the cases made here");
  command->add_option("--concurrency", flags->concurrency, "requests at once, of a server")
      ->check(CLI::Range(1, 1024));
  command->add_flag("--json", flags->json, "stdout is one JSON object, with each answer");
  command->add_option("--output", flags->output, "also write the JSON there")->type_name("FILE");
  command->add_option("--picture", flags->picture, "write the chart there, as SVG")
      ->type_name("FILE");
  command->callback([flags, run, &exit_code] { exit_code = RunEval(*flags, run); });
  return command;
}

void AddRetrievalFlags(CLI::App& command, EvalFlags& flags) {
  command.add_option("--template", flags.prompt_template, "conversation around each prompt")
      ->check(CLI::IsMember({"none", "vicuna"}));
  command.add_option("--max-cases", flags.max_cases, "of each length; 0: all")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 30));
}

}  // namespace

void AddEvalCommand(CLI::App& app, int& exit_code) {
  CLI::App* eval =
      app.add_subcommand("eval", "Long-context evaluation of a server, or of a model offline")
          ->require_subcommand(1);
  std::shared_ptr<EvalFlags> flags;
  CLI::App* lines = AddTask(*eval, "lines", "LongChat-Lines: one number out of a record",
                            {20, 50, 100, 200}, RunLines, flags, exit_code);
  AddRetrievalFlags(*lines, *flags);
  lines->add_option("--file", flags->files, "LongChat-Lines JSONL; absent: records made here")
      ->type_name("FILE");

  CLI::App* passkey = AddTask(*eval, "passkey", "A pass key in repeated sentences",
                              {512, 1024, 2048, 4096}, RunPasskey, flags, exit_code);
  AddRetrievalFlags(*passkey, *flags);

  CLI::App* needle = AddTask(*eval, "niah", "A needle in a text, or MR-NIAH conversations",
                             {512, 1024, 2048, 4096}, RunNeedle, flags, exit_code);
  AddRetrievalFlags(*needle, *flags);
  needle->add_option("--file", flags->files, "MR-NIAH JSONL")->type_name("FILE");
  needle->add_option("--text", flags->text_file, "haystack")->type_name("FILE");

  CLI::App* perplexity =
      AddTask(*eval, "perplexity-by-length", "Perplexity of a text in windows of each length",
              {256, 512, 1024, 2048}, RunPerplexity, flags, exit_code);
  perplexity->add_option("--text", flags->text_file, "text to score")
      ->required()
      ->type_name("FILE");

  AddEvalLosslessCommand(*eval, exit_code);
}

}  // namespace godwit::cli
