#pragma once
// Sessions by tenant: who may use which, where its state is, and when it moves to the disk, the
// last of the three tiers. The states in memory are the engine thread's (SessionTable), files are
// SessionFiles'. Methods that say so wait for the engine or the disk: they belong on a worker.
// Thread-safe.

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/rope_table.h"
#include "engine/state_file.h"
#include "scheduler/engine_loop.h"
#include "server/served_model.h"
#include "server/session_files.h"
#include "server/session_limits.h"

namespace godwit {

struct SessionDiskStats {
  int64_t num_sessions = 0, num_on_disk = 0, disk_bytes = 0;
  int64_t num_to_disk = 0, num_from_disk = 0, num_expired = 0;
  int64_t num_snapshots = 0, num_restores = 0;  // written, read
  int64_t num_disk_errors = 0;  // files that could not be written; what was to be in them stands
};

// What is known of a session outside the engine.
struct SessionView {
  std::string id;
  int64_t position = 0;
  int32_t pending_token = -1;  // drawn, not in the state; -1: none
  int64_t idle_ms = 0, ttl_ms = 0;
  bool busy = false, on_disk = false;
};

class SessionRegistry;

// The right to write a session, given back with the object.
class SessionUse {
 public:
  ~SessionUse();
  SessionUse(const SessionUse&) = delete;
  SessionUse& operator=(const SessionUse&) = delete;

  const std::string& id() const { return id_; }
  SessionKey key() const { return key_; }         // of its state: starts from it and is kept as it
  int64_t position() const { return position_; }  // 0: empty
  int32_t pending_token() const { return pending_token_; }
  const std::shared_ptr<const RopeTable>& rope() const { return rope_; }

  // What an empty session rotates with from now on.
  void FixRope(std::shared_ptr<const RopeTable> rope, StateNotes notes);
  // The request has left this state.
  void Kept(int64_t position, int32_t pending_token);

 private:
  friend class SessionRegistry;
  explicit SessionUse(SessionRegistry& registry) : registry_(registry) {}
  SessionRegistry& registry_;
  std::string id_;
  SessionKey key_ = 0;
  int64_t position_ = 0;
  int32_t pending_token_ = -1;
  std::shared_ptr<const RopeTable> rope_;
  StateNotes notes_;
  bool anonymous_ = false;
};

class SessionRegistry {
 public:
  // Loop and model outlive it.
  SessionRegistry(SessionLimits limits, StateLayout layout, EngineLoop& loop,
                  const ServedModel& model);
  ~SessionRegistry();

  // INVALID_ARGUMENT: the folder cannot be used. Before any other call.
  absl::Status Start();

  absl::StatusOr<SessionView> CreateSession(const std::string& tenant,
                                            std::optional<int64_t> ttl_ms);
  absl::StatusOr<SessionView> Get(const std::string& tenant, const std::string& id) const;
  std::vector<SessionView> List(const std::string& tenant) const;
  absl::Status Delete(const std::string& tenant, const std::string& id);

  // Wait for engine and disk.
  // NOT_FOUND; ABORTED: another request writes it; FAILED_PRECONDITION: it stands elsewhere;
  // DATA_LOSS: its state is gone; RESOURCE_EXHAUSTED: no host memory to bring it back.
  absl::StatusOr<std::shared_ptr<SessionUse>> Acquire(const std::string& tenant,
                                                      const std::string& id,
                                                      std::optional<int64_t> expected_position);
  // A session of nobody's, for the time of a request.
  absl::StatusOr<std::shared_ptr<SessionUse>> AcquireAnonymous(const std::string& tenant);
  absl::StatusOr<SessionView> Fork(const std::string& tenant, const std::string& id,
                                   std::optional<int64_t> expected_position,
                                   std::optional<int64_t> ttl_ms);
  absl::StatusOr<SessionFiles::Snapshot> Snapshot(const SessionUse& use, const std::string& tenant,
                                                  const std::string& name);
  absl::StatusOr<SessionView> Restore(const std::string& tenant, const std::string& name,
                                      std::optional<int64_t> ttl_ms);
  // What was received at ImportPath(); it stays there.
  absl::StatusOr<SessionFiles::Snapshot> Import(const std::string& tenant, const std::string& name,
                                                const std::string& path);
  SessionFiles& files() { return files_; }

  SessionDiskStats stats() const;

 private:
  friend class SessionUse;
  struct Entry {
    std::string tenant, id;
    SessionKey key = 0;           // 0: empty, or on disk
    SessionFiles::IdleFile file;  // on disk
    int64_t position = 0;
    int32_t pending_token = -1;
    std::shared_ptr<const RopeTable> rope;
    StateNotes notes;
    TimeNs last_used = 0, ttl = 0;
    int64_t order = 0;
    int64_t version = 0;  // changes with every use
    bool busy = false;
  };

  absl::StatusOr<TimeNs> Ttl(std::optional<int64_t> ttl_ms) const;
  absl::StatusOr<Entry*> Find(const std::string& tenant, const std::string& id);
  absl::StatusOr<Entry*> Add(const std::string& tenant, TimeNs ttl);
  SessionView View(const Entry& entry) const;
  void Release(SessionUse& use);
  void Drop(Entry& entry);
  void EraseState(SessionKey key);
  absl::Status LoadFromDisk(const std::string& id, const std::string& file, SessionKey key);
  absl::StatusOr<std::shared_ptr<const StateImage>> Export(SessionKey key);
  using EngineWork = std::function<absl::Status(SessionTable&, StepExecutor&)>;
  absl::Status OnEngine(const EngineWork& work);
  // Again and again while `work` has no room in host memory for a state of *num_bytes (which it may
  // set) and a session goes to the disk for it.
  absl::Status OnEngineWithRoom(const int64_t* num_bytes, const EngineWork& work);
  absl::StatusOr<std::shared_ptr<const RopeTable>> RopeOf(const StateNotes& notes) const;
  void Maintain();
  void ExpireIdle();
  // Of the sessions in host memory; one at a time.
  bool SpillOldest();
  absl::Status ImportState(SessionKey key, const std::shared_ptr<const StateImage>& image);

  const SessionLimits limits_;
  EngineLoop& loop_;
  const ServedModel& model_;
  SessionFiles files_;

  mutable std::mutex mutex_;              // guards the rest
  std::map<std::string, Entry> entries_;  // by id; at most max_sessions
  SessionKey next_key_ = 1;
  int64_t next_order_ = 0;
  SessionDiskStats counts_;
  bool stopping_ = false;
  std::condition_variable wake_;
  std::mutex spilling_;  // held while a session moves to the disk; taken before any other
  std::thread maintenance_;
};

}  // namespace godwit
