#pragma once
// Prompts that begin alike are computed once: states at chosen positions of past prompts, from
// which later requests start. A state is the whole of a sequence (recurrent bases, windows, penalty
// counts, draft model) at one position, its KV blocks shared and never written again. Positions are
// multiples of kPrefillBlock inside the prompt, so the rest is computed in the same blocks as it
// would be without: a hit has the bits of a miss (docs/architecture.md section 3.2).

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "engine/batch.h"
#include "engine/cache_manager.h"
#include "scheduler/prefix_tree.h"
#include "scheduler/request.h"

namespace godwit {

// Where a prompt's state is kept. The positions that a request names are kept in any case.
struct PrefixCachePolicy {
  // At the last multiple of kPrefillBlock before the prompt's end: the next turn of a conversation
  // starts there, and so does the same prompt.
  bool at_end = true;
  // Where the prompt leaves the path of an earlier one: what both begin with is likely to come
  // again. Two prompts find it out, the third starts there.
  bool at_branch = true;
  int64_t interval = 8192;  // at every multiple; 0: nowhere
  // A state is kept where it saves at least that many tokens over the one before it on the path.
  int64_t min_tokens = kPrefillBlock;
};

struct PrefixCacheStats {
  int64_t num_queries = 0, num_hits = 0;  // prompt tokens that were looked up, and found
  int64_t num_kept = 0, num_dropped = 0;  // states, so far
  int64_t num_states = 0, max_states = 0;
  int64_t num_bytes = 0;  // of these states, with the KV blocks that no sequence uses
};

// The positions at which a prompt's state is kept, ascending: multiples of kPrefillBlock after
// match.num_cached and before the prompt's end. `marks`: positions that the request names, rounded
// down.
std::vector<int64_t> PositionsToKeep(const PrefixCachePolicy& policy, int64_t prompt_length,
                                     std::span<const int64_t> marks,
                                     const PrefixTree::Match& match);

// Off when the cache manager has no snapshots. Not thread-safe.
class PrefixCache {
 public:
  PrefixCache(const PrefixCachePolicy& policy, CacheManager& caches);

  // What the request can start from; at least the last token of a prompt is computed, and one whose
  // tokens are scored from its beginning.
  PrefixTree::Match Find(const GenerateRequest& request, int64_t prompt_length) const;
  // The request starts, from match: counts and remembers it. Where its states are to be kept.
  std::vector<int64_t> Start(const GenerateRequest& request, int64_t prompt_length,
                             const PrefixTree::Match& match);
  // Keeps the state that the lease will have at `position` behind the steps submitted so far; the
  // copy goes before its next step. Nothing when the same state is kept already.
  std::optional<CacheCopy> Keep(const GenerateRequest& request, const CacheLease& lease,
                                int64_t position);

  // Gives up the state used longest ago, other than `spared`, for its KV blocks. False: none left.
  bool DropOldest(const CacheSnapshot* spared) { return tree_.DropOldestState(spared); }
  // A step of the request failed: its states are not trusted.
  void Forget(const GenerateRequest& request);
  void Clear() { tree_.Clear(); }

  PrefixCacheStats stats() const;

 private:
  bool Serves(const GenerateRequest& request) const;

  const PrefixCachePolicy policy_;
  CacheManager& caches_;
  PrefixTree tree_;
  int64_t num_queries_ = 0, num_hits_ = 0, num_kept_ = 0;
};

}  // namespace godwit
