// What a step's result does: tokens are kept up to the output's end, events go out, leases are
// freed.

#include <algorithm>
#include <iterator>
#include <optional>
#include <utility>

#include "kernels/base/check.h"
#include "scheduler/scheduler_impl.h"

namespace godwit {
namespace {

bool Contains(const std::vector<int32_t>& ids, int32_t id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

struct Cut {
  size_t num_kept = 0;               // tokens before the end
  std::optional<FinishInfo> finish;  // none: the output goes on
};

// Where an EOS, a stop token or max_tokens ends the output. The id that ends it is not kept.
Cut CutAtTokenOrLength(std::span<const SampledToken> tokens, const GenerateRequest& request,
                       int64_t num_output) {
  for (size_t index = 0; index < tokens.size(); ++index) {
    const int32_t id = tokens[index].token_id;
    if (Contains(request.eos_token_ids, id)) {
      return {index, FinishInfo{.reason = FinishReason::kEos, .stop_token_id = id}};
    }
    if (Contains(request.stop_token_ids, id)) {
      return {index, FinishInfo{.reason = FinishReason::kStopToken, .stop_token_id = id}};
    }
    if (num_output + static_cast<int64_t>(index) + 1 == request.max_tokens) {
      return {index + 1, FinishInfo{.reason = FinishReason::kLength}};
    }
  }
  return {tokens.size(), std::nullopt};
}

// The earliest end: a stop string is complete at or before the place that the ids gave.
Cut FindEnd(std::span<const SampledToken> tokens, const GenerateRequest& request,
            const Sequence& sequence) {
  Cut cut = CutAtTokenOrLength(tokens, request, sequence.num_output);
  if (request.find_stop.empty() || cut.num_kept == 0) return cut;
  const FindStop& find_stop = request.find_stop[static_cast<size_t>(sequence.output_index)];
  if (!find_stop) return cut;
  const std::optional<StopMatch> match = find_stop(tokens.first(cut.num_kept));
  if (!match) return cut;
  GODWIT_CHECK(match->last_token >= 0);
  GODWIT_CHECK(match->last_token < static_cast<int64_t>(cut.num_kept));
  return {static_cast<size_t>(match->last_token) + 1,
          FinishInfo{.reason = FinishReason::kStopString, .stop_index = match->stop_index}};
}

}  // namespace

void Scheduler::Impl::Apply(StepPlan plan, StepResult result, TimeNs now) {
  GODWIT_CHECK(result.rows.size() == plan.rows.size());
  ++num_steps_;
  const StepPlan::Record& record = *plan.record;
  CountDrafts(plan, result);
  for (size_t row = 0; row < plan.rows.size(); ++row) {
    const StepPlan::Record::Row& planned = record.rows[row];
    RowResult& computed = result.rows[row];
    RequestGroup& group = *planned.sequence->group;
    GODWIT_CHECK(computed.outputs.size() == planned.num_outputs);
    prompt_tokens_ += planned.num_prompt_tokens;
    RecordDropped(record, planned, computed);
    if (group.phase == Phase::kFinished) continue;
    if (!computed.status.ok()) {
      prefixes_.Forget(group.request);
      EndGroup(group, computed.status, now);
      continue;
    }
    if (planned.num_prompt_tokens > 0) {
      ApplyPrompt(group, planned.num_prompt_tokens, std::move(computed.scores), now);
    }
    for (size_t output = 0; output < planned.num_outputs; ++output) {
      Sequence& sequence = *record.drawers[planned.first_output + output];
      // The state holds all drawn tokens but the last; a decode row began one token behind.
      const auto num_tokens = static_cast<int64_t>(computed.outputs[output].size());
      GODWIT_CHECK(num_tokens >= 1);
      if (planned.num_prompt_tokens > 0) {
        sequence.confirmed_position = group.prompt_length + num_tokens - 1;
      } else {
        sequence.confirmed_position += num_tokens;
      }
      sequence.num_drawn += num_tokens - 1;
      if (!sequence.finished) ApplyDraws(sequence, std::move(computed.outputs[output]), now);
    }
  }
  Land(plan);
  Recycle(std::move(plan));
}

// What a step drew for an output that had ended is no part of the state that is kept.
void Scheduler::Impl::RecordDropped(const StepPlan::Record& record,
                                    const StepPlan::Record::Row& planned,
                                    const RowResult& computed) {
  for (size_t output = 0; output < planned.num_outputs; ++output) {
    Sequence& sequence = *record.drawers[planned.first_output + output];
    if (!sequence.kept) continue;
    for (const SampledToken& token : computed.outputs[output]) {
      if (token.token_id >= 0) sequence.dropped_tokens.push_back(token.token_id);
    }
  }
}

// Into the statistics of the rows' requests, and of all.
void Scheduler::Impl::CountDrafts(const StepPlan& plan, const StepResult& result) {
  double num_drawn = 0;
  for (const RowResult& row : result.rows) num_drawn += row.num_drafts + row.num_dropped;
  const double verify_seconds = result.forward_seconds - result.draft_seconds;
  for (size_t index = 0; index < plan.rows.size(); ++index) {
    const StepPlan::Record::Row& planned = plan.record->rows[index];
    const RowResult& row = result.rows[index];
    RequestGroup& group = *planned.sequence->group;
    if (planned.num_prompt_tokens > 0 || !group.speculates() || !row.status.ok()) continue;
    // A row that could not ask for drafts was limited by the plan.
    const DraftStop stop = row.draft_stop.value_or(plan.rows[index].draft_limit);
    for (SpeculationStats* stats : {&group.speculation, &speculation_}) {
      stats->AddRow(row, stop);
      if (num_drawn > 0) {
        stats->draft_seconds +=
            result.draft_seconds * (row.num_drafts + row.num_dropped) / num_drawn;
      }
      if (result.num_tokens > 0) {
        stats->verify_seconds +=
            verify_seconds * (1 + row.num_drafts) / static_cast<double>(result.num_tokens);
      }
    }
  }
}

void Scheduler::Impl::ApplyPrompt(RequestGroup& group, int64_t num_tokens,
                                  std::vector<SampledToken> scores, TimeNs now) {
  group.num_prompt_confirmed += num_tokens;
  group.sequences[0].confirmed_position = group.num_prompt_confirmed;
  group.prompt_scores.insert(group.prompt_scores.end(), std::make_move_iterator(scores.begin()),
                             std::make_move_iterator(scores.end()));
  if (group.num_prompt_confirmed < group.prompt_length) return;
  group.phase = Phase::kDecoding;
  group.events.push_back({.kind = TokenEvent::Kind::kPrompt,
                          .num_cached_tokens = group.num_cached,
                          .tokens = std::move(group.prompt_scores)});
  if (group.request.max_tokens > 0) return;
  MarkKept(group.sequences[0], FinishReason::kLength);
  EndGroup(group, absl::OkStatus(), now);
}

void Scheduler::Impl::ApplyDraws(Sequence& sequence, std::vector<SampledToken> tokens, TimeNs now) {
  RequestGroup& group = *sequence.group;
  const Cut cut = FindEnd(tokens, group.request, sequence);
  for (size_t token = cut.num_kept; token < tokens.size(); ++token) {
    sequence.dropped_tokens.push_back(tokens[token].token_id);
  }
  tokens.resize(cut.num_kept);
  if (!tokens.empty()) {
    sequence.last_token = tokens.back().token_id;
    sequence.num_output += std::ssize(tokens);
    generation_tokens_ += std::ssize(tokens);
    if (group.timings.first_token == kNever) group.timings.first_token = now;
    group.timings.last_token = now;
    std::vector<TimeNs> times(tokens.size(), now);
    group.events.push_back({.kind = TokenEvent::Kind::kTokens,
                            .output_index = sequence.output_index,
                            .tokens = std::move(tokens),
                            .times = std::move(times)});
  }
  if (cut.finish) FinishOutput(sequence, *cut.finish, now);
}

void Scheduler::Impl::Fail(StepPlan plan, const absl::Status& status, TimeNs now) {
  GODWIT_CHECK(!status.ok());
  sessions_.Lose(plan.copies);
  prefixes_.Clear();
  for (const StepPlan::Record::Row& row : plan.record->rows) {
    RequestGroup& group = *row.sequence->group;
    if (group.phase != Phase::kFinished) EndGroup(group, status, now);
  }
  if (!plan.copies.empty()) {
    const std::vector<int64_t>& copied = plan.record->copied_orders;
    for (const std::vector<GroupPtr>* groups : {&queue_, &running_}) {
      for (const GroupPtr& group : *groups) {
        const bool was_copied =
            std::find(copied.begin(), copied.end(), group->order) != copied.end();
        if (was_copied && group->phase != Phase::kFinished) EndGroup(*group, status, now);
      }
    }
  }
  Land(plan);
  Recycle(std::move(plan));
}

void Scheduler::Impl::Land(StepPlan& plan) {
  const StepPlan::Record& record = *plan.record;
  if (record.rows.empty()) {
    Sweep();
    return;
  }
  GODWIT_CHECK(steps_in_flight_ > 0);
  --steps_in_flight_;
  for (const StepPlan::Record::Row& row : record.rows) {
    --row.sequence->steps_in_flight;
    for (size_t output = 0; output < row.num_outputs; ++output) {
      Sequence* drawer = record.drawers[row.first_output + output];
      if (drawer != row.sequence) --drawer->steps_in_flight;
    }
  }
  for (const StepPlan::Record::Row& row : record.rows) {
    RequestGroup& group = *row.sequence->group;
    for (Sequence& sequence : group.sequences) {
      if (sequence.finished && sequence.steps_in_flight == 0) GiveBack(sequence);
    }
    // A state that is kept is there before the client hears of the end.
    if (!group.ended_ok || group.request.keep_as == 0) {
      group.request.stream->Push(std::exchange(group.events, {}));
    }
  }
  Sweep();
}

void Scheduler::Impl::Recycle(StepPlan plan) {
  if (spares_.size() == static_cast<size_t>(kMaxStepsInFlight)) return;
  plan.copies.clear();
  plan.rows.clear();
  plan.record->Clear();
  spares_.push_back(std::move(plan));
}

}  // namespace godwit
