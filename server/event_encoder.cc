#include "server/event_encoder.h"

#include <algorithm>
#include <string>
#include <utility>

#include "engine/draft_policy.h"
#include "kernels/base/check.h"
#include "server/clock.h"
#include "server/status_mapping.h"

namespace godwit {
namespace {

std::string PieceOf(const ServedModel& model, int32_t token_id) {
  if (model.tokenizer() == nullptr) return "";
  return std::string(model.tokenizer()->Piece(token_id));
}

v1::FinishReason EncodeReason(FinishReason reason) {
  switch (reason) {
    case FinishReason::kEos:
      return v1::FINISH_REASON_STOP_EOS;
    case FinishReason::kStopToken:
      return v1::FINISH_REASON_STOP_TOKEN;
    case FinishReason::kStopString:
      return v1::FINISH_REASON_STOP_STRING;
    case FinishReason::kLength:
      return v1::FINISH_REASON_LENGTH;
    case FinishReason::kTimeLimit:
      return v1::FINISH_REASON_TIME_LIMIT;
  }
  return v1::FINISH_REASON_UNSPECIFIED;
}

std::vector<TokenWriter> MakeWriters(const ServedModel& model, const PreparedGenerate& prepared) {
  const PieceReader pieces(model.tokenizer(), prepared.starts_text);
  const TokenWriterOptions options = {.stops = prepared.stops,
                                      .include_stop = prepared.include_stop};
  return std::vector<TokenWriter>(prepared.request.num_outputs, TokenWriter(options, pieces));
}

}  // namespace

EventEncoder::EventEncoder(const ServedModel& model, const PreparedGenerate& prepared)
    : model_(model),
      request_id_(prepared.request.id),
      prompt_(prepared.request.token_ids),
      echo_text_(prepared.echo_text),
      echo_(prepared.echo),
      logprobs_(prepared.logprobs),
      prompt_logprobs_(prepared.request.prompt_logprobs >= 0),
      seed_(prepared.request.seed),
      session_id_(prepared.session_id),
      num_restored_(prepared.request.start_position),
      num_prompt_(num_restored_ +
                  std::max<int64_t>(std::ssize(prompt_), num_restored_ > 0 ? 1 : 0)),
      stops_(prepared.stops),
      writers_(MakeWriters(model, prepared)) {}

void EventEncoder::Encode(std::vector<TokenEvent> events, std::vector<v1::GenerateEvent>* out) {
  for (TokenEvent& event : events) {
    GODWIT_CHECK(!done_);
    switch (event.kind) {
      case TokenEvent::Kind::kPrompt:
        num_cached_tokens_ = event.num_cached_tokens;
        EncodePrompt(event.tokens, out);
        break;
      case TokenEvent::Kind::kTokens:
        EncodeTokens(event, out);
        break;
      case TokenEvent::Kind::kFinished:
        EncodeFinished(event, out);
        break;
      case TokenEvent::Kind::kDone:
        done_ = true;
        status_ = event.status.ok() ? event.status : RunError(event.status, event.phase);
        if (status_.ok()) EncodeSummary(event, out);
        break;
    }
  }
}

v1::GenerateEvent& EventEncoder::NewEvent(int32_t output_index,
                                          std::vector<v1::GenerateEvent>* out) const {
  v1::GenerateEvent& event = out->emplace_back();
  event.set_request_id(request_id_);
  event.set_output_index(output_index);
  return event;
}

void EventEncoder::EncodePrompt(const std::vector<SampledToken>& scores,
                                std::vector<v1::GenerateEvent>* out) {
  prompt_sent_ = true;
  v1::PromptEvent& prompt = *NewEvent(0, out).mutable_prompt();
  prompt.set_num_tokens(num_prompt_);
  prompt.set_num_restored_tokens(num_restored_);
  prompt.set_num_cached_tokens(num_cached_tokens_);
  if (echo_) {
    prompt.set_text(echo_text_);
    prompt.mutable_token_ids()->Assign(prompt_.begin(), prompt_.end());
  }
  if (!prompt_logprobs_ || scores.empty()) return;
  v1::TokenLogprob& first = *prompt.add_logprobs();  // nothing predicts it
  first.set_token_id(prompt_[0]);
  first.set_piece(PieceOf(model_, prompt_[0]));
  for (const SampledToken& score : scores) *prompt.add_logprobs() = EncodeLogprob(model_, score);
}

void EventEncoder::EncodeTokens(const TokenEvent& event, std::vector<v1::GenerateEvent>* out) {
  TokenWriter& writer = writers_[event.output_index];
  const std::span<const SampledToken> tokens(event.tokens);
  for (size_t begin = 0; begin < tokens.size(); begin += kMaxTokensPerDelta) {
    const size_t count = std::min<size_t>(kMaxTokensPerDelta, tokens.size() - begin);
    if (auto delta = writer.Append(tokens.subspan(begin, count))) {
      EncodeDelta(event.output_index, *std::move(delta), out);
    }
  }
}

void EventEncoder::EncodeDelta(int32_t output_index, TextDelta delta,
                               std::vector<v1::GenerateEvent>* out) const {
  v1::Delta& encoded = *NewEvent(output_index, out).mutable_delta();
  encoded.set_text(std::move(delta.text));
  encoded.mutable_token_ids()->Reserve(static_cast<int>(delta.tokens.size()));
  for (const SampledToken& token : delta.tokens) {
    encoded.add_token_ids(token.token_id);
    if (logprobs_) *encoded.add_logprobs() = EncodeLogprob(model_, token);
  }
}

void EventEncoder::EncodeFinished(const TokenEvent& event, std::vector<v1::GenerateEvent>* out) {
  if (!prompt_sent_)
    EncodePrompt({}, out);  // the time limit was over before the prompt was computed
  TokenWriter& writer = writers_[event.output_index];
  if (auto delta = writer.Finish(event.finish))
    EncodeDelta(event.output_index, *std::move(delta), out);
  v1::Finished& finished = *NewEvent(event.output_index, out).mutable_finished();
  finished.set_reason(EncodeReason(event.finish.reason));
  finished.set_num_tokens(writer.num_tokens());
  switch (event.finish.reason) {
    case FinishReason::kEos:
      finished.set_eos_token_id(event.finish.stop_token_id);
      break;
    case FinishReason::kStopToken:
      finished.set_stop_token_id(event.finish.stop_token_id);
      break;
    case FinishReason::kStopString:
      finished.set_stop_text(stops_->stop(event.finish.stop_index));
      break;
    case FinishReason::kLength:
    case FinishReason::kTimeLimit:
      break;
  }
}

void EventEncoder::EncodeSummary(const TokenEvent& event,
                                 std::vector<v1::GenerateEvent>* out) const {
  v1::Summary& summary = *NewEvent(0, out).mutable_summary();
  int64_t num_tokens = 0;
  for (const TokenWriter& writer : writers_) num_tokens += writer.num_tokens();
  v1::Usage& usage = *summary.mutable_usage();
  usage.set_prompt_tokens(num_prompt_);
  usage.set_restored_tokens(num_restored_);
  usage.set_completion_tokens(num_tokens);
  usage.set_total_tokens(num_prompt_ + num_tokens);
  usage.set_cached_prompt_tokens(num_cached_tokens_);
  usage.set_dropped_tokens(event.num_dropped);
  if (!session_id_.empty()) {
    v1::SessionInfo& session = *summary.mutable_session();
    session.set_session_id(session_id_);
    session.set_kept(event.kept_position >= 0);
    session.set_state_position(session.kept() ? event.kept_position : num_restored_);
  }
  *summary.mutable_timings() = EncodeTimings(event.timings, num_tokens / std::ssize(writers_));
  if (event.speculation.num_rounds > 0) {
    *summary.mutable_speculation() = EncodeSpeculation(event.speculation);
  }
  summary.set_seed(seed_);
  summary.set_model(model_.name());
}

v1::SpeculationStats EncodeSpeculation(const SpeculationStats& stats) {
  v1::SpeculationStats encoded;
  encoded.set_draft_tokens(stats.num_drafts);
  encoded.set_accepted_tokens(stats.num_accepted);
  encoded.set_num_rounds(stats.num_rounds);
  for (size_t place = 0; place < stats.drafted_at.size() && stats.drafted_at[place] > 0; ++place) {
    encoded.add_draft_tokens_at(stats.drafted_at[place]);
    encoded.add_accepted_tokens_at(stats.accepted_at[place]);
  }
  encoded.set_wasted_tokens(stats.num_wasted());
  encoded.set_dropped_tokens(stats.num_dropped);
  size_t num_lengths = stats.rounds_of_length.size();
  while (num_lengths > 0 && stats.rounds_of_length[num_lengths - 1] == 0) --num_lengths;
  for (size_t length = 0; length < num_lengths; ++length) {
    encoded.add_steps_of_length(stats.rounds_of_length[length]);
  }
  for (size_t stop = 0; stop < stats.stops.size(); ++stop) {
    if (stats.stops[stop] == 0) continue;
    const std::string reason(DraftStopName(static_cast<DraftStop>(stop)));
    (*encoded.mutable_stops())[reason] = stats.stops[stop];
  }
  const bool predicts = std::any_of(stats.deciles.begin(), stats.deciles.end(),
                                    [](const auto& decile) { return decile.num_drafts > 0; });
  for (size_t index = 0; predicts && index < stats.deciles.size(); ++index) {
    const SpeculationStats::Decile& decile = stats.deciles[index];
    v1::AcceptanceDecile& to = *encoded.add_predicted();
    to.set_draft_tokens(decile.num_drafts);
    to.set_accepted_tokens(decile.num_accepted);
    if (decile.num_drafts > 0) {
      to.set_predicted(decile.predicted / static_cast<double>(decile.num_drafts));
    }
  }
  encoded.set_draft_ms(1e3 * stats.draft_seconds);
  encoded.set_verify_ms(1e3 * stats.verify_seconds);
  return encoded;
}

v1::TokenLogprob EncodeLogprob(const ServedModel& model, const SampledToken& token) {
  v1::TokenLogprob encoded;
  encoded.set_token_id(token.token_id);
  encoded.set_logprob(token.logprob);
  encoded.set_piece(PieceOf(model, token.token_id));
  for (const TopLogprob& top : token.top) {
    v1::TopLogprob& entry = *encoded.add_top();
    entry.set_token_id(top.token_id);
    entry.set_logprob(top.logprob);
    entry.set_piece(PieceOf(model, top.token_id));
  }
  return encoded;
}

v1::Timings EncodeTimings(const RequestTimings& timings, int64_t tokens_per_output) {
  v1::Timings encoded;
  encoded.set_queue_ms(ToMs(timings.queue_ns));
  encoded.set_num_preemptions(timings.num_preemptions);
  if (timings.finished != kNever) encoded.set_total_ms(ToMs(timings.finished - timings.submitted));
  if (timings.first_token == kNever) return encoded;
  encoded.set_time_to_first_token_ms(ToMs(timings.first_token - timings.submitted));
  if (timings.admitted != kNever)
    encoded.set_prefill_ms(ToMs(timings.first_token - timings.admitted));
  const double decode_ms = ToMs(timings.last_token - timings.first_token);
  encoded.set_decode_ms(decode_ms);
  if (tokens_per_output > 1) {
    encoded.set_mean_inter_token_ms(decode_ms / static_cast<double>(tokens_per_output - 1));
  }
  return encoded;
}

void AppendEvent(const v1::GenerateEvent& event, v1::GenerateResponse* response) {
  response->set_request_id(event.request_id());
  switch (event.event_case()) {
    case v1::GenerateEvent::kPrompt:
      *response->mutable_prompt() = event.prompt();
      return;
    case v1::GenerateEvent::kSummary:
      *response->mutable_summary() = event.summary();
      return;
    case v1::GenerateEvent::EVENT_NOT_SET:
      return;
    default:
      break;
  }
  while (response->outputs_size() <= event.output_index()) {
    const int32_t output_index = response->outputs_size();
    response->add_outputs()->set_output_index(output_index);
  }
  v1::Output& output = *response->mutable_outputs(event.output_index());
  if (event.has_finished()) {
    *output.mutable_finished() = event.finished();
    return;
  }
  output.mutable_text()->append(event.delta().text());
  output.mutable_token_ids()->MergeFrom(event.delta().token_ids());
  output.mutable_logprobs()->MergeFrom(event.delta().logprobs());
}

}  // namespace godwit
