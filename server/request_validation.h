#pragma once
// From the request on the wire to the request of the scheduler: every field is checked and named
// when it is refused.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/state_file.h"
#include "godwit/v1/inference.pb.h"
#include "scheduler/request.h"
#include "scheduler/session_table.h"
#include "server/served_model.h"
#include "server/stop_finder.h"

namespace godwit {

// When the request arrived and when the client stops waiting, on the steady clock.
struct Arrival {
  TimeNs now = 0;
  TimeNs deadline = kNever;
  std::string tenant;  // whose bearer token the call had; "" where everybody may
};

// What a request of a session goes on from.
struct SessionStart {
  std::string session_id;  // "": of this request only
  SessionKey key = 0;
  int64_t position = 0;
  int32_t pending_token = -1;
  std::shared_ptr<const RopeTable> rope;  // of a session that is not empty
  bool keeps = true;
};

// A valid Generate request, and what its answer needs beside the tokens.
struct PreparedGenerate {
  GenerateRequest request;  // no stream yet; id is never empty
  std::shared_ptr<const StopAutomaton> stops;
  std::string echo_text;  // with echo
  bool echo = false;
  bool logprobs = false;
  bool include_stop = false;
  bool starts_text = false;  // nothing visible precedes the output
  bool has_session = false;
  std::string session_id;
  StateNotes rope_notes;  // of what it rotates with
};

// INVALID_ARGUMENT with all violations at once; UNIMPLEMENTED; NOT_FOUND (model);
// FAILED_PRECONDITION (no tokenizer).
absl::StatusOr<PreparedGenerate> PrepareGenerate(const v1::GenerateRequest& request,
                                                 const ServedModel& model, const Arrival& arrival,
                                                 const SessionStart* session = nullptr);

struct PreparedScore {
  GenerateRequest request;   // max_tokens = 0
  int64_t first_scored = 1;  // index of the first token to report
};
absl::StatusOr<PreparedScore> PrepareScore(const v1::ScoreRequest& request,
                                           const ServedModel& model, const Arrival& arrival);

// INVALID_ARGUMENT naming `field` when `text` is too long to be split into tokens.
absl::Status CheckTextSize(const std::string& field, const std::string& text,
                           const ServedModel& model);
// Names the first id of `ids` that is not in the vocabulary.
absl::Status CheckTokenIds(const std::string& field,
                           const google::protobuf::RepeatedField<int32_t>& ids,
                           const ServedModel& model);

}  // namespace godwit
