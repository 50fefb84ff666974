#include "tests/server/fake_engine.h"

#include <array>
#include <chrono>
#include <thread>
#include <utility>

#include "kernels/base/check.h"

namespace godwit {

std::vector<int32_t> ByteTokenizer::Encode(std::string_view text) const {
  std::vector<int32_t> ids;
  for (const char c : text) ids.push_back(static_cast<uint8_t>(c));
  return ids;
}

std::string ByteTokenizer::Decode(const std::vector<int32_t>& token_ids) const {
  std::string text;
  for (int32_t id : token_ids) text += Piece(id);
  return text;
}

std::string_view ByteTokenizer::Piece(int32_t token_id) const {
  static const std::array<char, 256> bytes = [] {
    std::array<char, 256> all;
    for (int byte = 0; byte < 256; ++byte) all[byte] = static_cast<char>(byte);
    return all;
  }();
  if (token_id >= 0 && token_id < 256) return std::string_view(&bytes[token_id], 1);
  if (token_id == kThe) return " the";
  if (token_id == kWorld) return "世界";
  return {};
}

FakeEngine::FakeEngine(const FakeEngineOptions& options) : options_(options) {
  auto caches = CacheManager::Create(card().geometry);
  GODWIT_CHECK(caches.ok());
  caches_ = *std::move(caches);
}

ModelCard FakeEngine::card() const {
  ModelCard card;
  card.config.family = "transnormer";
  card.config.vocab_size = ByteTokenizer::kVocab;
  card.config.d_model = 8;
  card.config.num_layers = 1;
  card.config.eos_token_ids = {ByteTokenizer::kEos};
  card.config.bos_token_id = ByteTokenizer::kBos;
  card.config.add_bos = options_.add_bos;
  card.num_parameters = 1234;
  card.context_length = options_.context_length;
  card.max_tokens_per_step = 2048;
  card.geometry.components = {
      {.name = "layers.0.lightning", .base_bytes = 1024, .row_bytes = 32, .block = 16}};
  card.geometry.window_rows = WindowRows(1, 0);
  card.geometry.num_slots = options_.num_slots;
  card.geometry.swap_bytes = 1 << 20;
  card.geometry.store_bytes = options_.store_bytes;
  card.dtype = "f32";
  card.backend = "fake";
  return card;
}

int32_t FakeEngine::Letter(uint64_t seed, int32_t output_index, int64_t index) {
  const uint64_t mixed =
      (seed + 31 * static_cast<uint64_t>(output_index) + 7 * static_cast<uint64_t>(index)) *
      0x9E3779B97F4A7C15u;
  return 'a' + static_cast<int32_t>((mixed >> 40) % 26);
}

void FakeEngine::set_next_token(NextToken next_token) {
  std::lock_guard<std::mutex> lock(mutex_);
  next_token_ = std::move(next_token);
}

void FakeEngine::set_step_time_us(int64_t step_time_us) {
  std::lock_guard<std::mutex> lock(mutex_);
  step_time_us_ = step_time_us;
}

void FakeEngine::AllowSteps(int64_t count) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    num_allowed_ = count;
  }
  allowed_.notify_all();
}

void FakeEngine::FailNextStep(absl::Status status) {
  std::lock_guard<std::mutex> lock(mutex_);
  next_error_ = std::move(status);
}

int64_t FakeEngine::num_steps() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return num_steps_;
}

SampledToken FakeEngine::Draw(const RowOutput& output, int64_t index) {
  SampledToken token = {.token_id = next_token_(output.seed, output.output_index, index)};
  if (output.sampling->num_logprobs >= 0) {
    token.logprob = -0.125f * static_cast<float>(token.token_id % 8);
    for (int top = 0; top < output.sampling->num_logprobs; ++top) {
      token.top.push_back({.token_id = 'a' + top, .logprob = -0.5f * static_cast<float>(top)});
    }
  }
  return token;
}

RowResult FakeEngine::Compute(const BatchRow& row, Pending& pending) {
  RowResult result;
  result.num_computed = row.token_ids.empty() ? 1 : std::ssize(row.token_ids);
  const int64_t position =
      (row.token_ids.empty() ? row.lease->position() : row.first_position) + result.num_computed;
  pending.positions.emplace_back(row.lease, position);
  for (const RowOutput& output : row.outputs) {
    result.outputs.push_back({Draw(output, position - row.prompt_length)});
    pending.positions.emplace_back(output.lease, position);
  }
  for (const int32_t target : row.score_targets) {
    if (target < 0) continue;
    SampledToken score = {.token_id = target, .logprob = -0.25f * static_cast<float>(target % 16)};
    for (int top = 0; top < row.num_score_top; ++top)
      score.top.push_back({.token_id = top, .logprob = -1.0f});
    result.scores.push_back(std::move(score));
  }
  pending.result.num_tokens += result.num_computed;
  return result;
}

absl::StatusOr<StepId> FakeEngine::Submit(std::span<const BatchRow> rows) {
  std::unique_lock<std::mutex> lock(mutex_);
  allowed_.wait(lock, [this] { return num_allowed_ != 0; });
  if (num_allowed_ > 0) --num_allowed_;
  ++num_steps_;
  if (!next_error_.ok()) return std::exchange(next_error_, absl::OkStatus());
  Pending pending;
  for (const BatchRow& row : rows) pending.result.rows.push_back(Compute(row, pending));
  const int64_t step_time_us = step_time_us_;
  lock.unlock();
  if (step_time_us > 0) std::this_thread::sleep_for(std::chrono::microseconds(step_time_us));
  pending_[next_id_] = std::move(pending);
  return next_id_++;
}

absl::StatusOr<StepResult> FakeEngine::Collect(StepId id) {
  Pending pending = std::move(pending_.at(id));
  pending_.erase(id);
  for (const auto& [lease, position] : pending.positions) lease->set_position(position);
  return std::move(pending.result);
}

// A state is its position and the token after it; its bytes are zeros.
absl::Status FakeEngine::Copy(std::span<const CacheCopy> copies) {
  for (const CacheCopy& copy : copies) {
    if (copy.kind == CacheCopy::Kind::kTrim) next_tokens_[copy.from_slot] = copy.next_token;
    if (copy.kind == CacheCopy::Kind::kFork) {
      next_tokens_[copy.to_slot] = next_tokens_[copy.from_slot];
    }
    if (copy.kind == CacheCopy::Kind::kLoad) {
      next_tokens_[copy.to_slot] = host_states_.at(copy.host_id).last_token;
    }
    if (copy.kind != CacheCopy::Kind::kSave) continue;
    const auto num_bytes = static_cast<size_t>(caches_->StateBytes(copy.position));
    host_states_[copy.host_id] = {.position = copy.position,
                                  .base = copy.position / 16 * 16,
                                  .last_token = next_tokens_[copy.from_slot],
                                  .bytes = std::shared_ptr<const char[]>(new char[num_bytes]()),
                                  .num_bytes = static_cast<int64_t>(num_bytes)};
  }
  return absl::OkStatus();
}

std::shared_ptr<const StateImage> FakeEngine::ExportState(int64_t host_id) {
  return std::make_shared<StateImage>(host_states_.at(host_id));
}

absl::Status FakeEngine::ImportState(int64_t host_id, std::shared_ptr<const StateImage> image) {
  host_states_[host_id] = *image;
  return absl::OkStatus();
}

}  // namespace godwit
