#pragma once
// A StepExecutor without a model: tokens are a function of (seed, output, index), steps can be
// slowed down or held.

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine/batch.h"
#include "engine/cache_manager.h"
#include "engine/engine.h"
#include "engine/state_image.h"
#include "tokenizer/tokenizer.h"

namespace godwit {

// 256 bytes, then BOS, EOS, and a few longer pieces.
class ByteTokenizer final : public Tokenizer {
 public:
  static constexpr int32_t kBos = 256, kEos = 257, kThe = 258, kWorld = 259, kVocab = 260;

  std::vector<int32_t> Encode(std::string_view text) const override;
  std::string Decode(const std::vector<int32_t>& token_ids) const override;
  std::string_view Piece(int32_t token_id) const override;
  bool drops_first_space() const override { return true; }
  int32_t vocab_size() const override { return kVocab; }
  int32_t bos_id() const override { return kBos; }
  int32_t eos_id() const override { return kEos; }
};

struct FakeEngineOptions {
  int64_t num_slots = 4;
  int64_t context_length = 4096;
  bool add_bos = true;
  int64_t store_bytes = 1 << 20;
};

class FakeEngine final : public StepExecutor {
 public:
  using NextToken = std::function<int32_t(uint64_t seed, int32_t output_index, int64_t index)>;

  explicit FakeEngine(const FakeEngineOptions& options);

  ModelCard card() const;
  CacheManager& caches() { return *caches_; }

  // Letters a to z in an order that depends on all three.
  static int32_t Letter(uint64_t seed, int32_t output_index, int64_t index);

  // Any thread, also while it runs.
  void set_next_token(NextToken next_token);
  void set_step_time_us(int64_t step_time_us);
  void AllowSteps(int64_t count);  // that many more, then steps wait; -1: no limit
  void FailNextStep(absl::Status status);
  int64_t num_steps() const;

  absl::StatusOr<StepId> Submit(std::span<const BatchRow> rows) override;
  absl::StatusOr<StepResult> Collect(StepId id) override;
  absl::Status Copy(std::span<const CacheCopy> copies) override;
  std::shared_ptr<const StateImage> ExportState(int64_t host_id) override;
  absl::Status ImportState(int64_t host_id, std::shared_ptr<const StateImage> image) override;

 private:
  struct Pending {
    StepResult result;
    std::vector<std::pair<CacheLease*, int64_t>> positions;
  };
  RowResult Compute(const BatchRow& row, Pending& pending);
  SampledToken Draw(const RowOutput& output, int64_t index);

  const FakeEngineOptions options_;
  std::unique_ptr<CacheManager> caches_;
  mutable std::mutex mutex_;  // guards the controls
  std::condition_variable allowed_;
  NextToken next_token_ = Letter;
  int64_t step_time_us_ = 0, num_allowed_ = -1, num_steps_ = 0;
  absl::Status next_error_;
  std::map<StepId, Pending> pending_;          // engine thread
  std::map<int32_t, int32_t> next_tokens_;     // by slot: cut there
  std::map<int64_t, StateImage> host_states_;  // by host id: all that a state is here
  StepId next_id_ = 1;
};

}  // namespace godwit
