// The rows of one step.

#include "scheduler/scheduler.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "kernels/base/check.h"
#include "scheduler/scheduler_impl.h"

namespace godwit {

StepPlan::StepPlan() = default;
StepPlan::StepPlan(StepPlan&&) noexcept = default;
StepPlan& StepPlan::operator=(StepPlan&&) noexcept = default;
StepPlan::~StepPlan() = default;

void StepPlan::Record::Clear() {
  rows.clear();
  drawers.clear();
  outputs.clear();
  copied_orders.clear();
  num_tokens = 0;
}

void SpeculationStats::AddRow(const RowResult& row, DraftStop stop) {
  const auto drafts = static_cast<size_t>(row.num_drafts);
  const size_t accepted = row.outputs[0].size() - 1;
  ++rounds_of_length[drafts];
  ++stops[static_cast<size_t>(stop)];
  num_rounds += drafts > 0;
  num_drafts += row.num_drafts;
  num_accepted += static_cast<int64_t>(accepted);
  num_dropped += row.num_dropped;
  for (size_t place = 0; place < drafts; ++place) {
    ++drafted_at[place];
    accepted_at[place] += place < accepted;
  }
  for (size_t place = 0; place < row.predicted.size() && place <= accepted; ++place) {
    const double predicted = static_cast<double>(row.predicted[place]);
    const int decile = std::clamp(static_cast<int>(predicted * kNumDeciles), 0, kNumDeciles - 1);
    Decile& of = deciles[static_cast<size_t>(decile)];
    ++of.num_drafts;
    of.num_accepted += place < accepted;
    of.predicted += predicted;
  }
}

int64_t RequestGroup::num_live() const {
  return std::count_if(sequences.begin(), sequences.end(),
                       [](const Sequence& sequence) { return !sequence.finished; });
}

int64_t RequestGroup::steps_in_flight() const {
  int64_t count = 0;
  for (const Sequence& sequence : sequences) count += sequence.steps_in_flight;
  return count;
}

Scheduler::Impl::Impl(SchedulerOptions options, CacheManager& caches)
    : options_(options),
      caches_(caches),
      sessions_(caches, options.may_drop_sessions),
      prefixes_(options.prefix_cache, caches) {
  GODWIT_CHECK(options_.max_tokens_per_step >= kMinTokensPerStep);
  GODWIT_CHECK(options_.max_steps_in_flight >= 1);
  GODWIT_CHECK(options_.max_steps_in_flight <= kMaxStepsInFlight);
  GODWIT_CHECK(options_.max_waiting >= 1);
  GODWIT_CHECK(options_.context_length >= 1);
}

StepPlan Scheduler::Impl::TakeSpare() {
  if (spares_.empty()) {
    StepPlan plan;
    plan.record = std::make_unique<StepPlan::Record>();
    return plan;
  }
  StepPlan plan = std::move(spares_.back());
  spares_.pop_back();
  return plan;
}

StepPlan Scheduler::Impl::Plan(TimeNs now) {
  GODWIT_CHECK(steps_in_flight_ < options_.max_steps_in_flight);
  Reap(now);
  for (const GroupPtr& group : running_) group->held = false;
  AgeQueue(now);
  StepPlan plan = TakeSpare();
  plan.copies = sessions_.TakeCopies();
  sessions_.ForgetWanted();
  Admit(plan, now);
  FailStuck(now);
  PlanDecodeRows(plan);
  PlanPrompts(plan, now);
  Publish(plan);
  // Whoever runs alone always gets a row, else the loop would spin.
  GODWIT_CHECK(!plan.rows.empty() || running_.empty() || steps_in_flight_ > 0);
  if (!plan.rows.empty()) {
    ++steps_in_flight_;
    ++next_step_;
  }
  return plan;
}

bool Scheduler::Impl::prompt_pending() const {
  return std::any_of(running_.begin(), running_.end(), [](const GroupPtr& group) {
    return !group->prompt_submitted() && !group->held;
  });
}

void Scheduler::Impl::PlanDecodeRows(StepPlan& plan) {
  ready_.clear();
  for (const GroupPtr& group : running_) {
    if (group->held || !group->prompt_submitted()) continue;
    for (Sequence& sequence : group->sequences) {
      if (group->speculates() && sequence.steps_in_flight > 0) continue;
      if (!sequence.finished && sequence.num_drawn < group->request.max_tokens) {
        ready_.push_back(&sequence);
      }
    }
  }
  const int64_t num_kept_back = prompt_pending() ? kPrefillBlock : 0;
  const int64_t max_rows = options_.max_tokens_per_step - num_kept_back;
  if (std::ssize(ready_) > max_rows) {
    std::stable_sort(ready_.begin(), ready_.end(), [](const Sequence* a, const Sequence* b) {
      return a->last_step < b->last_step;
    });
    ready_.resize(static_cast<size_t>(max_rows));
  }
  const int64_t num_speculating =
      std::count_if(ready_.begin(), ready_.end(),
                    [](const Sequence* sequence) { return sequence->group->speculates(); });
  const int64_t max_drafts =
      (max_rows - std::ssize(ready_)) / std::max<int64_t>(num_speculating, 1);
  for (Sequence* sequence : ready_) AddDecodeRow(*sequence, max_drafts, plan);
}

void Scheduler::Impl::PlanPrompts(StepPlan& plan, TimeNs now) {
  prompts_.clear();
  for (const GroupPtr& group : running_) {
    if (group->held || group->prompt_submitted()) continue;
    if (now - group->last_row >= options_.max_wait) group->aged = true;
    prompts_.push_back(group.get());
  }
  const auto key = [](const RequestGroup* group) {
    return std::tuple(!group->aged, group->aged ? 0 : -group->request.priority, group->admission);
  };
  std::sort(prompts_.begin(), prompts_.end(),
            [&](const RequestGroup* a, const RequestGroup* b) { return key(a) < key(b); });
  for (RequestGroup* group : prompts_) {
    KeepPrefix(*group, plan);
    const int64_t budget = options_.max_tokens_per_step - plan.record->num_tokens;
    const int64_t begin = group->num_prompt_submitted;
    int64_t end = group->num_kept < group->keep_positions.size()
                      ? group->keep_positions[group->num_kept]
                      : group->prompt_length;
    // Cuts are at multiples of kPrefillBlock, wherever the prompt begins.
    if (end - begin > budget) end = (begin + budget) / kPrefillBlock * kPrefillBlock;
    if (end <= begin) continue;  // the end of a shorter prompt may still fit
    group->last_row = now;
    AddPromptRow(*group, end - begin, plan);
  }
}

// The copy goes behind the step that reaches the position, which may be in flight, and before the
// row that goes on from there.
void Scheduler::Impl::KeepPrefix(RequestGroup& group, StepPlan& plan) {
  if (group.num_kept == group.keep_positions.size()) return;
  if (group.num_prompt_submitted < group.keep_positions[group.num_kept]) return;
  ++group.num_kept;
  std::optional<CacheCopy> copy =
      prefixes_.Keep(group.request, group.sequences[0].lease, group.num_prompt_submitted);
  if (copy) plan.copies.push_back(*std::move(copy));
}

void Scheduler::Impl::AddPromptRow(RequestGroup& group, int64_t num_tokens, StepPlan& plan) {
  Sequence& sequence = group.sequences[0];
  const int64_t begin = group.num_prompt_submitted;
  const std::span<const int32_t> token_ids(group.request.token_ids);
  const auto first = static_cast<size_t>(begin - group.first_prompt_token),
             count = static_cast<size_t>(num_tokens);
  BatchRow row{.token_ids = token_ids.subspan(first, count),
               .first_position = begin,
               .confirmed_position = sequence.confirmed_position,
               .prompt_length = group.prompt_length,
               .rope = group.request.rope.get(),
               .lease = &sequence.lease,
               .max_draft_tokens = group.request.max_draft_tokens};
  if (group.request.prompt_logprobs >= 0) {
    row.score_targets = token_ids.subspan(first + 1, count);
    row.num_score_top = group.request.prompt_logprobs;
  }
  plan.rows.push_back(row);
  plan.record->rows.push_back({.sequence = &sequence,
                               .num_prompt_tokens = num_tokens,
                               .first_output = plan.record->outputs.size()});
  plan.record->num_tokens += num_tokens;
  group.num_prompt_submitted += num_tokens;
  ++sequence.steps_in_flight;
  if (!group.prompt_submitted() || group.request.max_tokens == 0) return;
  for (Sequence& output : group.sequences) {
    if (&output != &sequence) ++output.steps_in_flight;
    AddOutput(output, plan);
  }
}

void Scheduler::Impl::AddDecodeRow(Sequence& sequence, int64_t max_drafts, StepPlan& plan) {
  const GenerateRequest& request = sequence.group->request;
  int64_t num_drafts = request.max_draft_tokens;
  DraftStop limit = DraftStop::kMaxDraftTokens;
  const auto lower = [&](int64_t most, DraftStop by) {
    if (num_drafts <= most) return;
    num_drafts = most;
    limit = by;
  };
  lower(max_drafts, DraftStop::kBudget);
  // The last token of an output needs no draft: the target draws it after the drafts.
  lower(request.max_tokens - sequence.num_drawn - 1, DraftStop::kMaxTokens);
  plan.rows.push_back({.confirmed_position = sequence.confirmed_position,
                       .prompt_length = sequence.group->prompt_length,
                       .rope = sequence.group->request.rope.get(),
                       .lease = &sequence.lease,
                       .max_draft_tokens = static_cast<int>(num_drafts),
                       .draft_policy = request.draft_policy,
                       .draft_threshold = request.draft_threshold,
                       .draft_limit = limit});
  plan.record->rows.push_back({.sequence = &sequence, .first_output = plan.record->outputs.size()});
  plan.record->num_tokens += 1 + num_drafts;
  ++sequence.steps_in_flight;
  AddOutput(sequence, plan);
}

void Scheduler::Impl::AddOutput(Sequence& sequence, StepPlan& plan) {
  const GenerateRequest& request = sequence.group->request;
  plan.record->outputs.push_back({.lease = &sequence.lease,
                                  .sampling = &request.sampling,
                                  .seed = request.seed,
                                  .output_index = sequence.output_index,
                                  .coupled = request.seed_is_given});
  plan.record->drawers.push_back(&sequence);
  ++plan.record->rows.back().num_outputs;
  ++sequence.num_drawn;
  sequence.last_step = next_step_;
}

void Scheduler::Impl::Publish(StepPlan& plan) {
  const std::span<const RowOutput> outputs(plan.record->outputs);
  for (size_t row = 0; row < plan.rows.size(); ++row) {
    const StepPlan::Record::Row& record = plan.record->rows[row];
    plan.rows[row].outputs = outputs.subspan(record.first_output, record.num_outputs);
  }
}

SchedulerStats Scheduler::Impl::Stats() const {
  const CacheGeometry& geometry = caches_.geometry();
  const int64_t num_blocks = geometry.has_paged() ? geometry.num_blocks : 0;
  return {.num_waiting = num_waiting_,
          .num_waiting_tokens = num_waiting_tokens_,
          .num_running = std::ssize(running_),
          .num_swapped = num_swapped_,
          .slots_used = geometry.num_slots - caches_.free_slots(),
          .slots_total = geometry.num_slots,
          .blocks_used = num_blocks - caches_.free_blocks() - caches_.idle_blocks(),
          .blocks_total = num_blocks,
          .num_preemptions = num_preemptions_,
          .num_steps = num_steps_,
          .prompt_tokens = prompt_tokens_,
          .generation_tokens = generation_tokens_,
          .num_dropped = num_dropped_,
          .speculation = speculation_,
          .sessions = sessions_.stats(),
          .prefix_cache = prefixes_.stats()};
}

Scheduler::Scheduler(SchedulerOptions options, CacheManager& caches)
    : impl_(std::make_unique<Impl>(options, caches)) {}
Scheduler::~Scheduler() = default;

absl::Status Scheduler::Add(GenerateRequest request, TimeNs now) {
  return impl_->Add(std::move(request), now);
}
StepPlan Scheduler::Plan(TimeNs now) { return impl_->Plan(now); }
void Scheduler::Apply(StepPlan plan, StepResult result, TimeNs now) {
  impl_->Apply(std::move(plan), std::move(result), now);
}
void Scheduler::Fail(StepPlan plan, const absl::Status& status, TimeNs now) {
  impl_->Fail(std::move(plan), status, now);
}
void Scheduler::AbortAll(const absl::Status& status, TimeNs now) { impl_->AbortAll(status, now); }

bool Scheduler::idle() const {
  return impl_->queue_.empty() && impl_->running_.empty() && impl_->ending_.empty() &&
         !impl_->sessions_.has_copies();
}

bool Scheduler::waits_for_room() const { return impl_->waits_for_room(); }
SchedulerStats Scheduler::stats() const { return impl_->Stats(); }
SessionTable& Scheduler::sessions() { return impl_->sessions_; }

}  // namespace godwit
