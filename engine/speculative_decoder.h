#pragma once
// The draft model's side of speculation: what it has read of each sequence, and its proposals for a
// step. The target's side, acceptance, is an op (VerifyTokensArgs). The draft's state lies in the
// target's slots and blocks, as further components of the same pool, so that a lease, a fork and a
// copy to host memory cover both; here are positions and the tokens that the draft has still to
// read.

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/acceptance_head.h"
#include "engine/acceptance_score.h"
#include "engine/batch.h"
#include "engine/cache_pool.h"
#include "engine/device_buffer.h"
#include "engine/draft_policy.h"
#include "engine/draw_list.h"
#include "engine/forward_plan.h"
#include "engine/model.h"
#include "engine/rope_store.h"
#include "engine/round_planner.h"
#include "engine/round_recorder.h"
#include "engine/round_ways.h"
#include "engine/sampler.h"
#include "engine/state_image.h"
#include "engine/step_arena.h"

namespace godwit {

// A sequence that the draft has not followed for so many tokens is not speculated on again: reading
// them would take a row's whole step.
inline constexpr int64_t kMaxDraftLag = 1024;

// INVALID_ARGUMENT with the reason when drafts of one cannot be tokens of the other.
absl::Status CheckDraftFits(const ModelConfig& target, const std::string& target_folder,
                            const ModelConfig& draft, const std::string& draft_folder);

struct SpeculativeDecoderOptions {
  int64_t max_tokens_per_step = 0;
  int64_t num_slots = 0;
  int64_t num_snapshots = 0;          // further slots, in which no row runs
  int64_t num_table_entries = 0;      // of the block tables of a step
  int64_t max_drafts = 0;             // of a row
  int64_t first_draft = 0;            // where they lie among the tokens that were drawn
  AcceptanceHead* head = nullptr;     // of the draft model
  RoundRecorder* recorder = nullptr;  // of what is drawn
};

// Not thread-safe.
class SpeculativeDecoder {
 public:
  // Back end, model and pool outlive it. counts: [num_slots, vocab]; drawn: i32, with room for
  // num_slots * max_drafts from first_draft on.
  static absl::StatusOr<std::unique_ptr<SpeculativeDecoder>> Create(
      Backend& backend, Model& draft, CachePool& pool, const TensorView& counts,
      const TensorView& drawn, const SpeculativeDecoderOptions& options);
  static int64_t DeviceBytes(const ModelConfig& draft, const SpeculativeDecoderOptions& options);

  // Reads the prompts, catches up, and proposes tokens: the drafts of the r-th row that has some
  // are at r * max_drafts. Lowers max_draft_tokens of each row to what was proposed. The proposals
  // are counted in their slots.
  absl::Status Draft(StepId step, std::span<BatchRow> rows, std::span<const SlotState> slots);
  Sampler::Drafts drafts() const;

  // Before the Draft of a further step, while `step` is in flight: keeps what its passes showed,
  // for Accept. `mark` is in the queue after them.
  absl::Status KeepSigns(StepId step, int mark);

  // Once the step has ended: the tokens that one output gained; num_drafts were verified for it,
  // and num_dropped more drawn. What was predicted of the verified ones, where a policy asked.
  std::vector<float> Accept(StepId step, int32_t slot, std::span<const int32_t> tokens,
                            int num_drafts, int num_dropped);
  // And what a step of decode rows only took, without its passes. Where steps are recorded, those
  // of which something was not yet replayed are left out; and everywhere those in which the draft
  // read what a long pause had left.
  void Measure(StepId step, int64_t num_sequences, SpeculationCosts::Step taken);

  // Learns from what was accepted. Where ops run behind the host that waits for this call, which
  // comes while the device is busy with the next step.
  void Learn();
  // Where passes are recorded: runs those of decode rows that a load makes, of padding alone, as
  // often as that takes. Waits for each.
  absl::Status WarmUp(int num_runs);
  void ForgetCosts();  // of steps that were like no later one

  // What happens to a slot's state happens to what is known of it. Forget: it holds no token yet.
  void Forget(int32_t slot) { slots_[static_cast<size_t>(slot)] = {}; }
  void Fork(int32_t from_slot, int32_t to_slot);
  void SwapOut(int32_t slot, int64_t host_id);
  void SwapIn(int64_t host_id, int32_t slot);
  void Save(int32_t slot, int64_t host_id);
  void Load(int64_t host_id, int32_t slot);
  void Drop(std::span<const int64_t> host_ids);
  // The state is cut to `position`; next_token was drawn after it, unless it is -1.
  void Trim(int32_t slot, int64_t position, int32_t next_token);
  // Nothing: the draft does not follow the sequence.
  std::optional<DraftImage> Export(int64_t host_id) const;
  void Import(int64_t host_id, const std::optional<DraftImage>& image);

 private:
  struct SlotDraft {
    int64_t position = 0;         // tokens that the draft has read; at most the target's position
    int64_t base = 0;             // of its lightning state
    std::vector<int32_t> unread;  // from there to the next input of the target, which is the last
    bool lost = false;            // it has fallen behind for good
    std::vector<int32_t>
        prompt;              // what it reads of one in the step, with what it had not read before
    int32_t draft_row = -1;  // in the last step that it had drafts in
    AcceptanceClass acceptance_class = AcceptanceClass::kGreedy;
    bool by_head = false;  // its drafts were judged
    float temperature = 0;
    SequenceHistory history;
  };
  // A row that reads, and proposes if `draft_row` says which row with drafts it is.
  struct Reader {
    BatchRow* row = nullptr;
    SlotDraft* slot = nullptr;
    std::span<const int32_t> token_ids;
    int32_t draft_row = -1;
    int32_t most_drafts = 0;  // that were asked for
    bool is_prefill = false;
    double history = 0;  // SequenceHistory::logit
    // P(its first num_weighed drafts are accepted), of which all is known that will be.
    double survival = 1;
    int32_t num_weighed = 0;
    bool stopped = false;    // by its policy
    bool overruled = false;  // its policy would have stopped: once a step
  };
  // Host arrays of one forward pass.
  struct Arrays {
    std::vector<int32_t> token_ids;
    std::vector<int64_t> positions;
    std::vector<StepRow> rows;
    std::vector<int32_t> block_tables;
    std::vector<int32_t> logit_tokens;  // of the rows that draw
    int64_t num_decode_tokens = 0;
    int32_t num_decode_rows = 0;
    void Clear();
    void Pad(int64_t num_rows, int64_t num_tokens);  // decode rows, each of which draws
  };

  SpeculativeDecoder(Backend& backend, Model& draft, CachePool& pool, const TensorView& counts,
                     const TensorView& drawn, const SpeculativeDecoderOptions& options);
  absl::Status MakeRope();
  void BeginStep(StepId step, std::span<BatchRow> rows);
  bool ByHead(DraftPolicy policy) const;
  void BorrowCosts();
  void ChooseReaders(std::span<BatchRow> rows, std::span<const SlotState> slots);
  bool ReadsPrompt(const BatchRow& row, const SlotDraft& slot, int64_t tokens_left) const;
  bool CanDraft(const BatchRow& row, const SlotDraft& slot) const;
  void OrderReaders();
  bool WarmsUp(std::span<BatchRow> rows, int64_t num_sequences);
  DraftDecider::Load Load(double reluctance) const;
  DraftCandidate Candidate(const Reader& reader, int32_t place) const;
  DraftCandidate WeighedCandidate(StepId step, Reader& reader, int32_t index);
  void PlanRound();
  void DecideFirst();
  void DropWithoutDrafts();
  bool IsUndecided(const Reader& reader, int32_t index) const;
  bool DecidesBy(int32_t index) const;
  void Decide(StepId step, int32_t index);
  absl::Status DecideAfter(StepId step, int32_t index);
  void Overrule(Reader& reader, DraftCandidate& candidate);
  void Stop(Reader& reader, int num_kept, int num_drawn);
  // Of draft `index` of a row, once num_passes passes of the step have run and their signs are
  // read.
  DraftSigns Signs(StepId step, const SlotDraft& slot, double history, int32_t index,
                   int32_t num_passes) const;
  std::vector<float> Judged(StepId step, SlotDraft& slot, int num_drafts, int num_accepted,
                            int num_passes);
  void AddRead(const Reader& reader);
  void AddDraft(const Reader& reader, int32_t index);
  void AddRow(const Reader& reader, StepRow row);
  void AddDraws(int32_t index, int64_t num_draws);
  int64_t PaddedDraws() const;
  void PadPass(int32_t index);
  absl::Status RunPass(int32_t index);
  absl::Status WarmUpPasses(int64_t num_sequences, bool all_rows, int num_runs);
  absl::Status WarmUpPass(int32_t index, int64_t num_rows, int64_t num_tokens, int num_runs);
  TensorView SignsOf(int32_t index, int64_t kind, int64_t count) const;
  absl::Status Judge(const TensorView& hidden, int32_t index, const SampleArgs& draws);
  absl::Status DrawDrafts(const TensorView& hidden, int32_t index, int32_t* logit_tokens,
                          const SampleRow* rows, int64_t num_draws);

  Backend* backend_;
  Model* draft_;
  CachePool* pool_;
  TensorView counts_, drawn_;
  SpeculativeDecoderOptions options_;
  std::unique_ptr<StepArena> arena_, biases_;  // of the passes, each in its place; of all draws
  DeviceBuffer gathered_;                      // [num_slots, d_model] f32
  DeviceBuffer logits_;                        // [num_slots, vocab] f32
  DeviceBuffer probabilities_;                 // [num_slots * max_drafts, vocab] f32
  // What each pass shows of its draft: margins, then the head's logits. [max_drafts, 2, num_slots]
  // f32. Its last op writes them where the host reads them, so that a mark after the pass is all
  // that a decision waits for. Recordings hold the address, so that all steps write here: what a
  // step in flight showed is copied before the passes of the next one are queued (KeepSigns).
  HostBuffer signs_;
  std::vector<float> kept_signs_[kMaxStepsInFlight];  // of a step; empty: they are in signs_ still
  DeviceBuffer margins_;                              // [num_slots] f32, of a pass, for ops
  DeviceBuffer certainties_;                          // [num_slots, 2] f32, of a pass
  bool replays_ = false;                              // passes of decode rows are recorded
  int32_t lag_ = 0;  // passes whose margins the host does not wait for
  // Of a draft with RoPE. It rotates with its own table, whatever a request's target does: a draft
  // may be worse for that, a token never is.
  std::optional<RopeStore> rope_;
  DeviceBuffer rope_table_ids_;  // [max_tokens_per_step] i32, zeros

  std::vector<SlotDraft> slots_;
  std::map<int64_t, SlotDraft> host_slots_;  // of swapped and stored states, by host id

  AcceptanceScore score_;
  struct Verdict {
    AcceptanceClass acceptance_class;
    int place;
    DraftSigns signs;
    bool accepted, chosen;
  };
  std::vector<Verdict> verdicts_;  // to learn from
  ByLoad<SpeculationCosts> costs_;
  ByLoad<RoundWays> ways_;
  DraftDecider decider_;
  RoundPlanner planner_;
  int64_t num_passes_[kMaxStepsInFlight] = {};  // with drafts, of a step
  bool learns_[kMaxStepsInFlight] = {};         // from what became of a step's drafts
  bool has_margins_[kMaxStepsInFlight] = {}, chosen_[kMaxStepsInFlight] = {};  // by them
  bool is_unusual_[kMaxStepsInFlight] =
      {};  // a pass of the step: not replayed yet, or a pause read
  bool has_head_logits_[kMaxStepsInFlight] = {};
  int64_t num_warm_ups_ = 0;
  std::minstd_rand random_;            // which stops are overruled
  bool was_off_ = false;               // the last step that could choose drew no draft
  RoundWay way_ = RoundWay::kMargins;  // of rows that ask for throughput, in the step
  RoundWay ways_of_steps_[kMaxStepsInFlight] = {};
  double expected_rates_[kMaxStepsInFlight] = {};  // tokens/s, by the planner; 0: it was not asked
  bool overrules_ = false;                         // the step being run
  int64_t num_sequences_ = 0, num_rows_ = 0;       // of the target, so far
  // Of the step being run: some row's policy is another than kFixed; its drafts are planned; they
  // are measurements; rows that ask for throughput may choose the way.
  bool adapts_ = false, plans_ = false, warms_up_ = false, chooses_ = false;
  // What its passes show of their draws.
  enum class Shown { kNothing, kMargins, kHead };
  Shown shown_ = Shown::kNothing;
  StepId step_ = 0;

  // Of the step being run.
  std::vector<RoundPlanner::Row> plan_rows_;
  std::vector<DraftCandidate> candidates_;
  std::vector<Reader*> candidate_readers_;
  std::vector<Reader> readers_;
  std::vector<Reader> waiting_;  // could draft, had the step room for what they have to read first
  std::vector<Reader*> drafters_;  // by draft row
  Arrays arrays_;
  DrawList draws_;
  std::vector<int32_t> logit_rows_;  // scratch of AddDraws, by draft row
};

}  // namespace godwit
