#pragma once
// A StepExecutor without a model. The state of a sequence is a hash of its tokens, kept by slot
// (and, with paged components, by block), and a drawn token is a function of (seed, output_index,
// position) and of that state: a state that is lost, swapped for another or forked too early
// changes tokens. Computes in Submit, reports at Collect, and records every breach of the contract
// of engine/batch.h.

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/batch.h"
#include "engine/cache_manager.h"
#include "engine/state_image.h"
#include "scheduler/request.h"

namespace godwit {

struct FakeExecutorOptions {
  int32_t vocab_size = 1000;
  int64_t max_tokens_per_step = 2048;
  int max_steps_in_flight = 1;
  // Called before each Submit, Collect and Copy ("submit", 0-based count); not OK: that call fails.
  std::function<absl::Status(const std::string& call, int64_t count)> fault;
};

class FakeExecutor final : public StepExecutor {
 public:
  FakeExecutor(FakeExecutorOptions options, CacheManager& caches);

  absl::StatusOr<StepId> Submit(std::span<const BatchRow> rows) override;
  absl::StatusOr<StepResult> Collect(StepId id) override;
  absl::Status Copy(std::span<const CacheCopy> copies) override;
  std::shared_ptr<const StateImage> ExportState(int64_t host_id) override;
  absl::Status ImportState(int64_t host_id, std::shared_ptr<const StateImage> image) override;

  const std::vector<std::string>& violations() const { return violations_; }  // the first 20
  uint64_t trace_hash() const {
    return trace_hash_;
  }  // of everything that was submitted and copied
  int64_t num_steps() const { return num_submits_; }
  size_t num_host_copies();  // after those of released leases are dropped

  // What an uninterrupted run gives output `output_index` of the request: tokens up to and with the
  // first EOS or stop id, or max_tokens of them. find_stop is not applied.
  static std::vector<int32_t> ReferenceTokens(const GenerateRequest& request, int32_t output_index,
                                              int32_t vocab_size, bool paged);
  // Scores of prompt tokens 1 .. length - 1.
  static std::vector<float> ReferenceScores(const GenerateRequest& request);

 private:
  struct SlotState {
    uint64_t hash = 0;
    int64_t position = 0;
    int32_t next_token = -1;            // drawn, not computed
    int64_t loaded = -1;                // position that it was copied here at
    int64_t num_drawn = 0;              // counted, as for penalties
    std::array<uint64_t, 64> recent{};  // hashes by position, to go back to
  };
  using Block = std::array<uint64_t, 16>;
  struct HostCopy {
    SlotState state;
    std::vector<Block> blocks;
  };
  struct Image;
  struct Step {
    StepId id = 0;
    StepResult result;
    std::vector<std::pair<CacheLease*, int64_t>> positions;  // to report
    std::map<int32_t, const CacheLease*> slots;              // in use
    std::set<int32_t> drafting;                              // of these, with drafts
  };

  void Check(bool ok, const std::string& what);
  void CheckRow(const BatchRow& row, Step& step);
  void CheckLease(const CacheLease& lease, Step& step);
  RowResult ComputeRow(const BatchRow& row, Step& step);
  void ComputePrompt(const BatchRow& row, SlotState& state, RowResult& result);
  SampledToken Draw(const RowOutput& output, const SlotState& state);
  void Append(const CacheLease& lease, SlotState& state, int32_t token_id);
  void Fork(const BatchRow& row, const CacheLease& to);
  uint64_t Cell(const CacheLease& lease, int64_t position);
  void CopyOne(const CacheCopy& copy);
  void Trim(const CacheCopy& copy);
  bool IsPrefix(const CacheCopy& copy) const;
  void CopyPrefix(const CacheCopy& copy);
  void Fork(const CacheCopy& copy);
  bool SlotInFlight(int32_t slot) const;
  bool SlotDrafting(int32_t slot) const;
  void DropHostCopies();
  void Trace(uint64_t value);

  const FakeExecutorOptions options_;
  CacheManager& caches_;
  const bool paged_;
  std::vector<SlotState> slots_;
  std::vector<Block> blocks_;
  std::map<int64_t, HostCopy> host_copies_;
  std::deque<Step> in_flight_;
  std::vector<std::string> violations_;
  uint64_t trace_hash_ = 0;
  int64_t num_submits_ = 0, num_collects_ = 0, num_copies_ = 0;
};

}  // namespace godwit
