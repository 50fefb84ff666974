#pragma once
// The scheduler's state, shared by admission.cc, preemption.cc, apply.cc, ending.cc and
// scheduler.cc.

#include <cstdint>
#include <memory>
#include <vector>

#include "scheduler/scheduler.h"
#include "scheduler/sequence.h"

namespace godwit {

struct StepPlan::Record {
  struct Row {
    Sequence* sequence = nullptr;   // whose lease the row uses
    int64_t num_prompt_tokens = 0;  // 0: a decode row
    size_t first_output = 0, num_outputs = 0;
  };
  std::vector<Row> rows;
  std::vector<Sequence*> drawers;      // per output of the step
  std::vector<RowOutput> outputs;      // the rows' spans point here
  std::vector<int64_t> copied_orders;  // groups of plan.copies; by name, they may be gone by then
  int64_t num_tokens = 0;

  void Clear();
};

using GroupPtr = std::unique_ptr<RequestGroup>;

struct Scheduler::Impl {
  Impl(SchedulerOptions options, CacheManager& caches);

  // scheduler.cc
  StepPlan Plan(TimeNs now);
  StepPlan TakeSpare();
  void PlanDecodeRows(StepPlan& plan);
  void PlanPrompts(StepPlan& plan, TimeNs now);
  void KeepPrefix(RequestGroup& group, StepPlan& plan);
  void AddPromptRow(RequestGroup& group, int64_t num_tokens, StepPlan& plan);
  void AddDecodeRow(Sequence& sequence, int64_t max_drafts, StepPlan& plan);
  void AddOutput(Sequence& sequence, StepPlan& plan);
  void Publish(StepPlan& plan);
  bool prompt_pending() const;

  // admission.cc
  absl::Status Add(GenerateRequest request, TimeNs now);
  void Enqueue(GroupPtr group);
  void AgeQueue(TimeNs now);
  void Admit(StepPlan& plan, TimeNs now);
  PrefixTree::Match FindPrefix(const RequestGroup& group) const;
  bool Fits(const RequestGroup& group) const;
  bool FitsAfterDropping(const RequestGroup& group);
  void StartFromPrefix(RequestGroup& group, StepPlan& plan);
  void StartGroup(size_t queue_index, StepPlan& plan, TimeNs now);
  void BeginSession(RequestGroup& group, StepPlan& plan, TimeNs now);
  bool MakeFit(const RequestGroup& group, StepPlan& plan);
  void FailStuck(TimeNs now);
  bool waits_for_room() const {
    return sessions_.wanted_bytes() > 0 && !queue_.empty() && running_.empty() && ending_.empty();
  }

  // preemption.cc
  enum class Room { kMade, kPending, kNone };
  Room MakeRoom(const RequestGroup& group, StepPlan& plan, TimeNs now);
  std::vector<size_t> ChooseVictims(
      const RequestGroup& group) const;  // indices into running_, descending
  void SwapOut(size_t running_index, StepPlan& plan, TimeNs now);
  void SwapIn(RequestGroup& group, StepPlan& plan);

  // apply.cc
  void Apply(StepPlan plan, StepResult result, TimeNs now);
  void Fail(StepPlan plan, const absl::Status& status, TimeNs now);
  void ApplyPrompt(RequestGroup& group, int64_t num_tokens, std::vector<SampledToken> scores,
                   TimeNs now);
  void RecordDropped(const StepPlan::Record& record, const StepPlan::Record::Row& planned,
                     const RowResult& computed);
  void CountDrafts(const StepPlan& plan, const StepResult& result);
  void ApplyDraws(Sequence& sequence, std::vector<SampledToken> tokens, TimeNs now);
  void Land(StepPlan& plan);  // the rows are no longer in flight
  void Recycle(StepPlan plan);

  // ending.cc
  void Reap(TimeNs now);
  void ReapGroup(RequestGroup& group, TimeNs now);
  void End(Sequence& sequence);
  void FinishOutput(Sequence& sequence, FinishInfo finish, TimeNs now);
  void EndGroup(RequestGroup& group, absl::Status status, TimeNs now);
  void
  Sweep();  // moves ended groups out of queue_ and running_, drops those with nothing in flight
  void AbortAll(const absl::Status& status, TimeNs now);
  void MarkKept(Sequence& sequence, FinishReason reason);
  void GiveBack(Sequence& sequence);

  SchedulerStats Stats() const;

  const SchedulerOptions options_;
  CacheManager& caches_;
  SessionTable sessions_;
  PrefixCache prefixes_;
  // Each group is in exactly one of these.
  std::vector<GroupPtr> queue_;    // waiting and swapped, in the order of the queue; at most
                                   // max_waiting of each kind
  std::vector<GroupPtr> running_;  // hold slots; in order of admission; at most num_slots
  std::vector<GroupPtr>
      ending_;  // done, but steps in flight still use their leases; at most num_slots
  std::vector<StepPlan> spares_;        // storage of applied plans; at most kMaxStepsInFlight
  std::vector<Sequence*> ready_;        // scratch of PlanDecodeRows
  std::vector<RequestGroup*> prompts_;  // scratch of PlanPrompts
  int64_t num_waiting_ = 0, num_waiting_tokens_ = 0, num_swapped_ = 0;
  int64_t next_order_ = 0, next_admission_ = 0, next_step_ = 0;
  int steps_in_flight_ = 0;
  int64_t num_preemptions_ = 0, num_steps_ = 0, prompt_tokens_ = 0, generation_tokens_ = 0;
  int64_t num_dropped_ = 0;
  SpeculationStats speculation_;
};

}  // namespace godwit
