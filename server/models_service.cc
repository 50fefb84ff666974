#include <algorithm>

#include "engine/draft_policy.h"
#include "engine/rope_table.h"
#include "godwit/v1/models.grpc.pb.h"
#include "kernels/base/status.h"
#include "server/services.h"
#include "server/unary_call.h"

namespace godwit {
namespace {

v1::Limits EncodeLimits(const ServedModel& model) {
  const RequestLimits& limits = model.limits();
  v1::Limits encoded;
  encoded.set_default_max_tokens(limits.default_max_tokens);
  encoded.set_max_tokens(limits.max_tokens);
  encoded.set_max_n(limits.max_n);
  encoded.set_max_stop_strings(kMaxStopStrings);
  encoded.set_max_stop_bytes(kMaxStopBytes);
  encoded.set_max_stop_token_ids(kMaxStopTokenIds);
  encoded.set_max_logit_biases(kMaxLogitBiases);
  encoded.set_max_top_logprobs(
      static_cast<int32_t>(std::min<int64_t>(kMaxTopLogprobs, model.vocab_size())));
  encoded.set_max_message_bytes(limits.max_message_bytes);
  return encoded;
}

void EncodeMemory(const CacheGeometry& geometry, v1::ModelCard& card) {
  card.set_state_bytes_per_sequence(geometry.slot_bytes());
  card.set_kv_bytes_per_token(geometry.kv_bytes_per_token());
  card.set_slots_total(geometry.num_slots);
  card.set_blocks_total(geometry.num_blocks);
  if (geometry.has_paged()) card.set_block_tokens(kPagedBlock);
  for (const StateComponent& component : geometry.components) {
    v1::StateComponentCard& encoded = *card.add_components();
    encoded.set_name(component.name);
    const int64_t window_bytes =
        component.windowed() ? geometry.window_rows * component.row_bytes : 0;
    encoded.set_bytes_per_sequence(component.base_bytes + window_bytes);
    encoded.set_bytes_per_token(component.paged() ? component.row_bytes : 0);
  }
}

v1::RopeCard EncodeRope(const ServedModel& model) {
  const RopeConfig& rope = *model.card().config.rope;
  v1::RopeCard encoded;
  encoded.set_type(rope.type);
  encoded.set_theta(rope.theta);
  encoded.set_factor(rope.factor);
  encoded.set_original_length(rope.original_length);
  encoded.set_rotary_dim(static_cast<int32_t>(rope.rotary_dim));
  if (const auto table = MakeRopeTable(rope); table.ok())
    encoded.set_attention_factor(table->attention_factor);
  encoded.set_depends_on_length(DependsOnLength(rope));
  encoded.set_regime(model.card().rope_regime.ToString());
  encoded.set_max_request_factor(model.limits().max_rope_factor);
  return encoded;
}

void EncodeDraftModel(const ServedModel& model, v1::DraftModelCard& draft) {
  const ModelCard& card = model.card();
  draft.set_family(card.draft_config.family);
  draft.set_num_parameters(card.draft_num_parameters);
  draft.set_num_layers(card.draft_config.num_layers);
  draft.set_on_by_default(model.limits().speculate);
  draft.set_default_draft_tokens(model.limits().max_draft_tokens);
  draft.set_max_draft_tokens(card.max_draft_tokens);
  draft.set_default_policy(std::string(DraftPolicyName(model.limits().draft_policy)));
  draft.set_default_threshold(model.limits().draft_threshold);
  draft.set_has_acceptance_head(card.has_acceptance_head);
}

v1::ModelCard EncodeCard(const ServedModel& model) {
  const ModelCard& card = model.card();
  const ModelConfig& config = card.config;
  v1::ModelCard encoded;
  encoded.set_name(model.name());
  encoded.set_family(config.family);
  encoded.set_dtype(card.dtype);
  encoded.set_backend(card.backend);
  encoded.set_num_parameters(card.num_parameters);
  encoded.set_weight_bytes(card.weight_bytes);
  encoded.set_workspace_bytes(card.workspace_bytes);
  encoded.set_vocab_size(config.vocab_size);
  encoded.set_d_model(config.d_model);
  encoded.set_num_layers(config.num_layers);
  encoded.set_num_heads(config.num_heads);
  encoded.set_num_kv_heads(config.num_kv_heads);
  encoded.set_head_dim(config.head_dim);
  encoded.set_context_length(card.context_length);
  encoded.mutable_eos_token_ids()->Assign(model.eos_token_ids().begin(),
                                          model.eos_token_ids().end());
  if (model.bos_token_id().has_value()) encoded.set_bos_token_id(*model.bos_token_id());
  encoded.set_add_bos(model.add_bos());
  encoded.set_has_tokenizer(model.tokenizer() != nullptr);
  EncodeMemory(card.geometry, encoded);
  *encoded.mutable_limits() = EncodeLimits(model);
  if (config.rope) *encoded.mutable_rope() = EncodeRope(model);
  encoded.set_context_note(config.context_note);
  encoded.set_unlimited_output_tokens(card.geometry.bound_tokens);
  if (card.max_draft_tokens > 0) EncodeDraftModel(model, *encoded.mutable_draft_model());
  return encoded;
}

using Base = v1::Models::WithRawCallbackMethod_ListModels<
    v1::Models::WithRawCallbackMethod_GetModel<v1::Models::Service>>;

class ModelsService final : public Base {
 public:
  explicit ModelsService(const ServiceContext& context) : services_(context) {}

  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override {
    constexpr RpcName kName = {"godwit.v1.Models", "ListModels"};
    return AnswerAtOnce<v1::ListModelsRequest, v1::ListModelsResponse>(
        services_, kName, context, request, response, [this](const auto&, auto* to) {
          *to->add_models() = EncodeCard(services_.model);
          return absl::OkStatus();
        });
  }
  grpc::ServerUnaryReactor* GetModel(grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override {
    constexpr RpcName kName = {"godwit.v1.Models", "GetModel"};
    return AnswerAtOnce<v1::GetModelRequest, v1::ModelCard>(
        services_, kName, context, request, response,
        [this](const auto& from, auto* to) -> absl::Status {
          RETURN_IF_ERROR(services_.model.CheckName(from.model()));
          *to = EncodeCard(services_.model);
          return absl::OkStatus();
        });
  }

 private:
  const ServiceContext& services_;
};

}  // namespace

std::unique_ptr<grpc::Service> NewModelsService(const ServiceContext& context) {
  return std::make_unique<ModelsService>(context);
}

}  // namespace godwit
