#include "engine/speculative_decoder.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/rope_table.h"
#include "kernels/base/accept_rule.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace godwit {
namespace {

int64_t RoundDown(int64_t value, int64_t multiple) { return value / multiple * multiple; }

constexpr int kFirstPassMark = 9;  // two of its own, besides those of steps
static_assert(kFirstPassMark + 2 <= kNumMarks);
constexpr int64_t kExplorePeriod = 32;
constexpr int64_t kWarmUpObservations = 100;  // of a class, before its estimates are trusted

AcceptanceClass ClassOf(const RowOutput& output) {
  if (output.sampling->temperature == 0) return AcceptanceClass::kGreedy;
  return output.coupled ? AcceptanceClass::kCoupled : AcceptanceClass::kStandard;
}

void StopAt(BatchRow& row, int num_drafts) {
  row.max_draft_tokens = num_drafts;
  row.draft_limit = DraftStop::kPolicy;
}

// Bytes of a pass of `tokens` tokens of `rows` rows, without draws.
int64_t PassBytes(int64_t tokens, int64_t rows, int64_t num_blocks) {
  return StepArena::Footprint(tokens * DTypeBytes(DType::kI32)) +
         StepArena::Footprint(tokens * DTypeBytes(DType::kI64)) +
         StepArena::Footprint(rows * int64_t{sizeof(StepRow)}) +
         StepArena::Footprint(rows * DTypeBytes(DType::kI32)) +
         StepArena::Footprint(num_blocks * DTypeBytes(DType::kI32)) +
         StepArena::Footprint(rows * int64_t{sizeof(SampleRow)});
}

int64_t ArenaBytes(const SpeculativeDecoderOptions& options) {
  const int64_t slots = options.num_slots;
  return PassBytes(options.max_tokens_per_step, slots, options.num_blocks) +
         (options.max_drafts - 1) * PassBytes(slots, slots, options.num_blocks) +
         DrawList::ArenaBytes(0, slots);
}

// "" where there is none.
std::string FileBytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

}  // namespace

absl::Status CheckDraftFits(const ModelConfig& target, const std::string& target_folder,
                            const ModelConfig& draft, const std::string& draft_folder) {
  const auto refuse = [&](auto&&... words) {
    return absl::InvalidArgumentError(absl::StrCat("draft model ", draft_folder, " does not fit ",
                                                   target_folder, ": ", words...));
  };
  if (draft.vocab_size != target.vocab_size) {
    return refuse("its vocabulary has ", draft.vocab_size, " tokens, expected ", target.vocab_size);
  }
  for (const char* name : {"tokenizer.model", "tokenizer.json"}) {
    const std::string expected = FileBytes(absl::StrCat(target_folder, "/", name));
    const std::string found = FileBytes(absl::StrCat(draft_folder, "/", name));
    if (!expected.empty() && !found.empty() && expected != found) {
      return refuse(name, " differs, so that its token ids mean other text");
    }
  }
  return absl::OkStatus();
}

void SpeculativeDecoder::Arrays::Clear() {
  token_ids.clear();
  positions.clear();
  rows.clear();
  block_tables.clear();
  logit_tokens.clear();
  num_decode_tokens = 0;
  num_decode_rows = 0;
}

// --- Create

int64_t SpeculativeDecoder::DeviceBytes(const ModelConfig& draft,
                                        const SpeculativeDecoderOptions& options) {
  const int64_t row_bytes = options.num_slots * DTypeBytes(DType::kF32);
  const int64_t rope_bytes = draft.rope ? RopeStore::DeviceBytes(draft.rope->rotary_dim, 0) +
                                              options.max_tokens_per_step * DTypeBytes(DType::kI32)
                                        : 0;
  return ArenaBytes(options) + rope_bytes +
         row_bytes *
             (draft.d_model + options.max_drafts + draft.vocab_size * (1 + options.max_drafts));
}

SpeculativeDecoder::SpeculativeDecoder(Backend& backend, Model& draft, CachePool& pool,
                                       const TensorView& counts, const TensorView& drawn,
                                       const SpeculativeDecoderOptions& options)
    : backend_(&backend),
      draft_(&draft),
      pool_(&pool),
      counts_(counts),
      drawn_(drawn),
      options_(options),
      slots_(static_cast<size_t>(options.num_slots)),
      draws_(options.num_slots * options.max_drafts, draft.config().vocab_size) {}

absl::StatusOr<std::unique_ptr<SpeculativeDecoder>> SpeculativeDecoder::Create(
    Backend& backend, Model& draft, CachePool& pool, const TensorView& counts,
    const TensorView& drawn, const SpeculativeDecoderOptions& options) {
  GODWIT_CHECK(options.max_drafts >= 1 && options.max_drafts <= kMaxDraftTokens);
  GODWIT_CHECK(options.first_draft + options.num_slots * options.max_drafts <= drawn.rows());
  std::unique_ptr<SpeculativeDecoder> decoder(
      new SpeculativeDecoder(backend, draft, pool, counts, drawn, options));
  const int64_t row_bytes = options.num_slots * DTypeBytes(DType::kF32);
  const int64_t d_model = draft.config().d_model, vocab_size = draft.config().vocab_size;
  ASSIGN_OR_RETURN(StepArena arena, StepArena::Create(backend, ArenaBytes(options)));
  decoder->arena_ = std::make_unique<StepArena>(std::move(arena));
  ASSIGN_OR_RETURN(decoder->gathered_, DeviceBuffer::Allocate(backend, row_bytes * d_model));
  ASSIGN_OR_RETURN(decoder->logits_, DeviceBuffer::Allocate(backend, row_bytes * vocab_size));
  ASSIGN_OR_RETURN(decoder->probabilities_,
                   DeviceBuffer::Allocate(backend, row_bytes * options.max_drafts * vocab_size));
  ASSIGN_OR_RETURN(decoder->margins_,
                   DeviceBuffer::Allocate(backend, row_bytes * options.max_drafts));
  for (HostBuffer& host : decoder->host_margins_) {
    ASSIGN_OR_RETURN(host, HostBuffer::Allocate(backend, row_bytes * options.max_drafts));
  }
  // Where ops run behind the host, a decision takes what the pass before the last one said: the
  // device has the last one to do meanwhile, and a pass at most is for nothing.
  decoder->lag_ = backend.Info().replays ? 1 : 0;
  RETURN_IF_ERROR(decoder->MakeRope());
  return decoder;
}

// Table 0 for every token.
absl::Status SpeculativeDecoder::MakeRope() {
  const std::optional<RopeConfig>& config = draft_->config().rope;
  if (!config) return absl::OkStatus();
  ASSIGN_OR_RETURN(const RopeTable own, MakeRopeTable(*config));
  ASSIGN_OR_RETURN(rope_, RopeStore::Create(*backend_, own, 0));
  ASSIGN_OR_RETURN(rope_table_ids_, DeviceBuffer::Allocate(*backend_, options_.max_tokens_per_step *
                                                                          DTypeBytes(DType::kI32)));
  return absl::OkStatus();
}

Sampler::Drafts SpeculativeDecoder::drafts() const {
  const int64_t count = options_.num_slots * options_.max_drafts;
  return {.tokens = RowRange(drawn_, options_.first_draft, count),
          .probabilities =
              MakeView(probabilities_.bytes(), DType::kF32, count, draft_->config().vocab_size)};
}

// --- Draft

bool SpeculativeDecoder::ReadsPrompt(const BatchRow& row, const SlotDraft& slot) const {
  const int64_t limit = draft_->config().context_length;
  const int64_t end = row.first_position + std::ssize(row.token_ids);
  return row.max_draft_tokens > 0 && !slot.lost && slot.position == row.first_position &&
         (limit == 0 || end <= limit);
}

bool SpeculativeDecoder::CanDraft(const BatchRow& row, const SlotDraft& slot,
                                  int64_t tokens_left) const {
  const int64_t limit = draft_->config().context_length;
  const int64_t num_unread = std::ssize(slot.unread);
  const int64_t end = slot.position + num_unread + row.max_draft_tokens - 1;
  return !slot.lost && num_unread <= tokens_left && (limit == 0 || end <= limit);
}

// Rows that read a prompt, and rows that can draft.
void SpeculativeDecoder::ChooseReaders(std::span<BatchRow> rows, std::span<const SlotState> slots) {
  readers_.clear();
  drafters_.clear();
  int64_t tokens_left = options_.max_tokens_per_step;
  for (BatchRow& row : rows) {
    SlotDraft& slot = slots_[static_cast<size_t>(row.lease->slot())];
    if (row.lease->fresh()) slot = {};
    if (row.token_ids.empty()) continue;
    if (ReadsPrompt(row, slot)) {
      readers_.push_back(
          {.row = &row, .slot = &slot, .token_ids = row.token_ids, .is_prefill = true});
      tokens_left -= std::ssize(row.token_ids);
    } else {
      slot.lost = true;
      slot.unread.clear();
    }
  }
  for (BatchRow& row : rows) {
    if (!HasDrafts(row)) continue;
    SlotDraft& slot = slots_[static_cast<size_t>(row.lease->slot())];
    const int64_t num_unread = std::ssize(slot.unread);
    if (!CanDraft(row, slot, tokens_left)) {
      row.draft_limit =
          slot.lost || num_unread > tokens_left ? DraftStop::kLag : DraftStop::kContext;
      row.max_draft_tokens = 0;
      continue;
    }
    const int64_t position = slots[static_cast<size_t>(row.lease->slot())].position;
    GODWIT_CHECK(slot.position + num_unread == position + 1);
    slot.acceptance_class = ClassOf(row.outputs[0]);
    slot.policy = row.draft_policy;
    readers_.push_back({.row = &row,
                        .slot = &slot,
                        .token_ids = slot.unread,
                        .draft_row = 0,  // until they are counted
                        .is_prefill = num_unread > kWindow});
    tokens_left -= num_unread;
  }
}

// Numbers the rows with drafts in the order of the batch, as the target's step does; and rows that
// decode before those that read as a prompt does.
void SpeculativeDecoder::OrderReaders() {
  int32_t num_drafters = 0;
  for (Reader& reader : readers_) {
    if (reader.draft_row >= 0) reader.draft_row = reader.slot->draft_row = num_drafters++;
  }
  std::stable_partition(readers_.begin(), readers_.end(),
                        [](const Reader& reader) { return !reader.is_prefill; });
  drafters_.resize(static_cast<size_t>(num_drafters));
  for (Reader& reader : readers_) {
    if (reader.draft_row >= 0) drafters_[static_cast<size_t>(reader.draft_row)] = &reader;
  }
}

void SpeculativeDecoder::AddRow(const Reader& reader, StepRow row) {
  row.slot = reader.row->lease->slot();
  row.first_token = static_cast<int32_t>(arrays_.token_ids.size()) - row.num_tokens;
  row.block_table = std::ssize(arrays_.block_tables);
  for (int64_t offset = 0; offset < row.num_tokens; ++offset) {
    arrays_.positions.push_back(row.position + offset);
  }
  AppendBlocks(*reader.row->lease, row.position + row.num_tokens, arrays_.block_tables);
  arrays_.rows.push_back(row);
  if (reader.draft_row >= 0) {
    arrays_.logit_tokens.push_back(static_cast<int32_t>(arrays_.token_ids.size()) - 1);
  }
  if (reader.is_prefill && row.is_prefill != 0) return;
  arrays_.num_decode_tokens += row.num_tokens;
  ++arrays_.num_decode_rows;
}

// What the draft has not read. All of it is confirmed, but only rows that a prompt's form folds
// are folded beyond the row's own beginning.
void SpeculativeDecoder::AddRead(const Reader& reader) {
  SlotDraft& slot = *reader.slot;
  const auto count = static_cast<int32_t>(reader.token_ids.size());
  const int64_t end = slot.position + count;
  StepRow row = {.num_tokens = count,
                 .is_prefill = reader.is_prefill,
                 .position = slot.position,
                 .base = slot.base};
  if (reader.is_prefill) {
    row.base_after = RoundDown(end, kWindow);
    const int64_t p_begin = RoundDown(slot.position + kPrefillBlock - 1, kPrefillBlock);
    const int64_t p_end = RoundDown(end, kPrefillBlock);
    if (p_begin < p_end) {
      row.p_begin = p_begin;
      row.p_end = p_end;
    }
  } else {
    row.base_after = std::max(slot.base, RoundDown(slot.position, kWindow));
  }
  arrays_.token_ids.insert(arrays_.token_ids.end(), reader.token_ids.begin(),
                           reader.token_ids.end());
  AddRow(reader, row);
  slot.position = end;
  slot.base = row.base_after;
}

// The draft before `index` is read, at a position that may be taken back: nothing is folded.
void SpeculativeDecoder::AddDraft(const Reader& reader, int32_t index) {
  const SlotDraft& slot = *reader.slot;
  const int64_t drawn = options_.first_draft + reader.draft_row * options_.max_drafts + index - 1;
  arrays_.token_ids.push_back(~static_cast<int32_t>(drawn));
  AddRow(reader, {.num_tokens = 1,
                  .position = slot.position + index - 1,
                  .base = slot.base,
                  .base_after = slot.base});
}

// One draw for each drafter, padding for those that have their drafts: outputs have a fixed place.
void SpeculativeDecoder::AddDraws(int32_t index) {
  int32_t logit_row = 0;
  logit_rows_.assign(drafters_.size(), -1);
  for (const Reader& reader : readers_) {
    if (reader.draft_row < 0 || reader.row->max_draft_tokens <= index) continue;
    logit_rows_[static_cast<size_t>(reader.draft_row)] = logit_row++;
  }
  for (const Reader* reader : drafters_) {
    const auto draft_row = static_cast<size_t>(reader->draft_row);
    if (logit_rows_[draft_row] < 0) {
      draws_.AddPadding();
      continue;
    }
    const BatchRow& row = *reader->row;
    const int64_t round_position = reader->slot->position;  // of the first draft
    SampleRow& draw = draws_.Add(row.outputs[0], round_position + index, row.prompt_length);
    draw.logit_row = logit_rows_[draft_row];
    draw.num_logprobs = -1;
    if (IsCoupled(row.outputs[0])) continue;
    draw.position = NoisePosition(round_position, StandardRule::DraftStream(index));
    draw.probability_row = static_cast<int32_t>(reader->draft_row * options_.max_drafts + index);
  }
}

absl::Status SpeculativeDecoder::DrawDrafts(const TensorView& hidden, int32_t index,
                                            int32_t* logit_tokens, const SampleRow* rows) {
  const ModelConfig& config = draft_->config();
  const int64_t num_logits = std::ssize(arrays_.logit_tokens);
  const TensorView gathered = MakeView(gathered_.bytes(), DType::kF32, num_logits, config.d_model);
  const TensorView logits = MakeView(logits_.bytes(), DType::kF32, num_logits, config.vocab_size);
  RETURN_IF_ERROR(backend_->GatherRows(
      {.x = hidden, .rows = MakeView(logit_tokens, DType::kI32, num_logits), .y = gathered}));
  RETURN_IF_ERROR(draft_->Logits(gathered, logits));
  const int64_t num_draws = std::ssize(drafters_);
  TensorView tokens = RowRange(drawn_, options_.first_draft + index, num_draws);
  tokens.row_stride = options_.max_drafts;
  return ToStatus(backend_->Sample(
      {.logits = logits,
       .rows = rows,
       .num_rows = static_cast<int32_t>(num_draws),
       .counts = counts_,
       .tokens = tokens,
       .probabilities = drafts().probabilities,
       .margins = !adapts_ ? TensorView()
                           : MakeView(margins_.as<float>() + index * options_.num_slots,
                                      DType::kF32, num_draws)}));
}

// One forward pass, and with drafters the draft `index` of each.
absl::Status SpeculativeDecoder::RunPass(int32_t index) {
  ForwardPlan plan;
  plan.num_tokens = std::ssize(arrays_.token_ids);
  plan.num_decode_tokens = arrays_.num_decode_tokens;
  plan.token_ids = MakeView(arena_->Push(arrays_.token_ids), DType::kI32, plan.num_tokens);
  plan.drawn = drawn_;
  plan.positions = MakeView(arena_->Push(arrays_.positions), DType::kI64, plan.num_tokens);
  if (rope_) {
    plan.rope_table_ids = MakeView(rope_table_ids_.bytes(), DType::kI32, plan.num_tokens);
    plan.rope_tables = rope_->tables();
    plan.num_rope_tables = rope_->num_tables();
  }
  plan.rows = arena_->Push(arrays_.rows);
  plan.num_rows = static_cast<int32_t>(arrays_.rows.size());
  plan.num_decode_rows = arrays_.num_decode_rows;
  plan.block_tables = arena_->Push(arrays_.block_tables);
  int32_t* const logit_tokens = arena_->Push(arrays_.logit_tokens);
  AddDraws(index);
  const SampleRow* const draws = draws_.PushRows(*arena_);
  draws_.PushBiases(*arena_);
  RETURN_IF_ERROR(arena_->Upload());
  ASSIGN_OR_RETURN(const TensorView hidden, draft_->Forward(plan, *pool_));
  if (arrays_.logit_tokens.empty()) return absl::OkStatus();
  return DrawDrafts(hidden, index, logit_tokens, draws);
}

// --- How far

DraftSigns SpeculativeDecoder::Signs(StepId step, int32_t draft_row, int32_t index) const {
  const float* const margins = host_margins_[step % kMaxStepsInFlight].as<const float>();
  return {.margin = margins[index * options_.num_slots + draft_row]};
}

absl::Status SpeculativeDecoder::ReadMargins(StepId step, int32_t index) {
  const int64_t offset = index * options_.num_slots * DTypeBytes(DType::kF32);
  RETURN_IF_ERROR(backend_->CopyToHost(host_margins_[step % kMaxStepsInFlight].bytes() + offset,
                                       margins_.bytes() + offset,
                                       std::ssize(drafters_) * DTypeBytes(DType::kF32)));
  return ToStatus(backend_->SetMark(kFirstPassMark + index % 2));
}

// Now and then, and until something is known, a step proposes a number of drafts that no estimate
// chose, each in turn: what learns only from drafts it trusts would never trust another, and what
// a row costs is known only of numbers of rows that were tried.
bool SpeculativeDecoder::Explores(std::span<BatchRow> rows) {
  if (num_decisions_++ % kExplorePeriod != 0 && costs_.known() && !warms_up_) return false;
  const auto turn = static_cast<int>(num_explored_++ % options_.max_drafts);
  for (BatchRow& row : rows) {
    if (!HasDrafts(row) || row.draft_policy == DraftPolicy::kFixed) continue;
    row.max_draft_tokens = 1 + turn % row.max_draft_tokens;
    row.draft_limit = DraftStop::kMeasurement;
  }
  return true;
}

// Whether there is a first draft, of rows that ask for throughput; those without read nothing.
void SpeculativeDecoder::DecideFirst() {
  candidates_.clear();
  candidate_readers_.clear();
  for (Reader& reader : readers_) {
    if (reader.draft_row < 0) continue;
    DraftCandidate& candidate = candidates_.emplace_back(Candidate(reader));
    if (candidate.policy != DraftPolicy::kThroughput) candidate.policy = DraftPolicy::kFixed;
    candidate_readers_.push_back(&reader);
  }
  DecideDrafts(costs_, num_rows_, candidates_);
  for (size_t candidate = 0; candidate < candidates_.size(); ++candidate) {
    if (!candidates_[candidate].goes_on) {
      StopAt(*candidate_readers_[candidate]->row, 0);
    }
  }
  std::erase_if(readers_, [](const Reader& reader) {
    return reader.draft_row >= 0 && reader.row->max_draft_tokens == 0;
  });
}

// Without drafts so far.
DraftCandidate SpeculativeDecoder::Candidate(const Reader& reader) const {
  return {.policy = reader.row->draft_policy,
          .threshold = reader.row->draft_threshold,
          .acceptance = score_.Mean(reader.slot->acceptance_class)};
}

// P(the reader's drafts are all accepted): by the margins of the first num_known, by the mean for
// the others.
double SpeculativeDecoder::Survival(StepId step, const Reader& reader, int32_t num_known,
                                    int32_t num_drafts) const {
  const AcceptanceClass acceptance_class = reader.slot->acceptance_class;
  double survival = 1;
  for (int32_t index = 0; index < num_drafts; ++index) {
    survival *= index < num_known ? score_.Predict(reader.row->draft_policy, acceptance_class,
                                                   index, Signs(step, reader.draft_row, index))
                                  : score_.Mean(acceptance_class);
  }
  return survival;
}

// Which rows go on after draft `index`.
void SpeculativeDecoder::Decide(StepId step, int32_t index) {
  candidates_.clear();
  candidate_readers_.clear();
  const int32_t num_known = std::max(index + 1 - lag_, 0);
  for (Reader* reader : drafters_) {
    if (reader->row->max_draft_tokens <= index + 1) continue;
    candidates_.push_back(Candidate(*reader));
    candidates_.back().survival = Survival(step, *reader, num_known, index + 1);
    candidate_readers_.push_back(reader);
  }
  DecideDrafts(costs_, num_rows_, candidates_);
  for (size_t candidate = 0; candidate < candidates_.size(); ++candidate) {
    if (!candidates_[candidate].goes_on) {
      StopAt(*candidate_readers_[candidate]->row, index + 1);
    }
  }
}

absl::Status SpeculativeDecoder::Draft(StepId step, std::span<BatchRow> rows,
                                       std::span<const SlotState> slots) {
  num_passes_[step % kMaxStepsInFlight] = 0;
  adapts_ = std::any_of(rows.begin(), rows.end(), [](const BatchRow& row) {
    return HasDrafts(row) && row.draft_policy != DraftPolicy::kFixed;
  });
  learns_[step % kMaxStepsInFlight] = adapts_;
  warms_up_ = std::any_of(rows.begin(), rows.end(), [this](const BatchRow& row) {
    return HasDrafts(row) && row.draft_policy != DraftPolicy::kFixed &&
           score_.num_observed(ClassOf(row.outputs[0])) < kWarmUpObservations;
  });
  const bool decides = adapts_ && !Explores(rows);
  ChooseReaders(rows, slots);
  num_rows_ = std::count_if(rows.begin(), rows.end(),
                            [](const BatchRow& row) { return row.token_ids.empty(); });
  if (decides) DecideFirst();
  OrderReaders();
  if (readers_.empty()) return absl::OkStatus();
  arena_->Begin(step);
  draws_.Clear();
  arrays_.Clear();
  for (const Reader& reader : readers_) AddRead(reader);
  RETURN_IF_ERROR(RunPass(0));
  for (int32_t index = 0; !drafters_.empty(); ++index) {
    ++num_passes_[step % kMaxStepsInFlight];
    num_rows_ += std::count_if(drafters_.begin(), drafters_.end(), [&](const Reader* reader) {
      return reader->row->max_draft_tokens > index;
    });
    if (adapts_) RETURN_IF_ERROR(ReadMargins(step, index));
    if (decides) {
      if (index >= lag_) {
        RETURN_IF_ERROR(backend_->WaitMark(kFirstPassMark + (index - lag_) % 2));
      }
      Decide(step, index);
    }
    arrays_.Clear();
    for (const Reader& reader : readers_) {
      if (reader.draft_row >= 0 && reader.row->max_draft_tokens > index + 1) {
        AddDraft(reader, index + 1);
      }
    }
    if (arrays_.rows.empty()) break;
    RETURN_IF_ERROR(RunPass(index + 1));
  }
  return absl::OkStatus();
}

// --- What the host learns

std::vector<float> SpeculativeDecoder::Accept(StepId step, int32_t slot_index,
                                              std::span<const int32_t> tokens, int num_drafts) {
  SlotDraft& slot = slots_[static_cast<size_t>(slot_index)];
  std::vector<float> predicted;
  if (slot.lost) return predicted;
  if (num_drafts > 0) {
    const auto num_accepted = static_cast<int>(tokens.size()) - 1;
    const bool learns = learns_[step % kMaxStepsInFlight];
    // All before any is learnt from.
    for (int index = 0; learns && index < num_drafts; ++index) {
      predicted.push_back(static_cast<float>(score_.Predict(
          slot.policy, slot.acceptance_class, index, Signs(step, slot.draft_row, index))));
    }
    for (int index = 0; learns && index <= num_accepted && index < num_drafts; ++index) {
      score_.Observe(slot.acceptance_class, index, Signs(step, slot.draft_row, index),
                     index < num_accepted);
    }
    // The draft read the target's input and its own proposals but the last. Those that stand are
    // read for good.
    const int64_t num_read = std::min<int64_t>(std::ssize(tokens), num_drafts) - 1;
    slot.position += num_read;
    slot.unread.assign(tokens.begin() + num_read, tokens.end());
    return predicted;
  }
  slot.unread.insert(slot.unread.end(), tokens.begin(), tokens.end());
  if (std::ssize(slot.unread) <= kMaxDraftLag) return predicted;
  slot.lost = true;
  slot.unread.clear();
  return predicted;
}

void SpeculativeDecoder::Measure(StepId step, double draft_seconds, int64_t num_rows,
                                 double verify_seconds, int64_t num_tokens) {
  costs_.Observe(num_passes_[step % kMaxStepsInFlight], draft_seconds, num_rows, verify_seconds,
                 num_tokens);
}

void SpeculativeDecoder::Fork(int32_t from_slot, int32_t to_slot) {
  slots_[static_cast<size_t>(to_slot)] = slots_[static_cast<size_t>(from_slot)];
}

void SpeculativeDecoder::SwapOut(int32_t slot, int64_t host_id) {
  host_slots_[host_id] = std::exchange(slots_[static_cast<size_t>(slot)], {});
}

void SpeculativeDecoder::SwapIn(int64_t host_id, int32_t slot) {
  const auto found = host_slots_.find(host_id);
  GODWIT_CHECK(found != host_slots_.end());
  slots_[static_cast<size_t>(slot)] = std::move(found->second);
  host_slots_.erase(found);
}

void SpeculativeDecoder::Save(int32_t slot, int64_t host_id) {
  host_slots_[host_id] = slots_[static_cast<size_t>(slot)];
}

void SpeculativeDecoder::Load(int64_t host_id, int32_t slot) {
  const auto found = host_slots_.find(host_id);
  GODWIT_CHECK(found != host_slots_.end());
  slots_[static_cast<size_t>(slot)] = found->second;
}

void SpeculativeDecoder::Drop(std::span<const int64_t> host_ids) {
  for (const int64_t host_id : host_ids) host_slots_.erase(host_id);
}

}  // namespace godwit
