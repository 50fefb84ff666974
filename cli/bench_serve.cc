// `godwit bench serve`: load against a running server; closed loop (--concurrency) or open loop
// (--rate, Poisson arrivals).

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <iostream>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "absl/strings/str_format.h"
#include "cli/bench_report.h"
#include "cli/client.h"
#include "cli/command.h"
#include "godwit/v1/inference.grpc.pb.h"
#include "godwit/v1/models.grpc.pb.h"

namespace godwit::cli {
namespace {

using Clock = std::chrono::steady_clock;

double Milliseconds(Clock::duration duration) {
  return std::chrono::duration<double, std::milli>(duration).count();
}

struct BenchServeFlags {
  ClientFlags client;
  int64_t num_requests = 100;
  int64_t concurrency = 8;
  double rate = 0;  // requests per second; 0: closed loop
  int64_t prompt_tokens = 128, output_tokens = 128;
  int64_t shared_prefix_tokens = 0;
  uint64_t seed = 1;
  double temperature = 1;
  bool json = false;
  std::string output;
};

struct Delta {
  Clock::time_point time;
  int64_t num_tokens = 0;
};

// What the streams measured; every stream adds to it under the mutex.
struct Tally {
  std::mutex mutex;
  std::condition_variable changed;
  int64_t num_in_flight = 0, num_done = 0, num_failed = 0;
  int64_t output_tokens = 0, prompt_tokens = 0;
  int64_t cached_tokens = 0;
  int64_t decoded_tokens = 0;  // after the first of each stream,
  double decode_ms = 0;        // and the time from the first to the last
  std::vector<double> ttft_ms, inter_token_ms, end_to_end_ms;
  std::vector<std::vector<Delta>> decoded;    // by stream
  std::vector<std::vector<int32_t>> answers;  // by request
  std::string first_error;
};

// One request. Owns itself: deleted in OnDone.
class Stream final : public grpc::ClientReadReactor<v1::GenerateEvent> {
 public:
  Stream(v1::Inference::Stub& stub, const Client& client, v1::GenerateRequest request,
         int64_t index, Tally& tally)
      : request_(std::move(request)),
        index_(index),
        tally_(tally),
        start_(Clock::now()),
        last_(start_) {
    client.Prepare(context_);
    stub.async()->GenerateStream(&context_, &request_, this);
    StartRead(&event_);
    StartCall();
  }

  void OnReadDone(bool ok) override {
    if (!ok) return;
    if (event_.has_prompt()) num_cached_ = event_.prompt().num_cached_tokens();
    if (event_.has_delta() && event_.delta().token_ids_size() > 0) Count(event_.delta());
    StartRead(&event_);
  }

  void OnDone(const grpc::Status& status) override {
    {
      std::lock_guard lock(tally_.mutex);
      --tally_.num_in_flight;
      ++tally_.num_done;
      if (status.ok()) {
        tally_.ttft_ms.push_back(ttft_ms_);
        tally_.inter_token_ms.insert(tally_.inter_token_ms.end(), gaps_ms_.begin(), gaps_ms_.end());
        tally_.end_to_end_ms.push_back(Milliseconds(Clock::now() - start_));
        tally_.output_tokens += num_tokens_;
        tally_.decoded_tokens += std::ssize(gaps_ms_);
        tally_.decode_ms += decode_ms_;
        tally_.decoded.push_back(std::move(deltas_));
        tally_.prompt_tokens += request_.token_ids().ids_size();
        tally_.cached_tokens += num_cached_;
        tally_.answers[static_cast<size_t>(index_)] = std::move(answer_);
      } else {
        ++tally_.num_failed;
        if (tally_.first_error.empty()) tally_.first_error = Describe(status);
      }
      tally_.changed.notify_all();  // under the lock: the tally may end when it is released
    }
    delete this;
  }

 private:
  // A delta of several tokens (a slow client, or speculation) spreads its gap over them.
  void Count(const v1::Delta& delta) {
    const auto now = Clock::now();
    if (num_tokens_ == 0) {
      ttft_ms_ = Milliseconds(now - start_);
    } else {
      decode_ms_ += Milliseconds(now - last_);
      const double gap = Milliseconds(now - last_) / delta.token_ids_size();
      gaps_ms_.insert(gaps_ms_.end(), delta.token_ids_size(), gap);
    }
    last_ = now;
    answer_.insert(answer_.end(), delta.token_ids().begin(), delta.token_ids().end());
    num_tokens_ += delta.token_ids_size();
    deltas_.push_back({now, delta.token_ids_size()});
  }

  grpc::ClientContext context_;
  v1::GenerateRequest request_;
  v1::GenerateEvent event_;
  const int64_t index_;
  Tally& tally_;
  Clock::time_point start_, last_;
  double ttft_ms_ = 0, decode_ms_ = 0;
  std::vector<double> gaps_ms_;
  std::vector<Delta> deltas_;
  std::vector<int32_t> answer_;
  int64_t num_tokens_ = 0, num_cached_ = 0;
};

// Tokens a second in the time in which `num_streams` streams are between their first token and
// their last; 0 when they never are.
double FullRate(const std::vector<std::vector<Delta>>& streams, int64_t num_streams) {
  struct Event {
    Clock::time_point time;
    int change;  // of the number of streams that decode
    int64_t num_tokens;
  };
  std::vector<Event> events;
  for (const std::vector<Delta>& deltas : streams) {
    for (size_t i = 0; i < deltas.size() && deltas.size() > 1; ++i) {
      const int change = i == 0 ? 1 : i + 1 == deltas.size() ? -1 : 0;
      events.push_back({deltas[i].time, change, deltas[i].num_tokens});
    }
  }
  std::sort(events.begin(), events.end(),
            [](const Event& a, const Event& b) { return a.time < b.time; });
  int64_t num_decoding = 0, num_tokens = 0;
  double milliseconds = 0;
  for (size_t i = 0; i < events.size(); ++i) {
    if (num_decoding >= num_streams) {
      milliseconds += Milliseconds(events[i].time - events[i - 1].time);
      num_tokens += events[i].num_tokens;
    }
    num_decoding += events[i].change;
  }
  return milliseconds > 0 ? static_cast<double>(num_tokens) * 1e3 / milliseconds : 0;
}

v1::GenerateRequest RandomRequest(const BenchServeFlags& flags, int64_t vocab_size, int64_t index,
                                  bool bypass_prefix_cache) {
  std::mt19937_64 random(flags.seed + static_cast<uint64_t>(index));
  // Ids below 3 are control tokens in every sentencepiece vocabulary.
  std::uniform_int_distribution<int32_t> token(
      static_cast<int32_t>(std::min<int64_t>(3, vocab_size - 1)),
      static_cast<int32_t>(vocab_size - 1));
  v1::GenerateRequest request;
  std::mt19937_64 shared(flags.seed ^ 0x9e3779b97f4a7c15u);
  for (int64_t i = 0; i < flags.shared_prefix_tokens; ++i) {
    request.mutable_token_ids()->add_ids(token(shared));
  }
  if (bypass_prefix_cache) request.mutable_state()->set_bypass_prefix_cache(true);
  for (int64_t i = 0; i < flags.prompt_tokens; ++i) {
    request.mutable_token_ids()->add_ids(token(random));
  }
  request.mutable_sampling()->set_temperature(static_cast<float>(flags.temperature));
  request.mutable_sampling()->set_seed(flags.seed + static_cast<uint64_t>(index));
  request.mutable_stopping()->set_max_tokens(flags.output_tokens);
  request.mutable_stopping()->set_ignore_eos(true);
  return request;
}

void ShowProgress(const Tally& tally, int64_t num_requests, Clock::time_point start) {
  constexpr int kWidth = 30;
  const auto filled = static_cast<int>(kWidth * tally.num_done / num_requests);
  std::cerr << absl::StrFormat("\r[%s%s] %d/%d requests, %d running, %.0f tokens/s ",
                               std::string(filled, '#'), std::string(kWidth - filled, '.'),
                               tally.num_done, num_requests, tally.num_in_flight,
                               static_cast<double>(tally.output_tokens) * 1e3 /
                                   Milliseconds(Clock::now() - start))
            << std::flush;
}

// Starts every request at its time and returns when the last has ended.
Clock::duration RunLoad(const BenchServeFlags& flags, const Client& client, int64_t vocab_size,
                        bool bypass_prefix_cache, Tally& tally) {
  tally.answers.resize(static_cast<size_t>(flags.num_requests));
  auto stub = v1::Inference::NewStub(client.channel);
  std::mt19937_64 random(flags.seed);
  std::exponential_distribution<double> gap_s(flags.rate > 0 ? flags.rate : 1);
  const bool progress = isatty(STDERR_FILENO) == 1;
  const auto start = Clock::now();
  auto next_arrival = start;
  std::unique_lock lock(tally.mutex);
  for (int64_t index = 0; index < flags.num_requests; ++index) {
    if (flags.rate > 0) {
      while (tally.changed.wait_until(lock, next_arrival) != std::cv_status::timeout) {
        if (progress) ShowProgress(tally, flags.num_requests, start);
      }
      next_arrival +=
          std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(gap_s(random)));
    } else {
      tally.changed.wait(lock, [&] { return tally.num_in_flight < flags.concurrency; });
      if (progress) ShowProgress(tally, flags.num_requests, start);
    }
    ++tally.num_in_flight;
    lock.unlock();
    new Stream(*stub, client, RandomRequest(flags, vocab_size, index, bypass_prefix_cache), index,
               tally);
    lock.lock();
  }
  while (tally.num_in_flight > 0) {
    tally.changed.wait(lock);
    if (progress) ShowProgress(tally, flags.num_requests, start);
  }
  if (progress) std::cerr << "\n";
  return Clock::now() - start;
}

// The same requests without the prefix cache and with it.
nlohmann::ordered_json PrefixReport(Tally& without, Tally& with) {
  int64_t num_differing = 0;
  for (size_t index = 0; index < with.answers.size(); ++index) {
    num_differing += with.answers[index] != without.answers[index];
  }
  const nlohmann::ordered_json before = Percentiles(without.ttft_ms);
  const nlohmann::ordered_json after = Percentiles(with.ttft_ms);
  return {{"ttft_ms_without", before},
          {"ttft_ms_with", after},
          {"ttft_mean_ratio", before["mean"].get<double>() / after["mean"].get<double>()},
          {"ttft_p50_ratio", before["p50"].get<double>() / after["p50"].get<double>()},
          {"cached_prompt_tokens", with.cached_tokens},
          {"prompt_tokens", with.prompt_tokens},
          {"differing_answers", num_differing}};
}

void PrintPrefixReport(const nlohmann::ordered_json& report) {
  for (const char* name : {"ttft_ms_without", "ttft_ms_with"}) {
    std::cout << absl::StrFormat("%-15s mean %9.3f  p50 %9.3f\n", name,
                                 report[name]["mean"].get<double>(),
                                 report[name]["p50"].get<double>());
  }
  std::cout << absl::StrFormat(
      "prefix cache: time to first token %.2f times better (p50 %.2f), %d of %d prompt tokens "
      "cached, %d differing answers\n",
      report["ttft_mean_ratio"].get<double>(), report["ttft_p50_ratio"].get<double>(),
      report["cached_prompt_tokens"].get<int64_t>(), report["prompt_tokens"].get<int64_t>(),
      report["differing_answers"].get<int64_t>());
}

int RunBenchServe(const BenchServeFlags& flags) {
  absl::StatusOr<Client> client = Connect(flags.client);
  if (!client.ok()) return Report(client.status(), kUsage);
  v1::ModelCard card;
  {
    grpc::ClientContext context;
    client->Prepare(context);
    const grpc::Status status =
        v1::Models::NewStub(client->channel)->GetModel(&context, v1::GetModelRequest(), &card);
    if (!status.ok()) return Report(absl::UnavailableError(Describe(status)), kFailed);
  }
  Tally tally, uncached;
  if (flags.shared_prefix_tokens > 0) {
    RunLoad(flags, *client, card.vocab_size(), /*bypass_prefix_cache=*/true, uncached);
  }
  const double seconds = Milliseconds(RunLoad(flags, *client, card.vocab_size(),
                                              /*bypass_prefix_cache=*/false, tally)) /
                         1e3;
  const auto per_second = [&](int64_t count) { return static_cast<double>(count) / seconds; };
  const nlohmann::ordered_json config = {{"model", card.name()},
                                         {"backend", card.backend()},
                                         {"dtype", card.dtype()},
                                         {"requests", flags.num_requests},
                                         {"concurrency", flags.rate > 0 ? 0 : flags.concurrency},
                                         {"rate", flags.rate},
                                         {"prompt_tokens", flags.prompt_tokens},
                                         {"shared_prefix_tokens", flags.shared_prefix_tokens},
                                         {"output_tokens", flags.output_tokens},
                                         {"temperature", flags.temperature},
                                         {"seed", flags.seed}};
  const int64_t completed = tally.num_done - tally.num_failed;
  // Of a stream: tokens after the first over the time between the first and the last, over all
  // streams; prompts of others that were read meanwhile included.
  const double stream_rate =
      tally.decode_ms > 0 ? static_cast<double>(tally.decoded_tokens) * 1e3 / tally.decode_ms : 0;
  const int64_t num_streams = flags.rate > 0 ? 0 : std::min(flags.concurrency, flags.num_requests);
  const double full_rate = num_streams > 0 ? FullRate(tally.decoded, num_streams) : 0;
  nlohmann::ordered_json results = {
      {"seconds", seconds},
      {"completed", completed},
      {"failed", tally.num_failed},
      {"requests_per_second", per_second(completed)},
      {"output_tokens_per_second", per_second(tally.output_tokens)},
      {"total_tokens_per_second", per_second(tally.output_tokens + tally.prompt_tokens)},
      {"decode_tokens_per_second_per_stream", stream_rate},
      {"decode_tokens_per_second_all_streams", full_rate},
      {"ttft_ms", Percentiles(tally.ttft_ms)},
      {"inter_token_ms", Percentiles(tally.inter_token_ms)},
      {"end_to_end_ms", Percentiles(tally.end_to_end_ms)}};
  if (flags.shared_prefix_tokens > 0) results["prefix_cache"] = PrefixReport(uncached, tally);
  if (!flags.json) {
    std::cout << absl::StrFormat(
        "%d completed, %d failed in %.2f s: %.1f requests/s, %.0f output tokens/s\n", completed,
        tally.num_failed, seconds, per_second(completed), per_second(tally.output_tokens));
    std::cout << absl::StrFormat("decoding: %.2f tokens/s a stream", stream_rate);
    if (num_streams > 0) {
      std::cout << absl::StrFormat(", %.0f tokens/s of %d streams, %.0f while all of them decode",
                                   stream_rate * static_cast<double>(num_streams), num_streams,
                                   full_rate);
    }
    std::cout << "\n";
    for (const char* name : {"ttft_ms", "inter_token_ms", "end_to_end_ms"}) {
      const auto& row = results[name];
      std::cout << absl::StrFormat("%-15s mean %9.3f  p50 %9.3f  p90 %9.3f  p99 %9.3f\n", name,
                                   row["mean"].get<double>(), row["p50"].get<double>(),
                                   row["p90"].get<double>(), row["p99"].get<double>());
    }
    if (flags.shared_prefix_tokens > 0) PrintPrefixReport(results["prefix_cache"]);
  }
  if (!WriteReport("serve", config, results, flags.json, flags.output)) {
    return Report(absl::UnavailableError("--output: cannot write " + flags.output), kFailed);
  }
  if (tally.num_failed > 0) {
    return Report(absl::InternalError("first failure: " + tally.first_error), kFailed);
  }
  return kDone;
}

}  // namespace

void AddBenchServeCommand(CLI::App& bench, int& exit_code) {
  auto flags = std::make_shared<BenchServeFlags>();
  CLI::App* command = bench.add_subcommand("serve", "Load against a running server");
  AddClientFlags(*command, flags->client);
  command->add_option("--requests", flags->num_requests, "requests in all")
      ->check(CLI::Range(int64_t{1}, int64_t{10'000'000}));
  command->add_option("--concurrency", flags->concurrency, "closed loop: streams at once")
      ->check(CLI::Range(int64_t{1}, int64_t{10'000}));
  command
      ->add_option("--rate", flags->rate, "open loop: requests per second, Poisson; 0: closed loop")
      ->check(CLI::Range(0.0, 1e6));
  command->add_option("--prompt-tokens", flags->prompt_tokens, "random ids per prompt")
      ->check(CLI::Range(int64_t{1}, int64_t{10'000'000}));
  command
      ->add_option("--shared-prefix-tokens", flags->shared_prefix_tokens,
                   "every prompt begins with these random ids; the load runs without the prefix "
                   "cache, then with it")
      ->check(CLI::Range(int64_t{0}, int64_t{10'000'000}));
  command->add_option("--output-tokens", flags->output_tokens, "tokens per request, EOS ignored")
      ->check(CLI::Range(int64_t{1}, int64_t{10'000'000}));
  command->add_option("--temperature", flags->temperature, "0 = greedy");
  command->add_option("--seed", flags->seed, "of prompts, arrivals and sampling");
  command->add_flag("--json", flags->json, "stdout is one JSON object");
  command->add_option("--output", flags->output, "also write the JSON there")->type_name("FILE");
  command->callback([flags, &exit_code] { exit_code = RunBenchServe(*flags); });
}

}  // namespace godwit::cli
