// Which requests start: validation, the queue and its order, aging.

#include <algorithm>
#include <tuple>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"
#include "scheduler/scheduler_impl.h"

namespace godwit {
namespace {

constexpr int64_t kMaxOutput = int64_t{1} << 40;

absl::Status InvalidField(absl::string_view field, int64_t value, absl::string_view limit) {
  return absl::InvalidArgumentError(absl::StrCat(field, " ", value, " ", limit));
}

// With the state that it starts from. Without input the token drawn after that is its last.
int64_t PromptLength(const GenerateRequest& request) {
  const int64_t num_input = std::ssize(request.token_ids);
  return request.start_position +
         (request.session == 0 ? num_input : std::max<int64_t>(num_input, 1));
}

absl::Status ValidateFields(const GenerateRequest& request) {
  const int64_t num_outputs = request.num_outputs;
  if (request.stream == nullptr) return absl::InvalidArgumentError("stream is missing");
  if (request.token_ids.empty() && request.session == 0) {
    return absl::InvalidArgumentError("the prompt has no tokens");
  }
  if (request.token_ids.empty() && (num_outputs != 1 || request.max_tokens == 0)) {
    return absl::InvalidArgumentError("a session goes on without input in one output only");
  }
  if (num_outputs < 1) return InvalidField("n", num_outputs, "not >= 1");
  if (request.max_tokens < 0) return InvalidField("max_tokens", request.max_tokens, "not >= 0");
  if (request.max_tokens == 0 && num_outputs != 1) {
    return InvalidField("n", num_outputs, "not 1 while max_tokens is 0");
  }
  if (request.priority < -kMaxPriority || request.priority > kMaxPriority) {
    return InvalidField("priority", request.priority,
                        absl::StrCat("not in [", -kMaxPriority, ", ", kMaxPriority, "]"));
  }
  if (request.prompt_logprobs < -1 || request.prompt_logprobs > kMaxTopLogprobs) {
    return InvalidField("prompt_logprobs", request.prompt_logprobs,
                        absl::StrCat("not in [-1, ", kMaxTopLogprobs, "]"));
  }
  if (request.stop_token_ids.size() > static_cast<size_t>(kMaxStopTokenIds)) {
    return absl::InvalidArgumentError(
        absl::StrCat(request.stop_token_ids.size(), " stop token ids, at most ", kMaxStopTokenIds));
  }
  if (!request.find_stop.empty() && std::ssize(request.find_stop) != num_outputs) {
    return absl::InvalidArgumentError(absl::StrCat(
        request.find_stop.size(), " find_stop callbacks for ", num_outputs, " outputs"));
  }
  return absl::OkStatus();
}

// Aged ones in order of arrival; then priority, preempted before new, order of arrival.
auto QueueKey(const RequestGroup& group) {
  const bool swapped = group.phase == Phase::kSwapped;
  return std::tuple(!group.aged, group.aged ? 0 : -group.request.priority, !group.aged && !swapped,
                    group.order);
}

bool InQueueOrder(const GroupPtr& a, const GroupPtr& b) { return QueueKey(*a) < QueueKey(*b); }

}  // namespace

absl::Status ValidateRequest(const GenerateRequest& request, const SchedulerOptions& options,
                             const CacheManager& caches) {
  RETURN_IF_ERROR(ValidateFields(request));
  const int64_t num_prompt = PromptLength(request);
  const CacheGeometry& geometry = caches.geometry();
  // A state that dropped tokens is not that of its text, so none is kept.
  const bool keeps_state = request.session != 0 || request.keep_as != 0;
  if (geometry.bound_tokens > 0 && !keeps_state &&
      request.max_tokens > geometry.bound_beyond - num_prompt) {
    if (request.max_tokens > kMaxOutput) {
      return InvalidField("max_tokens", request.max_tokens, absl::StrCat("not <= ", kMaxOutput));
    }
    if (num_prompt > geometry.bound_tokens) {
      return absl::InvalidArgumentError(absl::StrCat("prompt of ", num_prompt,
                                                     " tokens exceeds the ", geometry.bound_tokens,
                                                     " that a sequence of unlimited output holds"));
    }
  } else if (num_prompt > options.context_length ||
             request.max_tokens > options.context_length - num_prompt) {
    return absl::InvalidArgumentError(
        absl::StrCat("prompt of ", num_prompt, " tokens and max_tokens ", request.max_tokens,
                     " exceed the context of ", options.context_length));
  }
  const int64_t num_tokens = num_prompt + request.max_tokens;
  if (!caches.FitsEver(num_tokens, request.num_outputs)) {
    return absl::InvalidArgumentError(absl::StrCat(
        request.num_outputs, " sequence(s) of ", num_tokens,
        " tokens (prompt and max_tokens) need ", request.num_outputs, " state slots and ",
        geometry.blocks_for(num_tokens), " KV blocks each; the server has ", geometry.num_slots,
        " and ", geometry.num_blocks));
  }
  return absl::OkStatus();
}

absl::Status CheckQueue(int64_t num_waiting, int64_t num_waiting_tokens, int64_t num_tokens,
                        const SchedulerOptions& options) {
  if (num_waiting >= options.max_waiting) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the queue is full: ", num_waiting, " requests wait, limit ", options.max_waiting));
  }
  if (num_waiting > 0 && num_waiting_tokens + num_tokens > options.max_waiting_tokens) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the queue is full: ", num_waiting_tokens, " prompt tokens wait, ", num_tokens,
                     " more exceed the limit of ", options.max_waiting_tokens));
  }
  return absl::OkStatus();
}

absl::Status Scheduler::Impl::Add(GenerateRequest request, TimeNs now) {
  RETURN_IF_ERROR(ValidateRequest(request, options_, caches_));
  const int64_t num_prompt = std::ssize(request.token_ids);
  RETURN_IF_ERROR(CheckQueue(num_waiting_, num_waiting_tokens_, num_prompt, options_));
  const int64_t prompt_length = PromptLength(request);
  auto group = std::make_unique<RequestGroup>();
  group->request = std::move(request);
  group->request.token_ids.push_back(-1);
  // What a session reads comes after tokens that the request does not name, and the blocks of a
  // bounded sequence are written again.
  if (group->request.session != 0 ||
      caches_.geometry().bounds(prompt_length + group->request.max_tokens)) {
    group->request.prefix_domain.clear();
  }
  group->prompt_length = prompt_length;
  group->first_prompt_token = group->request.start_position;
  group->num_prompt_submitted = group->request.start_position;
  if (num_prompt == 0) group->num_prompt_submitted = group->prompt_length;
  group->num_prompt_confirmed = group->num_prompt_submitted;
  group->order = next_order_++;
  group->sequences.resize(static_cast<size_t>(group->request.num_outputs));
  for (size_t output = 0; output < group->sequences.size(); ++output) {
    group->sequences[output].group = group.get();
    group->sequences[output].output_index = static_cast<int32_t>(output);
  }
  group->timings.submitted = now;
  group->queued_since = now;
  Enqueue(std::move(group));
  return absl::OkStatus();
}

void Scheduler::Impl::Enqueue(GroupPtr group) {
  if (group->phase == Phase::kSwapped) {
    ++num_swapped_;
  } else {
    ++num_waiting_;
    num_waiting_tokens_ += group->num_input();
  }
  const auto place = std::upper_bound(queue_.begin(), queue_.end(), group, InQueueOrder);
  queue_.insert(place, std::move(group));
}

void Scheduler::Impl::AgeQueue(TimeNs now) {
  bool changed = false;
  for (const GroupPtr& group : queue_) {
    const TimeNs queued = group->timings.queue_ns + (now - group->queued_since);
    if (group->aged || queued < options_.max_wait) continue;
    group->aged = true;
    changed = true;
  }
  if (changed) std::sort(queue_.begin(), queue_.end(), InQueueOrder);
}

// What a request that never ran can start from.
PrefixTree::Match Scheduler::Impl::FindPrefix(const RequestGroup& group) const {
  if (group.phase != Phase::kWaiting) return {};
  return prefixes_.Find(group.request, group.prompt_length);
}

bool Scheduler::Impl::Fits(const RequestGroup& group) const {
  return caches_.Fits(group.num_reserved(), group.num_live());
}

// With the blocks that it shares; and those that only kept prefixes hold give way to a sequence,
// the ones used longest ago first, if that makes it fit.
bool Scheduler::Impl::FitsAfterDropping(const RequestGroup& group) {
  if (Fits(group)) return true;
  if (!caches_.geometry().has_paged() || caches_.free_slots() < group.num_live()) return false;
  const PrefixTree::Match match = FindPrefix(group);
  int64_t num_shared = 0, num_shared_in_use = 0;
  if (match.snapshot != nullptr) {
    num_shared = std::ssize(match.snapshot->blocks());
    for (const int32_t block : match.snapshot->blocks()) {
      num_shared_in_use += !caches_.IsIdle(block);
    }
  }
  const int64_t num_tokens = group.num_reserved(), count = group.num_live();
  if (!caches_.Fits(num_tokens, count, num_shared_in_use + caches_.idle_blocks())) return false;
  while (!caches_.Fits(num_tokens, count, num_shared)) {
    if (!prefixes_.DropOldest(match.snapshot)) return false;
  }
  return true;
}

// Reserves for the first sequence, which computes the prompt.
void Scheduler::Impl::StartFromPrefix(RequestGroup& group, StepPlan& plan) {
  const PrefixTree::Match match = FindPrefix(group);
  if (match.snapshot != nullptr) {
    Sequence& sequence = group.sequences[0];
    absl::StatusOr<CacheManager::Started> started =
        caches_.ReserveFrom(*match.snapshot, group.num_reserved());
    GODWIT_CHECK(started.ok());  // the caller saw that the group fits
    sequence.lease = std::move(started->lease);
    sequence.confirmed_position = match.num_cached;
    group.num_cached = group.num_prompt_submitted = group.num_prompt_confirmed = match.num_cached;
    plan.copies.push_back(std::move(started->copy));
    plan.record->copied_orders.push_back(group.order);
  }
  group.keep_positions = prefixes_.Start(group.request, group.prompt_length, match);
}

void Scheduler::Impl::Admit(StepPlan& plan, TimeNs now) {
  size_t num_blocked = 0;  // groups at the front of the queue that stay
  while (num_blocked < queue_.size()) {
    RequestGroup& group = *queue_[num_blocked];
    const Room room = MakeFit(group, plan) ? Room::kMade : MakeRoom(group, plan, now);
    if (room == Room::kPending) return;
    if (room == Room::kMade) {
      GODWIT_CHECK(queue_[num_blocked].get() == &group);  // its victims queue behind it
      StartGroup(num_blocked, plan, now);
      for (size_t index = 0; index < num_blocked; ++index) {
        if (++queue_[index]->num_bypassed >= kMaxBypass) return;
      }
      continue;
    }
    if (group.aged || group.num_bypassed >= kMaxBypass || caches_.free_slots() == 0) return;
    ++num_blocked;
  }
}

void Scheduler::Impl::StartGroup(size_t queue_index, StepPlan& plan, TimeNs now) {
  GroupPtr group = std::move(queue_[queue_index]);
  queue_.erase(queue_.begin() + static_cast<std::ptrdiff_t>(queue_index));
  if (group->phase == Phase::kSwapped) {
    --num_swapped_;
  } else {
    --num_waiting_;
    num_waiting_tokens_ -= group->num_input();
    group->timings.admitted = now;
  }
  const bool begins = group->phase == Phase::kWaiting;
  if (begins) StartFromPrefix(*group, plan);
  SwapIn(*group, plan);
  const bool decodes = group->num_prompt_confirmed == group->prompt_length;
  group->phase = decodes ? Phase::kDecoding : Phase::kPrefilling;
  group->timings.queue_ns += now - group->queued_since;
  group->num_bypassed = 0;
  group->last_row = now;
  group->admission = next_admission_++;
  RequestGroup& started = *group;
  running_.push_back(std::move(group));
  if (begins && started.request.session != 0) BeginSession(started, plan, now);
}

void Scheduler::Impl::BeginSession(RequestGroup& group, StepPlan& plan, TimeNs now) {
  Sequence& sequence = group.sequences[0];
  if (!sessions_.Begin(group.request.session, sequence.lease, plan.copies)) {
    EndGroup(
        group,
        absl::DataLossError("the state of the session is gone: device and host memory were full"),
        now);
    Sweep();
    return;
  }
  if (sequence.lease.position() != group.request.start_position) {
    EndGroup(group, absl::AbortedError("the session has moved on"), now);
    Sweep();
    return;
  }
  plan.record->copied_orders.push_back(group.order);
  sequence.confirmed_position = group.request.start_position;
  if (group.phase == Phase::kDecoding) group.events.push_back({.kind = TokenEvent::Kind::kPrompt});
}

// Room for the group once kept prefixes, then states of sessions, have made way.
bool Scheduler::Impl::MakeFit(const RequestGroup& group, StepPlan& plan) {
  while (!FitsAfterDropping(group)) {
    if (!sessions_.Evict(plan.copies)) return false;
  }
  return true;
}

void Scheduler::Impl::FailStuck(TimeNs now) {
  const bool refused = sessions_.TakeRefusal();
  if (queue_.empty() || !running_.empty() || !ending_.empty()) return;
  RequestGroup& group = *queue_.front();
  if (waits_for_room() && !refused && now - group.queued_since < options_.max_wait) return;
  sessions_.ForgetWanted();
  EndGroup(group,
           absl::ResourceExhaustedError(absl::StrCat(
               "nothing runs and the request does not fit: ", group.num_live(), " sequence(s) of ",
               group.num_reserved(), " tokens, free are ", caches_.free_slots(),
               " state slots and ", caches_.free_blocks(), " KV blocks")),
           now);
  Sweep();
}

}  // namespace godwit
