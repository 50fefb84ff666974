#include "server/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/exposer.h>
#include <prometheus/family.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <algorithm>
#include <array>
#include <exception>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/draft_policy.h"
#include "server/clock.h"
#include "server/session_registry.h"
#include "server/status_mapping.h"
#include "server/version.h"

namespace godwit {
namespace {

using prometheus::BuildCounter;
using prometheus::BuildGauge;
using prometheus::BuildHistogram;
using prometheus::ClientMetric;
using prometheus::Histogram;
using prometheus::Labels;
using prometheus::MetricFamily;
using prometheus::MetricType;
using Buckets = Histogram::BucketBoundaries;

const Buckets kTimeToFirstToken = {.001, .005, .01, .02, .04, .06, .08, .1, .25, .5,  .75,
                                   1,    2.5,  5,   7.5, 10,  20,  40,  80, 160, 640, 2560};
// vLLM's begin at 10 ms, where a small model has all of its tokens in the first bucket.
const Buckets kInterToken = {.0005, .001, .002, .004, .006, .008, .01, .015, .02,
                             .03,   .05,  .075, .1,   .2,   .5,   1,   2,    5};
const Buckets kRequestSeconds = {.005, .01, .025, .05, .1, .3, .5, .8,  1,   1.5, 2,   2.5,  5,
                                 10,   15,  20,   30,  40, 50, 60, 120, 240, 480, 960, 1920, 7680};
const Buckets kStepSeconds = {.00005, .0001, .0002, .0005, .001, .002, .005, .01, .02,
                              .05,    .1,    .2,    .5,    1,    2,    5,    10};
// What a device leaves uncovered is microseconds; a step of a CPU engine is all overhead at most.
const Buckets kOverheadSeconds = {1e-6,   2e-6, 5e-6, 10e-6, 20e-6, 30e-6, 50e-6, 100e-6,
                                  200e-6, 5e-4, .001, .002,  .005,  .01,   .02,   .05,
                                  .1,     .2,   .5,   1,     2,     5,     10};
const Buckets kIterationTokens = {1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384};
const Buckets kNumOutputs = {1, 2, 5, 10, 20};

// 1, 2, 5, 10, 20, ... up to the context.
Buckets TokenCounts(int64_t context_length) {
  Buckets buckets;
  for (int64_t decade = 1; decade <= context_length; decade *= 10) {
    for (const int64_t digit : {1, 2, 5}) {
      if (decade * digit <= context_length) buckets.push_back(static_cast<double>(decade * digit));
    }
  }
  return buckets;
}

std::string_view FinishedReason(FinishReason reason) {  // vLLM's values, and time_limit
  switch (reason) {
    case FinishReason::kLength:
      return "length";
    case FinishReason::kTimeLimit:
      return "time_limit";
    default:
      return "stop";
  }
}

// Totals and gauges that the scheduler counts itself, read when somebody scrapes.
class LoopCollector final : public prometheus::Collectable {
 public:
  LoopCollector(Labels labels, const CacheGeometry& geometry) : geometry_(geometry) {
    for (const auto& [name, value] : labels) labels_.push_back({name, value});
  }

  void Watch(const EngineLoop* loop) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (loop == nullptr && loop_ != nullptr) last_ = loop_->stats();
    loop_ = loop;
  }

  void WatchSessions(const SessionRegistry* sessions) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (sessions == nullptr && sessions_ != nullptr) last_sessions_ = sessions_->stats();
    sessions_ = sessions;
  }

  std::vector<MetricFamily> Collect() const override {
    const SchedulerStats stats = Read();
    const SessionDiskStats disk = ReadSessions();
    const double slots_total = static_cast<double>(geometry_.num_slots);
    const double slots_used = static_cast<double>(stats.slots_used);
    const double blocks_total = static_cast<double>(geometry_.num_blocks);
    const double blocks_used = static_cast<double>(stats.blocks_used);
    const double slot_bytes = static_cast<double>(geometry_.slot_bytes());
    const double block_bytes = static_cast<double>(geometry_.block_bytes());
    const double usage = std::max(slots_total > 0 ? slots_used / slots_total : 0,
                                  blocks_total > 0 ? blocks_used / blocks_total : 0);
    return {
        Gauge("num_requests_running", "Requests in execution.", stats.num_running),
        Gauge("num_requests_waiting", "Requests waiting to run.", stats.num_waiting),
        Gauge("num_requests_swapped", "Requests preempted to host memory.", stats.num_swapped),
        Gauge("num_tokens_waiting", "Prompt tokens of waiting requests.", stats.num_waiting_tokens),
        Gauge("kv_cache_usage_perc", "Use of the scarcer of state slots and KV blocks, 0 to 1.",
              usage),
        Gauge("state_slots", "Sequences that fit at once.", slots_total),
        Gauge("state_slots_used", "State slots in use.", slots_used),
        Gauge("state_slot_bytes", "Bytes of one state slot.", slot_bytes),
        Gauge("state_bytes", "Bytes of sequence state in use, slots and KV blocks.",
              slots_used * slot_bytes + blocks_used * block_bytes),
        Gauge("kv_blocks", "KV blocks of softmax layers.", blocks_total),
        Gauge("kv_blocks_used", "KV blocks in use.", blocks_used),
        Counter("num_preemptions_total", "Preemptions to host memory.", stats.num_preemptions),
        Counter("prompt_tokens_total", "Prompt tokens computed.", stats.prompt_tokens),
        Counter("generation_tokens_total", "Tokens generated.", stats.generation_tokens),
        // The names of vLLM; both count tokens.
        Counter("prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.",
                stats.prefix_cache.num_queries),
        Counter("prefix_cache_hits_total", "Of these, not computed anew.",
                stats.prefix_cache.num_hits),
        Counter("prefix_cache_evictions_total", "States that the prefix cache gave up.",
                stats.prefix_cache.num_dropped),
        Gauge("prefix_cache_states", "States that the prefix cache keeps.",
              stats.prefix_cache.num_states),
        Gauge("prefix_cache_bytes", "Bytes of them, with KV blocks that no sequence uses.",
              stats.prefix_cache.num_bytes),
        Counter("dropped_tokens_total",
                "Tokens that unlimited output dropped from the KV cache, of ended requests.",
                stats.num_dropped),
        Counter("engine_steps_total", "Steps of the engine.", stats.num_steps),
        Gauge("sessions", "Sessions, empty ones too.", disk.num_sessions),
        Gauge("session_states_on_device",
              "States of idle sessions on the device; a fork shares one.",
              stats.sessions.num_on_device),
        Gauge("session_states_on_host", "States of idle sessions in host memory.",
              stats.sessions.num_on_host),
        Gauge("session_states_on_disk", "Sessions whose state is on disk.", disk.num_on_disk),
        Gauge("session_host_bytes", "Host memory of idle sessions in use.",
              stats.sessions.store_bytes_used),
        Gauge("session_disk_bytes", "Snapshots and idle sessions on disk.", disk.disk_bytes),
        Counter("session_moves_to_host_total", "States moved from the device to host memory.",
                stats.sessions.num_to_host),
        Counter("session_moves_to_disk_total", "Sessions moved from host memory to disk.",
                disk.num_to_disk),
        Counter("session_moves_from_disk_total", "Sessions brought back from disk.",
                disk.num_from_disk),
        Counter("session_starts_from_device_total",
                "Requests that found their state on the device.", stats.sessions.num_from_device),
        Counter("session_starts_from_host_total", "Requests that found their state in host memory.",
                stats.sessions.num_from_host),
        Counter("session_states_kept_total", "States that requests left.", stats.sessions.num_kept),
        Counter("session_states_dropped_total", "States given up for want of memory.",
                stats.sessions.num_dropped),
        Counter("sessions_expired_total", "Sessions idle for their time to live.",
                disk.num_expired),
        Counter("session_disk_errors_total",
                "Snapshots and idle sessions that could not be written to disk.",
                disk.num_disk_errors),
        Counter("snapshots_written_total", "Snapshots written.", disk.num_snapshots),
        Counter("snapshots_restored_total", "Sessions made from a snapshot.", disk.num_restores),
        // The names of vLLM.
        Counter("spec_decode_num_drafts_total", "Rounds of drafts.", stats.speculation.num_rounds),
        Counter("spec_decode_num_draft_tokens_total", "Drafted tokens.",
                stats.speculation.num_drafts),
        Counter("spec_decode_num_accepted_tokens_total", "Drafted tokens that were accepted.",
                stats.speculation.num_accepted),
        ByPlace("spec_decode_num_draft_tokens_per_pos_total", "Drafted tokens by place.",
                stats.speculation.drafted_at),
        ByPlace("spec_decode_num_accepted_tokens_per_pos_total",
                "Drafted tokens that were accepted, by place.", stats.speculation.accepted_at),
        Counter("spec_decode_num_wasted_tokens_total",
                "Drafted tokens that were rejected or dropped before verification.",
                stats.speculation.num_wasted()),
        Counter("spec_decode_num_dropped_tokens_total",
                "Drafted tokens that were dropped before verification.",
                stats.speculation.num_dropped),
        ByLabel("spec_decode_steps_total", "Decode steps of sequences, by number of drafts.",
                "num_drafts", stats.speculation.rounds_of_length,
                [](size_t i) { return absl::StrCat(i); }),
        ByLabel("spec_decode_stops_total", "The same by what ended their drafts.", "reason",
                stats.speculation.stops,
                [](size_t i) { return std::string(DraftStopName(static_cast<DraftStop>(i))); }),
        ByDecile("spec_decode_judged_tokens_total",
                 "Judged drafts by tenths of the probability that was predicted.",
                 stats.speculation,
                 [](const auto& decile) { return static_cast<double>(decile.num_drafts); }),
        ByDecile("spec_decode_judged_accepted_tokens_total", "Of these, accepted.",
                 stats.speculation,
                 [](const auto& decile) { return static_cast<double>(decile.num_accepted); }),
        ByDecile("spec_decode_judged_predicted_total", "Of these, the sum of what was predicted.",
                 stats.speculation, [](const auto& decile) { return decile.predicted; }),
    };
  }

 private:
  SchedulerStats Read() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return loop_ != nullptr ? loop_->stats() : last_;
  }
  SessionDiskStats ReadSessions() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return sessions_ != nullptr ? sessions_->stats() : last_sessions_;
  }
  MetricFamily Family(const char* name, const char* help, MetricType type) const {
    MetricFamily family;
    family.name = absl::StrCat("godwit_", name);
    family.help = help;
    family.type = type;
    family.metric.emplace_back().label = labels_;
    return family;
  }
  MetricFamily Gauge(const char* name, const char* help, double value) const {
    MetricFamily family = Family(name, help, MetricType::Gauge);
    family.metric[0].gauge.value = value;
    return family;
  }
  MetricFamily Counter(const char* name, const char* help, int64_t value) const {
    MetricFamily family = Family(name, help, MetricType::Counter);
    family.metric[0].counter.value = static_cast<double>(value);
    return family;
  }

  // A counter for each value of one more label.
  template <typename Values, typename Name>
  MetricFamily ByLabel(const char* name, const char* help, const char* label, const Values& values,
                       const Name& value_name) const {
    MetricFamily family = Family(name, help, MetricType::Counter);
    family.metric.clear();
    for (size_t index = 0; index < values.size(); ++index) {
      ClientMetric& metric = family.metric.emplace_back();
      metric.label = labels_;
      metric.label.push_back({label, value_name(index)});
      metric.counter.value = static_cast<double>(values[index]);
    }
    return family;
  }
  template <typename Values>
  MetricFamily ByPlace(const char* name, const char* help, const Values& values) const {
    return ByLabel(name, help, "position", values,
                   [](size_t place) { return absl::StrCat(place); });
  }
  template <typename Value>
  MetricFamily ByDecile(const char* name, const char* help, const SpeculationStats& stats,
                        const Value& value) const {
    std::array<double, SpeculationStats::kNumDeciles> values;
    std::transform(stats.deciles.begin(), stats.deciles.end(), values.begin(), value);
    return ByLabel(name, help, "decile", values,
                   [](size_t decile) { return absl::StrCat(decile); });
  }

  const CacheGeometry geometry_;
  std::vector<ClientMetric::Label> labels_;
  mutable std::mutex mutex_;  // guards all below
  const EngineLoop* loop_ = nullptr;
  SchedulerStats last_;
  const SessionRegistry* sessions_ = nullptr;
  SessionDiskStats last_sessions_;
};

}  // namespace

struct Metrics::Impl {
  Impl(const std::string& model_name, const ModelCard& card)
      : labels{{"model_name", model_name}},
        collector(std::make_shared<LoopCollector>(labels, card.geometry)),
        registry(std::make_shared<prometheus::Registry>()) {
    const Buckets counts = TokenCounts(card.context_length);
    time_to_first_token =
        &Add("time_to_first_token_seconds", "From arrival to the first token.", kTimeToFirstToken);
    inter_token_latency =
        &Add("inter_token_latency_seconds", "Between two tokens of one output.", kInterToken);
    time_per_output_token = &Add("request_time_per_output_token_seconds",
                                 "Mean time between the tokens of one request.", kInterToken);
    e2e_latency = &Add("e2e_request_latency_seconds", "From arrival to the end.", kRequestSeconds);
    queue_time = &Add("request_queue_time_seconds", "Waiting, or preempted.", kRequestSeconds);
    inference_time =
        &Add("request_inference_time_seconds", "From admission to the end.", kRequestSeconds);
    prefill_time =
        &Add("request_prefill_time_seconds", "From admission to the first token.", kRequestSeconds);
    decode_time =
        &Add("request_decode_time_seconds", "From the first token to the last.", kRequestSeconds);
    prompt_tokens = &Add("request_prompt_tokens", "Prompt tokens of a request.", counts);
    generation_tokens =
        &Add("request_generation_tokens", "Generated tokens of a request, all outputs.", counts);
    max_tokens = &Add("request_params_max_tokens", "max_tokens of a request.", counts);
    num_outputs = &Add("request_params_n", "n of a request.", kNumOutputs);
    iteration_tokens = &Add("iteration_tokens", "Tokens computed in one step.", kIterationTokens);
    step_time = &Add("step_seconds", "One step, from plan to applied result.", kStepSeconds);
    if (card.max_draft_tokens > 0) {
      draft_time =
          &Add("spec_decode_draft_seconds", "The draft model's part of a step.", kStepSeconds);
      verify_time = &Add("spec_decode_verify_seconds", "The model's part of a step with drafts.",
                         kStepSeconds);
    }
    step_overhead = &Add(
        "step_overhead_seconds",
        "Step time that the model's work did not cover: the pause of its device before a step.",
        kOverheadSeconds);
    AddFamilies(card);
  }

  Histogram& Add(const char* name, const char* help, const Buckets& buckets) {
    return BuildHistogram()
        .Name(absl::StrCat("godwit_", name))
        .Help(help)
        .Register(*registry)
        .Add(labels, buckets);
  }

  void AddFamilies(const ModelCard& card) {
    success = &BuildCounter()
                   .Name("godwit_request_success_total")
                   .Help("Outputs that ended, by reason.")
                   .Register(*registry);
    failed = &BuildCounter()
                  .Name("godwit_request_failed_total")
                  .Help("Accepted requests that ended with an error, by code and phase.")
                  .Register(*registry);
    rejected = &BuildCounter()
                    .Name("godwit_request_rejected_total")
                    .Help("Requests refused before they were accepted, by code and reason.")
                    .Register(*registry);
    handled = &BuildCounter()
                   .Name("grpc_server_handled_total")
                   .Help("RPCs completed, by code.")
                   .Register(*registry);
    handling = &BuildHistogram()
                    .Name("grpc_server_handling_seconds")
                    .Help("Time of RPCs.")
                    .Register(*registry);
    // Dashboards want the series from the start.
    for (const char* reason : {"stop", "length", "time_limit"})
      success->Add(With({{"finished_reason", reason}}));
    BuildGauge()
        .Name("godwit_build_info")
        .Help("Always 1; what runs.")
        .Register(*registry)
        .Add(With({{"version", kVersion}, {"backend", card.backend}, {"dtype", card.dtype}}))
        .Set(1);
  }

  Labels With(Labels more) const {
    more.insert(labels.begin(), labels.end());
    return more;
  }

  std::vector<MetricFamily> Collect() const {
    std::vector<MetricFamily> families = collector->Collect();
    std::vector<MetricFamily> own = registry->Collect();
    std::move(own.begin(), own.end(), std::back_inserter(families));
    return families;
  }

  const Labels labels;
  std::shared_ptr<LoopCollector> collector;
  std::shared_ptr<prometheus::Registry> registry;
  Histogram *time_to_first_token, *inter_token_latency, *time_per_output_token, *e2e_latency,
      *queue_time;
  Histogram *inference_time, *prefill_time, *decode_time, *prompt_tokens, *generation_tokens,
      *max_tokens;
  Histogram *num_outputs, *iteration_tokens, *step_time, *step_overhead;
  Histogram *draft_time = nullptr, *verify_time = nullptr;  // with a draft model
  prometheus::Family<prometheus::Counter>*success, *failed, *rejected, *handled;
  prometheus::Family<Histogram>* handling;
  std::unique_ptr<prometheus::Exposer> exposer;
};

Metrics::Metrics(const std::string& model_name, const ModelCard& card)
    : impl_(std::make_unique<Impl>(model_name, card)) {}

Metrics::~Metrics() = default;

void Metrics::OnStep(const StepReport& report) {
  impl_->iteration_tokens->Observe(static_cast<double>(report.num_tokens));
  impl_->step_time->Observe(ToSeconds(report.step_ns));
  impl_->step_overhead->Observe(ToSeconds(report.overhead_ns));
  if (impl_->draft_time == nullptr || report.num_drafts == 0) return;
  impl_->draft_time->Observe(ToSeconds(report.draft_ns));
  impl_->verify_time->Observe(ToSeconds(report.forward_ns - report.draft_ns));
}

void Metrics::WatchLoop(const EngineLoop* loop) { impl_->collector->Watch(loop); }
void Metrics::WatchSessions(const SessionRegistry* sessions) {
  impl_->collector->WatchSessions(sessions);
}

void Metrics::OnFirstToken(TimeNs since_arrival) {
  impl_->time_to_first_token->Observe(ToSeconds(since_arrival));
}

void Metrics::OnInterTokenGap(TimeNs gap) { impl_->inter_token_latency->Observe(ToSeconds(gap)); }

void Metrics::OnOutputFinished(FinishReason reason) {
  impl_->success->Add(impl_->With({{"finished_reason", std::string(FinishedReason(reason))}}))
      .Increment();
}

void Metrics::OnRequestEnded(const RequestStats& stats) {
  const RequestTimings& timings = stats.timings;
  impl_->prompt_tokens->Observe(static_cast<double>(stats.num_prompt_tokens));
  if (stats.max_tokens > 0) {
    impl_->generation_tokens->Observe(static_cast<double>(stats.num_output_tokens));
    impl_->max_tokens->Observe(static_cast<double>(stats.max_tokens));
    impl_->num_outputs->Observe(stats.num_outputs);
  }
  impl_->queue_time->Observe(ToSeconds(timings.queue_ns));
  if (timings.submitted != kNever && timings.finished != kNever) {
    impl_->e2e_latency->Observe(ToSeconds(timings.finished - timings.submitted));
  }
  if (timings.admitted != kNever) {
    if (timings.finished != kNever)
      impl_->inference_time->Observe(ToSeconds(timings.finished - timings.admitted));
    if (timings.first_token != kNever) {
      impl_->prefill_time->Observe(ToSeconds(timings.first_token - timings.admitted));
    }
  }
  if (timings.first_token != kNever) {
    const TimeNs decode = timings.last_token - timings.first_token;
    impl_->decode_time->Observe(ToSeconds(decode));
    const int64_t per_output = stats.num_output_tokens / std::max(1, stats.num_outputs);
    if (per_output > 1) {
      impl_->time_per_output_token->Observe(ToSeconds(decode) /
                                            static_cast<double>(per_output - 1));
    }
  }
  if (stats.status.ok()) return;
  impl_->failed
      ->Add(impl_->With({{"code", std::string(CodeName(stats.status.code()))},
                         {"phase", std::string(PhaseName(stats.phase))}}))
      .Increment();
}

void Metrics::OnRejected(const absl::Status& status) {
  impl_->rejected
      ->Add(impl_->With(
          {{"code", std::string(CodeName(status.code()))}, {"reason", ReasonOf(status)}}))
      .Increment();
}

void Metrics::OnHandled(std::string_view service, std::string_view method, std::string_view type,
                        absl::StatusCode code, TimeNs duration) {
  Labels labels = {{"grpc_type", std::string(type)},
                   {"grpc_service", std::string(service)},
                   {"grpc_method", std::string(method)}};
  impl_->handling->Add(labels, kRequestSeconds).Observe(ToSeconds(duration));
  labels["grpc_code"] = std::string(CodeName(code));
  impl_->handled->Add(labels).Increment();
}

std::string Metrics::Text() const {
  return prometheus::TextSerializer().Serialize(impl_->Collect());
}

absl::StatusOr<int> Metrics::Listen(const std::string& address) {
  try {
    impl_->exposer = std::make_unique<prometheus::Exposer>(address, 2);
  } catch (const std::exception& e) {  // civetweb reports through it
    return absl::UnavailableError(absl::StrCat("metrics address ", address, ": ", e.what()));
  }
  impl_->exposer->RegisterCollectable(impl_->collector);
  impl_->exposer->RegisterCollectable(impl_->registry);
  return impl_->exposer->GetListeningPorts().front();
}

void Metrics::StopListening() { impl_->exposer.reset(); }

}  // namespace godwit
