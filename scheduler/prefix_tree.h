#pragma once
// Which prompts were seen, and where along them a state is kept: a radix tree over token ids whose
// digit is a block of kPrefillBlock tokens, because states are kept at multiples of that only.
// Token ids are compared, not their hashes: two prompts never meet in one node unless they are
// equal.

#include <array>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/batch.h"
#include "engine/cache_manager.h"

namespace godwit {

// Not thread-safe. Every operation takes time in proportion to the tokens that it is given.
class PrefixTree {
 public:
  // The most blocks that are remembered; beyond, those of the path used longest ago go, with the
  // states kept there.
  explicit PrefixTree(int64_t max_blocks);

  struct Match {
    int64_t num_known = 0;                    // tokens of the longest path that was seen
    int64_t num_cached = 0;                   // up to the deepest state on it; 0: none
    const CacheSnapshot* snapshot = nullptr;  // that state, valid until the tree changes
  };
  // Of whole blocks of `token_ids`. Domains share nothing.
  Match Find(const std::string& domain, std::span<const int32_t> token_ids) const;
  // A sequence starts from the state where this path ends: of all states it is used last.
  void UseState(const std::string& domain, std::span<const int32_t> token_ids);

  // Remembers the path of all whole blocks, as far as max_blocks reaches.
  void Insert(const std::string& domain, std::span<const int32_t> token_ids);
  // Keeps a state where the path of token_ids ends: position() == token_ids.size(), a multiple of
  // kPrefillBlock, and no state is there yet. The path is remembered too; one that is longer than
  // max_blocks keeps nothing.
  void Keep(const std::string& domain, std::span<const int32_t> token_ids, CacheSnapshot snapshot);

  // Gives up the state that was used longest ago, other than `spared`. False: there is none.
  bool DropOldestState(const CacheSnapshot* spared = nullptr);
  // Gives up the states along the path.
  void DropStates(const std::string& domain, std::span<const int32_t> token_ids);
  void Clear();

  int64_t num_blocks() const { return num_blocks_; }
  int64_t num_states() const { return num_states_; }
  int64_t num_dropped() const { return num_dropped_; }  // states given up so far

 private:
  using Node = int32_t;
  static constexpr Node kNone = -1;
  using Block = std::array<int32_t, kPrefillBlock>;
  // A list through the nodes, most recently used first.
  struct Links {
    Node previous = kNone, next = kNone;
  };
  struct List {
    Node first = kNone, last = kNone;
  };
  struct NodeData {
    Block token_ids = {};  // from the parent's end to the node's; of the root of a domain: none
    const std::string* domain = nullptr;  // of a root: the key of roots_
    Node parent = kNone;                  // of a root: none
    int64_t num_children = 0;
    CacheSnapshot snapshot;  // empty: no state is kept here
    Links use, state;
  };

  NodeData& at(Node node) { return nodes_[static_cast<size_t>(node)]; }
  const NodeData& at(Node node) const { return nodes_[static_cast<size_t>(node)]; }
  static uint64_t Hash(Node parent, std::span<const int32_t> block);
  Node Root(const std::string& domain) const;
  Node Child(Node parent, std::span<const int32_t> block) const;
  Node Add(Node parent);
  // The node where the path ends, or kNone.
  Node Walk(const std::string& domain, std::span<const int32_t> token_ids) const;
  // The same, after what is missing was added; kNone when max_blocks cut it short.
  Node Grow(const std::string& domain, std::span<const int32_t> token_ids);
  void Use(Node node);
  void DropState(Node node);
  void Remove(Node node);
  void PushFront(List& list, Links NodeData::*links, Node node);
  void Unlink(List& list, Links NodeData::*links, Node node);

  const int64_t max_blocks_;
  std::vector<NodeData> nodes_;  // at most max_blocks_ and a root for each domain among them
  std::vector<Node> free_nodes_;
  std::map<std::string, Node> roots_;
  std::unordered_multimap<uint64_t, Node> children_;  // by Hash
  List uses_;    // of all nodes. A node is used after all its descendants, so the last is a leaf
  List states_;  // of nodes with a state
  int64_t num_blocks_ = 0, num_states_ = 0, num_dropped_ = 0;
};

}  // namespace godwit
