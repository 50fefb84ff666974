#pragma once
// Host bookkeeping of sequence state: which slot and which KV blocks a sequence holds, and how many fit. Knows nothing but
// the list of StateComponent and integers; the bytes live in a CachePool. Admission is exact and never over-commits.

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/state_component.h"

namespace godwit {

inline constexpr int kMaxStepsInFlight = 2;
inline constexpr int kMaxDraftTokens = 15;  // K_max; K_max + 1 <= W

// Rows of a window ring: W - 1 + (F + 1)(K_max + 1), F = steps in flight.
int64_t WindowRows(int max_steps_in_flight, int max_draft_tokens);

struct CacheGeometry {
  std::vector<StateComponent> components;
  int64_t window_rows = 0;      // of every windowed component
  int64_t num_slots = 0;        // one per resident sequence
  int64_t num_blocks = 0;       // KV blocks of kPagedBlock tokens, shared by all paged components (one id = one block each)
  int64_t swap_bytes = 0;       // host memory for preempted sequences
  int64_t store_bytes = 0;      // host memory for stored states: sessions
  // States kept for later sequences to start from, in slots num_slots, num_slots + 1, ... of the
  // pool. No row runs there.
  int64_t num_snapshots = 0;
  // Unlimited output: a sequence of more than bound_beyond tokens is bounded. It holds at most bound_tokens, a multiple of
  // kPagedBlock in [3 kPagedBlock, bound_beyond]: the first block and the latest tokens. 0: every sequence holds all.
  int64_t bound_tokens = 0, bound_beyond = 0;

  bool has_paged() const;
  int64_t slot_bytes() const;        // bases and window rings of one sequence
  int64_t block_bytes() const;       // one block id, over all paged components
  int64_t kv_bytes_per_token() const;
  bool bounds(int64_t num_tokens) const { return bound_tokens > 0 && num_tokens > bound_beyond; }
  // The bound for a window of so many latest tokens: the first block, the window, and the block that fills up until the
  // next drop.
  static int64_t BoundFor(int64_t window);
  // Tokens that a bounded sequence has dropped once `num_tokens` went through it.
  int64_t dropped_after(int64_t num_tokens) const;
  // That a sequence of num_tokens needs at most; 0 without paged components.
  int64_t blocks_for(int64_t num_tokens) const;
  int64_t bytes_per_sequence(int64_t num_tokens) const;
};

class CacheManager;

// The first block of a bounded sequence where its tokens stand after a drop (TurnKeysArgs).
struct SinkTurn {
  int32_t from_block = 0;  // as it was written
  int32_t to_block = 0;    // what the block table begins with from now on
  int64_t delta = 0;       // tokens dropped so far
};

// What one sequence holds: ids and positions, never bytes. Move-only; returns its ids when destroyed. Two states: resident
// (slot and blocks) or swapped (host_id). Not thread-safe; owned by the engine thread.
class CacheLease {
 public:
  CacheLease() = default;
  CacheLease(CacheLease&& other) noexcept;
  CacheLease& operator=(CacheLease&& other) noexcept;
  ~CacheLease() { Release(); }

  explicit operator bool() const { return manager_ != nullptr; }
  bool resident() const { return slot_ >= 0; }
  bool swapped() const { return host_id_ >= 0; }
  int32_t slot() const { return slot_; }
  const std::vector<int32_t>& blocks() const { return blocks_; }
  int64_t reserved_tokens() const { return reserved_tokens_; }
  int64_t host_id() const { return host_id_; }

  // A bounded sequence (CacheGeometry) has one block more than its block table: the first block as it was written, behind
  // the others; until tokens were dropped, room for its turned copy. Its other blocks are written again and again, so none
  // may be shared. A state that has dropped tokens is none that its text would give: it is not saved, forked or published.
  bool bounded() const { return bound_tokens_ > 0; }
  int64_t dropped() const { return dropped_; }  // tokens, a multiple of kPagedBlock
  // Room for the token of `position` in a bounded lease: where its block table is full, the oldest block behind the first
  // is taken for it and the first is to be turned before the step. A function of the position alone.
  std::optional<SinkTurn> MakeRoom(int64_t position);

  // Number of tokens that went through the state (what the host has seen committed). Set by the engine at Collect.
  int64_t position() const { return position_; }
  void set_position(int64_t position) { position_ = position; }

  // True until the engine zeroed the slot, in the first step that uses it.
  bool fresh() const { return fresh_; }
  void clear_fresh() { fresh_ = false; }

  void Release();

 private:
  friend class CacheManager;
  CacheManager* manager_ = nullptr;
  int32_t slot_ = -1;
  bool fresh_ = false;
  std::vector<int32_t> blocks_;
  int64_t reserved_tokens_ = 0;
  int64_t position_ = 0;
  int64_t bound_tokens_ = 0, dropped_ = 0;
  int64_t host_id_ = -1;
  int64_t host_bytes_ = 0;
};

// A state kept in host memory beside the sequences: any number of leases can be loaded from it. Move-only; returns its bytes
// when destroyed. Not thread-safe; owned by the engine thread.
class StoredState {
 public:
  StoredState() = default;
  StoredState(StoredState&& other) noexcept;
  StoredState& operator=(StoredState&& other) noexcept;
  ~StoredState() { Release(); }

  explicit operator bool() const { return manager_ != nullptr; }
  int64_t host_id() const { return host_id_; }
  int64_t position() const { return position_; }  // tokens in the state
  int64_t num_bytes() const { return num_bytes_; }  // of host memory

  void Release();

 private:
  friend class CacheManager;
  CacheManager* manager_ = nullptr;
  int64_t host_id_ = -1;
  int64_t position_ = 0;
  int64_t num_bytes_ = 0;
};

// A state at one position that sequences can start from: a slot of its own, and the whole KV blocks
// up to the position, which it shares with the sequence that computed them and with all that start
// here. Nobody writes to a shared block: tokens after the position lie in blocks of their sequence.
// Move-only; returns what it holds when destroyed. Not thread-safe.
class CacheSnapshot {
 public:
  CacheSnapshot() = default;
  CacheSnapshot(CacheSnapshot&& other) noexcept;
  CacheSnapshot& operator=(CacheSnapshot&& other) noexcept;
  ~CacheSnapshot() { Release(); }

  explicit operator bool() const { return manager_ != nullptr; }
  int32_t slot() const { return slot_; }
  const std::vector<int32_t>& blocks() const { return blocks_; }
  int64_t position() const { return position_; }

  void Release();

 private:
  friend class CacheManager;
  CacheManager* manager_ = nullptr;
  int32_t slot_ = -1;
  std::vector<int32_t> blocks_;
  int64_t position_ = 0;
};

// A copy of a whole sequence state, done by StepExecutor::Copy in order with the steps. Ids are captured by value: the
// manager may hand the source's device ids to others at once, because later steps run after the copy. Whoever orders a
// kFork clears fresh() of the target's lease, or its first step would zero the copy.
struct CacheCopy {
  // kFork, kSave and kLoad leave their source as it is; a swap's is gone. kTrim copies nothing: the state in from_slot is
  // cut to `position`.
  enum class Kind { kFork, kSwapOut, kSwapIn, kSave, kLoad, kTrim };
  Kind kind = Kind::kFork;
  int32_t from_slot = -1, to_slot = -1;
  // As many as hold `position` tokens; none where the two share them.
  std::vector<int32_t> from_blocks, to_blocks;
  int64_t host_id = -1;  // all but kFork and kTrim
  int64_t position = 0;
  int32_t next_token = -1;              // kTrim: drawn after the state, not in it; -1: none
  std::vector<int32_t> dropped_tokens;  // kTrim: drawn, and no longer part of the text
};

class CacheManager {
 public:
  // INVALID_ARGUMENT: no slots, or paged components without blocks.
  static absl::StatusOr<std::unique_ptr<CacheManager>> Create(CacheGeometry geometry);

  const CacheGeometry& geometry() const { return geometry_; }
  int64_t free_slots() const { return static_cast<int64_t>(free_slots_.size()); }
  int64_t free_blocks() const { return static_cast<int64_t>(free_blocks_.size()); }
  int64_t free_swap_bytes() const { return geometry_.swap_bytes - used_swap_bytes_; }
  int64_t free_store_bytes() const { return geometry_.store_bytes - used_store_bytes_; }

  int64_t free_snapshots() const { return static_cast<int64_t>(free_snapshots_.size()); }
  // Blocks that only snapshots hold: they come free when those are released.
  int64_t idle_blocks() const { return num_idle_blocks_; }

  // Would `count` sequences of `num_tokens` each fit now / in an empty cache? The first of them
  // takes num_shared blocks from a snapshot.
  bool Fits(int64_t num_tokens, int64_t count = 1, int64_t num_shared = 0) const;
  bool FitsEver(int64_t num_tokens, int64_t count = 1) const;

  // A slot and the blocks for num_tokens (prompt + max_tokens). RESOURCE_EXHAUSTED leaves everything unchanged.
  absl::StatusOr<CacheLease> Reserve(int64_t num_tokens);

  // The state of a resident lease at `position`, a multiple of kPagedBlock that is not before the
  // lease's own and that all steps in flight together reach. RESOURCE_EXHAUSTED (no free snapshot)
  // leaves everything unchanged; on OK the caller executes the copy behind the step that reaches
  // the position and before the next one of the lease.
  struct Snapshot {
    CacheSnapshot snapshot;
    CacheCopy copy;
  };
  absl::StatusOr<Snapshot> TakeSnapshot(const CacheLease& lease, int64_t position);

  // A lease as Reserve gives it, that starts at the snapshot's position; num_tokens is more than
  // that. The caller executes the copy before the lease's first step. The snapshot may be released
  // meanwhile: what reuses its slot is copied later.
  struct Started {
    CacheLease lease;
    CacheCopy copy;
  };
  absl::StatusOr<Started> ReserveFrom(const CacheSnapshot& snapshot, int64_t num_tokens);

  // Blocks that no other lease holds: when this one is released they are free or idle.
  int64_t NumOwnBlocks(const CacheLease& lease) const;
  // Leases and snapshots that hold the block.
  int64_t NumUsers(int32_t block) const;
  bool IsIdle(int32_t block) const;

  // Moves a resident lease with no step in flight to host memory / back. RESOURCE_EXHAUSTED leaves all unchanged; on OK the
  // lease has changed state and the caller must execute the copy before its next step.
  absl::StatusOr<CacheCopy> SwapOut(CacheLease& lease);
  absl::StatusOr<CacheCopy> SwapIn(CacheLease& lease);
  // Host bytes that SwapOut would take.
  int64_t SwapBytes(const CacheLease& lease) const;
  // Host bytes of a state of `position` tokens, none of which was dropped.
  int64_t StateBytes(int64_t position) const;

  // Copies the state of a resident lease to host memory; the lease keeps all it has. `position`, at least 1: where the state
  // will stand once every submitted step has run, none of which may have drawn from it uncollected. RESOURCE_EXHAUSTED,
  // and FAILED_PRECONDITION for a lease that has dropped tokens, change nothing; on OK the caller executes the copy before the lease's next step, or drops the state first.
  struct Saved {
    StoredState state;
    CacheCopy copy;
  };
  absl::StatusOr<Saved> Save(const CacheLease& lease, int64_t position);
  // The second half of Save, into a state that Store gave.
  CacheCopy SaveTo(const StoredState& state, const CacheLease& lease);
  // Fills a fresh lease with the state of another, which has no step in flight and stays. The same rules as for Load.
  CacheCopy Fork(const CacheLease& from, CacheLease& lease);
  // Cuts the state of a lease with no step in flight to `position`, at least 1, and what is reserved for it too. The state's
  // bases have not been folded beyond it: it is no less than any confirmed_position that a row of the lease named.
  CacheCopy Trim(CacheLease& lease, int64_t position, int32_t next_token, std::vector<int32_t> dropped_tokens);
  // Fills a fresh lease with room for it (a bounded one holds bound_tokens) from a stored state, which stays. The copy must be executed before the lease's
  // next step; the stored state may be dropped as soon as the copy is planned to run before any other.
  CacheCopy Load(const StoredState& state, CacheLease& lease);
  // Host memory for a state of `position` tokens that comes from elsewhere (StateFile). RESOURCE_EXHAUSTED changes nothing.
  absl::StatusOr<StoredState> Store(int64_t position);

  // Host ids freed by released swapped leases and stored states since the last call; the pool frees their bytes.
  std::vector<int64_t> TakeReleasedHostIds();

 private:
  friend class CacheLease;
  friend class StoredState;
  friend class CacheSnapshot;
  // Of one block; it is free when both are 0.
  struct BlockUsers {
    int32_t num_leases = 0, num_snapshots = 0;
  };
  explicit CacheManager(CacheGeometry geometry);
  // A slot, the shared blocks and num_blocks free ones; all or nothing.
  absl::Status Take(const std::vector<int32_t>& shared, int64_t num_blocks, CacheLease& lease);
  void Return(CacheLease& lease);
  void Return(StoredState& state);
  void Return(CacheSnapshot& snapshot);
  void ReturnBlocksAfter(size_t num_kept, CacheLease& lease);
  void ReturnDeviceIds(CacheLease& lease);
  void AddUsers(int32_t block, BlockUsers change);
  const BlockUsers& users(int32_t block) const { return block_users_[static_cast<size_t>(block)]; }
  int64_t StateBytes(int64_t num_blocks, int64_t position) const;

  CacheGeometry geometry_;
  std::vector<int32_t> free_slots_, free_blocks_, free_snapshots_;
  std::vector<BlockUsers> block_users_;  // by block
  int64_t num_idle_blocks_ = 0;
  std::vector<int64_t> released_host_ids_;
  int64_t used_swap_bytes_ = 0, used_store_bytes_ = 0;
  int64_t next_host_id_ = 0;
};

}  // namespace godwit
