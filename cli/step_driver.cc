#include "cli/step_driver.h"

#include <chrono>
#include <deque>
#include <iterator>
#include <memory>
#include <utility>

#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace godwit::cli {
namespace {

TimeNs Now() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

SchedulerOptions OptionsFor(const Engine& engine, size_t num_requests) {
  return {.max_tokens_per_step = engine.card().max_tokens_per_step,
          .max_waiting = static_cast<int64_t>(num_requests) + 1,
          .max_waiting_tokens = INT64_MAX,
          .max_wait = kNever / 2,
          .max_steps_in_flight = engine.card().max_steps_in_flight,
          .context_length = engine.card().context_length};
}

class Driver {
 public:
  Driver(Engine& engine, std::vector<GenerateRequest> requests, int64_t concurrency, OnStep on_step)
      : engine_(engine),
        on_step_(std::move(on_step)),
        requests_(std::move(requests)),
        concurrency_(concurrency > 0 ? concurrency : std::ssize(requests_)),
        scheduler_(OptionsFor(engine, requests_.size()), engine.caches()) {
    run_.outputs.resize(requests_.size());
    for (GenerateRequest& request : requests_) {
      streams_.push_back(std::make_shared<TokenStream>([] {}));
      request.stream = streams_.back();
    }
  }

  absl::StatusOr<DrivenRun> Run() {
    while (next_ < requests_.size() || !scheduler_.idle()) {
      RETURN_IF_ERROR(Add());
      RETURN_IF_ERROR(FillSteps());
      if (!in_flight_.empty()) RETURN_IF_ERROR(FinishOldest());
      RETURN_IF_ERROR(Drain());
    }
    run_.num_preemptions = scheduler_.stats().num_preemptions;
    return std::move(run_);
  }

 private:
  struct Step {
    StepPlan plan;
    StepId id = 0;
    bool only_decodes = true;
  };

  absl::Status Add() {
    // One takes the place of another two steps late: it finds those that waited in the slots, and
    // with a higher priority has to preempt one.
    const int64_t num_gone = in_flight_.empty() && scheduler_.idle() ? num_done_ : done_before_[0];
    while (next_ < requests_.size() && static_cast<int64_t>(next_) - num_gone < concurrency_) {
      RETURN_IF_ERROR(scheduler_.Add(std::move(requests_[next_++]), Now()));
    }
    return absl::OkStatus();
  }

  absl::Status FillSteps() {
    while (std::ssize(in_flight_) < engine_.card().max_steps_in_flight) {
      Step step = {.plan = scheduler_.Plan(Now())};
      if (!step.plan.copies.empty()) {
        RETURN_IF_ERROR(engine_.Copy(step.plan.copies));
        step.plan.copies.clear();
        if (step.plan.rows.empty()) continue;
      }
      if (step.plan.rows.empty()) break;
      for (const BatchRow& row : step.plan.rows) step.only_decodes &= row.token_ids.empty();
      ASSIGN_OR_RETURN(step.id, engine_.Submit(step.plan.rows));
      in_flight_.push_back(std::move(step));
    }
    return absl::OkStatus();
  }

  absl::Status FinishOldest() {
    Step step = std::move(in_flight_.front());
    in_flight_.pop_front();
    ASSIGN_OR_RETURN(StepResult result, engine_.Collect(step.id));
    DrivenStep taken = {.num_rows = result.num_tokens, .draft_seconds = result.draft_seconds};
    for (const RowResult& row : result.rows) {
      taken.num_drafts += row.num_drafts;
      taken.num_dropped += row.num_dropped;
      if (!row.outputs.empty()) taken.num_tokens += std::ssize(row.outputs[0]);
    }
    done_before_[0] = std::exchange(done_before_[1], num_done_);
    if (on_step_) on_step_(step.plan.rows, result);
    scheduler_.Apply(std::move(step.plan), std::move(result), Now());
    const TimeNs end = Now();
    if (step.only_decodes) {
      taken.seconds = static_cast<double>(end - last_end_) / 1e9;
      run_.steps.push_back(taken);
    }
    last_end_ = end;
    return absl::OkStatus();
  }

  absl::Status Drain() {
    for (size_t request = 0; request < next_; ++request) {
      if (streams_[request] == nullptr) continue;
      for (TokenEvent& event : streams_[request]->Drain()) {
        DrivenOutput& output = run_.outputs[request];
        if (event.kind == TokenEvent::Kind::kTokens) {
          output.tokens.insert(output.tokens.end(), std::make_move_iterator(event.tokens.begin()),
                               std::make_move_iterator(event.tokens.end()));
        } else if (event.kind == TokenEvent::Kind::kFinished) {
          output.finish = event.finish;
        } else if (event.kind == TokenEvent::Kind::kDone) {
          RETURN_IF_ERROR(event.status);
          output.speculation = event.speculation;
          ++num_done_;
          streams_[request] = nullptr;
          break;
        }
      }
    }
    return absl::OkStatus();
  }

  Engine& engine_;
  const OnStep on_step_;
  std::vector<GenerateRequest> requests_;
  const int64_t concurrency_;
  Scheduler scheduler_;
  std::vector<std::shared_ptr<TokenStream>> streams_;  // null: the request has ended
  std::deque<Step> in_flight_;
  size_t next_ = 0;
  int64_t num_done_ = 0;
  int64_t done_before_[2] = {};  // the same, one and two steps ago
  TimeNs last_end_ = Now();
  DrivenRun run_;
};

}  // namespace

absl::StatusOr<DrivenRun> Drive(Engine& engine, std::vector<GenerateRequest> requests,
                                int64_t concurrency, OnStep on_step) {
  for (const GenerateRequest& request : requests) GODWIT_CHECK(request.num_outputs == 1);
  return Driver(engine, std::move(requests), concurrency, std::move(on_step)).Run();
}

GenerateRequest MakeRequest(std::vector<int32_t> prompt, float temperature, uint64_t seed,
                            int64_t max_tokens) {
  GenerateRequest request = {
      .token_ids = std::move(prompt), .seed = seed, .max_tokens = max_tokens};
  request.sampling.temperature = temperature;
  return request;
}

absl::StatusOr<std::vector<std::vector<int32_t>>> WritePrompts(Engine& engine, uint64_t seed,
                                                               int64_t count, int64_t length) {
  std::vector<GenerateRequest> requests;
  const int32_t start = engine.card().config.bos_token_id.value_or(0);
  for (int64_t index = 0; index < count; ++index) {
    requests.push_back(MakeRequest({start}, 1, seed + static_cast<uint64_t>(index), length - 1));
  }
  ASSIGN_OR_RETURN(const DrivenRun run, Drive(engine, std::move(requests), 0));
  std::vector<std::vector<int32_t>> prompts;
  for (const DrivenOutput& output : run.outputs) {
    std::vector<int32_t>& prompt = prompts.emplace_back(1, start);
    for (const SampledToken& token : output.tokens) prompt.push_back(token.token_id);
  }
  return prompts;
}

}  // namespace godwit::cli
