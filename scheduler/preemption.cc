// Room for a request of higher priority: running ones of lower priority go to host memory, whole
// and never to be recomputed, and come back through the queue.

#include <algorithm>
#include <functional>
#include <utility>

#include "absl/status/statusor.h"
#include "kernels/base/check.h"
#include "scheduler/scheduler_impl.h"

namespace godwit {
namespace {

// A lease without state (an output that waits for its fork, a prompt without a row so far) is given
// back and reserved again: there is nothing to copy.
bool HasState(const Sequence& sequence) { return sequence.confirmed_position > 0; }

}  // namespace

std::vector<size_t> Scheduler::Impl::ChooseVictims(const RequestGroup& group) const {
  std::vector<size_t> candidates;
  for (size_t index = 0; index < running_.size(); ++index) {
    const RequestGroup& other = *running_[index];
    if (other.request.priority < group.request.priority && !other.aged) candidates.push_back(index);
  }
  // Lowest priority first, of these the last admitted first.
  std::sort(candidates.begin(), candidates.end(), [&](size_t a, size_t b) {
    const int32_t priority_a = running_[a]->request.priority;
    const int32_t priority_b = running_[b]->request.priority;
    return priority_a != priority_b ? priority_a < priority_b : a > b;
  });
  const int64_t num_slots = group.num_live();
  const int64_t num_blocks = num_slots * caches_.geometry().blocks_for(group.num_reserved());
  int64_t free_slots = caches_.free_slots();
  int64_t free_blocks = caches_.free_blocks() + caches_.idle_blocks();
  int64_t swap_bytes = 0;
  std::vector<size_t> victims;
  for (size_t index : candidates) {
    if (free_slots >= num_slots && free_blocks >= num_blocks) break;
    for (const Sequence& sequence : running_[index]->sequences) {
      if (!sequence.lease) continue;
      ++free_slots;
      free_blocks += caches_.NumOwnBlocks(sequence.lease);
      if (HasState(sequence)) swap_bytes += caches_.SwapBytes(sequence.lease);
    }
    victims.push_back(index);
  }
  const bool enough = free_slots >= num_slots && free_blocks >= num_blocks &&
                      swap_bytes <= caches_.free_swap_bytes() &&
                      num_swapped_ + std::ssize(victims) <= options_.max_waiting;
  if (!enough) return {};
  std::sort(victims.begin(), victims.end(), std::greater<>());
  return victims;
}

Scheduler::Impl::Room Scheduler::Impl::MakeRoom(const RequestGroup& group, StepPlan& plan,
                                                TimeNs now) {
  const std::vector<size_t> victims = ChooseVictims(group);
  if (victims.empty()) return Room::kNone;
  const bool in_flight = std::any_of(victims.begin(), victims.end(), [&](size_t index) {
    return running_[index]->steps_in_flight() > 0;
  });
  if (in_flight) {  // positions are not known before the step is collected: no more rows till then
    for (size_t index : victims) running_[index]->held = true;
    return Room::kPending;
  }
  for (size_t index : victims) SwapOut(index, plan, now);
  while (!Fits(group)) GODWIT_CHECK(prefixes_.DropOldest(nullptr));
  return Room::kMade;
}

void Scheduler::Impl::SwapOut(size_t running_index, StepPlan& plan, TimeNs now) {
  GroupPtr group = std::move(running_[running_index]);
  running_.erase(running_.begin() + static_cast<std::ptrdiff_t>(running_index));
  for (Sequence& sequence : group->sequences) {
    if (sequence.finished) continue;
    if (!HasState(sequence)) {
      sequence.lease.Release();
      continue;
    }
    GODWIT_CHECK(sequence.lease.position() == sequence.confirmed_position);
    absl::StatusOr<CacheCopy> copy = caches_.SwapOut(sequence.lease);
    GODWIT_CHECK(copy.ok());  // ChooseVictims counted the bytes
    plan.copies.push_back(*std::move(copy));
  }
  plan.record->copied_orders.push_back(group->order);
  group->phase = Phase::kSwapped;
  group->queued_since = now;
  ++group->timings.num_preemptions;
  ++num_preemptions_;
  Enqueue(std::move(group));
}

void Scheduler::Impl::SwapIn(RequestGroup& group, StepPlan& plan) {
  for (Sequence& sequence : group.sequences) {
    if (sequence.finished || sequence.lease.resident()) continue;
    if (!sequence.lease) {
      absl::StatusOr<CacheLease> lease = caches_.Reserve(group.num_reserved());
      GODWIT_CHECK(lease.ok());  // the caller saw that the group fits
      sequence.lease = *std::move(lease);
      continue;
    }
    absl::StatusOr<CacheCopy> copy = caches_.SwapIn(sequence.lease);
    GODWIT_CHECK(copy.ok());
    plan.copies.push_back(*std::move(copy));
    plan.record->copied_orders.push_back(group.order);
  }
}

}  // namespace godwit
