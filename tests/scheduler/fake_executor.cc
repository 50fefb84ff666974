#include "tests/scheduler/fake_executor.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace godwit {
namespace {

constexpr size_t kMaxViolations = 20;

uint64_t Mix(uint64_t a, uint64_t b) {  // splitmix64 of the pair
  uint64_t z = a * 0x9e3779b97f4a7c15u + b + 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// An earlier position that the draw at `position` depends on through its block.
int64_t FarPosition(int64_t position) {
  return static_cast<int64_t>(Mix(static_cast<uint64_t>(position), 7) %
                              static_cast<uint64_t>(position));
}

int32_t DrawToken(uint64_t seed, int32_t output_index, int64_t position, uint64_t hash,
                  uint64_t far_cell, int32_t vocab_size) {
  uint64_t z = Mix(seed, static_cast<uint64_t>(output_index));
  z = Mix(Mix(z, static_cast<uint64_t>(position)), Mix(hash, far_cell));
  return static_cast<int32_t>(z % static_cast<uint64_t>(vocab_size));
}

float Score(uint64_t hash, int32_t target) {
  return -static_cast<float>(Mix(hash, static_cast<uint64_t>(target)) % 4096) / 256;
}

bool Contains(const std::vector<int32_t>& ids, int32_t id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

}  // namespace

FakeExecutor::FakeExecutor(FakeExecutorOptions options, CacheManager& caches)
    : options_(std::move(options)),
      caches_(caches),
      paged_(caches.geometry().has_paged()),
      slots_(static_cast<size_t>(caches.geometry().num_slots + caches.geometry().num_snapshots)),
      blocks_(paged_ ? static_cast<size_t>(caches.geometry().num_blocks) : 0) {
  static_assert(std::tuple_size_v<Block> == kPagedBlock);
}

void FakeExecutor::Check(bool ok, const std::string& what) {
  if (!ok && violations_.size() < kMaxViolations) {
    violations_.push_back(absl::StrCat("step ", num_submits_, ": ", what));
  }
}

void FakeExecutor::Trace(uint64_t value) { trace_hash_ = Mix(trace_hash_, value); }

absl::StatusOr<StepId> FakeExecutor::Submit(std::span<const BatchRow> rows) {
  if (options_.fault) {
    absl::Status status = options_.fault("submit", num_submits_);
    if (!status.ok()) {
      ++num_submits_;
      return status;
    }
  }
  DropHostCopies();
  Check(!rows.empty(), "no rows");
  Check(std::ssize(in_flight_) < options_.max_steps_in_flight, "too many steps in flight");
  Step step{.id = num_submits_++};
  for (const BatchRow& row : rows) {
    CheckRow(row, step);
    // Computing what is not allowed could leave the arrays.
    if (!violations_.empty()) return absl::InternalError(violations_.back());
    step.result.rows.push_back(ComputeRow(row, step));
  }
  for (const BatchRow& row : rows) {
    step.result.num_tokens +=
        row.token_ids.empty() ? 1 + row.max_draft_tokens : std::ssize(row.token_ids);
  }
  Check(step.result.num_tokens <= options_.max_tokens_per_step, "token budget exceeded");
  const StepId id = step.id;
  in_flight_.push_back(std::move(step));
  return id;
}

void FakeExecutor::CheckLease(const CacheLease& lease, Step& step) {
  Check(lease.resident(), "lease is not resident");
  Check(step.slots.emplace(lease.slot(), &lease).second, "slot twice in a step");
  for (const Step& other : in_flight_) {
    const auto used = other.slots.find(lease.slot());
    Check(used == other.slots.end() || used->second == &lease,
          "slot was handed on while a step with it is in flight");
  }
}

void FakeExecutor::CheckRow(const BatchRow& row, Step& step) {
  CheckLease(*row.lease, step);
  const SlotState& state = slots_[static_cast<size_t>(row.lease->slot())];
  const int64_t position = row.lease->fresh() ? 0 : state.position;
  Check(row.confirmed_position == row.lease->position(),
        "confirmed position is not the collected one");
  Check(row.confirmed_position <= position, "confirmed position ahead of the state");
  if (row.token_ids.empty()) {
    Check(!row.lease->fresh() && state.next_token >= 0, "nothing to continue from");
    Check(row.outputs.size() == 1, "a decode row has one output");
    Check(row.max_draft_tokens >= 0 && row.max_draft_tokens <= kMaxDraftTokens,
          "drafts out of range");
    Check(position + 1 + row.max_draft_tokens <= row.lease->reserved_tokens(),
          "decodes past its reservation");
    for (const Step& other : in_flight_) {
      const bool drafts = row.max_draft_tokens > 0 || other.drafting.contains(row.lease->slot());
      Check(!drafts || !other.slots.contains(row.lease->slot()),
            "a row with drafts beside a step in flight");
    }
    if (row.max_draft_tokens > 0) step.drafting.insert(row.lease->slot());
    Check(position + 1 >= row.prompt_length, "decodes inside the prompt");
  } else {
    const int64_t end = row.first_position + std::ssize(row.token_ids);
    Check(row.first_position == position, "positions are not contiguous");
    Check(row.first_position % kPrefillBlock == 0 || row.first_position == state.loaded,
          "chunk begins off the prefill block");
    Check(end % kPrefillBlock == 0 || end == row.prompt_length, "chunk ends off the prefill block");
    Check(end <= row.prompt_length, "chunk past the prompt");
    Check(row.outputs.empty() || end == row.prompt_length, "draws before the prompt's end");
    Check(row.score_targets.empty() || row.score_targets.size() == row.token_ids.size(),
          "score targets do not match the tokens");
    Check(end <= row.lease->reserved_tokens(), "prompt past its reservation");
  }
  for (size_t output = 0; output < row.outputs.size(); ++output) {
    if (output == 0) {
      Check(row.outputs[0].lease == row.lease, "the first output is the row's own lease");
    } else {
      Check(row.outputs[output].lease->fresh(), "forks into a lease in use");
      CheckLease(*row.outputs[output].lease, step);
    }
  }
  const int64_t num_blocks = caches_.geometry().blocks_for(row.lease->reserved_tokens());
  Check(std::ssize(row.lease->blocks()) == num_blocks, "blocks do not match the reservation");
}

void FakeExecutor::Append(const CacheLease& lease, SlotState& state, int32_t token_id) {
  state.hash = Mix(state.hash, static_cast<uint64_t>(token_id));
  if (paged_ && !lease.bounded()) {  // the cells of a bounded one are the engine's matter
    const auto block =
        static_cast<size_t>(lease.blocks()[static_cast<size_t>(state.position / kPagedBlock)]);
    Check(caches_.NumUsers(static_cast<int32_t>(block)) == 1, "writes to a shared block");
    blocks_[block][static_cast<size_t>(state.position % kPagedBlock)] = state.hash;
  }
  ++state.position;
  state.recent[static_cast<size_t>(state.position) % state.recent.size()] = state.hash;
}

uint64_t FakeExecutor::Cell(const CacheLease& lease, int64_t position) {
  const auto block =
      static_cast<size_t>(lease.blocks()[static_cast<size_t>(position / kPagedBlock)]);
  return blocks_[block][static_cast<size_t>(position % kPagedBlock)];
}

SampledToken FakeExecutor::Draw(const RowOutput& output, const SlotState& state) {
  const bool in_blocks = paged_ && !output.lease->bounded();
  const uint64_t cell = in_blocks ? Cell(*output.lease, FarPosition(state.position)) : 0;
  return {.token_id = DrawToken(output.seed, output.output_index, state.position, state.hash, cell,
                                options_.vocab_size)};
}

void FakeExecutor::ComputePrompt(const BatchRow& row, SlotState& state, RowResult& result) {
  for (size_t token = 0; token < row.token_ids.size(); ++token) {
    Append(*row.lease, state, row.token_ids[token]);
    if (row.score_targets.empty() || row.score_targets[token] < 0) continue;
    const int32_t target = row.score_targets[token];
    result.scores.push_back({.token_id = target, .logprob = Score(state.hash, target)});
  }
}

void FakeExecutor::Fork(const BatchRow& row, const CacheLease& to) {
  slots_[static_cast<size_t>(to.slot())] = slots_[static_cast<size_t>(row.lease->slot())];
  const int64_t num_blocks = caches_.geometry().blocks_for(row.prompt_length);
  for (size_t block = 0; block < static_cast<size_t>(num_blocks); ++block) {
    blocks_[static_cast<size_t>(to.blocks()[block])] =
        blocks_[static_cast<size_t>(row.lease->blocks()[block])];
  }
}

RowResult FakeExecutor::ComputeRow(const BatchRow& row, Step& step) {
  RowResult result;
  SlotState& state = slots_[static_cast<size_t>(row.lease->slot())];
  if (row.lease->fresh()) state = {};
  row.lease->clear_fresh();
  Trace(static_cast<uint64_t>(row.lease->slot()));
  Trace(static_cast<uint64_t>(state.position) * 4096 + row.token_ids.size());
  ComputePrompt(row, state, result);
  const bool prompt = !row.token_ids.empty();
  if (prompt) state.next_token = -1;
  for (size_t output = 1; output < row.outputs.size(); ++output) {
    Fork(row, *row.outputs[output].lease);
    row.outputs[output].lease->clear_fresh();
  }
  for (const RowOutput& output : row.outputs) {
    SlotState& drawer = slots_[static_cast<size_t>(output.lease->slot())];
    int64_t num_tokens = 1;
    if (!prompt && row.max_draft_tokens > 0) {
      result.num_drafts = row.max_draft_tokens;
      num_tokens += static_cast<int64_t>(Mix(drawer.hash, 11) %
                                         static_cast<uint64_t>(row.max_draft_tokens + 1));
    }
    std::vector<SampledToken>& tokens = result.outputs.emplace_back();
    for (int64_t token = 0; token < num_tokens; ++token) {
      if (!prompt) Append(*output.lease, drawer, drawer.next_token);
      tokens.push_back(Draw(output, drawer));
      drawer.next_token = tokens.back().token_id;
      ++drawer.num_drawn;
    }
    if (output.lease != row.lease) step.positions.emplace_back(output.lease, drawer.position);
  }
  result.num_computed = state.position;
  step.positions.emplace_back(row.lease, state.position);
  return result;
}

absl::StatusOr<StepResult> FakeExecutor::Collect(StepId id) {
  if (in_flight_.empty() || in_flight_.front().id != id) {
    Check(false, "collects out of order");
    return absl::InternalError("collect out of order");
  }
  Step step = std::move(in_flight_.front());
  in_flight_.pop_front();
  if (options_.fault) {
    absl::Status status = options_.fault("collect", num_collects_++);
    if (!status.ok()) return status;
  }
  for (const auto& [lease, position] : step.positions) {
    Check(lease->resident(), "lease left while its step was in flight");
    lease->set_position(position);
  }
  return std::move(step.result);
}

absl::Status FakeExecutor::Copy(std::span<const CacheCopy> copies) {
  if (options_.fault) {
    absl::Status status = options_.fault("copy", num_copies_++);
    if (!status.ok()) {
      // Nobody else knows the host ids of these: the manager gave them back when it planned the
      // copy.
      for (const CacheCopy& copy : copies) {
        if (copy.kind == CacheCopy::Kind::kSwapIn) host_copies_.erase(copy.host_id);
      }
      return status;
    }
  }
  Check(!copies.empty(), "no copies");
  for (const CacheCopy& copy : copies) CopyOne(copy);
  DropHostCopies();
  return absl::OkStatus();
}

bool FakeExecutor::SlotInFlight(int32_t slot) const {
  return std::any_of(in_flight_.begin(), in_flight_.end(),
                     [&](const Step& step) { return step.slots.contains(slot); });
}

bool FakeExecutor::SlotDrafting(int32_t slot) const {
  return std::any_of(in_flight_.begin(), in_flight_.end(),
                     [&](const Step& step) { return step.drafting.contains(slot); });
}

void FakeExecutor::CopyOne(const CacheCopy& copy) {
  Trace(static_cast<uint64_t>(copy.kind) + 977);
  Trace(static_cast<uint64_t>(copy.host_id));
  if (copy.kind == CacheCopy::Kind::kFork) return IsPrefix(copy) ? CopyPrefix(copy) : Fork(copy);
  if (copy.kind == CacheCopy::Kind::kTrim) return Trim(copy);
  if (copy.kind == CacheCopy::Kind::kSwapOut || copy.kind == CacheCopy::Kind::kSave) {
    // What a step in flight does not draw is known before it is collected.
    Check(copy.kind == CacheCopy::Kind::kSave || !SlotInFlight(copy.from_slot),
          "swapped out with a step in flight");
    Check(!SlotDrafting(copy.from_slot), "saved with drafts in flight");
    SlotState& state = slots_[static_cast<size_t>(copy.from_slot)];
    Check(state.position == copy.position, "swapped out at another position");
    HostCopy host{.state = state};
    for (int32_t block : copy.from_blocks)
      host.blocks.push_back(blocks_[static_cast<size_t>(block)]);
    Check(host_copies_.emplace(copy.host_id, std::move(host)).second, "host id twice");
    if (copy.kind == CacheCopy::Kind::kSave) return;
    state = {.hash = 0xdead, .position = -1};  // poison
    for (int32_t block : copy.from_blocks) {
      if (caches_.NumUsers(block) == 0) blocks_[static_cast<size_t>(block)].fill(0xdead);
    }
    return;
  }
  Check(!SlotInFlight(copy.to_slot), "swapped into a slot in flight");
  const auto host = host_copies_.find(copy.host_id);
  if (host == host_copies_.end()) return Check(false, "swapped in from an unknown host id");
  slots_[static_cast<size_t>(copy.to_slot)] = host->second.state;
  if (copy.kind == CacheCopy::Kind::kLoad) {
    slots_[static_cast<size_t>(copy.to_slot)].loaded = copy.position;
  }
  Check(host->second.blocks.size() == copy.to_blocks.size(), "blocks of the swap do not match");
  for (size_t block = 0; block < copy.to_blocks.size(); ++block) {
    blocks_[static_cast<size_t>(copy.to_blocks[block])] = host->second.blocks[block];
  }
  if (copy.kind == CacheCopy::Kind::kSwapIn) host_copies_.erase(host);
}

void FakeExecutor::Fork(const CacheCopy& copy) {
  Check(!SlotDrafting(copy.from_slot), "forked with drafts in flight");
  Check(!SlotInFlight(copy.to_slot), "forked into a slot in flight");
  const SlotState& from = slots_[static_cast<size_t>(copy.from_slot)];
  Check(from.position == copy.position, "forked at another position");
  slots_[static_cast<size_t>(copy.to_slot)] = from;
  slots_[static_cast<size_t>(copy.to_slot)].loaded = copy.position;
  Check(copy.from_blocks.size() == copy.to_blocks.size(), "blocks of the fork do not match");
  for (size_t block = 0; block < copy.to_blocks.size(); ++block) {
    blocks_[static_cast<size_t>(copy.to_blocks[block])] =
        blocks_[static_cast<size_t>(copy.from_blocks[block])];
  }
}

// Of what was drawn, as many are taken back as were drawn after the cut, but for the next token.
void FakeExecutor::Trim(const CacheCopy& copy) {
  Check(!SlotInFlight(copy.from_slot), "cut with a step in flight");
  SlotState& state = slots_[static_cast<size_t>(copy.from_slot)];
  const int64_t num_cut = state.position - copy.position;
  Check(num_cut >= 0 && num_cut < std::ssize(state.recent), "cut to a place that is not there");
  const int64_t num_after = num_cut + (state.next_token >= 0) - (copy.next_token >= 0);
  Check(std::ssize(copy.dropped_tokens) == num_after, "dropped tokens do not match the cut");
  state.num_drawn -= std::ssize(copy.dropped_tokens);
  state.position = copy.position;
  state.hash = state.recent[static_cast<size_t>(copy.position) % state.recent.size()];
  state.next_token = copy.next_token;
}

struct FakeExecutor::Image : StateImage {
  HostCopy copy;
};

std::shared_ptr<const StateImage> FakeExecutor::ExportState(int64_t host_id) {
  const auto host = host_copies_.find(host_id);
  Check(host != host_copies_.end(), "exported an unknown host id");
  auto image = std::make_shared<Image>();
  image->copy = host->second;
  image->position = host->second.state.position;
  image->last_token = host->second.state.next_token;
  return image;
}

absl::Status FakeExecutor::ImportState(int64_t host_id, std::shared_ptr<const StateImage> image) {
  host_copies_[host_id] = static_cast<const Image&>(*image).copy;
  return absl::OkStatus();
}

// To or from a slot in which no row runs.
bool FakeExecutor::IsPrefix(const CacheCopy& copy) const {
  return std::max(copy.from_slot, copy.to_slot) >= caches_.geometry().num_slots;
}

void FakeExecutor::CopyPrefix(const CacheCopy& copy) {
  const int64_t num_slots = caches_.geometry().num_slots;
  Check((copy.from_slot < num_slots) != (copy.to_slot < num_slots),
        "neither keeps a prefix nor starts from one");
  Check(!SlotInFlight(copy.to_slot), "a prefix goes to a slot in flight");
  const SlotState& from = slots_[static_cast<size_t>(copy.from_slot)];
  Check(from.position == copy.position, "the prefix has another position");
  Check(copy.position % kPrefillBlock == 0, "a prefix ends off the prefill block");
  Check(from.next_token < 0, "a prefix from which a token was drawn");
  Check(copy.from_blocks.empty() && copy.to_blocks.empty(), "copies blocks that are shared");
  slots_[static_cast<size_t>(copy.to_slot)] = from;
}

void FakeExecutor::DropHostCopies() {
  for (int64_t host_id : caches_.TakeReleasedHostIds()) host_copies_.erase(host_id);
}

size_t FakeExecutor::num_host_copies() {
  DropHostCopies();
  return host_copies_.size();
}

std::vector<int32_t> FakeExecutor::ReferenceTokens(const GenerateRequest& request,
                                                   int32_t output_index, int32_t vocab_size,
                                                   bool paged) {
  uint64_t hash = 0;
  std::vector<uint64_t> cells;
  for (int32_t token_id : request.token_ids)
    cells.push_back(hash = Mix(hash, static_cast<uint64_t>(token_id)));
  std::vector<int32_t> tokens;
  while (std::ssize(tokens) < request.max_tokens) {
    const int64_t position = std::ssize(cells);
    const uint64_t cell = paged ? cells[static_cast<size_t>(FarPosition(position))] : 0;
    const int32_t token_id =
        DrawToken(request.seed, output_index, position, hash, cell, vocab_size);
    tokens.push_back(token_id);
    if (Contains(request.eos_token_ids, token_id)) break;
    if (Contains(request.stop_token_ids, token_id)) break;
    cells.push_back(hash = Mix(hash, static_cast<uint64_t>(token_id)));
  }
  return tokens;
}

std::vector<float> FakeExecutor::ReferenceScores(const GenerateRequest& request) {
  uint64_t hash = 0;
  std::vector<float> scores;
  for (size_t token = 0; token + 1 < request.token_ids.size(); ++token) {
    hash = Mix(hash, static_cast<uint64_t>(request.token_ids[token]));
    scores.push_back(Score(hash, request.token_ids[token + 1]));
  }
  return scores;
}

}  // namespace godwit
