#pragma once
// From the engine's events of one request to the events on the wire.

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "godwit/v1/inference.pb.h"
#include "scheduler/request.h"
#include "server/request_validation.h"
#include "server/served_model.h"
#include "server/token_writer.h"

namespace godwit {

// A slow client's tokens are merged, but a message stays far below the 4 MiB that clients accept by
// default.
inline constexpr int64_t kMaxTokensPerDelta = 2048;

class EventEncoder {
 public:
  // `prompt`: the request's token ids. `model` outlives the encoder.
  EventEncoder(const ServedModel& model, const PreparedGenerate& prepared);

  // Appends to `out` what `events` make. The summary is made when the request has ended with OK.
  void Encode(std::vector<TokenEvent> events, std::vector<v1::GenerateEvent>* out);

  bool done() const { return done_; }
  const absl::Status& status() const { return status_; }  // once done; with details

 private:
  v1::GenerateEvent& NewEvent(int32_t output_index, std::vector<v1::GenerateEvent>* out) const;
  void EncodePrompt(const std::vector<SampledToken>& scores, std::vector<v1::GenerateEvent>* out);
  void EncodeTokens(const TokenEvent& event, std::vector<v1::GenerateEvent>* out);
  void EncodeDelta(int32_t output_index, TextDelta delta,
                   std::vector<v1::GenerateEvent>* out) const;
  void EncodeFinished(const TokenEvent& event, std::vector<v1::GenerateEvent>* out);
  void EncodeSummary(const TokenEvent& event, std::vector<v1::GenerateEvent>* out) const;

  const ServedModel& model_;
  const std::string request_id_;
  const std::vector<int32_t> prompt_;
  const std::string echo_text_;
  const bool echo_, logprobs_, prompt_logprobs_;
  const uint64_t seed_;
  const std::string session_id_;
  const int64_t num_restored_, num_prompt_;  // num_prompt_: with these
  std::shared_ptr<const StopAutomaton> stops_;
  std::vector<TokenWriter> writers_;  // by output_index
  bool prompt_sent_ = false;
  int64_t num_cached_tokens_ = 0;  // of the prompt
  bool done_ = false;
  absl::Status status_;
};

// Shared with Score.
v1::TokenLogprob EncodeLogprob(const ServedModel& model, const SampledToken& token);
v1::SpeculationStats EncodeSpeculation(const SpeculationStats& stats);
v1::Timings EncodeTimings(const RequestTimings& timings, int64_t tokens_per_output);

// The unary answer: `event` put at the end of what is there.
void AppendEvent(const v1::GenerateEvent& event, v1::GenerateResponse* response);

}  // namespace godwit
