#include "engine/models/llama.h"

#include <cmath>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/models/device_memory.h"
#include "engine/models/weight_loader.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace godwit {
namespace {

struct Layer {
  NormSpec attention_norm, mlp_norm;
  MatrixView qkv;       // [(num_heads + 2 num_kv_heads) head_dim, d_model]: rows of q, k, v
  MatrixView out;       // [d_model, num_heads * head_dim]
  MatrixView gate, up;  // [d_ff, d_model]
  MatrixView down;      // [d_model, d_ff]
};

// x += W_o attention(rope(q), rope(k), v),  [q, k, v] = W_qkv RMSNorm(x)
// x += W_down( silu(W_gate RMSNorm(x)) * W_up RMSNorm(x) )
class Llama final : public Model {
 public:
  Llama(const ModelConfig& config, const ModelOptions& options, Backend& backend)
      : config_(config),
        options_(options),
        q_width_(config.num_heads * config.head_dim),
        kv_width_(config.num_kv_heads * config.head_dim),
        backend_(backend),
        weights_(backend),
        workspace_(backend) {}

  absl::Status Load(const WeightSource& source) {
    WeightLoader loader(source, options_.dtype, weights_);
    ASSIGN_OR_RETURN(embedding_, loader.Matrix({{"model.embed_tokens.weight", config_.vocab_size}},
                                               config_.d_model));
    for (int64_t layer = 0; layer < config_.num_layers; ++layer)
      RETURN_IF_ERROR(LoadLayer(layer, loader));
    ASSIGN_OR_RETURN(final_norm_, LoadNorm("model.norm.weight", loader));
    RETURN_IF_ERROR(LoadHead(loader));
    RETURN_IF_ERROR(loader.Finish());
    num_parameters_ = loader.num_parameters();
    return AllocateWorkspace();
  }

  const ModelConfig& config() const override { return config_; }
  const std::vector<StateComponent>& state_components() const override { return components_; }
  int64_t num_parameters() const override { return num_parameters_; }
  int64_t weight_bytes() const override { return weights_.num_bytes(); }
  int64_t workspace_bytes() const override { return workspace_.num_bytes(); }

  absl::StatusOr<TensorView> Forward(const ForwardPlan& plan, CachePool& pool) override {
    GODWIT_CHECK(plan.num_tokens <= options_.max_tokens_per_step);
    const TensorView x = RowRange(x_, 0, plan.num_tokens);  // [T, d_model], the residual stream
    RETURN_IF_ERROR(backend_.EmbedTokens({.table = embedding_,
                                          .token_ids = plan.token_ids,
                                          .drawn = plan.drawn,
                                          .scale = config_.embedding_scale,
                                          .y = x}));
    RETURN_IF_ERROR(
        backend_.Rope({.positions = plan.positions,  // once: the same angles in every layer
                       .table_ids = plan.rope_table_ids,
                       .tables = plan.rope_tables,
                       .num_tables = plan.num_rope_tables,
                       .num_freqs = static_cast<int32_t>(config_.rope->rotary_dim / 2),
                       .cos = RowRange(cos_, 0, plan.num_tokens),
                       .sin = RowRange(sin_, 0, plan.num_tokens)}));
    for (size_t layer = 0; layer < layers_.size(); ++layer) {
      RETURN_IF_ERROR(SelfAttention(static_cast<int>(layer), plan, pool, x));
      RETURN_IF_ERROR(Mlp(layers_[layer], plan, x));
    }
    return x;
  }

  const NormSpec& final_norm() const override { return final_norm_; }

  absl::Status TurnKeys(const ForwardPlan& plan, CachePool& pool) override {
    for (int layer = 0; layer < static_cast<int>(layers_.size()); ++layer) {
      RETURN_IF_ERROR(
          backend_.TurnKeys({.blocks = Blocks(layer, pool),
                             .pair_layout = config_.rope->pair_layout,
                             .num_kv_heads = static_cast<int32_t>(config_.num_kv_heads),
                             .head_dim = static_cast<int32_t>(config_.head_dim),
                             .tables = plan.rope_tables,
                             .num_tables = plan.num_rope_tables,
                             .num_freqs = static_cast<int32_t>(config_.rope->rotary_dim / 2),
                             .turns = plan.turns,
                             .num_turns = plan.num_turns}));
    }
    return absl::OkStatus();
  }

  absl::Status Logits(const TensorView& hidden, const TensorView& logits) override {
    return ToStatus(backend_.Linear({.input = {.x = hidden, .norm = final_norm_},
                                     .w = head_,
                                     .y = logits,
                                     .num_decode_tokens = hidden.rows()}));
  }

 private:
  absl::StatusOr<NormSpec> LoadNorm(const std::string& name, WeightLoader& loader) {
    ASSIGN_OR_RETURN(const TensorView weight,
                     loader.Table(name, {config_.d_model}, 1, config_.d_model));
    return NormSpec{.kind = NormKind::kRms,
                    .weight = MakeView(weight.data, DType::kF32, config_.d_model),
                    .epsilon = config_.norm_epsilon};
  }

  absl::Status LoadLayer(int64_t index, WeightLoader& loader) {
    const std::string prefix = absl::StrCat("model.layers.", index, ".");
    const std::string attention = prefix + "self_attn.", mlp = prefix + "mlp.";
    const int64_t d_model = config_.d_model, d_ff = config_.d_ff;
    Layer layer;
    ASSIGN_OR_RETURN(layer.attention_norm, LoadNorm(prefix + "input_layernorm.weight", loader));
    ASSIGN_OR_RETURN(layer.qkv, loader.Matrix({{attention + "q_proj.weight", q_width_},
                                               {attention + "k_proj.weight", kv_width_},
                                               {attention + "v_proj.weight", kv_width_}},
                                              d_model));
    ASSIGN_OR_RETURN(layer.out, loader.Matrix({{attention + "o_proj.weight", d_model}}, q_width_));
    ASSIGN_OR_RETURN(layer.mlp_norm, LoadNorm(prefix + "post_attention_layernorm.weight", loader));
    ASSIGN_OR_RETURN(layer.gate, loader.Matrix({{mlp + "gate_proj.weight", d_ff}}, d_model));
    ASSIGN_OR_RETURN(layer.up, loader.Matrix({{mlp + "up_proj.weight", d_ff}}, d_model));
    ASSIGN_OR_RETURN(layer.down, loader.Matrix({{mlp + "down_proj.weight", d_model}}, d_ff));
    components_.push_back({.name = absl::StrCat("layers.", index, ".kv"),
                           .row_bytes = 2 * kv_width_ * DTypeBytes(options_.dtype),
                           .retain = kRetainAll,
                           .shard = ShardAxis::kHeads,
                           .head_bytes = config_.head_dim * DTypeBytes(options_.dtype),
                           .element_bytes = DTypeBytes(options_.dtype)});
    layers_.push_back(layer);
    return absl::OkStatus();
  }

  // A tied checkpoint may store the head again. Where it differs from the embedding, no reading of
  // the folder is right.
  absl::Status LoadHead(WeightLoader& loader) {
    if (!config_.tie_word_embeddings) {
      ASSIGN_OR_RETURN(head_,
                       loader.Matrix({{"lm_head.weight", config_.vocab_size}}, config_.d_model));
      return absl::OkStatus();
    }
    head_ = embedding_;
    if (loader.Has("lm_head.weight") &&
        !loader.Same("lm_head.weight", "model.embed_tokens.weight")) {
      return absl::InvalidArgumentError(
          "tensor 'lm_head.weight': config.json says tie_word_embeddings, but it differs from "
          "'model.embed_tokens.weight'");
    }
    loader.MarkUsed("lm_head.weight");
    return absl::OkStatus();
  }

  absl::Status AllocateWorkspace() {
    const int64_t num_tokens = options_.max_tokens_per_step;
    const int64_t num_freqs = config_.rope->rotary_dim / 2;
    ASSIGN_OR_RETURN(x_, workspace_.Tensor(DType::kF32, num_tokens, config_.d_model));
    ASSIGN_OR_RETURN(cos_, workspace_.Tensor(DType::kF32, num_tokens, num_freqs));
    ASSIGN_OR_RETURN(sin_, workspace_.Tensor(DType::kF32, num_tokens, num_freqs));
    ASSIGN_OR_RETURN(qkv_, workspace_.Tensor(options_.dtype, num_tokens, q_width_ + 2 * kv_width_));
    ASSIGN_OR_RETURN(o_, workspace_.Tensor(DType::kF32, num_tokens, q_width_));
    ASSIGN_OR_RETURN(product_, workspace_.Tensor(options_.dtype, num_tokens, config_.d_ff));
    return absl::OkStatus();
  }

  // [num_blocks, 2, num_kv_heads, kPagedBlock * head_dim]: keys and values of a layer.
  TensorView Blocks(int layer, const CachePool& pool) const {
    return MakeView(pool.blocks(options_.first_component + layer), options_.dtype,
                    pool.geometry().num_blocks, 2, config_.num_kv_heads,
                    kPagedBlock * config_.head_dim);
  }

  absl::Status SelfAttention(int index, const ForwardPlan& plan, CachePool& pool,
                             const TensorView& x) {
    const Layer& layer = layers_[static_cast<size_t>(index)];
    const int64_t decode = plan.num_decode_tokens;
    const TensorView qkv = RowRange(qkv_, 0, plan.num_tokens);  // [T, q_width + 2 kv_width]
    const TensorView o = RowRange(o_, 0, plan.num_tokens);      // [T, q_width]

    RETURN_IF_ERROR(backend_.Linear({.input = {.x = x, .norm = layer.attention_norm},
                                     .w = layer.qkv,
                                     .y = qkv,
                                     .num_decode_tokens = decode}));
    RETURN_IF_ERROR(backend_.PagedAttention(
        {.q = ColumnRange(qkv, 0, q_width_),
         .k = ColumnRange(qkv, q_width_, kv_width_),
         .v = ColumnRange(qkv, q_width_ + kv_width_, kv_width_),
         .cos = RowRange(cos_, 0, plan.num_tokens),
         .sin = RowRange(sin_, 0, plan.num_tokens),
         .pair_layout = config_.rope->pair_layout,
         .num_heads = static_cast<int32_t>(config_.num_heads),
         .num_kv_heads = static_cast<int32_t>(config_.num_kv_heads),
         .head_dim = static_cast<int32_t>(config_.head_dim),
         .scale = static_cast<float>(1 / std::sqrt(static_cast<double>(config_.head_dim))),
         .blocks = Blocks(index, pool),
         .block_tables = plan.block_tables,
         .rows = plan.rows,
         .num_rows = plan.num_rows,
         .num_decode_rows = plan.num_decode_rows,
         .num_decode_tokens = decode,
         .o = o}));
    return ToStatus(backend_.Linear({.input = {.x = o},
                                     .w = layer.out,
                                     .epilogue = Epilogue::kAdd,
                                     .y = x,
                                     .num_decode_tokens = decode}));
  }

  // SwiGLU.
  absl::Status Mlp(const Layer& layer, const ForwardPlan& plan, const TensorView& x) {
    const TensorView product = RowRange(product_, 0, plan.num_tokens);  // [T, d_ff]
    RETURN_IF_ERROR(backend_.GatedLinear({.input = {.x = x, .norm = layer.mlp_norm},
                                          .gate = layer.gate,
                                          .up = layer.up,
                                          .activation = config_.gate_activation,
                                          .y = product,
                                          .num_decode_tokens = plan.num_decode_tokens}));
    return ToStatus(backend_.Linear({.input = {.x = product},
                                     .w = layer.down,
                                     .epilogue = Epilogue::kAdd,
                                     .y = x,
                                     .num_decode_tokens = plan.num_decode_tokens}));
  }

  const ModelConfig config_;
  const ModelOptions options_;
  const int64_t q_width_, kv_width_;  // columns of q, and of k or v
  Backend& backend_;
  DeviceMemory weights_, workspace_;
  MatrixView embedding_, head_;  // [vocab, d_model]; one matrix when tied
  NormSpec final_norm_;
  std::vector<Layer> layers_;
  std::vector<StateComponent> components_;  // one per layer
  TensorView x_, cos_, sin_, qkv_, o_, product_;
  int64_t num_parameters_ = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Model>> LoadLlama(const ModelConfig& config,
                                                 const WeightSource& source,
                                                 const ModelOptions& options, Backend& backend) {
  auto model = std::make_unique<Llama>(config, options, backend);
  RETURN_IF_ERROR(model->Load(source));
  return model;
}

}  // namespace godwit
