#include "scheduler/prefix_cache.h"

#include <algorithm>
#include <string>
#include <utility>

#include "kernels/base/check.h"

namespace godwit {
namespace {

// 4 M tokens of past prompts, 25 MB.
constexpr int64_t kMaxBlocks = int64_t{1} << 16;

int64_t RoundDown(int64_t value) { return value / kPrefillBlock * kPrefillBlock; }

// Where the last state of a prompt can be kept: at least one token after it is computed, whose
// logits the output begins with, and before any is drawn, which would be counted in the state.
int64_t LastPosition(int64_t prompt_length) { return RoundDown(prompt_length - 1); }

// Where the draft model read the prompt its state is there too; where not, a sequence that
// speculates cannot start.
std::string Domain(const GenerateRequest& request) {
  return request.prefix_domain + (request.max_draft_tokens > 0 ? "+draft" : "");
}

std::span<const int32_t> Prefix(const GenerateRequest& request, int64_t length) {
  return std::span<const int32_t>(request.token_ids).first(static_cast<size_t>(length));
}

}  // namespace

std::vector<int64_t> PositionsToKeep(const PrefixCachePolicy& policy, int64_t prompt_length,
                                     std::span<const int64_t> marks,
                                     const PrefixTree::Match& match) {
  const int64_t last = LastPosition(prompt_length);
  std::vector<int64_t> named, chosen;
  const auto add = [&](int64_t position, std::vector<int64_t>& to) {
    position = RoundDown(position);
    if (position > match.num_cached && position <= last) to.push_back(position);
  };
  for (const int64_t mark : marks) add(mark, named);
  chosen = named;
  if (policy.at_end) add(last, chosen);
  if (policy.at_branch) add(match.num_known, chosen);
  if (policy.interval > 0) {
    const int64_t interval = std::max<int64_t>(RoundDown(policy.interval), kPrefillBlock);
    for (int64_t position = (match.num_cached / interval + 1) * interval; position <= last;
         position += interval) {
      add(position, chosen);
    }
  }
  std::sort(chosen.begin(), chosen.end());
  std::vector<int64_t> positions;
  for (const int64_t position : chosen) {
    const int64_t before = positions.empty() ? match.num_cached : positions.back();
    const bool is_named = std::find(named.begin(), named.end(), position) != named.end();
    if (position == before || (!is_named && position - before < policy.min_tokens)) continue;
    positions.push_back(position);
  }
  return positions;
}

PrefixCache::PrefixCache(const PrefixCachePolicy& policy, CacheManager& caches)
    : policy_(policy), caches_(caches), tree_(kMaxBlocks) {}

bool PrefixCache::Serves(const GenerateRequest& request) const {
  return caches_.geometry().num_snapshots > 0 && !request.prefix_domain.empty();
}

PrefixTree::Match PrefixCache::Find(const GenerateRequest& request, int64_t prompt_length) const {
  if (!Serves(request)) return {};
  PrefixTree::Match match =
      tree_.Find(Domain(request), Prefix(request, LastPosition(prompt_length)));
  if (request.prompt_logprobs < 0) return match;
  return {.num_known = match.num_known};
}

std::vector<int64_t> PrefixCache::Start(const GenerateRequest& request, int64_t prompt_length,
                                        const PrefixTree::Match& match) {
  if (!Serves(request)) return {};
  num_queries_ += prompt_length;
  num_hits_ += match.num_cached;
  const std::vector<int64_t> positions =
      PositionsToKeep(policy_, prompt_length, request.prefix_marks, match);
  if (match.num_cached > 0) {
    tree_.UseState(Domain(request), Prefix(request, match.num_cached));
  }
  tree_.Insert(Domain(request), Prefix(request, LastPosition(prompt_length)));
  return positions;
}

std::optional<CacheCopy> PrefixCache::Keep(const GenerateRequest& request, const CacheLease& lease,
                                           int64_t position) {
  const std::span<const int32_t> path = Prefix(request, position);
  if (tree_.Find(Domain(request), path).num_cached == position) return std::nullopt;
  if (caches_.free_snapshots() == 0) {
    GODWIT_CHECK(tree_.DropOldestState());
  }
  absl::StatusOr<CacheManager::Snapshot> taken = caches_.TakeSnapshot(lease, position);
  GODWIT_CHECK(taken.ok());
  tree_.Keep(Domain(request), path, std::move(taken->snapshot));
  ++num_kept_;
  return std::move(taken->copy);
}

void PrefixCache::Forget(const GenerateRequest& request) {
  if (Serves(request)) tree_.DropStates(Domain(request), request.token_ids);
}

PrefixCacheStats PrefixCache::stats() const {
  const CacheGeometry& geometry = caches_.geometry();
  return {.num_queries = num_queries_,
          .num_hits = num_hits_,
          .num_kept = num_kept_,
          .num_dropped = tree_.num_dropped(),
          .num_states = tree_.num_states(),
          .max_states = geometry.num_snapshots,
          .num_bytes = tree_.num_states() * geometry.slot_bytes() +
                       caches_.idle_blocks() * geometry.block_bytes()};
}

}  // namespace godwit
