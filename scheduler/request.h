#pragma once
// A request as the scheduler knows it: token ids, limits, priorities. No text, no gRPC, no device.

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "engine/batch.h"

namespace godwit {

// Steady-clock nanoseconds; the scheduler never reads a clock itself.
using TimeNs = int64_t;
inline constexpr TimeNs kNever = INT64_MAX;

enum class FinishReason { kEos, kStopToken, kStopString, kLength, kTimeLimit };
enum class Phase { kWaiting, kPrefilling, kDecoding, kSwapped, kFinished };

// Finds a stop string. Called on the engine thread with each output's new tokens, before they are
// confirmed; returns the index of the last token to keep and which stop matched, or nothing. <= 20
// us, no lock. Stateful per output.
struct StopMatch {
  int64_t last_token = 0;  // index into the span of new tokens; it and those before are kept
  int32_t stop_index = 0;  // which of the request's stop strings
};
using FindStop = std::function<std::optional<StopMatch>(std::span<const SampledToken> new_tokens)>;

// The token that ended an output by its id is named here and is in no kTokens event; with a stop
// string the tokens up to and with the one that completes it are delivered.
struct FinishInfo {
  FinishReason reason = FinishReason::kLength;
  int32_t stop_token_id = -1;  // kEos, kStopToken
  int32_t stop_index = -1;     // kStopString
};

struct RequestTimings {  // all TimeNs; kNever when it did not happen
  TimeNs submitted = kNever, admitted = kNever, first_token = kNever, last_token = kNever,
         finished = kNever;
  TimeNs queue_ns = 0;  // waiting and swapped
  int64_t num_preemptions = 0;
};

// Drafts and what became of them.
struct SpeculationStats {
  static constexpr int kNumDeciles = 10;
  // Drafts that were judged (all before them in their round accepted), by the probability of
  // acceptance that their policy saw.
  struct Decile {
    int64_t num_drafts = 0, num_accepted = 0;
    double predicted = 0;  // sum
  };

  int64_t num_rounds = 0;                    // steps of a sequence that verified drafts
  int64_t num_drafts = 0, num_accepted = 0;  // verified drafts, and of these
  int64_t num_dropped = 0;                   // drawn, but not verified
  // By place in the round, from 0: how often there was a draft, and how often it was accepted.
  std::array<int64_t, kMaxDraftTokens> drafted_at{}, accepted_at{};
  // Steps of sequences that may speculate, by number of verified drafts and by what ended them.
  std::array<int64_t, kMaxDraftTokens + 1> rounds_of_length{};
  std::array<int64_t, kNumDraftStops> stops{};
  std::array<Decile, kNumDeciles> deciles{};
  // The part of the steps' time that fell to these sequences: by drafts, and by rows of the model.
  double draft_seconds = 0, verify_seconds = 0;

  int64_t num_wasted() const { return num_drafts - num_accepted + num_dropped; }
  // A decode row of a sequence that may speculate.
  void AddRow(const RowResult& row, DraftStop stop);
};

// What the engine thread tells the request's owner. Pushed in order; never blocks.
struct TokenEvent {
  enum class Kind {
    kPrompt,    // once, when the prompt is computed: scores of prompt tokens 1.. if asked for
    kTokens,    // new confirmed tokens of one output
    kFinished,  // one output ended by itself or by the time limit; none when kDone is an error, and
                // none for a max_tokens of 0 that ends after its kPrompt
    kDone,      // last event, exactly once: status and timings. Nothing follows
  };
  Kind kind = Kind::kTokens;
  int32_t output_index = 0;
  int64_t num_cached_tokens = 0;     // kPrompt: of the prompt, not computed anew
  std::vector<SampledToken> tokens;  // kPrompt: scores; kTokens
  std::vector<TimeNs> times;         // kTokens: when each token was confirmed
  FinishInfo finish;                 // kFinished
  absl::Status
      status;  // kDone: OK, CANCELLED, DEADLINE_EXCEEDED, UNAVAILABLE, RESOURCE_EXHAUSTED, INTERNAL
  Phase phase = Phase::kWaiting;  // kDone with an error: where it happened
  RequestTimings timings;         // kDone
  SpeculationStats speculation;   // kDone
  // kDone: tokens that the outputs' states dropped (unlimited output), all together.
  int64_t num_dropped = 0;
  // kDone: the position of the state that was kept, and the token drawn after it (-1: none). -1:
  // none was.
  int64_t kept_position = -1;
  int32_t kept_token = -1;
};

// The consumer side of a request. Push runs on the engine thread; Drain and Cancel on any thread.
class TokenStream {
 public:
  // notify: called on the engine thread after events were pushed to an empty mailbox; must not
  // block, may be called after the consumer lost interest. No lock is held.
  explicit TokenStream(std::function<void()> notify) : notify_(std::move(notify)) {}

  // Never blocks. A kTokens event joins the one of the same output that still waits here, so the
  // events of one output keep their order and those of different outputs may change places.
  void Push(std::vector<TokenEvent> events);
  // Everything pushed since the last call.
  std::vector<TokenEvent> Drain();

  // The engine looks at step boundaries; EngineLoop::Wake() makes it look now if it sleeps.
  void Cancel() { cancelled_.store(true, std::memory_order_release); }
  bool cancelled() const { return cancelled_.load(std::memory_order_acquire); }

 private:
  std::function<void()> notify_;
  std::mutex mutex_;                // guards events_
  std::vector<TokenEvent> events_;  // at most 2 n + 2 (kPrompt, n kTokens, n kFinished, kDone)
  std::atomic<bool> cancelled_{false};
};

struct GenerateRequest {
  std::string id;                  // for logs
  std::vector<int32_t> token_ids;  // >= 1, but for a session
  SamplingParams sampling;
  uint64_t seed = 0;
  // The seed was the client's: the tokens are a function of it, speculation or not.
  bool seed_is_given = true;
  int max_draft_tokens = 0;  // that the draft model proposes in a step; 0: no speculation
  DraftPolicy draft_policy = DraftPolicy::kFixed;
  float draft_threshold = 0.5f;        // kMargin
  int32_t num_outputs = 1;             // n; prefills once and forks
  int64_t max_tokens = 0;              // per output; 0: prompt scoring only (Score)
  std::vector<int32_t> eos_token_ids;  // empty with ignore_eos
  std::vector<int32_t> stop_token_ids;
  std::vector<FindStop> find_stop;        // one per output, or empty
  std::shared_ptr<const RopeTable> rope;  // of all its outputs, from prompt + max_tokens; null: the
                                          // model's own
  // With whom it shares computed prompts: those of the same bytes. Whatever changes a state besides
  // the token ids (the rope table) or may not be shared (tenant, salt) is in it. Empty: with
  // nobody, and nothing of it is kept.
  std::string prefix_domain;
  // Lengths of prefixes that others will begin with (the end of a system prompt); ascending.
  std::vector<int64_t> prefix_marks;
  int32_t priority = 0;                   // higher runs first; [-100, 100]
  TimeNs deadline = kNever;               // DEADLINE_EXCEEDED in every phase
  TimeNs time_limit = kNever;  // absolute; ends OK with kTimeLimit (what was generated stands)
  int32_t prompt_logprobs =
      -1;  // -1: none; n: score each prompt token after the first, with n most likely
  std::shared_ptr<TokenStream> stream;  // required

  // Sessions (session_table.h). `session`, not 0: the request starts from the state of that one, which has
  // start_position tokens and is not changed. Then token_ids may be empty if a token that was drawn
  // after the state follows it: the output goes on where it ended. keep_as, not 0: what output 0
  // leaves becomes the state of that session, if the request ends with OK.
  int64_t session = 0;
  int64_t start_position = 0;
  int64_t keep_as = 0;
};

}  // namespace godwit
