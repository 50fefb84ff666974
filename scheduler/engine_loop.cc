#include "scheduler/engine_loop.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"

namespace godwit {
namespace {

using Clock = std::chrono::steady_clock;

TimeNs Now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch())
      .count();
}

// An idle loop wakes this often for the heartbeat.
constexpr TimeNs kHeartbeatPeriod = 1'000'000'000;
// And one whose requests wait for room in host memory, for their deadlines.
constexpr TimeNs kRoomPeriod = 50'000'000;

constexpr char kDeviceLostMark[] = "godwit.device_lost";

// What clients are told; the cause is the operator's.
absl::Status DeviceLost() {
  absl::Status status = absl::UnavailableError("the device was lost");
  status.SetPayload(kDeviceLostMark, absl::Cord());
  return status;
}

struct Mail {
  GenerateRequest request;
  TimeNs submitted = 0;
};

struct InFlight {
  StepPlan plan;
  StepId id = 0;
  TimeNs planned = 0;
};

}  // namespace

bool IsDeviceLost(const absl::Status& status) {
  return status.GetPayload(kDeviceLostMark).has_value();
}

absl::Status WithoutDeviceLostMark(absl::Status status) {
  status.ErasePayload(kDeviceLostMark);
  return status;
}

struct EngineLoop::Impl {
  using SessionWork = EngineLoop::SessionWork;

  Impl(EngineLoopOptions options, StepExecutor& executor, CacheManager& caches)
      : options(std::move(options)),
        executor(executor),
        caches(caches),
        scheduler(this->options.scheduler, caches),
        heartbeat(Now()) {}

  // Any thread.
  absl::Status Submit(GenerateRequest request);
  void Wake();
  void Drain(TimeNs timeout_ns);
  void Stop();

  // Engine thread.
  void Run();
  bool TakeMail();  // false: stop
  void RunSessionWork();
  bool Post(SessionWork work);
  bool FillSteps();  // plans and submits; true if there was something to do
  bool SubmitStep(StepPlan plan, TimeNs planned);
  void FinishOldestStep();
  void FailStep(StepPlan plan, const absl::Status& cause);
  void AbortAll(const absl::Status& status);
  void Publish();
  void Sleep(TimeNs longest);

  const EngineLoopOptions options;
  StepExecutor& executor;
  CacheManager& caches;

  // Engine thread only.
  Scheduler scheduler;
  std::deque<InFlight> in_flight;  // at most max_steps_in_flight
  std::vector<Mail> taken;         // mail that TakeMail hands to the scheduler
  TimeNs last_step_end = 0;

  mutable std::mutex mutex;  // guards the next block
  std::condition_variable wake_engine, became_idle;
  std::vector<Mail> mailbox;              // at most max_mailbox
  std::vector<SessionWork> session_work;  // at most one a caller of the server's
  bool closed = false;                    // no more of it
  int64_t mailbox_tokens = 0;
  // Mailbox and the scheduler's queue. Between TakeMail and Publish it also counts those that were
  // admitted meanwhile, so what it lets in always fits the scheduler's queue.
  int64_t num_queued = 0, num_queued_tokens = 0;
  SchedulerStats published;
  std::string device_lost_cause;
  bool woken = false, draining = false, abort = false, stopping = false, idle = true;

  std::atomic<TimeNs> heartbeat;
  std::atomic<bool> device_lost{false};
  std::mutex join_mutex;  // guards thread against two calls of Stop
  std::thread thread;
};

absl::Status EngineLoop::Impl::Submit(GenerateRequest request) {
  if (absl::Status valid = ValidateRequest(request, options.scheduler, caches); !valid.ok()) {
    return valid;
  }
  const int64_t num_tokens = std::ssize(request.token_ids);
  std::lock_guard<std::mutex> lock(mutex);
  if (device_lost.load()) return DeviceLost();
  if (stopping || draining) return absl::UnavailableError("the server is shutting down");
  if (std::ssize(mailbox) >= options.max_mailbox) {
    return absl::ResourceExhaustedError(absl::StrCat("the mailbox is full: ", mailbox.size(),
                                                     " requests, limit ", options.max_mailbox));
  }
  absl::Status room = CheckQueue(num_queued, num_queued_tokens, num_tokens, options.scheduler);
  if (!room.ok()) return room;
  ++num_queued;
  num_queued_tokens += num_tokens;
  mailbox_tokens += num_tokens;
  idle = false;
  mailbox.push_back({std::move(request), Now()});
  wake_engine.notify_one();
  return absl::OkStatus();
}

bool EngineLoop::Impl::Post(SessionWork work) {
  std::lock_guard<std::mutex> lock(mutex);
  if (closed || device_lost.load()) return false;
  session_work.push_back(std::move(work));
  wake_engine.notify_one();
  return true;
}

void EngineLoop::Impl::RunSessionWork() {
  std::vector<SessionWork> work;
  {
    std::lock_guard<std::mutex> lock(mutex);
    std::swap(work, session_work);
  }
  for (SessionWork& one : work) one(scheduler.sessions(), executor);
}

void EngineLoop::Impl::Wake() {
  std::lock_guard<std::mutex> lock(mutex);
  woken = true;
  wake_engine.notify_one();
}

void EngineLoop::Impl::Drain(TimeNs timeout_ns) {
  std::unique_lock<std::mutex> lock(mutex);
  draining = true;
  // A longer timeout would overflow the clock.
  constexpr std::chrono::hours kLongest(24 * 365);
  const auto timeout =
      std::min<std::chrono::nanoseconds>(std::chrono::nanoseconds(timeout_ns), kLongest);
  const auto ended = [this] { return idle || stopping; };
  if (became_idle.wait_until(lock, Clock::now() + timeout, ended)) return;
  abort = true;
  wake_engine.notify_one();
  became_idle.wait(lock, ended);
}

void EngineLoop::Impl::Stop() {
  {
    std::lock_guard<std::mutex> lock(mutex);
    stopping = true;
    wake_engine.notify_one();
    became_idle.notify_all();
  }
  std::lock_guard<std::mutex> lock(join_mutex);
  if (thread.joinable()) thread.join();
}

void EngineLoop::Impl::Run() {
  bool running = true;
  while (running) {
    heartbeat.store(Now(), std::memory_order_relaxed);
    running = TakeMail();
    RunSessionWork();
    const bool progressed = FillSteps();
    if (!in_flight.empty()) {
      FinishOldestStep();
      Publish();
    } else {
      Publish();
      if (progressed || !running) continue;
      if (scheduler.idle()) Sleep(kHeartbeatPeriod);
      if (scheduler.waits_for_room()) Sleep(kRoomPeriod);  // whoever makes it posts work
    }
  }
  // Everything has ended; what is still in flight is collected, so that the executor is left clean.
  while (!in_flight.empty()) FinishOldestStep();
  {
    std::lock_guard<std::mutex> lock(mutex);
    closed = true;
  }
  RunSessionWork();
  Publish();
}

bool EngineLoop::Impl::TakeMail() {
  bool end_all = false, stop = false;
  {
    std::lock_guard<std::mutex> lock(mutex);
    std::swap(taken, mailbox);
    mailbox_tokens = 0;
    end_all = std::exchange(abort, false);
    stop = stopping;
    woken = false;
  }
  for (Mail& mail : taken) {
    const std::shared_ptr<TokenStream> stream = mail.request.stream;
    absl::Status added = scheduler.Add(std::move(mail.request), mail.submitted);
    GODWIT_CHECK(added.ok());  // Submit checked the request and the queue
  }
  taken.clear();
  if (device_lost.load()) {
    AbortAll(DeviceLost());
  } else if (end_all || stop) {
    AbortAll(absl::UnavailableError("the server is shutting down"));
  }
  return !stop;
}

bool EngineLoop::Impl::FillSteps() {
  bool progressed = false;
  while (std::ssize(in_flight) < options.scheduler.max_steps_in_flight) {
    const TimeNs now = Now();
    StepPlan plan = scheduler.Plan(now);
    if (plan.rows.empty() && plan.copies.empty()) break;
    progressed = true;
    if (!SubmitStep(std::move(plan), now)) break;
  }
  return progressed;
}

bool EngineLoop::Impl::SubmitStep(StepPlan plan, TimeNs planned) {
  if (!plan.copies.empty()) {
    if (absl::Status copied = executor.Copy(plan.copies); !copied.ok()) {
      FailStep(std::move(plan), copied);
      return false;
    }
    plan.copies.clear();
  }
  if (plan.rows.empty()) return true;
  absl::StatusOr<StepId> id = executor.Submit(plan.rows);
  if (!id.ok()) {
    FailStep(std::move(plan), id.status());
    return false;
  }
  in_flight.push_back({std::move(plan), *id, planned});
  return true;
}

void EngineLoop::Impl::FinishOldestStep() {
  InFlight step = std::move(in_flight.front());
  in_flight.pop_front();
  absl::StatusOr<StepResult> result = executor.Collect(step.id);
  if (!result.ok()) {
    FailStep(std::move(step.plan), result.status());
    return;
  }
  StepReport report{.num_tokens = result->num_tokens,
                    .num_rows = std::ssize(step.plan.rows),
                    .forward_ns = static_cast<TimeNs>(result->forward_seconds * 1e9),
                    .draft_ns = static_cast<TimeNs>(result->draft_seconds * 1e9)};
  const std::optional<double> idle_seconds = result->idle_seconds;
  for (const RowResult& row : result->rows) report.num_drafts += row.num_drafts + row.num_dropped;
  scheduler.Apply(std::move(step.plan), *std::move(result), Now());
  const TimeNs end = Now();
  report.step_ns = end - std::max(step.planned, last_step_end);
  report.overhead_ns = idle_seconds.has_value()
                           ? static_cast<TimeNs>(*idle_seconds * 1e9)
                           : std::max<TimeNs>(0, report.step_ns - report.forward_ns);
  report.stats = scheduler.stats();
  last_step_end = end;
  if (options.on_step) options.on_step(report);
}

void EngineLoop::Impl::FailStep(StepPlan plan, const absl::Status& cause) {
  const bool lost = absl::IsUnavailable(cause);
  const absl::Status status = lost ? DeviceLost() : cause;
  scheduler.Fail(std::move(plan), status, Now());
  if (!lost) return;
  {
    std::lock_guard<std::mutex> lock(mutex);
    device_lost_cause = std::string(cause.message());
    device_lost.store(true);
  }
  AbortAll(status);
  // The executor is not asked again: the results of a lost device do not come.
  while (!in_flight.empty()) {
    scheduler.Fail(std::move(in_flight.front().plan), status, Now());
    in_flight.pop_front();
  }
}

void EngineLoop::Impl::AbortAll(const absl::Status& status) { scheduler.AbortAll(status, Now()); }

void EngineLoop::Impl::Publish() {
  const SchedulerStats stats = scheduler.stats();
  std::lock_guard<std::mutex> lock(mutex);
  num_queued = std::ssize(mailbox) + stats.num_waiting;
  num_queued_tokens = mailbox_tokens + stats.num_waiting_tokens;
  published = stats;
  idle = scheduler.idle() && in_flight.empty() && mailbox.empty();
  if (idle) became_idle.notify_all();
}

void EngineLoop::Impl::Sleep(TimeNs longest) {
  std::unique_lock<std::mutex> lock(mutex);
  const auto until = Clock::now() + std::chrono::nanoseconds(longest);
  wake_engine.wait_until(lock, until, [this] {
    return woken || abort || stopping || !mailbox.empty() || !session_work.empty();
  });
}

EngineLoop::EngineLoop(EngineLoopOptions options, StepExecutor& executor, CacheManager& caches)
    : impl_(std::make_unique<Impl>(std::move(options), executor, caches)) {
  impl_->thread = std::thread([impl = impl_.get()] { impl->Run(); });
}

EngineLoop::~EngineLoop() { Stop(); }

absl::Status EngineLoop::Submit(GenerateRequest request) {
  return impl_->Submit(std::move(request));
}
bool EngineLoop::Post(SessionWork work) { return impl_->Post(std::move(work)); }
void EngineLoop::Wake() { impl_->Wake(); }
void EngineLoop::Drain(TimeNs timeout_ns) { impl_->Drain(timeout_ns); }
void EngineLoop::Stop() { impl_->Stop(); }

SchedulerStats EngineLoop::stats() const {
  std::lock_guard<std::mutex> lock(impl_->mutex);
  return impl_->published;
}
TimeNs EngineLoop::last_heartbeat() const {
  return impl_->heartbeat.load(std::memory_order_relaxed);
}
std::string EngineLoop::device_lost_cause() const {
  std::lock_guard<std::mutex> lock(impl_->mutex);
  return impl_->device_lost_cause;
}
bool EngineLoop::device_lost() const { return impl_->device_lost.load(); }

}  // namespace godwit
