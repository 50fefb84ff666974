#include "scheduler/prefix_tree.h"

#include <algorithm>
#include <list>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/scheduler/harness.h"

namespace godwit {
namespace {

using Tokens = std::vector<int32_t>;

// Block i of the path holds digit i in all places but one, so that only whole comparisons tell
// blocks apart.
Tokens Path(const std::string& digits) {
  Tokens tokens;
  for (const char digit : digits) {
    tokens.insert(tokens.end(), kPrefillBlock - 1, 7);
    tokens.push_back(digit);
  }
  return tokens;
}

class PrefixTreeTest : public testing::Test {
 protected:
  PrefixTreeTest()
      : caches_(*CacheManager::Create(FakeGeometry(2, true, 400, 0, 6))),
        lease_(*caches_->Reserve(100 * kPrefillBlock)) {}

  CacheSnapshot Take(const Tokens& tokens) {
    return std::move(caches_->TakeSnapshot(lease_, std::ssize(tokens))->snapshot);
  }
  void Keep(PrefixTree& tree, const std::string& domain, const std::string& digits) {
    tree.Keep(domain, Path(digits), Take(Path(digits)));
  }

  std::unique_ptr<CacheManager> caches_;
  CacheLease lease_;
};

TEST_F(PrefixTreeTest, FindsTheLongestPathAndTheDeepestStateOnIt) {
  PrefixTree tree(100);
  EXPECT_EQ(tree.Find("t", Path("ab")).num_known, 0);
  tree.Insert("t", Path("abcd"));
  Keep(tree, "t", "ab");
  Keep(tree, "t", "abx");
  for (const auto& [digits, known, cached] :
       std::vector<std::tuple<std::string, int, int>>{{"", 0, 0},
                                                      {"a", 1, 0},
                                                      {"ab", 2, 2},
                                                      {"abc", 3, 2},
                                                      {"abcde", 4, 2},
                                                      {"abx", 3, 3},
                                                      {"abxy", 3, 3},
                                                      {"b", 0, 0},
                                                      {"aab", 1, 0}}) {
    SCOPED_TRACE(digits);
    Tokens tokens = Path(digits);
    tokens.insert(tokens.end(), 63, 7);  // no whole block
    const PrefixTree::Match match = tree.Find("t", tokens);
    EXPECT_EQ(match.num_known, known * kPrefillBlock);
    EXPECT_EQ(match.num_cached, cached * kPrefillBlock);
    EXPECT_EQ(match.snapshot != nullptr, cached > 0);
    if (cached == 0) continue;
    EXPECT_EQ(match.snapshot->position(), match.num_cached);
  }
}

TEST_F(PrefixTreeTest, ABlockMatchesOnlyWhenEveryTokenDoes) {
  PrefixTree tree(100);
  tree.Insert("t", Path("a"));
  for (size_t place = 0; place < kPrefillBlock; ++place) {
    Tokens tokens = Path("a");
    tokens[place] ^= 1;
    EXPECT_EQ(tree.Find("t", tokens).num_known, 0) << place;
  }
}

TEST_F(PrefixTreeTest, DomainsShareNothing) {
  PrefixTree tree(100);
  Keep(tree, "t", "ab");
  EXPECT_EQ(tree.Find("u", Path("ab")).num_known, 0);
  EXPECT_EQ(tree.Find("", Path("ab")).num_known, 0);
  Keep(tree, "u", "ab");
  EXPECT_NE(tree.Find("t", Path("ab")).snapshot, tree.Find("u", Path("ab")).snapshot);
  tree.DropStates("t", Path("abc"));
  EXPECT_EQ(tree.Find("t", Path("ab")).num_cached, 0);
  EXPECT_EQ(tree.Find("u", Path("ab")).num_cached, 2 * kPrefillBlock);
}

TEST_F(PrefixTreeTest, GivesUpStatesInOrderOfLastUse) {
  PrefixTree tree(100);
  for (const char* digits : {"a", "ab", "abc"}) Keep(tree, "t", digits);
  tree.UseState("t", Path("a"));
  EXPECT_TRUE(tree.DropOldestState());
  EXPECT_EQ(tree.Find("t", Path("ab")).num_cached, 1 * kPrefillBlock);
  // The oldest is spared.
  EXPECT_TRUE(tree.DropOldestState(tree.Find("t", Path("abc")).snapshot));
  EXPECT_EQ(tree.Find("t", Path("ab")).num_cached, 0);
  EXPECT_EQ(tree.Find("t", Path("abc")).num_cached, 3 * kPrefillBlock);
  EXPECT_FALSE(tree.DropOldestState(tree.Find("t", Path("abc")).snapshot));
  EXPECT_TRUE(tree.DropOldestState());
  EXPECT_FALSE(tree.DropOldestState());
  EXPECT_EQ(caches_->free_snapshots(), 6);
  EXPECT_EQ(tree.num_dropped(), 3);
  EXPECT_EQ(tree.Find("t", Path("abc")).num_known, 3 * kPrefillBlock);  // the path stays
}

TEST_F(PrefixTreeTest, APathLongerThanTheLimitIsCutShortAndKeepsNoState) {
  PrefixTree tree(3);
  Keep(tree, "t", "xy");
  tree.Insert("t", Path("abcd"));
  EXPECT_EQ(tree.num_blocks(), 3);
  EXPECT_EQ(tree.Find("t", Path("abcd")).num_known, 3 * kPrefillBlock);
  EXPECT_EQ(tree.Find("t", Path("x")).num_known, 0);
  Keep(tree, "t", "abcd");
  EXPECT_EQ(tree.num_states(), 0);
  EXPECT_EQ(caches_->free_snapshots(), 6);
}

// What the tree must do, said with lists of strings.
class NaiveTree {
 public:
  explicit NaiveTree(size_t max_blocks) : max_blocks_(max_blocks) {}

  void Insert(const std::string& domain, const std::string& digits) {
    std::list<std::string> own;  // the path's blocks, shortest first
    for (size_t length = 1; length <= digits.size(); ++length) {
      own.push_back(domain + digits.substr(0, length));
    }
    if (own.size() > max_blocks_) own.resize(max_blocks_);
    for (const std::string& block : own) blocks_.remove(block);
    while (blocks_.size() + own.size() > max_blocks_) {
      states_.remove(blocks_.back());
      blocks_.pop_back();
    }
    blocks_.splice(blocks_.begin(), own);  // the shortest is used last of all
  }
  bool Keep(const std::string& domain, const std::string& digits) {
    Insert(domain, digits);
    if (digits.size() > max_blocks_) return false;
    states_.push_front(domain + digits);
    return true;
  }
  void UseState(const std::string& path) {
    states_.remove(path);
    states_.push_front(path);
  }
  bool DropOldest() {
    if (states_.empty()) return false;
    states_.pop_back();
    return true;
  }
  void DropStates(const std::string& path) {
    states_.remove_if([&](const std::string& state) { return path.starts_with(state); });
  }
  size_t Longest(const std::list<std::string>& of, const std::string& path) const {
    size_t longest = 0;
    for (const std::string& known : of) {
      if (path.starts_with(known)) longest = std::max(longest, known.size() - 1);
    }
    return longest;
  }

  const size_t max_blocks_;
  std::list<std::string> blocks_, states_;  // domain and digits; last used first
};

TEST_F(PrefixTreeTest, RandomOperationsAgreeWithANaiveModel) {
  for (uint64_t seed = 1; seed <= 30; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937_64 random(seed);
    const auto draw = [&](uint64_t below) { return random() % below; };
    const size_t max_blocks = 1 + draw(20);
    PrefixTree tree(static_cast<int64_t>(max_blocks));
    NaiveTree naive(max_blocks);
    for (int step = 0; step < 3000; ++step) {
      const std::string domain(1, static_cast<char>('0' + draw(2)));
      std::string digits;
      for (size_t length = 1 + draw(6); length > 0; --length) {
        digits.push_back(static_cast<char>('a' + draw(2)));
      }
      const Tokens tokens = Path(digits);
      const std::string path = domain + digits;
      PrefixTree::Match match = tree.Find(domain, tokens);
      ASSERT_EQ(match.num_known, naive.Longest(naive.blocks_, path) * kPrefillBlock);
      ASSERT_EQ(match.num_cached, naive.Longest(naive.states_, path) * kPrefillBlock);
      ASSERT_EQ(match.snapshot != nullptr, match.num_cached > 0);
      switch (draw(5)) {
        case 0:
          tree.Insert(domain, tokens);
          naive.Insert(domain, digits);
          break;
        case 1:
          if (match.num_cached == std::ssize(tokens)) break;
          if (caches_->free_snapshots() == 0) {
            ASSERT_TRUE(tree.DropOldestState());
            ASSERT_TRUE(naive.DropOldest());
          }
          tree.Keep(domain, tokens, Take(tokens));
          naive.Keep(domain, digits);
          break;
        case 2:
          if (match.num_cached == 0) break;
          tree.UseState(domain, std::span(tokens).first(static_cast<size_t>(match.num_cached)));
          naive.UseState(path.substr(0, 1 + static_cast<size_t>(match.num_cached / kPrefillBlock)));
          break;
        case 3:
          if (draw(3) > 0) break;
          ASSERT_EQ(tree.DropOldestState(), naive.DropOldest());
          break;
        case 4:
          if (draw(6) > 0) break;
          tree.DropStates(domain, tokens);
          naive.DropStates(path);
          if (draw(20) > 0) break;
          tree.Clear();
          naive.blocks_.clear();
          naive.states_.clear();
      }
      ASSERT_EQ(tree.num_blocks(), std::ssize(naive.blocks_));
      ASSERT_EQ(tree.num_states(), std::ssize(naive.states_));
      ASSERT_EQ(caches_->free_snapshots(), 6 - tree.num_states());
    }
    tree.Clear();
  }
}

}  // namespace
}  // namespace godwit
