#include "server/request_validation.h"

#include <google/protobuf/message.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <random>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/rope_table.h"
#include "kernels/base/status.h"
#include "scheduler/scheduler.h"
#include "server/prefix_domain.h"
#include "server/status_mapping.h"

namespace godwit {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::RepeatedField;

// Collects what is wrong with a request.
class Checker {
 public:
  void Fail(std::string field, std::string description) {
    if (violations_.size() < kMaxViolations)
      violations_.emplace_back(std::move(field), std::move(description));
  }
  // NaN fails every comparison, so the test is for being inside.
  template <typename T>
  bool InRange(const char* field, T value, T min, T max) {
    if (value >= min && value <= max) return true;
    Fail(field, absl::StrCat(value, " not in [", min, ", ", max, "]"));
    return false;
  }
  // (0, max]
  bool Positive(const char* field, float value, float max) {
    if (value > 0 && value <= max) return true;
    Fail(field, absl::StrCat(value, " not in (0, ", max, "]"));
    return false;
  }
  bool AtMost(const char* field, int64_t count, int64_t max, const char* what) {
    if (count <= max) return true;
    Fail(field, absl::StrCat(count, " ", what, ", at most ", max));
    return false;
  }
  void Add(const absl::Status& status) {
    if (!status.ok() && first_error_.ok()) first_error_ = status;
  }
  absl::Status status() const {
    if (!violations_.empty()) return InvalidFields(violations_);
    return first_error_;
  }

 private:
  static constexpr size_t kMaxViolations = 16;
  FieldViolations violations_;
  absl::Status first_error_;  // with details of its own
};

// The first field of `group` that is set, as "name.field"; a group that is set but empty is named
// itself.
std::string FirstSetField(const std::string& name, const Message& group) {
  std::vector<const FieldDescriptor*> fields;
  group.GetReflection()->ListFields(group, &fields);
  return fields.empty() ? name : absl::StrCat(name, ".", fields.front()->name());
}

absl::Status CheckScheduling(const v1::SchedulingOptions& scheduling) {
  if (scheduling.has_queue_timeout_ms()) return UnimplementedField("scheduling.queue_timeout_ms");
  if (scheduling.has_ttft_slo_ms()) return UnimplementedField("scheduling.ttft_slo_ms");
  if (scheduling.has_tpot_slo_ms()) return UnimplementedField("scheduling.tpot_slo_ms");
  return absl::OkStatus();
}

absl::Status CheckImplemented(const v1::GenerateRequest& request) {
  const v1::StateOptions& state = request.state();
  if (state.has_parent_snapshot()) return UnimplementedField("state.parent_snapshot");
  if (state.has_expected_state_hash()) return UnimplementedField("state.expected_state_hash");
  if (request.has_guided()) return UnimplementedField(FirstSetField("guided", request.guided()));
  return CheckScheduling(request.scheduling());
}

void CheckRequestId(const std::string& id, Checker& check) {
  check.AtMost("request_id", static_cast<int64_t>(id.size()), kMaxRequestIdBytes, "bytes");
  const bool printable =
      std::all_of(id.begin(), id.end(), [](char c) { return c >= 0x20 && c < 0x7F; });
  if (!printable) check.Fail("request_id", "has a character that is not printable ASCII");
}

uint64_t RandomU64() {
  std::random_device device;
  return (static_cast<uint64_t>(device()) << 32) | device();
}

std::string IdOrNew(const std::string& id) {
  return id.empty() ? absl::StrCat("req-", absl::Hex(RandomU64(), absl::kZeroPad16)) : id;
}

absl::StatusOr<std::vector<int32_t>> TextPrompt(const std::string& text, const ServedModel& model,
                                                bool with_bos) {
  RETURN_IF_ERROR(model.RequireTokenizer().status());
  RETURN_IF_ERROR(CheckTextSize("prompt", text, model));
  std::vector<int32_t> ids = model.EncodePrompt(text, with_bos);
  if (ids.empty()) return InvalidFields({{"prompt", "is empty, and the model adds no BOS"}});
  return ids;
}

absl::StatusOr<std::vector<int32_t>> IdPrompt(const v1::TokenIds& token_ids,
                                              const ServedModel& model) {
  RETURN_IF_ERROR(CheckTokenIds("token_ids.ids", token_ids.ids(), model));
  if (token_ids.ids().empty()) return InvalidFields({{"token_ids.ids", "is empty"}});
  return std::vector<int32_t>(token_ids.ids().begin(), token_ids.ids().end());
}

// Of Generate and Score, which name their input alike.
template <typename Request>
absl::StatusOr<std::vector<int32_t>> PromptTokens(const Request& request,
                                                  const ServedModel& model) {
  if (request.has_prompt()) return TextPrompt(request.prompt(), model, model.add_bos());
  if (request.has_token_ids()) return IdPrompt(request.token_ids(), model);
  return InvalidFields({{"input", "neither prompt nor token_ids is set"}});
}

// Of a request that goes on with a session: what was drawn and not read, then its input. Without
// input nothing: the engine goes on from the token itself.
absl::StatusOr<std::vector<int32_t>> SessionTokens(const v1::GenerateRequest& request,
                                                   const ServedModel& model,
                                                   const SessionStart& session) {
  if (session.position == 0) return PromptTokens(request, model);
  if (!request.has_prompt() && !request.has_token_ids()) {
    if (session.pending_token >= 0) return std::vector<int32_t>();
    return InvalidFields(
        {{"input", "neither prompt nor token_ids is set, and the session has no pending token"}});
  }
  std::vector<int32_t> ids;
  if (request.has_prompt()) {
    ASSIGN_OR_RETURN(ids, TextPrompt(request.prompt(), model, /*with_bos=*/false));
  } else {
    ASSIGN_OR_RETURN(ids, IdPrompt(request.token_ids(), model));
  }
  if (session.pending_token >= 0) ids.insert(ids.begin(), session.pending_token);
  return ids;
}

void ReadLogitBias(const v1::SamplingOptions& from, const ServedModel& model, SamplingParams& to,
                   Checker& check) {
  if (!check.AtMost("sampling.logit_bias", from.logit_bias_size(), kMaxLogitBiases, "entries"))
    return;
  for (const auto& [token_id, bias] : from.logit_bias()) {
    const std::string field = absl::StrCat("sampling.logit_bias[", token_id, "]");
    if (token_id < 0 || token_id >= model.vocab_size()) {
      check.Fail(field,
                 absl::StrCat("token id ", token_id, " not in [0, ", model.vocab_size(), ")"));
    } else {
      check.InRange(field.c_str(), bias, -100.0f, 100.0f);
    }
    to.logit_bias.push_back({token_id, bias});
  }
  // A map has no order; the same request must make the same row.
  std::sort(to.logit_bias.begin(), to.logit_bias.end(),
            [](const TokenBias& a, const TokenBias& b) { return a.token_id < b.token_id; });
}

void ReadSampling(const v1::SamplingOptions& from, const ServedModel& model,
                  GenerateRequest& request, Checker& check) {
  SamplingParams& to = request.sampling;
  if (from.has_temperature()) to.temperature = from.temperature();
  if (from.has_top_k()) to.top_k = from.top_k();
  if (from.has_top_p()) to.top_p = from.top_p();
  if (from.has_min_p()) to.min_p = from.min_p();
  if (from.has_repetition_penalty()) to.repetition_penalty = from.repetition_penalty();
  if (from.has_presence_penalty()) to.presence_penalty = from.presence_penalty();
  if (from.has_frequency_penalty()) to.frequency_penalty = from.frequency_penalty();
  check.InRange("sampling.temperature", to.temperature, 0.0f, 100.0f);
  check.InRange("sampling.top_k", to.top_k, 0, std::numeric_limits<int32_t>::max());
  check.Positive("sampling.top_p", to.top_p, 1.0f);
  check.InRange("sampling.min_p", to.min_p, 0.0f, 1.0f);
  check.Positive("sampling.repetition_penalty", to.repetition_penalty, 100.0f);
  check.InRange("sampling.presence_penalty", to.presence_penalty, -2.0f, 2.0f);
  check.InRange("sampling.frequency_penalty", to.frequency_penalty, -2.0f, 2.0f);
  ReadLogitBias(from, model, to, check);
  request.seed = from.has_seed() ? from.seed() : RandomU64();
  request.seed_is_given = from.has_seed();
  if (from.has_n()) request.num_outputs = from.n();
  check.InRange("sampling.n", request.num_outputs, 1, model.limits().max_n);
}

void ReadStopStrings(const v1::StoppingOptions& from, const ServedModel& model, Checker& check) {
  if (from.stop_size() > 0 && model.tokenizer() == nullptr) {
    check.Fail("stopping.stop", "the model has no tokenizer; use stop_token_ids");
  }
  if (!check.AtMost("stopping.stop", from.stop_size(), kMaxStopStrings, "strings")) return;
  for (int at = 0; at < from.stop_size(); ++at) {
    const int64_t num_bytes = static_cast<int64_t>(from.stop(at).size());
    if (num_bytes < 1 || num_bytes > kMaxStopBytes) {
      check.Fail(absl::StrCat("stopping.stop[", at, "]"),
                 absl::StrCat(num_bytes, " bytes, not in [1, ", kMaxStopBytes, "]"));
    }
  }
}

// Token limits, once the prompt's length is known. A context that is too short has details of its
// own.
absl::Status ReadTokenLimits(const v1::StoppingOptions& from, const ServedModel& model,
                             GenerateRequest& request, Checker& check) {
  // A session that goes on without input has a token to read all the same.
  const int64_t num_prompt =
      request.start_position +
      std::max<int64_t>(std::ssize(request.token_ids), request.session != 0 ? 1 : 0);
  const int64_t least = request.keep_as != 0 && !request.token_ids.empty() ? 0 : 1;
  const int64_t room = model.context_length() - num_prompt;
  request.max_tokens = from.has_max_tokens() ? from.max_tokens()
                                             : std::min(model.limits().default_max_tokens,
                                                        std::max<int64_t>(room, 1));
  if (!check.InRange<int64_t>("stopping.max_tokens", request.max_tokens, least,
                              model.limits().max_tokens)) {
    return absl::OkStatus();
  }
  if (from.has_min_tokens()) {
    check.InRange<int64_t>("stopping.min_tokens", from.min_tokens(), 0, request.max_tokens);
    request.sampling.min_tokens = from.min_tokens();
  }
  if (request.max_tokens <= room) return absl::OkStatus();
  const int64_t bound = model.card().geometry.bound_tokens;
  if (bound > 0 && num_prompt <= bound) return absl::OkStatus();
  const int64_t got = num_prompt + request.max_tokens;
  absl::Status status = InvalidFields(
      {{from.has_max_tokens() ? "stopping.max_tokens" : "input",
        absl::StrCat(num_prompt, " prompt tokens + ", request.max_tokens, " max_tokens = ", got,
                     ", the context is ", model.context_length(),
                     bound == 0 ? ""
                                : absl::StrCat(", and a prompt of unlimited output has at most ",
                                               bound, " tokens"))}});
  return WithErrorInfo(
      status, "CONTEXT_LENGTH_EXCEEDED",
      {{"limit", absl::StrCat(model.context_length())}, {"got", absl::StrCat(got)}});
}

void ReadStopping(const v1::StoppingOptions& from, const ServedModel& model, const Arrival& arrival,
                  PreparedGenerate& prepared, Checker& check) {
  GenerateRequest& request = prepared.request;
  ReadStopStrings(from, model, check);
  if (check.AtMost("stopping.stop_token_ids", from.stop_token_ids_size(), kMaxStopTokenIds,
                   "ids")) {
    check.Add(CheckTokenIds("stopping.stop_token_ids", from.stop_token_ids(), model));
  }
  request.stop_token_ids.assign(from.stop_token_ids().begin(), from.stop_token_ids().end());
  if (!from.ignore_eos()) request.eos_token_ids = model.eos_token_ids();
  prepared.include_stop = from.include_stop_in_output();
  if (from.has_time_limit_ms() &&
      check.InRange<int64_t>("stopping.time_limit_ms", from.time_limit_ms(), 1, kMaxTimeLimitMs)) {
    request.time_limit = arrival.now + from.time_limit_ms() * 1'000'000;
  }
}

void ReadResponse(const v1::ResponseOptions& from, const ServedModel& model,
                  PreparedGenerate& prepared, Checker& check) {
  const int32_t max_top =
      static_cast<int32_t>(std::min<int64_t>(kMaxTopLogprobs, model.vocab_size()));
  check.InRange("response.top_logprobs", from.top_logprobs(), 0, max_top);
  if (from.has_top_logprobs() && !from.logprobs())
    check.Fail("response.top_logprobs", "needs response.logprobs");
  check.InRange("response.prompt_logprobs", from.prompt_logprobs(), 0, max_top);
  prepared.echo = from.echo();
  prepared.logprobs = from.logprobs();
  if (from.logprobs()) prepared.request.sampling.num_logprobs = from.top_logprobs();
  if (from.has_prompt_logprobs()) prepared.request.prompt_logprobs = from.prompt_logprobs();
}

// None: no drafts.
std::optional<DraftPolicy> ReadDraftPolicy(const v1::SpeculationOptions& from,
                                           const ServedModel& model, Checker& check) {
  switch (from.policy()) {
    case v1::SpeculationOptions::POLICY_UNSPECIFIED:
      return model.limits().draft_policy;
    case v1::SpeculationOptions::POLICY_FIXED:
      return DraftPolicy::kFixed;
    case v1::SpeculationOptions::POLICY_MARGIN:
      return DraftPolicy::kMargin;
    case v1::SpeculationOptions::POLICY_THROUGHPUT:
      return DraftPolicy::kThroughput;
    case v1::SpeculationOptions::POLICY_SPECDECPP:
      return DraftPolicy::kSpecDecPP;
    case v1::SpeculationOptions::POLICY_OFF:
      if (from.mode() == v1::SpeculationOptions::MODE_ON) {
        check.Fail("speculation.policy", "is POLICY_OFF, but mode is MODE_ON");
      }
      return std::nullopt;
    default:
      check.Fail("speculation.policy",
                 absl::StrCat("is unknown: ", static_cast<int>(from.policy())));
      return std::nullopt;
  }
}

absl::Status ReadThreshold(const v1::SpeculationOptions& from, const ServedModel& model,
                           GenerateRequest& request, Checker& check) {
  request.draft_threshold =
      from.has_threshold() ? from.threshold() : model.limits().draft_threshold;
  check.InRange("speculation.threshold", request.draft_threshold, 0.0f, 1.0f);
  const bool by_threshold = request.draft_policy == DraftPolicy::kMargin ||
                            request.draft_policy == DraftPolicy::kSpecDecPP;
  if (from.has_threshold() && !by_threshold) {
    check.Fail("speculation.threshold", "needs POLICY_MARGIN or POLICY_SPECDECPP");
  }
  if (request.draft_policy != DraftPolicy::kSpecDecPP || model.card().has_acceptance_head) {
    return absl::OkStatus();
  }
  return WithErrorInfo(
      absl::FailedPreconditionError(
          "speculation.policy: POLICY_SPECDECPP, but the draft model has no acceptance head"),
      "NO_ACCEPTANCE_HEAD");
}

absl::Status ReadSpeculation(const v1::SpeculationOptions& from, const ServedModel& model,
                             GenerateRequest& request, Checker& check) {
  const int most = model.card().max_draft_tokens;
  const bool is_on = from.mode() == v1::SpeculationOptions::MODE_ON;
  const bool asks_for_policy =
      from.has_policy() && from.policy() != v1::SpeculationOptions::POLICY_OFF;
  if (most == 0) {
    const char* field = is_on                         ? "mode"
                        : from.has_max_draft_tokens() ? "max_draft_tokens"
                        : asks_for_policy             ? "policy"
                        : from.has_threshold()        ? "threshold"
                                                      : nullptr;
    if (field == nullptr) return absl::OkStatus();
    return WithErrorInfo(absl::FailedPreconditionError(absl::StrCat(
                             "speculation.", field, ": this server has no draft model")),
                         "NO_DRAFT_MODEL");
  }
  const std::optional<DraftPolicy> policy = ReadDraftPolicy(from, model, check);
  request.draft_policy = policy.value_or(DraftPolicy::kFixed);
  RETURN_IF_ERROR(ReadThreshold(from, model, request, check));
  const int wanted =
      from.has_max_draft_tokens() ? from.max_draft_tokens() : model.limits().max_draft_tokens;
  check.InRange("speculation.max_draft_tokens", wanted, 1, most);
  if (!v1::SpeculationOptions::Mode_IsValid(from.mode())) {
    check.Fail("speculation.mode", absl::StrCat("is unknown: ", static_cast<int>(from.mode())));
  }
  const bool is_off = from.mode() == v1::SpeculationOptions::MODE_OFF || !policy;
  if (is_on || (!is_off && model.limits().speculate)) request.max_draft_tokens = wanted;
  return absl::OkStatus();
}

void ReadScheduling(const v1::SchedulingOptions& from, GenerateRequest& request, Checker& check) {
  request.priority = from.priority();
  check.InRange("scheduling.priority", from.priority(), -kMaxPriority, kMaxPriority);
}

// The method that a request chooses, within what the operator allows.
absl::StatusOr<RopeConfig> ReadRope(const std::string& text, const ServedModel& model) {
  const auto refused = [](std::string why) { return InvalidFields({{"rope", std::move(why)}}); };
  const double max_factor = model.limits().max_rope_factor;
  if (max_factor == 0) return refused("this server serves its own only (ModelCard.rope)");
  if (static_cast<int64_t>(text.size()) > kMaxRopeBytes)
    return refused(absl::StrCat(text.size(), " bytes, at most ", kMaxRopeBytes));
  const absl::StatusOr<RopeConfig> rope = OverrideRope(model.card().config, text, "rope");
  if (!rope.ok()) return refused(std::string(rope.status().message()));
  const double factor = std::max(rope->factor, rope->alpha.value_or(1));
  if (factor > max_factor)
    return refused(absl::StrCat("factor ", factor, " not in [1, ", max_factor, "]"));
  return rope;
}

// What the request rotates with, for good: by its own choice, its prompt and its max_tokens.
template <typename Request>
absl::Status FixRope(const Request& from, const ServedModel& model, GenerateRequest& request,
                     StateNotes* notes = nullptr) {
  std::optional<RopeConfig> chosen;
  if (from.has_rope()) {
    ASSIGN_OR_RETURN(chosen, ReadRope(from.rope(), model));
    if (DependsOnLength(*chosen) &&
        model.card().geometry.bounds(std::ssize(request.token_ids) + request.max_tokens)) {
      return InvalidFields(
          {{"rope", absl::StrCat("type '", chosen->type,
                                 "' depends on the length of the request, which beyond the context "
                                 "of ",
                                 model.context_length(), " has none")}});
    }
  }
  const int64_t num_positions =
      NumRotatedPositions(std::ssize(request.token_ids), request.max_tokens);
  const auto rope = RopeOfRequest(model.card().config, chosen ? &*chosen : nullptr, num_positions);
  if (!rope.ok()) return InvalidFields({{"rope", std::string(rope.status().message())}});
  request.rope = *rope;
  if (notes == nullptr) return absl::OkStatus();
  const RopeRegime regime = *rope != nullptr ? (*rope)->regime : model.card().rope_regime;
  *notes = {.rope_digest = regime.ToString(), .rope = from.rope(), .rope_length = num_positions};
  return absl::OkStatus();
}

void CheckPrefixCache(const v1::StateOptions& from, Checker& check) {
  check.AtMost("state.cache_salt", std::ssize(from.cache_salt()), kMaxCacheSaltBytes, "bytes");
  if (!check.AtMost("state.cache_boundaries", from.cache_boundaries_size(), kMaxCacheBoundaries,
                    "positions")) {
    return;
  }
  for (int at = 0; at < from.cache_boundaries_size(); ++at) {
    if (from.cache_boundaries(at) >= 1) continue;
    check.Fail(absl::StrCat("state.cache_boundaries[", at, "]"),
               absl::StrCat(from.cache_boundaries(at), " not >= 1"));
  }
}

// The tokens that a text and its first num_bytes have in common.
int64_t NumTokensOf(const std::string& text, int64_t num_bytes, const ServedModel& model,
                    const std::vector<int32_t>& whole) {
  auto end = static_cast<size_t>(std::min<int64_t>(num_bytes, std::ssize(text)));
  while (end > 0 && end < text.size() && (text[end] & 0xC0) == 0x80) --end;  // inside a character
  const std::vector<int32_t> part = model.EncodePrompt(text.substr(0, end), model.add_bos());
  return std::mismatch(part.begin(), part.end(), whole.begin(), whole.end()).first - part.begin();
}

// After the rope is fixed.
void ReadPrefixCache(const v1::GenerateRequest& from, const ServedModel& model,
                     const Arrival& arrival, GenerateRequest& request) {
  const v1::StateOptions& state = from.state();
  if (state.bypass_prefix_cache() || model.card().geometry.num_snapshots == 0) return;
  const RopeRegime& regime =
      request.rope != nullptr ? request.rope->regime : model.card().rope_regime;
  request.prefix_domain =
      PrefixDomain(model.name(), regime, model.limits().share_prefixes ? "" : arrival.tenant,
                   state.cache_salt());
  for (const int64_t boundary : state.cache_boundaries()) {
    request.prefix_marks.push_back(
        from.has_prompt() ? NumTokensOf(from.prompt(), boundary, model, request.token_ids)
                          : boundary);
  }
}

// Fills in what follows from a request whose fields are all valid.
void Complete(const v1::GenerateRequest& from, const ServedModel& model,
              PreparedGenerate& prepared) {
  GenerateRequest& request = prepared.request;
  if (request.sampling.min_tokens > 0) {
    std::vector<int32_t>& end_ids = request.sampling.end_token_ids;
    end_ids = request.eos_token_ids;
    end_ids.insert(end_ids.end(), request.stop_token_ids.begin(), request.stop_token_ids.end());
  }
  prepared.starts_text = request.start_position == 0 && model.StartsText(request.token_ids);
  prepared.stops = std::make_shared<StopAutomaton>(
      std::vector<std::string>(from.stopping().stop().begin(), from.stopping().stop().end()));
  if (!prepared.stops->empty()) {
    const PieceReader pieces(model.tokenizer(), prepared.starts_text);
    for (int32_t output = 0; output < request.num_outputs; ++output) {
      request.find_stop.push_back(StopFinder(prepared.stops, pieces));
    }
  }
  if (!prepared.echo) return;
  if (from.has_prompt()) {
    prepared.echo_text = from.prompt();
  } else if (model.tokenizer() != nullptr) {
    prepared.echo_text = model.tokenizer()->Decode(request.token_ids);
  }
}

}  // namespace

absl::Status CheckTextSize(const std::string& field, const std::string& text,
                           const ServedModel& model) {
  const int64_t num_bytes = static_cast<int64_t>(text.size());
  if (num_bytes <= model.limits().max_prompt_bytes) return absl::OkStatus();
  return InvalidFields(
      {{field, absl::StrCat(num_bytes, " bytes, at most ", model.limits().max_prompt_bytes)}});
}

absl::Status CheckTokenIds(const std::string& field, const RepeatedField<int32_t>& ids,
                           const ServedModel& model) {
  for (int at = 0; at < ids.size(); ++at) {
    if (ids[at] >= 0 && ids[at] < model.vocab_size()) continue;
    return InvalidFields(
        {{absl::StrCat(field, "[", at, "]"),
          absl::StrCat("token id ", ids[at], " not in [0, ", model.vocab_size(), ")")}});
  }
  return absl::OkStatus();
}

absl::StatusOr<PreparedGenerate> PrepareGenerate(const v1::GenerateRequest& from,
                                                 const ServedModel& model, const Arrival& arrival,
                                                 const SessionStart* session) {
  RETURN_IF_ERROR(CheckImplemented(from));
  RETURN_IF_ERROR(model.CheckName(from.model()));
  PreparedGenerate prepared;
  GenerateRequest& request = prepared.request;
  Checker check;
  CheckRequestId(from.request_id(), check);
  ReadSampling(from.sampling(), model, request, check);
  ReadStopping(from.stopping(), model, arrival, prepared, check);
  ReadResponse(from.response(), model, prepared, check);
  ReadScheduling(from.scheduling(), request, check);
  CheckPrefixCache(from.state(), check);
  RETURN_IF_ERROR(ReadSpeculation(from.speculation(), model, request, check));
  // The prompt last: splitting a long text is the dear part, and is for nothing when a knob is
  // wrong.
  RETURN_IF_ERROR(check.status());
  if (session != nullptr) {
    prepared.has_session = true;
    prepared.session_id = session->session_id;
    request.session = session->position > 0 ? session->key : 0;
    request.start_position = session->position;
    request.keep_as = session->keeps ? session->key : 0;
    ASSIGN_OR_RETURN(request.token_ids, SessionTokens(from, model, *session));
    if (request.token_ids.empty() && request.num_outputs != 1) {
      return InvalidFields({{"sampling.n", "is not 1, and there is no input"}});
    }
  } else {
    ASSIGN_OR_RETURN(request.token_ids, PromptTokens(from, model));
  }
  RETURN_IF_ERROR(ReadTokenLimits(from.stopping(), model, request, check));
  RETURN_IF_ERROR(check.status());
  if (const absl::Status status = ValidateSampling(request.sampling, model.vocab_size());
      !status.ok()) {
    return InvalidFields({{"sampling", std::string(status.message())}});
  }
  if (request.session == 0) {
    RETURN_IF_ERROR(FixRope(from, model, request, &prepared.rope_notes));
    ReadPrefixCache(from, model, arrival, request);
  } else if (from.has_rope()) {
    return InvalidFields({{"rope", "is fixed by the session's first request"}});
  } else {
    request.rope = session->rope;
  }
  request.id = IdOrNew(from.request_id());
  request.deadline = arrival.deadline;
  Complete(from, model, prepared);
  return prepared;
}

namespace {

// Appends a continuation given as text. The two texts are split together, as a model would have
// read them, so a token may lie across the seam: scored is what differs from the prompt's own
// tokens.
absl::Status AppendText(const v1::ScoreRequest& from, const ServedModel& model,
                        PreparedScore& prepared) {
  if (!from.has_prompt())
    return InvalidFields({{"continuation_text", "needs prompt, not token_ids"}});
  if (from.continuation_text().empty()) return InvalidFields({{"continuation_text", "is empty"}});
  const std::string text = from.prompt() + from.continuation_text();
  RETURN_IF_ERROR(CheckTextSize("continuation_text", text, model));
  std::vector<int32_t> whole = model.EncodePrompt(text, model.add_bos());
  const std::vector<int32_t>& prompt = prepared.request.token_ids;
  const auto seam = std::mismatch(prompt.begin(), prompt.end(), whole.begin(), whole.end());
  prepared.first_scored = std::max<int64_t>(1, seam.second - whole.begin());
  prepared.request.token_ids = std::move(whole);
  return absl::OkStatus();
}

absl::Status AppendIds(const v1::ScoreRequest& from, const ServedModel& model,
                       PreparedScore& prepared) {
  const RepeatedField<int32_t>& ids = from.continuation_token_ids().ids();
  if (!from.has_token_ids())
    return InvalidFields({{"continuation_token_ids", "needs token_ids, not prompt"}});
  if (ids.empty()) return InvalidFields({{"continuation_token_ids.ids", "is empty"}});
  RETURN_IF_ERROR(CheckTokenIds("continuation_token_ids.ids", ids, model));
  prepared.first_scored = static_cast<int64_t>(prepared.request.token_ids.size());
  prepared.request.token_ids.insert(prepared.request.token_ids.end(), ids.begin(), ids.end());
  return absl::OkStatus();
}

absl::Status CheckScoreLength(const PreparedScore& prepared, const ServedModel& model) {
  const int64_t num_tokens = static_cast<int64_t>(prepared.request.token_ids.size());
  if (prepared.first_scored >= num_tokens) {
    return InvalidFields({{"input", "has one token; a token is scored given those before it"}});
  }
  if (num_tokens <= model.context_length()) return absl::OkStatus();
  return WithErrorInfo(
      InvalidFields({{"input", absl::StrCat(num_tokens, " tokens, the context is ",
                                            model.context_length())}}),
      "CONTEXT_LENGTH_EXCEEDED",
      {{"limit", absl::StrCat(model.context_length())}, {"got", absl::StrCat(num_tokens)}});
}

}  // namespace

absl::StatusOr<PreparedScore> PrepareScore(const v1::ScoreRequest& from, const ServedModel& model,
                                           const Arrival& arrival) {
  RETURN_IF_ERROR(CheckScheduling(from.scheduling()));
  RETURN_IF_ERROR(model.CheckName(from.model()));
  PreparedScore prepared;
  GenerateRequest& request = prepared.request;
  Checker check;
  CheckRequestId(from.request_id(), check);
  const int32_t max_top =
      static_cast<int32_t>(std::min<int64_t>(kMaxTopLogprobs, model.vocab_size()));
  check.InRange("top_logprobs", from.top_logprobs(), 0, max_top);
  ReadScheduling(from.scheduling(), request, check);
  RETURN_IF_ERROR(check.status());
  ASSIGN_OR_RETURN(request.token_ids, PromptTokens(from, model));
  if (from.has_continuation_text()) {
    RETURN_IF_ERROR(AppendText(from, model, prepared));
  } else if (from.has_continuation_token_ids()) {
    RETURN_IF_ERROR(AppendIds(from, model, prepared));
  }
  RETURN_IF_ERROR(CheckScoreLength(prepared, model));
  request.max_tokens = 0;
  RETURN_IF_ERROR(FixRope(from, model, request));
  request.prompt_logprobs = from.top_logprobs();
  request.id = IdOrNew(from.request_id());
  request.deadline = arrival.deadline;
  return prepared;
}

}  // namespace godwit
