// How requests end: by themselves, by cancel, deadline, time limit or error, in every phase.

#include <algorithm>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "scheduler/scheduler_impl.h"

namespace godwit {
namespace {

absl::string_view PhaseName(Phase phase) {
  switch (phase) {
    case Phase::kWaiting:
      return "waiting";
    case Phase::kPrefilling:
      return "prefilling";
    case Phase::kDecoding:
      return "decoding";
    case Phase::kSwapped:
      return "swapped";
    case Phase::kFinished:
      break;
  }
  return "finished";
}

}  // namespace

void Scheduler::Impl::Reap(TimeNs now) {
  for (const GroupPtr& group : queue_) ReapGroup(*group, now);
  for (const GroupPtr& group : running_) ReapGroup(*group, now);
  Sweep();
}

void Scheduler::Impl::ReapGroup(RequestGroup& group, TimeNs now) {
  const GenerateRequest& request = group.request;
  if (request.stream->cancelled()) {
    EndGroup(group, absl::CancelledError(absl::StrCat("cancelled while ", PhaseName(group.phase))),
             now);
  } else if (request.time_limit <= now && request.time_limit <= request.deadline) {
    for (Sequence& sequence : group.sequences) {
      if (!sequence.finished) FinishOutput(sequence, {.reason = FinishReason::kTimeLimit}, now);
    }
  } else if (request.deadline <= now) {
    EndGroup(group,
             absl::DeadlineExceededError(
                 absl::StrCat("deadline exceeded while ", PhaseName(group.phase))),
             now);
  }
}

// By what was confirmed: a step in flight may have dropped more.
void Scheduler::Impl::End(Sequence& sequence) {
  sequence.finished = true;
  if (!sequence.lease.bounded()) return;
  sequence.group->num_dropped += caches_.geometry().dropped_after(sequence.confirmed_position);
}

void Scheduler::Impl::FinishOutput(Sequence& sequence, FinishInfo finish, TimeNs now) {
  GODWIT_CHECK(!sequence.finished);
  RequestGroup& group = *sequence.group;
  End(sequence);
  if (sequence.output_index == 0) MarkKept(sequence, finish.reason);
  group.events.push_back({.kind = TokenEvent::Kind::kFinished,
                          .output_index = sequence.output_index,
                          .finish = finish});
  if (group.num_live() == 0) EndGroup(group, absl::OkStatus(), now);
}

void Scheduler::Impl::EndGroup(RequestGroup& group, absl::Status status, TimeNs now) {
  GODWIT_CHECK(group.phase != Phase::kFinished);
  if (group.phase == Phase::kWaiting || group.phase == Phase::kSwapped) {
    group.timings.queue_ns += now - group.queued_since;
    --(group.phase == Phase::kSwapped ? num_swapped_ : num_waiting_);
    if (group.phase == Phase::kWaiting) num_waiting_tokens_ -= group.num_input();
  }
  group.ended_ok = status.ok();
  const Sequence& first = group.sequences[0];
  group.timings.finished = now;
  for (Sequence& sequence : group.sequences) {
    if (!sequence.finished) End(sequence);
  }
  num_dropped_ += group.num_dropped;
  group.events.push_back({.kind = TokenEvent::Kind::kDone,
                          .status = std::move(status),
                          .phase = group.phase,
                          .timings = group.timings,
                          .speculation = group.speculation,
                          .num_dropped = group.num_dropped,
                          .kept_position = first.kept ? first.kept_position : -1,
                          .kept_token = first.kept ? first.kept_token : -1});
  group.phase = Phase::kFinished;
}

// Output 0 has ended. Its state is the text's: the prompt and the tokens that were delivered. The
// last of these is not in the state, unless a token that ends the text was drawn after it. Nothing
// is kept of a prompt that was not read whole, or of an output that waits in host memory.
void Scheduler::Impl::MarkKept(Sequence& sequence, FinishReason reason) {
  const RequestGroup& group = *sequence.group;
  if (group.request.keep_as == 0 || group.num_prompt_confirmed < group.prompt_length) return;
  if (!sequence.lease.resident()) return;
  const bool ended = reason == FinishReason::kEos || reason == FinishReason::kStopToken;
  const bool all_computed = ended || sequence.num_output == 0;
  // Whether the token that it went on from is in the state is not known.
  if (group.num_input() == 0 && sequence.num_output == 0 && !ended) return;
  sequence.kept_position = group.prompt_length + sequence.num_output - (all_computed ? 0 : 1);
  sequence.kept_token = all_computed ? -1 : sequence.last_token;
  sequence.kept = true;
}

// The lease of an output that has ended and has no step in flight. A state that is kept stays where
// it is until the whole request has ended, well or not.
void Scheduler::Impl::GiveBack(Sequence& sequence) {
  RequestGroup& group = *sequence.group;
  if (sequence.kept && group.phase != Phase::kFinished) return;
  if (sequence.kept && group.ended_ok && sequence.lease) {
    sessions_.Keep(group.request.keep_as, std::move(sequence.lease), sequence.kept_position,
                   sequence.kept_token, std::move(sequence.dropped_tokens));
    return;
  }
  sequence.lease.Release();
}

// Releases and pushes for all groups that ended, those outside a step too, which Land does not see.
void Scheduler::Impl::Sweep() {
  const auto goes_on = [](const GroupPtr& group) { return group->phase != Phase::kFinished; };
  for (std::vector<GroupPtr>* groups : {&queue_, &running_}) {
    if (std::all_of(groups->begin(), groups->end(), goes_on)) continue;
    const auto first = std::stable_partition(groups->begin(), groups->end(), goes_on);
    std::move(first, groups->end(), std::back_inserter(ending_));
    groups->erase(first, groups->end());
  }
  for (const GroupPtr& group : ending_) {
    for (Sequence& sequence : group->sequences) {
      if (sequence.steps_in_flight == 0) GiveBack(sequence);
    }
    if (group->steps_in_flight() == 0 || !group->ended_ok || group->request.keep_as == 0) {
      group->request.stream->Push(std::exchange(group->events, {}));
    }
  }
  std::erase_if(ending_, [](const GroupPtr& group) { return group->steps_in_flight() == 0; });
}

void Scheduler::Impl::AbortAll(const absl::Status& status, TimeNs now) {
  for (const std::vector<GroupPtr>* groups : {&queue_, &running_}) {
    for (const GroupPtr& group : *groups) EndGroup(*group, status, now);
  }
  Sweep();
}

}  // namespace godwit
