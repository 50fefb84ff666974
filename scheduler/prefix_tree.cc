#include "scheduler/prefix_tree.h"

#include <algorithm>
#include <utility>

#include "kernels/base/check.h"

namespace godwit {
namespace {

std::span<const int32_t> BlockOf(std::span<const int32_t> token_ids, int64_t index) {
  return token_ids.subspan(static_cast<size_t>(index * kPrefillBlock), kPrefillBlock);
}

int64_t NumBlocks(std::span<const int32_t> token_ids) {
  return std::ssize(token_ids) / kPrefillBlock;
}

}  // namespace

PrefixTree::PrefixTree(int64_t max_blocks) : max_blocks_(max_blocks) {
  GODWIT_CHECK(max_blocks >= 1);
}

// Only spreads children over buckets: equality is decided by the ids. FNV-1a over 32-bit words.
uint64_t PrefixTree::Hash(Node parent, std::span<const int32_t> block) {
  uint64_t hash = 0xcbf29ce484222325u ^ static_cast<uint64_t>(parent);
  for (const int32_t token_id : block) {
    hash = (hash ^ static_cast<uint32_t>(token_id)) * 0x100000001b3u;
  }
  return hash ^ (hash >> 32);
}

PrefixTree::Node PrefixTree::Root(const std::string& domain) const {
  const auto found = roots_.find(domain);
  return found == roots_.end() ? kNone : found->second;
}

PrefixTree::Node PrefixTree::Child(Node parent, std::span<const int32_t> block) const {
  const auto [begin, end] = children_.equal_range(Hash(parent, block));
  for (auto entry = begin; entry != end; ++entry) {
    const NodeData& child = at(entry->second);
    if (child.parent == parent && std::ranges::equal(child.token_ids, block)) return entry->second;
  }
  return kNone;
}

PrefixTree::Match PrefixTree::Find(const std::string& domain,
                                   std::span<const int32_t> token_ids) const {
  Match match;
  Node node = Root(domain);
  if (node == kNone) return match;
  for (int64_t index = 0; index < NumBlocks(token_ids); ++index) {
    node = Child(node, BlockOf(token_ids, index));
    if (node == kNone) break;
    match.num_known = (index + 1) * kPrefillBlock;
    if (!at(node).snapshot) continue;
    match.num_cached = match.num_known;
    match.snapshot = &at(node).snapshot;
  }
  return match;
}

PrefixTree::Node PrefixTree::Walk(const std::string& domain,
                                  std::span<const int32_t> token_ids) const {
  Node node = Root(domain);
  for (int64_t index = 0; node != kNone && index < NumBlocks(token_ids); ++index) {
    node = Child(node, BlockOf(token_ids, index));
  }
  return node;
}

PrefixTree::Node PrefixTree::Add(Node parent) {
  Node node = static_cast<Node>(nodes_.size());
  if (free_nodes_.empty()) {
    nodes_.emplace_back();
  } else {
    node = free_nodes_.back();
    free_nodes_.pop_back();
  }
  at(node).parent = parent;
  PushFront(uses_, &NodeData::use, node);
  return node;
}

PrefixTree::Node PrefixTree::Grow(const std::string& domain, std::span<const int32_t> token_ids) {
  if (NumBlocks(token_ids) == 0) return kNone;
  Node node = Root(domain);
  if (node == kNone) {
    node = Add(kNone);
    at(node).domain = &roots_.emplace(domain, node).first->first;
  }
  const Node root = node;
  ++at(root).num_children;  // holds it while all of its children may be removed
  int64_t index = 0;
  for (; index < NumBlocks(token_ids); ++index) {
    const Node child = Child(node, BlockOf(token_ids, index));
    if (child == kNone) break;
    node = child;
  }
  Use(node);  // no block of this path is the oldest, as long as there is another
  for (; index < NumBlocks(token_ids); ++index) {
    if (num_blocks_ == max_blocks_) {
      if (index == max_blocks_) break;
      Remove(uses_.last);
    }
    const std::span<const int32_t> block = BlockOf(token_ids, index);
    const Node child = Add(node);
    std::ranges::copy(block, at(child).token_ids.begin());
    children_.emplace(Hash(node, block), child);
    ++at(node).num_children;
    ++num_blocks_;
    node = child;
  }
  --at(root).num_children;
  Use(node);
  return index == NumBlocks(token_ids) ? node : kNone;
}

void PrefixTree::Use(Node node) {
  for (; node != kNone; node = at(node).parent) {
    Unlink(uses_, &NodeData::use, node);
    PushFront(uses_, &NodeData::use, node);
  }
}

void PrefixTree::UseState(const std::string& domain, std::span<const int32_t> token_ids) {
  const Node node = Walk(domain, token_ids);
  GODWIT_CHECK(node != kNone);
  GODWIT_CHECK(at(node).snapshot);
  Unlink(states_, &NodeData::state, node);
  PushFront(states_, &NodeData::state, node);
}

void PrefixTree::Insert(const std::string& domain, std::span<const int32_t> token_ids) {
  Grow(domain, token_ids);
}

void PrefixTree::Keep(const std::string& domain, std::span<const int32_t> token_ids,
                      CacheSnapshot snapshot) {
  GODWIT_CHECK(snapshot);
  GODWIT_CHECK(!token_ids.empty() && token_ids.size() % kPrefillBlock == 0);
  GODWIT_CHECK(snapshot.position() == std::ssize(token_ids));
  const Node node = Grow(domain, token_ids);
  if (node == kNone) return;
  GODWIT_CHECK(!at(node).snapshot);
  at(node).snapshot = std::move(snapshot);
  PushFront(states_, &NodeData::state, node);
  ++num_states_;
}

bool PrefixTree::DropOldestState(const CacheSnapshot* spared) {
  Node node = states_.last;
  if (node != kNone && &at(node).snapshot == spared) node = at(node).state.previous;
  if (node == kNone) return false;
  DropState(node);
  return true;
}

void PrefixTree::DropStates(const std::string& domain, std::span<const int32_t> token_ids) {
  Node node = Root(domain);
  for (int64_t index = 0; node != kNone && index < NumBlocks(token_ids); ++index) {
    node = Child(node, BlockOf(token_ids, index));
    if (node != kNone && at(node).snapshot) DropState(node);
  }
}

void PrefixTree::DropState(Node node) {
  Unlink(states_, &NodeData::state, node);
  at(node).snapshot.Release();
  --num_states_;
  ++num_dropped_;
}

// A node without children; and a root that it leaves without any.
void PrefixTree::Remove(Node node) {
  GODWIT_CHECK(at(node).num_children == 0);
  while (node != kNone && at(node).num_children == 0) {
    if (at(node).snapshot) DropState(node);
    const Node parent = at(node).parent;
    if (parent == kNone) {
      roots_.erase(*at(node).domain);
    } else {
      const auto [begin, end] = children_.equal_range(Hash(parent, at(node).token_ids));
      children_.erase(
          std::find_if(begin, end, [&](const auto& entry) { return entry.second == node; }));
      --at(parent).num_children;
      --num_blocks_;
    }
    Unlink(uses_, &NodeData::use, node);
    at(node) = {};
    free_nodes_.push_back(node);
    node = parent != kNone && at(parent).parent == kNone ? parent : kNone;
  }
}

void PrefixTree::Clear() {
  while (uses_.last != kNone) Remove(uses_.last);
}

void PrefixTree::PushFront(List& list, Links NodeData::*links, Node node) {
  (at(node).*links) = {.previous = kNone, .next = list.first};
  (list.first == kNone ? list.last : (at(list.first).*links).previous) = node;
  list.first = node;
}

void PrefixTree::Unlink(List& list, Links NodeData::*links, Node node) {
  const auto [previous, next] = at(node).*links;
  (previous == kNone ? list.first : (at(previous).*links).next) = next;
  (next == kNone ? list.last : (at(next).*links).previous) = previous;
}

}  // namespace godwit
