#include "engine/speculative_decoder.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
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
constexpr int64_t kMargins = 0, kHeadLogits = 1;  // of the signs of a pass
constexpr int64_t kWarmUpObservations = 48;       // of a class, before its estimates are trusted
constexpr int64_t kWarmUpRows = 32;               // of drafts in a step, while nothing is known
constexpr int64_t kWarmUpDrafts = 4;              // of each row at least, where rows are cheap
constexpr int kOverrulePeriod = 64;               // steps
constexpr int kOverrulePeriodOff = 256;  // without drafts: these have to read what they missed
constexpr int kOverruledRows = 8;        // of such a step, at most, on average
constexpr double kReluctance = 0.02;     // to draft again after a step that did not pay
constexpr double kMaxMargin = 1e4;
constexpr int32_t kWarmPasses = 8;    // of a round, recorded at start: few rounds are longer
constexpr int64_t kFewSequences = 8;  // by margins beside a head many seldom decide

AcceptanceClass ClassOf(const RowOutput& output) {
  if (output.sampling->temperature == 0) return AcceptanceClass::kGreedy;
  return output.coupled ? AcceptanceClass::kCoupled : AcceptanceClass::kStandard;
}

// Bytes of a pass of `tokens` tokens of `rows` rows, without draws.
int64_t PassBytes(int64_t tokens, int64_t rows, int64_t num_table_entries) {
  return StepArena::Footprint(tokens * DTypeBytes(DType::kI32)) +
         StepArena::Footprint(tokens * DTypeBytes(DType::kI64)) +
         StepArena::Footprint(rows * int64_t{sizeof(StepRow)}) +
         StepArena::Footprint(rows * DTypeBytes(DType::kI32)) +
         StepArena::Footprint(num_table_entries * DTypeBytes(DType::kI32)) +
         StepArena::Footprint(rows * int64_t{sizeof(SampleRow)});
}

// Where the arrays of a pass lie; of max_drafts: their end.
int64_t PassOffset(const SpeculativeDecoderOptions& options, int64_t index) {
  const int64_t slots = options.num_slots;
  if (index == 0) return 0;
  return PassBytes(options.max_tokens_per_step, slots, options.num_table_entries) +
         (index - 1) * PassBytes(slots, slots, options.num_table_entries);
}

// Numbers of rows and tokens in a doubling that a pass is padded to (PaddedCoarsely). The first one
// reads one or two tokens of each row.
constexpr int PaddingSteps(int32_t index) { return index == 0 ? 2 : 1; }

// A pass of decode rows is a function of these numbers: everything else is in the arena. Bit 63
// tells it from the target's steps.
uint64_t PassKey(int32_t index, int64_t shown, int64_t num_tokens, int64_t num_rows,
                 int64_t num_draws) {
  uint64_t key = 1;
  for (const auto& [count, bits] : {std::pair<int64_t, int>(index, 4),
                                    {shown, 2},
                                    {num_tokens, 22},
                                    {num_rows, 17},
                                    {num_draws, 18}}) {
    GODWIT_CHECK(count < int64_t{1} << bits);
    key = key << bits | static_cast<uint64_t>(count);
  }
  return key;
}

// What is found once more on each machine, but for what no trial needs to show. Many sequences
// share passes and have little to gain by looking at each draft: at 8, 32 and 128 margins gave 0.71
// to 0.88 of a fixed number on an H100, where the host waits for them, and the same as one draft on
// a CPU; the head less. One or two have nothing to lose by signs where ops run as they come: there
// these cost a hundredth of a pass.
RoundWays::Gains PriorGains(int64_t num_sequences, bool replays, bool has_head) {
  if (num_sequences > 2) return {1, 0, 0};
  if (replays) return {num_sequences == 1 ? 0.96 : 1, 1, has_head ? 0.98 : 0};
  return {0, has_head ? 0.0 : 1, has_head ? 1.0 : 0};
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
  return PassOffset(options, options.max_drafts) + DrawList::ArenaBytes(0, options.num_slots) +
         rope_bytes +
         (options.head == nullptr ? 0 : options.head->WorkspaceBytes(options.num_slots)) +
         row_bytes * (draft.d_model + 3 + draft.vocab_size * (1 + options.max_drafts));
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
      slots_(static_cast<size_t>(options.num_slots + options.num_snapshots)),
      ways_([&](int64_t num_sequences) {
        return RoundWays(PriorGains(num_sequences, backend.Info().replays, options.head != nullptr),
                         num_sequences);
      }),
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
  ASSIGN_OR_RETURN(StepArena arena,
                   StepArena::Create(backend, PassOffset(options, options.max_drafts)));
  decoder->arena_ = std::make_unique<StepArena>(std::move(arena));
  ASSIGN_OR_RETURN(StepArena biases,
                   StepArena::Create(backend, DrawList::ArenaBytes(0, options.num_slots)));
  decoder->biases_ = std::make_unique<StepArena>(std::move(biases));
  ASSIGN_OR_RETURN(decoder->gathered_, DeviceBuffer::Allocate(backend, row_bytes * d_model));
  ASSIGN_OR_RETURN(decoder->logits_, DeviceBuffer::Allocate(backend, row_bytes * vocab_size));
  ASSIGN_OR_RETURN(decoder->probabilities_,
                   DeviceBuffer::Allocate(backend, row_bytes * options.max_drafts * vocab_size));
  ASSIGN_OR_RETURN(decoder->signs_,
                   HostBuffer::Allocate(backend, 2 * row_bytes * options.max_drafts));
  for (std::vector<float>& kept : decoder->kept_signs_) {
    kept.reserve(static_cast<size_t>(2 * options.num_slots * options.max_drafts));
  }
  ASSIGN_OR_RETURN(decoder->margins_, DeviceBuffer::Allocate(backend, row_bytes));
  ASSIGN_OR_RETURN(decoder->certainties_, DeviceBuffer::Allocate(backend, 2 * row_bytes));
  if (options.head != nullptr) RETURN_IF_ERROR(options.head->MakeWorkspace(options.num_slots));
  // Where ops run behind the host, a decision takes what the pass before the last one said: the
  // device has the last one to do meanwhile, and a pass at most is for nothing.
  decoder->replays_ = backend.Info().replays;
  decoder->lag_ = decoder->replays_ ? 1 : 0;
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

// A prompt that continues an earlier text begins where the target stands; of what is before that
// the draft may have some to read still.
bool SpeculativeDecoder::ReadsPrompt(const BatchRow& row, const SlotDraft& slot,
                                     int64_t tokens_left) const {
  const int64_t limit = draft_->config().context_length;
  const int64_t end = row.first_position + std::ssize(row.token_ids);
  const int64_t num_behind = row.first_position - slot.position;
  return row.max_draft_tokens > 0 && !slot.lost && num_behind >= 0 &&
         num_behind <= std::ssize(slot.unread) &&
         num_behind + std::ssize(row.token_ids) <= tokens_left && (limit == 0 || end <= limit);
}

bool SpeculativeDecoder::CanDraft(const BatchRow& row, const SlotDraft& slot) const {
  const int64_t limit = draft_->config().context_length;
  const int64_t num_unread = std::ssize(slot.unread);
  const int64_t end = slot.position + num_unread + row.max_draft_tokens - 1;
  return !slot.lost && (limit == 0 || end <= limit);
}

// Rows that read a prompt, and rows that can draft.
void SpeculativeDecoder::ChooseReaders(std::span<BatchRow> rows, std::span<const SlotState> slots) {
  readers_.clear();
  waiting_.clear();
  drafters_.clear();
  int64_t tokens_left = options_.max_tokens_per_step;
  for (BatchRow& row : rows) {
    SlotDraft& slot = slots_[static_cast<size_t>(row.lease->slot())];
    if (row.lease->fresh()) slot = {};
    if (row.token_ids.empty()) continue;
    if (ReadsPrompt(row, slot, tokens_left)) {
      const auto num_behind = row.first_position - slot.position;
      slot.prompt.assign(slot.unread.begin(), slot.unread.begin() + num_behind);
      slot.prompt.insert(slot.prompt.end(), row.token_ids.begin(), row.token_ids.end());
      slot.unread.clear();
      readers_.push_back(
          {.row = &row, .slot = &slot, .token_ids = slot.prompt, .is_prefill = true});
      tokens_left -= std::ssize(slot.prompt);
    } else {
      slot.lost = true;
      slot.unread.clear();
    }
  }
  for (BatchRow& row : rows) {
    if (!HasDrafts(row)) continue;
    SlotDraft& slot = slots_[static_cast<size_t>(row.lease->slot())];
    const int64_t num_unread = std::ssize(slot.unread);
    const bool can_draft = CanDraft(row, slot), fits = num_unread <= tokens_left;
    slot.acceptance_class = ClassOf(row.outputs[0]);
    const double history = slot.history.logit();
    if (!can_draft || !fits) {
      if (can_draft) {
        waiting_.push_back(
            {.row = &row, .slot = &slot, .most_drafts = row.max_draft_tokens, .history = history});
      }
      row.draft_limit = slot.lost || !fits ? DraftStop::kLag : DraftStop::kContext;
      row.max_draft_tokens = 0;
      continue;
    }
    const int64_t position = slots[static_cast<size_t>(row.lease->slot())].position;
    GODWIT_CHECK(slot.position + num_unread == position + 1);
    slot.by_head = ByHead(row.draft_policy);
    slot.temperature = row.outputs[0].sampling->temperature;
    readers_.push_back({.row = &row,
                        .slot = &slot,
                        .token_ids = slot.unread,
                        .draft_row = 0,  // until they are counted
                        .most_drafts = row.max_draft_tokens,
                        .is_prefill = num_unread > kWindow,
                        .history = history});
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
    is_unusual_[step_ % kMaxStepsInFlight] = true;
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
void SpeculativeDecoder::AddDraws(int32_t index, int64_t num_draws) {
  const int64_t first = draws_.size();
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
  while (draws_.size() < first + num_draws) draws_.AddPadding();
}

absl::Status SpeculativeDecoder::DrawDrafts(const TensorView& hidden, int32_t index,
                                            int32_t* logit_tokens, const SampleRow* rows,
                                            int64_t num_draws) {
  const ModelConfig& config = draft_->config();
  const int64_t num_logits = std::ssize(arrays_.logit_tokens);
  const TensorView gathered = MakeView(gathered_.bytes(), DType::kF32, num_logits, config.d_model);
  const TensorView logits = MakeView(logits_.bytes(), DType::kF32, num_logits, config.vocab_size);
  RETURN_IF_ERROR(backend_->GatherRows(
      {.x = hidden, .rows = MakeView(logit_tokens, DType::kI32, num_logits), .y = gathered}));
  RETURN_IF_ERROR(draft_->Logits(gathered, logits));
  TensorView tokens = RowRange(drawn_, options_.first_draft + index, num_draws);
  tokens.row_stride = options_.max_drafts;
  SampleArgs args = {.logits = logits,
                     .rows = rows,
                     .num_rows = static_cast<int32_t>(num_draws),
                     .counts = counts_,
                     .tokens = tokens,
                     .probabilities = drafts().probabilities};
  const bool ops_read = shown_ == Shown::kHead || options_.recorder != nullptr;
  if (shown_ != Shown::kNothing && !ops_read) args.margins = SignsOf(index, kMargins, num_draws);
  if (ops_read) {
    args.margins = MakeView(margins_.bytes(), DType::kF32, num_draws);
    args.certainties = MakeView(certainties_.bytes(), DType::kF32, num_draws, 2);
  }
  RETURN_IF_ERROR(backend_->Sample(args));
  return ops_read ? Judge(gathered, index, args) : absl::OkStatus();
}

TensorView SpeculativeDecoder::SignsOf(int32_t index, int64_t kind, int64_t count) const {
  return MakeView(signs_.as<float>() + (2 * index + kind) * options_.num_slots, DType::kF32, count);
}

// The head's logits, and the recorder's part. Ops read margins in device memory, which the head
// passes on.
absl::Status SpeculativeDecoder::Judge(const TensorView& hidden, int32_t index,
                                       const SampleArgs& draws) {
  const TensorView shown = SignsOf(index, kMargins, draws.num_rows);
  if (shown_ == Shown::kHead) {
    RETURN_IF_ERROR(options_.head->Run({.hidden = hidden,
                                        .rows = draws.rows,
                                        .num_rows = draws.num_rows,
                                        .place = index,
                                        .margins = draws.margins,
                                        .certainties = draws.certainties,
                                        .logits = SignsOf(index, kHeadLogits, draws.num_rows),
                                        .shown_margins = shown},
                                       draft_->final_norm()));
  } else {
    RETURN_IF_ERROR(ToStatus(backend_->CopyToHost(shown.data, draws.margins.data,
                                                  draws.num_rows * DTypeBytes(DType::kF32))));
  }
  if (options_.recorder == nullptr) return absl::OkStatus();
  if (index == 0) options_.recorder->Begin();
  return options_.recorder->AddPass({.hidden = hidden,
                                     .final_norm = draft_->final_norm(),
                                     .rows = draws.rows,
                                     .num_rows = draws.num_rows,
                                     .logit_rows = logit_rows_,
                                     .margins = draws.margins,
                                     .certainties = draws.certainties});
}

void SpeculativeDecoder::Arrays::Pad(int64_t num_rows, int64_t num_tokens) {
  GODWIT_CHECK(logit_tokens.size() == rows.size());
  token_ids.resize(static_cast<size_t>(num_tokens), 0);
  positions.resize(static_cast<size_t>(num_tokens), 0);
  rows.resize(static_cast<size_t>(num_rows));  // of no tokens
  logit_tokens.resize(static_cast<size_t>(num_rows), 0);
  num_decode_tokens = num_tokens;
  num_decode_rows = static_cast<int32_t>(num_rows);
}

// A draw of padding is next to nothing, so that a load has one number of them, whichever rows go
// on.
int64_t SpeculativeDecoder::PaddedDraws() const {
  int64_t count = 1;
  while (count < num_sequences_) count *= 4;
  return std::min(count, options_.num_slots);
}

// Up to numbers that few recordings serve: a policy makes any number of rows, and a recording is
// made in a millisecond, ten times what a pass takes. Besides, what a pass costs depends little on
// its rows. After the first pass each row has one token, and there is room for no more.
void SpeculativeDecoder::PadPass(int32_t index) {
  const int steps = PaddingSteps(index);
  const int64_t num_rows = PaddedCoarsely(std::ssize(arrays_.rows), options_.num_slots, steps);
  const int64_t num_tokens = index > 0 ? num_rows
                                       : PaddedCoarsely(std::ssize(arrays_.token_ids),
                                                        options_.max_tokens_per_step, steps);
  arrays_.Pad(num_rows, std::max(num_rows, num_tokens));
}

// One forward pass, and with drafters the draft `index` of each.
absl::Status SpeculativeDecoder::RunPass(int32_t index) {
  // Of decode rows only, each of which draws.
  const bool recorded = replays_ && options_.recorder == nullptr &&
                        arrays_.num_decode_rows == std::ssize(arrays_.rows);
  if (recorded) PadPass(index);
  arena_->Seek(PassOffset(options_, index));
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
  int32_t* const logit_tokens = arena_->Push(arrays_.logit_tokens);
  const int64_t num_draws = recorded ? PaddedDraws() : std::ssize(drafters_);
  AddDraws(index, num_draws);
  const SampleRow* const draws = draws_.PushRows(*arena_);
  plan.block_tables = arena_->Push(arrays_.block_tables);  // last: its size is no part of a key
  draws_.PushBiases(*biases_);
  RETURN_IF_ERROR(biases_->Upload());
  RETURN_IF_ERROR(arena_->Upload());
  const auto forward_and_draw = [&]() -> absl::Status {
    ASSIGN_OR_RETURN(const TensorView hidden, draft_->Forward(plan, *pool_));
    if (arrays_.logit_tokens.empty()) return absl::OkStatus();
    return DrawDrafts(hidden, index, logit_tokens, draws, num_draws);
  };
  if (!recorded) return forward_and_draw();
  bool replayed = false;
  absl::Status status = ToStatus(backend_->BeginReplay(
      PassKey(index, static_cast<int64_t>(shown_), plan.num_tokens, plan.num_rows, num_draws),
      &replayed));
  if (status.ok() && !replayed) status = forward_and_draw();
  is_unusual_[step_ % kMaxStepsInFlight] |= !replayed;
  const absl::Status ended = ToStatus(backend_->EndReplay());
  return status.ok() ? ended : status;
}

// --- Warm-up

absl::Status SpeculativeDecoder::WarmUpPass(int32_t index, int64_t num_rows, int64_t num_tokens,
                                            int num_runs) {
  for (int run = 0; run < num_runs; ++run) {
    arena_->Begin(step_);
    biases_->Begin(step_);
    draws_.Clear();
    arrays_.Clear();
    arrays_.Pad(num_rows, num_tokens);
    RETURN_IF_ERROR(RunPass(index));
    RETURN_IF_ERROR(ToStatus(backend_->Synchronize()));
  }
  return absl::OkStatus();
}

// all_rows: any number of rows goes on, else about all of them.
absl::Status SpeculativeDecoder::WarmUpPasses(int64_t num_sequences, bool all_rows, int num_runs) {
  num_sequences_ = num_sequences;
  const int64_t num_slots = options_.num_slots, num_draws = PaddedDraws();
  const int64_t fewest = all_rows ? 1 : num_draws / 4 + 1;
  const auto num_passes = static_cast<int32_t>(std::min<int64_t>(options_.max_drafts, kWarmPasses));
  for (int32_t index = 0; index < num_passes; ++index) {
    const int steps = PaddingSteps(index);
    for (int64_t rows = fewest; rows <= num_draws; ++rows) {
      rows = PaddedCoarsely(rows, num_slots, steps);
      if (index > 0) {
        RETURN_IF_ERROR(WarmUpPass(index, rows, rows, num_runs));
        continue;
      }
      // Two tokens of a sequence whose drafts were all accepted.
      const int64_t most = std::min(2 * rows, options_.max_tokens_per_step);
      for (int64_t tokens = rows; tokens <= most; ++tokens) {
        tokens = PaddedCoarsely(tokens, options_.max_tokens_per_step, steps);
        RETURN_IF_ERROR(WarmUpPass(index, rows, tokens, num_runs));
      }
    }
  }
  return absl::OkStatus();
}

absl::Status SpeculativeDecoder::WarmUp(int num_runs) {
  if (!replays_ || options_.recorder != nullptr) return absl::OkStatus();
  readers_.clear();
  drafters_.clear();
  step_ = 0;
  for (int64_t sequences = 1, done = 0; done < options_.num_slots; sequences *= 4) {
    done = std::min(sequences, options_.num_slots);
    shown_ = Shown::kNothing;
    RETURN_IF_ERROR(WarmUpPasses(done, true, num_runs));
    shown_ = Shown::kMargins;
    if (options_.head == nullptr || done <= kFewSequences) {
      RETURN_IF_ERROR(WarmUpPasses(done, true, num_runs));
    }
    shown_ = Shown::kHead;
    if (options_.head != nullptr) RETURN_IF_ERROR(WarmUpPasses(done, true, num_runs));
  }
  return absl::OkStatus();
}

// --- How far

DraftSigns SpeculativeDecoder::Signs(StepId step, const SlotDraft& slot, double history,
                                     int32_t index, int32_t num_passes) const {
  const std::vector<float>& kept = kept_signs_[step % kMaxStepsInFlight];
  const float* const signs_of_step = kept.empty() ? signs_.as<const float>() : kept.data();
  const auto sign = [&](int64_t pass, int64_t kind) {
    return signs_of_step[(2 * pass + kind) * options_.num_slots + slot.draft_row];
  };
  const float scale = slot.temperature > 0 ? slot.temperature : 1;
  DraftSigns signs = {
      .margin = std::min(static_cast<double>(sign(index, kMargins) / scale), kMaxMargin),
      .history = history};
  if (!has_head_logits_[step % kMaxStepsInFlight]) return signs;
  // A head that reads a draft speaks in the pass after.
  const int32_t pass = options_.head->label() == HeadLabel::kPost ? index + 1 : index;
  if (pass >= num_passes) return signs;
  // A draw that failed leaves no number.
  const float logit = sign(pass, kHeadLogits);
  const bool greedy = slot.acceptance_class == AcceptanceClass::kGreedy;
  if (std::isfinite(logit)) signs.head = options_.head->Calibrated(logit, greedy, index);
  return signs;
}

// Nothing overwrites signs_ before: the passes of the next step are queued after this call, and
// what those of `step` wrote is complete where its mark has passed. Steps before `step` that are in
// flight were kept when the one after each came. The wait leaves the device the step of the target
// to do, and all passes but the last few have been waited for by decisions.
absl::Status SpeculativeDecoder::KeepSigns(StepId step, int mark) {
  const auto turn = static_cast<size_t>(step % kMaxStepsInFlight);
  if (!has_margins_[turn] || num_passes_[turn] == 0) return absl::OkStatus();
  RETURN_IF_ERROR(ToStatus(backend_->WaitMark(mark)));
  const float* const signs = signs_.as<const float>();
  kept_signs_[turn].assign(signs, signs + 2 * options_.num_slots * num_passes_[turn]);
  return absl::OkStatus();
}

// Until something is known, a step proposes a number of drafts that no estimate chose, each in
// turn, none among them: estimates need drafts of all kinds, and costs numbers of rows. Under load
// a few rows tell as much as many of what is accepted; but where rows are cheap, what a step costs
// jumps, and a line through the first few of them says nothing about four times as many.
bool SpeculativeDecoder::WarmsUp(std::span<BatchRow> rows, int64_t num_sequences) {
  const bool knows_costs = costs_.at(num_sequences).known();
  const bool wanted = std::any_of(rows.begin(), rows.end(), [&](const BatchRow& row) {
    return HasDrafts(row) && row.draft_policy != DraftPolicy::kFixed &&
           ((row.draft_policy == DraftPolicy::kThroughput && !knows_costs) ||
            ((options_.head == nullptr || row.draft_policy == DraftPolicy::kMargin) &&
             score_.num_observed(ClassOf(row.outputs[0])) < kWarmUpObservations));
  });
  if (!wanted) return false;
  const int64_t least = replays_ ? kWarmUpDrafts : 1;
  const auto most = static_cast<int>(std::max(kWarmUpRows / num_sequences, least));
  const auto turn = static_cast<int>(num_warm_ups_++ % options_.max_drafts);
  for (BatchRow& row : rows) {
    if (!HasDrafts(row) || row.draft_policy == DraftPolicy::kFixed) continue;
    row.max_draft_tokens = turn % (std::min(row.max_draft_tokens, most) + 1);
    row.draft_limit = DraftStop::kMeasurement;
  }
  return true;
}

DraftDecider::Load SpeculativeDecoder::Load(double reluctance) const {
  return {.costs = costs_.at(num_sequences_),
          .score = score_,
          .num_sequences = num_sequences_,
          .num_rows = num_rows_,
          .reluctance = reluctance,
          .most_drafts = static_cast<int>(options_.max_drafts),
          .lag = lag_,
          .way = way_};
}

// Of the draft at `place`, which is not drawn yet.
DraftCandidate SpeculativeDecoder::Candidate(const Reader& reader, int32_t place) const {
  const SlotDraft& slot = *reader.slot;
  return {.policy = reader.row->draft_policy,
          .threshold = reader.row->draft_threshold,
          .acceptance_class = slot.acceptance_class,
          .acceptance = score_.Expect(slot.acceptance_class, std::min(place, kMaxDraftTokens - 1),
                                      reader.history)};
}

// What learns only from drafts it trusts would never trust another. So in a step in 64 some rows
// draft one more than their policy asked for; which, chance decides, not what was drawn.
void SpeculativeDecoder::Overrule(Reader& reader, DraftCandidate& candidate) {
  const bool stops = !candidate.keeps || (candidate.can_go_on && !candidate.goes_on);
  if (!overrules_ || !stops || reader.overruled) return;
  if (random_() % num_sequences_ >= kOverruledRows) return;
  reader.overruled = true;
  candidate.keeps = true;
  candidate.goes_on = candidate.can_go_on;
}

void SpeculativeDecoder::Stop(Reader& reader, int num_kept, int num_drawn) {
  reader.stopped = true;
  reader.row->max_draft_tokens = num_kept;
  reader.row->num_dropped = num_drawn - num_kept;
  reader.row->draft_limit = DraftStop::kPolicy;
  num_rows_ -= num_drawn - num_kept;
}

void SpeculativeDecoder::DropWithoutDrafts() {
  std::erase_if(readers_, [](const Reader& reader) {
    return reader.draft_row >= 0 && reader.row->max_draft_tokens == 0;
  });
}

// What the planner expects of the step, and in a planned one the drafts of the rows that ask for
// throughput. Rows that wait count: in a few steps they have caught up.
void SpeculativeDecoder::PlanRound() {
  plan_rows_.clear();
  int64_t num_rows = num_rows_, num_passes = 0;
  for (const std::vector<Reader>* const list : {&readers_, &waiting_}) {
    for (const Reader& reader : *list) {
      if (list == &readers_ && reader.draft_row < 0) continue;
      const int most = reader.most_drafts;
      if (reader.row->draft_policy == DraftPolicy::kThroughput) {
        plan_rows_.push_back({.acceptance_class = reader.slot->acceptance_class,
                              .history = reader.history,
                              .most_drafts = most});
      } else {
        num_rows += most;
        num_passes = std::max<int64_t>(num_passes, most);
      }
    }
  }
  if (plan_rows_.empty()) return;
  const int planned = planner_.Plan({.costs = costs_.at(num_sequences_),
                                     .score = score_,
                                     .num_sequences = num_sequences_,
                                     .num_rows = num_rows,
                                     .num_passes = num_passes,
                                     .reluctance = was_off_ ? kReluctance : 0},
                                    plan_rows_);
  expected_rates_[step_ % kMaxStepsInFlight] = planner_.rate();
  if (!plans_) return;
  // What a step with another number takes would else never be seen again. After a pause a few rows
  // do, as these have to read what they missed.
  const int other = planned + (random_() % 2 == 0 ? 1 : -1);
  for (Reader& reader : readers_) {
    if (reader.draft_row < 0 || reader.row->draft_policy != DraftPolicy::kThroughput) continue;
    int num_drafts = planned;
    if (overrules_ && planned > 0) num_drafts = other;
    if (overrules_ && planned == 0) num_drafts = random_() % num_sequences_ < kOverruledRows;
    if (num_drafts < reader.most_drafts) Stop(reader, num_drafts, num_drafts);
  }
  was_off_ = planned == 0;
  DropWithoutDrafts();
}

// Whether there is a first draft, of rows that ask for throughput; those without read nothing.
void SpeculativeDecoder::DecideFirst() {
  candidates_.clear();
  candidate_readers_.clear();
  bool can_choose = false, goes_on = false;
  for (Reader& reader : readers_) {
    if (reader.draft_row < 0) continue;
    const bool chooses = reader.row->draft_policy == DraftPolicy::kThroughput;
    can_choose |= chooses;
    // The others always draw one.
    candidates_.push_back(chooses ? Candidate(reader, 0) : DraftCandidate());
    candidate_readers_.push_back(&reader);
  }
  if (!can_choose) return;
  // All of them, and in a few steps they have caught up: else what all could gain together would
  // never be seen again after a pause.
  for (const Reader& reader : waiting_) {
    if (reader.row->draft_policy != DraftPolicy::kThroughput) continue;
    candidates_.push_back(Candidate(reader, 0));
  }
  decider_.Decide(Load(was_off_ ? kReluctance : 0), candidates_);
  for (size_t index = 0; index < candidate_readers_.size(); ++index) {
    DraftCandidate& candidate = candidates_[index];
    goes_on |= candidate.policy == DraftPolicy::kThroughput && candidate.goes_on;
    Overrule(*candidate_readers_[index], candidate);
    if (!candidate.goes_on) Stop(*candidate_readers_[index], 0, 0);
  }
  was_off_ = !goes_on;
  DropWithoutDrafts();
}

// After pass `index`: the row could have another draft, or one that is known now dropped.
bool SpeculativeDecoder::IsUndecided(const Reader& reader, int32_t index) const {
  const BatchRow& row = *reader.row;
  if (reader.stopped || row.draft_policy == DraftPolicy::kFixed) return false;
  if (row.max_draft_tokens > index + 1) return true;
  return row.draft_policy == DraftPolicy::kThroughput && index >= lag_ &&
         row.max_draft_tokens > index - lag_;
}

// Whether a decision to come may take the signs of pass `index`, which has just been launched: that
// after pass index + lag_, if there is one.
bool SpeculativeDecoder::DecidesBy(int32_t index) const {
  bool undecided = false, has_pass = false;
  for (const Reader* reader : drafters_) {
    undecided |= IsUndecided(*reader, index + lag_);
    has_pass |= reader->row->max_draft_tokens > index + lag_;
  }
  return undecided && has_pass;
}

// After pass `index`, with all that is known of the row's drafts.
DraftCandidate SpeculativeDecoder::WeighedCandidate(StepId step, Reader& reader, int32_t index) {
  const SlotDraft& slot = *reader.slot;
  const int32_t num_drawn = std::min(reader.row->max_draft_tokens, index + 1);
  const int32_t num_known = std::clamp(index + 1 - lag_, 0, num_drawn);
  const bool head_is_late = options_.head != nullptr && options_.head->label() == HeadLabel::kPost;
  DraftCandidate candidate = Candidate(reader, index + 1);
  candidate.survival = reader.survival;
  for (int32_t draft = reader.num_weighed; draft < num_known; ++draft) {
    const DraftSigns signs = Signs(step, slot, reader.history, draft, num_known);
    const double p = score_.Predict(slot.by_head, slot.acceptance_class, draft, signs);
    if (draft == index - lag_) score_.Saw(slot.acceptance_class, p);
    // specdecpp leaves out what its head has not judged, as published.
    if (candidate.policy != DraftPolicy::kSpecDecPP || signs.head) candidate.survival *= p;
    if (head_is_late && draft + 1 == num_known) break;  // it is weighed again
    reader.survival = candidate.survival;
    reader.num_weighed = draft + 1;
  }
  candidate.has_open = index >= lag_ && num_known == index + 1 - lag_;
  candidate.num_unknown = num_drawn - num_known;
  candidate.can_go_on = reader.row->max_draft_tokens > index + 1;
  return candidate;
}

// What becomes of the rows after draft `index` is drawn, of which the margins up to index - lag_
// are known.
void SpeculativeDecoder::Decide(StepId step, int32_t index) {
  candidates_.clear();
  candidate_readers_.clear();
  for (Reader* reader : drafters_) {
    if (IsUndecided(*reader, index)) {
      candidates_.push_back(WeighedCandidate(step, *reader, index));
    } else if (reader->row->draft_policy == DraftPolicy::kFixed &&
               reader->row->max_draft_tokens > index + 1) {
      candidates_.push_back({});  // its pass is there for the others
    } else {
      continue;
    }
    candidate_readers_.push_back(reader);
  }
  decider_.Decide(Load(0), candidates_);
  for (size_t row = 0; row < candidates_.size(); ++row) {
    DraftCandidate& candidate = candidates_[row];
    Reader& reader = *candidate_readers_[row];
    if (candidate.policy == DraftPolicy::kFixed) continue;
    Overrule(reader, candidate);
    const int num_drawn = std::min(reader.row->max_draft_tokens, index + 1);
    if (!candidate.keeps) {
      Stop(reader, index - lag_, num_drawn);
    } else if (candidate.can_go_on && !candidate.goes_on) {
      Stop(reader, num_drawn, num_drawn);
    }
  }
}

bool SpeculativeDecoder::ByHead(DraftPolicy policy) const {
  return options_.head != nullptr &&
         (policy == DraftPolicy::kSpecDecPP ||
          (policy == DraftPolicy::kThroughput && way_ == RoundWay::kHead));
}

// Of the nearest load, first of a greater one: its steps had more rows, so that there is something
// to read off between them.
void SpeculativeDecoder::BorrowCosts() {
  SpeculationCosts& costs = costs_.at(num_sequences_);
  if (costs.known()) return;
  const int load = LoadOf(num_sequences_);
  for (int distance = 1; distance < kNumLoads; ++distance) {
    for (const int other : {load + distance, load - distance}) {
      if (other < 0 || other >= kNumLoads) continue;
      const SpeculationCosts& others = costs_.at(int64_t{1} << other);
      if (others.known()) return costs.BeginWith(others);
    }
  }
}

// By what this step decides, and what its passes have to show for that.
void SpeculativeDecoder::BeginStep(StepId step, std::span<BatchRow> rows) {
  step_ = step;
  num_sequences_ = num_rows_ = std::count_if(
      rows.begin(), rows.end(), [](const BatchRow& row) { return row.token_ids.empty(); });
  bool by_throughput = false, by_signs = false;
  for (const BatchRow& row : rows) {
    if (!HasDrafts(row) || row.draft_policy == DraftPolicy::kFixed) continue;
    (row.draft_policy == DraftPolicy::kThroughput ? by_throughput : by_signs) = true;
  }
  adapts_ = by_throughput || by_signs;
  if (by_throughput) BorrowCosts();
  warms_up_ = adapts_ && WarmsUp(rows, num_sequences_);
  // Signs that others need anyway cost nothing more.
  chooses_ = by_throughput && !by_signs;
  way_ = options_.head != nullptr ? RoundWay::kHead : RoundWay::kMargins;
  if (chooses_ && warms_up_ && num_warm_ups_ % 2 == 0) way_ = RoundWay::kPlanned;
  if (chooses_ && !warms_up_) way_ = ways_.at(num_sequences_).Next();
  plans_ = way_ == RoundWay::kPlanned;
  bool by_head = options_.recorder != nullptr && options_.head != nullptr;
  for (const BatchRow& row : rows) {
    // What it says of shorter rounds comes after their last decision.
    by_head |= HasDrafts(row) && row.max_draft_tokens > lag_ && ByHead(row.draft_policy);
  }
  const bool shows_margins = adapts_ && !plans_;
  shown_ = by_head                                         ? Shown::kHead
           : shows_margins || options_.recorder != nullptr ? Shown::kMargins
                                                           : Shown::kNothing;
  const auto turn = static_cast<size_t>(step % kMaxStepsInFlight);
  num_passes_[turn] = 0;
  kept_signs_[turn].clear();
  learns_[turn] = adapts_;
  has_margins_[turn] = shows_margins;
  chosen_[turn] = shows_margins && !warms_up_;
  has_head_logits_[turn] = by_head;
  is_unusual_[turn] = false;
  ways_of_steps_[turn] = plans_    ? RoundWay::kPlanned
                         : by_head ? RoundWay::kHead
                                   : RoundWay::kMargins;
  expected_rates_[turn] = 0;
}

// What is known by now is waited for only where it decides something.
absl::Status SpeculativeDecoder::DecideAfter(StepId step, int32_t index) {
  if (DecidesBy(index)) RETURN_IF_ERROR(backend_->SetMark(kFirstPassMark + index % 2));
  const bool undecided = std::any_of(drafters_.begin(), drafters_.end(), [&](const Reader* reader) {
    return IsUndecided(*reader, index);
  });
  if (!undecided) return absl::OkStatus();
  if (index >= lag_) RETURN_IF_ERROR(backend_->WaitMark(kFirstPassMark + (index - lag_) % 2));
  Decide(step, index);
  return absl::OkStatus();
}

absl::Status SpeculativeDecoder::Draft(StepId step, std::span<BatchRow> rows,
                                       std::span<const SlotState> slots) {
  BeginStep(step, rows);
  const bool decides = adapts_ && !warms_up_;
  overrules_ = decides && random_() % (was_off_ ? kOverrulePeriodOff : kOverrulePeriod) == 0;
  ChooseReaders(rows, slots);
  const bool compares = chooses_ && ways_.at(num_sequences_).has_choice();
  if (decides && (plans_ || compares)) PlanRound();
  if (decides && !plans_) DecideFirst();
  OrderReaders();
  if (readers_.empty()) return absl::OkStatus();
  arena_->Begin(step);
  biases_->Begin(step);
  draws_.Clear();
  arrays_.Clear();
  for (const Reader& reader : readers_) AddRead(reader);
  RETURN_IF_ERROR(RunPass(0));
  for (int32_t index = 0; !drafters_.empty(); ++index) {
    ++num_passes_[step % kMaxStepsInFlight];
    num_rows_ += std::count_if(drafters_.begin(), drafters_.end(), [&](const Reader* reader) {
      return reader->row->max_draft_tokens > index;
    });
    if (decides && !plans_) RETURN_IF_ERROR(DecideAfter(step, index));
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
                                              std::span<const int32_t> tokens, int num_drafts,
                                              int num_dropped) {
  SlotDraft& slot = slots_[static_cast<size_t>(slot_index)];
  if (slot.lost) return {};
  const int num_drawn = num_drafts + num_dropped;
  if (num_drawn == 0) {
    slot.unread.insert(slot.unread.end(), tokens.begin(), tokens.end());
    if (std::ssize(slot.unread) <= kMaxDraftLag) return {};
    slot.lost = true;
    slot.unread.clear();
    return {};
  }
  std::vector<float> predicted =
      Judged(step, slot, num_drafts, static_cast<int>(tokens.size()) - 1, num_drawn);
  // The draft read the target's input and its own proposals but the last. Those that stand are
  // read for good.
  const int64_t num_read = std::min<int64_t>(std::ssize(tokens), num_drawn) - 1;
  slot.position += num_read;
  slot.unread.assign(tokens.begin() + num_read, tokens.end());
  return predicted;
}

std::vector<float> SpeculativeDecoder::Judged(StepId step, SlotDraft& slot, int num_drafts,
                                              int num_accepted, int num_passes) {
  std::vector<float> predicted;
  if (!learns_[step % kMaxStepsInFlight]) return predicted;
  predicted.reserve(static_cast<size_t>(num_drafts));
  // All of them with the history before this round.
  const double history = slot.history.logit();
  for (int place = 0; place < num_drafts; ++place) {
    DraftSigns signs = {.history = history};
    if (has_margins_[step % kMaxStepsInFlight]) {
      signs = Signs(step, slot, history, place, num_passes);
    }
    predicted.push_back(
        static_cast<float>(score_.Predict(slot.by_head, slot.acceptance_class, place, signs)));
    if (place > num_accepted) continue;
    verdicts_.push_back({slot.acceptance_class, place, signs, place < num_accepted,
                         chosen_[step % kMaxStepsInFlight]});
    slot.history.Observe(place < num_accepted);
  }
  return predicted;
}

void SpeculativeDecoder::Learn() {
  for (const Verdict& verdict : verdicts_) {
    score_.Observe(verdict.acceptance_class, verdict.place, verdict.signs, verdict.accepted,
                   std::ssize(verdicts_), verdict.chosen);
  }
  verdicts_.clear();
}

void SpeculativeDecoder::Measure(StepId step, int64_t num_sequences, SpeculationCosts::Step taken) {
  if (is_unusual_[step % kMaxStepsInFlight]) return;
  const auto turn = static_cast<size_t>(step % kMaxStepsInFlight);
  taken.num_passes = num_passes_[turn];
  taken.way = ways_of_steps_[turn];
  const double seconds = costs_.at(num_sequences).Observe(taken);
  if (expected_rates_[turn] == 0) return;
  const auto sequences = static_cast<double>(num_sequences);
  ways_.at(num_sequences)
      .Observe(taken.way, static_cast<double>(taken.num_tokens) / sequences,
               expected_rates_[turn] * seconds / sequences);
}

void SpeculativeDecoder::ForgetCosts() { costs_ = ByLoad<SpeculationCosts>(); }

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

void SpeculativeDecoder::Trim(int32_t slot_index, int64_t position, int32_t next_token) {
  SlotDraft& slot = slots_[static_cast<size_t>(slot_index)];
  if (slot.lost) return;
  // Bases of the draft too stand at or below every confirmed position.
  GODWIT_CHECK(slot.base <= position);
  if (slot.position > position) {
    slot.position = position;
    slot.unread.clear();
  }
  GODWIT_CHECK(position - slot.position <= std::ssize(slot.unread));
  slot.unread.resize(static_cast<size_t>(position - slot.position));
  if (next_token >= 0) slot.unread.push_back(next_token);
}

std::optional<DraftImage> SpeculativeDecoder::Export(int64_t host_id) const {
  const auto found = host_slots_.find(host_id);
  GODWIT_CHECK(found != host_slots_.end());
  const SlotDraft& slot = found->second;
  if (slot.lost) return std::nullopt;
  return DraftImage{.position = slot.position, .base = slot.base, .unread = slot.unread};
}

void SpeculativeDecoder::Import(int64_t host_id, const std::optional<DraftImage>& image) {
  SlotDraft& slot = host_slots_[host_id] = {};
  slot.lost = !image.has_value();
  if (slot.lost) return;
  slot.position = image->position;
  slot.base = image->base;
  slot.unread = image->unread;
}

void SpeculativeDecoder::Drop(std::span<const int64_t> host_ids) {
  for (const int64_t host_id : host_ids) host_slots_.erase(host_id);
}

}  // namespace godwit
