#include "server/session_registry.h"

#include <algorithm>
#include <future>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "server/clock.h"
#include "server/status_mapping.h"

namespace godwit {
namespace {

constexpr std::chrono::milliseconds kMaintenancePeriod(250);
// Idle sessions go to the disk while more than that of the host's memory for states is theirs.
constexpr double kSpillAbove = 0.75;
constexpr TimeNs kMsNs = 1'000'000;

std::string RandomId() {
  std::random_device device;
  std::string id;
  for (int word = 0; word < 4; ++word) absl::StrAppend(&id, absl::Hex(device(), absl::kZeroPad8));
  return id;
}

absl::Status NoSuchSession(const std::string& id) {
  return WithResource(absl::NotFoundError(absl::StrCat("there is no session ", id)), "session", id);
}

}  // namespace

// --- SessionUse

SessionUse::~SessionUse() { registry_.Release(*this); }

void SessionUse::FixRope(std::shared_ptr<const RopeTable> rope, StateNotes notes) {
  rope_ = std::move(rope);
  notes_ = std::move(notes);
}

void SessionUse::Kept(int64_t position, int32_t pending_token) {
  position_ = position;
  pending_token_ = pending_token;
  std::lock_guard<std::mutex> lock(registry_.mutex_);
  const auto found = registry_.entries_.find(id_);
  if (found == registry_.entries_.end()) return;  // deleted meanwhile: Release drops the state
  SessionRegistry::Entry& entry = found->second;
  entry.key = key_;
  entry.position = position;
  entry.pending_token = pending_token;
  entry.rope = rope_;
  entry.notes = notes_;
}

// --- Life

SessionRegistry::SessionRegistry(SessionLimits limits, StateLayout layout, EngineLoop& loop,
                                 const ServedModel& model)
    : limits_(std::move(limits)),
      loop_(loop),
      model_(model),
      files_(limits_.folder, limits_.disk_bytes, std::move(layout)) {}

absl::Status SessionRegistry::Start() {
  RETURN_IF_ERROR(files_.Start());
  maintenance_ = std::thread([this] { Maintain(); });
  return absl::OkStatus();
}

SessionRegistry::~SessionRegistry() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  if (maintenance_.joinable()) maintenance_.join();
}

absl::Status SessionRegistry::OnEngine(const EngineWork& work) {
  std::promise<absl::Status> promise;
  std::future<absl::Status> done = promise.get_future();
  const bool posted = loop_.Post([&](SessionTable& sessions, StepExecutor& executor) {
    promise.set_value(work(sessions, executor));
  });
  if (!posted) return absl::UnavailableError("the server is shutting down");
  return done.get();
}

absl::Status SessionRegistry::OnEngineWithRoom(const int64_t* num_bytes, const EngineWork& work) {
  while (true) {
    const absl::Status status = OnEngine(work);
    const bool may_fit = *num_bytes <= loop_.stats().sessions.store_bytes_total;
    if (!absl::IsResourceExhausted(status) || !may_fit || !SpillOldest()) return status;
  }
}

void SessionRegistry::EraseState(SessionKey key) {
  loop_.Post([key](SessionTable& sessions, StepExecutor&) { sessions.Erase(key); });
}

// --- Sessions

absl::StatusOr<TimeNs> SessionRegistry::Ttl(std::optional<int64_t> ttl_ms) const {
  const int64_t ms = ttl_ms.value_or(limits_.ttl_ms);
  if (ttl_ms && (ms < 1000 || ms > limits_.ttl_ms)) {
    return InvalidFields({{"ttl_ms", absl::StrCat(ms, " not in [1000, ", limits_.ttl_ms, "]")}});
  }
  return ms * kMsNs;
}

absl::StatusOr<SessionRegistry::Entry*> SessionRegistry::Find(const std::string& tenant,
                                                              const std::string& id) {
  const auto found = entries_.find(id);
  if (found == entries_.end() || found->second.tenant != tenant) return NoSuchSession(id);
  return &found->second;
}

absl::StatusOr<SessionRegistry::Entry*> SessionRegistry::Add(const std::string& tenant,
                                                             TimeNs ttl) {
  if (std::ssize(entries_) >= limits_.max_sessions) {
    return WithRetryDelay(
        absl::ResourceExhaustedError(absl::StrCat("there are ", entries_.size(),
                                                  " sessions, at most ", limits_.max_sessions)),
        kQueueFullRetryDelay);
  }
  const std::string id = RandomId();
  Entry& entry = entries_[id];
  entry.tenant = tenant;
  entry.id = id;
  entry.last_used = SteadyNow();
  entry.ttl = ttl;
  entry.order = next_order_++;
  return &entry;
}

SessionView SessionRegistry::View(const Entry& entry) const {
  return {.id = entry.id,
          .position = entry.position,
          .pending_token = entry.pending_token,
          .idle_ms = entry.busy ? 0 : (SteadyNow() - entry.last_used) / kMsNs,
          .ttl_ms = entry.ttl / kMsNs,
          .busy = entry.busy,
          .on_disk = !entry.file.path.empty()};
}

absl::StatusOr<SessionView> SessionRegistry::CreateSession(const std::string& tenant,
                                                           std::optional<int64_t> ttl_ms) {
  ASSIGN_OR_RETURN(const TimeNs ttl, Ttl(ttl_ms));
  std::lock_guard<std::mutex> lock(mutex_);
  ASSIGN_OR_RETURN(Entry * entry, Add(tenant, ttl));
  return View(*entry);
}

absl::StatusOr<SessionView> SessionRegistry::Get(const std::string& tenant,
                                                 const std::string& id) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = entries_.find(id);
  if (found == entries_.end() || found->second.tenant != tenant) return NoSuchSession(id);
  return View(found->second);
}

std::vector<SessionView> SessionRegistry::List(const std::string& tenant) const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<const Entry*> own;
  for (const auto& [id, entry] : entries_) {
    if (entry.tenant == tenant) own.push_back(&entry);
  }
  std::sort(own.begin(), own.end(),
            [](const Entry* a, const Entry* b) { return a->order < b->order; });
  std::vector<SessionView> views;
  for (const Entry* entry : own) views.push_back(View(*entry));
  return views;
}

// The state of a session that a request writes goes when the request has ended.
void SessionRegistry::Drop(Entry& entry) {
  if (entry.key != 0 && !entry.busy) EraseState(entry.key);
  files_.Remove(entry.file);
  entries_.erase(entry.id);
}

absl::Status SessionRegistry::Delete(const std::string& tenant, const std::string& id) {
  std::lock_guard<std::mutex> lock(mutex_);
  ASSIGN_OR_RETURN(Entry * entry, Find(tenant, id));
  Drop(*entry);
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<SessionUse>> SessionRegistry::Acquire(
    const std::string& tenant, const std::string& id, std::optional<int64_t> expected_position) {
  std::shared_ptr<SessionUse> use;
  std::string file;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ASSIGN_OR_RETURN(Entry * entry, Find(tenant, id));
    if (entry->busy) {
      return WithErrorInfo(absl::AbortedError(absl::StrCat("another request writes session ", id)),
                           "SESSION_BUSY");
    }
    if (expected_position && *expected_position != entry->position) {
      return WithErrorInfo(
          absl::FailedPreconditionError(absl::StrCat("session ", id, " stands at ", entry->position,
                                                     ", expected ", *expected_position)),
          "SESSION_POSITION", {{"position", absl::StrCat(entry->position)}});
    }
    use.reset(new SessionUse(*this));
    entry->busy = true;
    ++entry->version;
    file = entry->file.path;
    use->id_ = id;
    use->key_ = entry->key != 0 ? entry->key : next_key_++;
    use->position_ = entry->position;
    use->pending_token_ = entry->pending_token;
    use->rope_ = entry->rope;
    use->notes_ = entry->notes;
  }
  if (!file.empty()) RETURN_IF_ERROR(LoadFromDisk(id, file, use->key_));
  return use;
}

absl::Status SessionRegistry::LoadFromDisk(const std::string& id, const std::string& file,
                                           SessionKey key) {
  ASSIGN_OR_RETURN(const StateFile read, files_.ReadIdle(file, id));
  RETURN_IF_ERROR(ImportState(key, read.image));
  std::lock_guard<std::mutex> lock(mutex_);
  ++counts_.num_from_disk;
  const auto found = entries_.find(id);
  if (found == entries_.end()) return absl::OkStatus();
  files_.Remove(std::exchange(found->second.file, {}));
  found->second.key = key;
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<SessionUse>> SessionRegistry::AcquireAnonymous(
    const std::string& tenant) {
  std::lock_guard<std::mutex> lock(mutex_);
  ASSIGN_OR_RETURN(Entry * entry, Add(tenant, limits_.ttl_ms * kMsNs));
  std::shared_ptr<SessionUse> use(new SessionUse(*this));
  entry->busy = true;
  use->id_ = entry->id;
  use->key_ = next_key_++;
  use->anonymous_ = true;
  return use;
}

void SessionRegistry::Release(SessionUse& use) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = entries_.find(use.id_);
  if (found == entries_.end()) return EraseState(use.key_);
  Entry& entry = found->second;
  entry.busy = false;
  entry.last_used = SteadyNow();
  if (use.anonymous_) Drop(entry);
}

absl::StatusOr<SessionView> SessionRegistry::Fork(const std::string& tenant, const std::string& id,
                                                  std::optional<int64_t> expected_position,
                                                  std::optional<int64_t> ttl_ms) {
  ASSIGN_OR_RETURN(const TimeNs ttl, Ttl(ttl_ms));
  ASSIGN_OR_RETURN(const std::shared_ptr<SessionUse> from, Acquire(tenant, id, expected_position));
  SessionKey key = 0;
  if (from->position() > 0) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      key = next_key_++;
    }
    RETURN_IF_ERROR(OnEngine(
        [&](SessionTable& sessions, StepExecutor&) { return sessions.Fork(from->key(), key); }));
  }
  std::lock_guard<std::mutex> lock(mutex_);
  const absl::StatusOr<Entry*> added = Add(tenant, ttl);
  if (!added.ok()) {
    if (key != 0) EraseState(key);
    return added.status();
  }
  Entry& entry = **added;
  entry.key = key;
  entry.position = from->position_;
  entry.pending_token = from->pending_token_;
  entry.rope = from->rope_;
  entry.notes = from->notes_;
  return View(entry);
}

// --- Snapshots

absl::StatusOr<std::shared_ptr<const StateImage>> SessionRegistry::Export(SessionKey key) {
  std::shared_ptr<const StateImage> image;
  int64_t num_bytes = 0;
  const EngineWork work = [&](SessionTable& sessions, StepExecutor& executor) -> absl::Status {
    num_bytes = sessions.StateBytes(key);
    ASSIGN_OR_RETURN(image, sessions.Export(key, executor));
    return absl::OkStatus();
  };
  RETURN_IF_ERROR(OnEngineWithRoom(&num_bytes, work));
  return image;
}

absl::StatusOr<SessionFiles::Snapshot> SessionRegistry::Snapshot(const SessionUse& use,
                                                                 const std::string& tenant,
                                                                 const std::string& name) {
  RETURN_IF_ERROR(files_.Check(name));
  if (use.position_ == 0) {
    return absl::FailedPreconditionError(absl::StrCat("session ", use.id_, " is empty"));
  }
  ASSIGN_OR_RETURN(const std::shared_ptr<const StateImage> image, Export(use.key_));
  ASSIGN_OR_RETURN(SessionFiles::Snapshot snapshot, files_.Write(tenant, name, *image, use.notes_));
  std::lock_guard<std::mutex> lock(mutex_);
  ++counts_.num_snapshots;
  return snapshot;
}

absl::StatusOr<std::shared_ptr<const RopeTable>> SessionRegistry::RopeOf(
    const StateNotes& notes) const {
  const ModelConfig& config = model_.card().config;
  std::optional<RopeConfig> chosen;
  if (!notes.rope.empty()) {
    if (model_.limits().max_rope_factor == 0) {
      return absl::FailedPreconditionError(
          "the state has a rope of its own; this server allows none");
    }
    ASSIGN_OR_RETURN(chosen, OverrideRope(config, notes.rope, "rope"));
  }
  ASSIGN_OR_RETURN(std::shared_ptr<const RopeTable> rope,
                   RopeOfRequest(config, chosen ? &*chosen : nullptr, notes.rope_length));
  const RopeRegime regime = rope != nullptr ? rope->regime : model_.card().rope_regime;
  if (regime.ToString() != notes.rope_digest) {
    return absl::FailedPreconditionError(
        "the state was rotated in another way than this server does (--rope)");
  }
  return rope;
}

absl::StatusOr<SessionView> SessionRegistry::Restore(const std::string& tenant,
                                                     const std::string& name,
                                                     std::optional<int64_t> ttl_ms) {
  ASSIGN_OR_RETURN(const TimeNs ttl, Ttl(ttl_ms));
  ASSIGN_OR_RETURN(StateFile file, files_.Read(tenant, name));
  ASSIGN_OR_RETURN(std::shared_ptr<const RopeTable> rope, RopeOf(file.notes));
  SessionKey key = 0;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    key = next_key_++;
  }
  RETURN_IF_ERROR(ImportState(key, file.image));
  std::lock_guard<std::mutex> lock(mutex_);
  const absl::StatusOr<Entry*> added = Add(tenant, ttl);
  if (!added.ok()) {
    EraseState(key);
    return added.status();
  }
  Entry& entry = **added;
  entry.key = key;
  entry.position = file.image->position;
  entry.pending_token = file.image->last_token;
  entry.rope = std::move(rope);
  entry.notes = std::move(file.notes);
  ++counts_.num_restores;
  return View(entry);
}

absl::StatusOr<SessionFiles::Snapshot> SessionRegistry::Import(const std::string& tenant,
                                                               const std::string& name,
                                                               const std::string& from) {
  RETURN_IF_ERROR(files_.Check(name));
  ASSIGN_OR_RETURN(const StateFile file, files_.ReadImport(from, name));
  RETURN_IF_ERROR(RopeOf(file.notes).status());
  // Written anew and not renamed: what is there is then what was checked.
  return files_.Write(tenant, name, *file.image, file.notes);
}

// --- Maintenance

void SessionRegistry::Maintain() {
  bool spilled = false;
  while (true) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      // After a move the next stats of the engine are waited for.
      wake_.wait_for(lock, spilled ? kMaintenancePeriod / 10 : kMaintenancePeriod,
                     [this] { return stopping_; });
      if (stopping_) return;
      ExpireIdle();
    }
    const SessionStats stats = loop_.stats().sessions;
    const auto limit = static_cast<double>(stats.store_bytes_total) * kSpillAbove;
    const bool wanted = stats.store_bytes_wanted > 0;
    spilled = (wanted || static_cast<double>(stats.store_bytes_used) > limit) && SpillOldest();
    if (!wanted || spilled) continue;
    loop_.Post([](SessionTable& sessions, StepExecutor&) { sessions.RefuseRoom(); });
  }
}

void SessionRegistry::ExpireIdle() {
  const TimeNs now = SteadyNow();
  for (auto at = entries_.begin(); at != entries_.end();) {
    Entry& entry = (at++)->second;
    if (entry.busy || now - entry.last_used < entry.ttl) continue;
    ++counts_.num_expired;
    Drop(entry);
  }
}

absl::Status SessionRegistry::ImportState(SessionKey key,
                                          const std::shared_ptr<const StateImage>& image) {
  return OnEngineWithRoom(&image->num_bytes, [&](SessionTable& sessions, StepExecutor& executor) {
    return sessions.Import(key, image->position, image, executor);
  });
}

// True: one has gone to the disk, and more may have to.
bool SessionRegistry::SpillOldest() {
  if (!files_.enabled()) return false;
  std::lock_guard<std::mutex> spilling(spilling_);
  struct Candidate {
    TimeNs last_used = 0;
    SessionKey key = 0;
    int64_t version = 0;
    std::string id;
    StateNotes notes;
  };
  std::vector<Candidate> candidates;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [entry_id, entry] : entries_) {
      if (stopping_ || entry.busy || entry.key == 0) continue;
      candidates.push_back({entry.last_used, entry.key, entry.version, entry.id, entry.notes});
    }
  }
  std::sort(candidates.begin(), candidates.end(),
            [](const Candidate& a, const Candidate& b) { return a.last_used < b.last_used; });
  // One on the device takes no host memory, and could need some to be copied.
  auto oldest = candidates.begin();
  std::shared_ptr<const StateImage> image;
  const absl::Status exported =
      OnEngine([&](SessionTable& sessions, StepExecutor& executor) -> absl::Status {
        while (oldest != candidates.end() &&
               sessions.place(oldest->key) != SessionTable::Place::kHost) {
          ++oldest;
        }
        if (oldest == candidates.end()) return absl::NotFoundError("no session in host memory");
        ASSIGN_OR_RETURN(image, sessions.Export(oldest->key, executor));
        return absl::OkStatus();
      });
  if (!exported.ok()) return false;
  const auto& [last_used, key, version, id, notes] = *oldest;
  absl::StatusOr<SessionFiles::IdleFile> file = files_.WriteIdle(key, *image, notes);
  if (!file.ok()) return false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = entries_.find(id);
    if (found == entries_.end() || found->second.busy || found->second.version != version) {
      files_.Remove(*file);  // used again meanwhile
      return true;
    }
    Entry& entry = found->second;
    entry.file = *std::move(file);
    entry.key = 0;
    ++counts_.num_to_disk;
  }
  // In order before the next look at what is used.
  return OnEngine([&oldest](SessionTable& sessions, StepExecutor&) {
           sessions.Erase(oldest->key);
           return absl::OkStatus();
         })
      .ok();
}

SessionDiskStats SessionRegistry::stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  SessionDiskStats stats = counts_;
  stats.num_sessions = std::ssize(entries_);
  stats.disk_bytes = files_.used_bytes();
  stats.num_disk_errors = files_.num_errors();
  for (const auto& [id, entry] : entries_) stats.num_on_disk += !entry.file.path.empty();
  return stats;
}

}  // namespace godwit
