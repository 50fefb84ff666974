#pragma once
// The states that requests leave behind and later ones start from, as the engine thread keeps them:
// on the device while there is room, in host memory under pressure. A state is a value: it is
// copied into the lease of a request that starts from it and is never changed, so that sessions
// forked from one another share it, and a request that fails leaves its session as it was. Who owns
// a session, and what lies on the disk, is the server's to know.

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/batch.h"
#include "engine/cache_manager.h"

namespace godwit {

using SessionKey = int64_t;  // > 0; given by the server, never twice

// Counts of values (a state shared by forks is one) and of moves since the start.
struct SessionStats {
  int64_t num_sessions = 0, num_on_device = 0, num_on_host = 0;
  int64_t store_bytes_used = 0;   // of host memory, by sessions
  int64_t store_bytes_total = 0;  // for all stored states
  int64_t num_to_host = 0;        // moved there for want of slots or blocks
  int64_t num_from_device = 0;    // requests that started from a state on the device
  int64_t num_from_host = 0;      // and from one in host memory
  int64_t num_dropped = 0;        // states given up because host memory was full too
  int64_t store_bytes_wanted =
      0;                 // by a state that has to leave the device; 0: none waits for room
  int64_t num_kept = 0;  // states that requests left
};

// Owned and used by the engine thread. Copies are gathered; whoever runs the next ones on the
// executor runs these before (TakeCopies).
class SessionTable {
 public:
  // may_drop: with device and host memory full, the state used longest ago is given up. Else it
  // stays where it is, and whoever needs its place waits until someone erases a state in host
  // memory (who has taken it elsewhere) or says RefuseRoom.
  SessionTable(CacheManager& caches, bool may_drop) : caches_(caches), may_drop_(may_drop) {}

  bool Has(SessionKey key) const { return sessions_.contains(key); }
  // Tokens in its state; 0 also for a session that does not exist.
  int64_t position(SessionKey key) const;
  // Where its state is.
  enum class Place { kNone, kDevice, kHost, kLost };
  Place place(SessionKey key) const;

  // The session `to`, which does not exist, gets the state of `from`. NOT_FOUND; DATA_LOSS: the
  // state was given up.
  absl::Status Fork(SessionKey from, SessionKey to);
  void Erase(SessionKey key) { sessions_.erase(key); }

  // What its state takes in host memory.
  int64_t StateBytes(SessionKey key) const { return caches_.StateBytes(position(key)); }
  // The state's bytes. RESOURCE_EXHAUSTED: no host memory; NOT_FOUND, DATA_LOSS.
  absl::StatusOr<std::shared_ptr<const StateImage>> Export(SessionKey key, StepExecutor& executor);
  // A session with these bytes as its state. RESOURCE_EXHAUSTED: no host memory.
  absl::Status Import(SessionKey key, int64_t position, std::shared_ptr<const StateImage> image,
                      StepExecutor& executor);

  // For the scheduler. Begin fills a fresh lease with the state of a session; false: there is none.
  // Keep makes `lease`, with no step in flight, the state of `key`, cut to `position`: the token
  // after it, drawn and not computed, is `next_token` (-1: none), and `dropped` were drawn and are
  // no part of it.
  bool Begin(SessionKey key, CacheLease& lease, std::vector<CacheCopy>& copies);
  void Keep(SessionKey key, CacheLease lease, int64_t position, int32_t next_token,
            std::vector<int32_t> dropped);
  // Moves the state on the device that was used longest ago to host memory. False: there is none,
  // or no room. Where host memory as a whole would hold it, that room is wanted until Evict
  // succeeds or ForgetWanted.
  bool Evict(std::vector<CacheCopy>& copies);
  int64_t wanted_bytes() const { return wanted_bytes_; }
  void ForgetWanted() { wanted_bytes_ = 0; }
  // Nobody can make the room that is wanted now: whoever waits for it fails.
  void RefuseRoom() { refused_ = wanted_bytes_ > 0; }
  bool TakeRefusal() { return std::exchange(refused_, false); }
  // Copies that failed: the states they were to make are lost.
  void Lose(std::span<const CacheCopy> copies);

  bool has_copies() const { return !copies_.empty(); }
  std::vector<CacheCopy> TakeCopies() { return std::exchange(copies_, {}); }
  absl::Status Flush(StepExecutor& executor);

  SessionStats stats() const;

 private:
  struct Value {
    int64_t position = 0;
    CacheLease lease;    // on the device, or
    StoredState stored;  // in host memory; neither: lost
    int64_t last_use = 0;
  };
  Value* Oldest(bool on_device) const;
  absl::StatusOr<Value*> Find(SessionKey key);
  absl::StatusOr<StoredState> Store(int64_t position);

  CacheManager& caches_;
  const bool may_drop_;
  std::map<SessionKey, std::shared_ptr<Value>> sessions_;
  std::vector<CacheCopy> copies_;
  int64_t next_use_ = 1;
  int64_t wanted_bytes_ = 0;
  bool refused_ = false;
  SessionStats counts_;  // the counters
};

}  // namespace godwit
