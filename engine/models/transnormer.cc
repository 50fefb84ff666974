#include "engine/models/transnormer.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/models/device_memory.h"
#include "engine/models/lightning_decay.h"
#include "engine/models/weight_loader.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace godwit {
namespace {

struct Layer {
  MatrixView qkvu;  // [4 hidden, d_model]: rows of q, k, v, u
  MatrixView out;   // [d_model, hidden]
  LightningDecay decay;
  TensorView lrpe_theta;  // [num_heads, head_dim] f32; absent: no positions in this layer
  MatrixView l1, l2;      // [d_ff, d_model]
  MatrixView l3;          // [d_model, d_ff]
};

// x += W_out( u * SRMS(lightning(q, k, v)) ),  [q, k, v, u] = W_qkvu SRMS(x)
// x += l3( l1(SRMS(x)) * l2(SRMS(x)) )
class Transnormer final : public Model {
 public:
  Transnormer(const ModelConfig& config, const ModelOptions& options, Backend& backend)
      : config_(config),
        options_(options),
        hidden_(config.num_heads * config.head_dim),
        backend_(backend),
        weights_(backend),
        workspace_(backend),
        srms_norm_{.kind = NormKind::kRms, .epsilon = config.norm_epsilon} {}

  absl::Status Load(const WeightSource& source) {
    WeightLoader loader(source, options_.dtype, weights_);
    ASSIGN_OR_RETURN(embedding_, loader.Matrix({{"model.embed_tokens.weight", config_.vocab_size}},
                                               config_.d_model));
    for (int64_t layer = 0; layer < config_.num_layers; ++layer)
      RETURN_IF_ERROR(LoadLayer(layer, loader));
    head_ = embedding_;
    // Published checkpoints carry a head of their own though their config says tied: what is stored
    // counts.
    if (loader.Has("lm_head.weight") || !config_.tie_word_embeddings) {
      ASSIGN_OR_RETURN(head_,
                       loader.Matrix({{"lm_head.weight", config_.vocab_size}}, config_.d_model));
    }
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
    for (size_t layer = 0; layer < layers_.size(); ++layer) {
      RETURN_IF_ERROR(TokenMixer(static_cast<int>(layer), plan, pool, x));
      RETURN_IF_ERROR(ChannelMixer(layers_[layer], plan, x));
    }
    return x;
  }

  const NormSpec& final_norm() const override { return srms_norm_; }

  absl::Status Logits(const TensorView& hidden, const TensorView& logits) override {
    return ToStatus(backend_.Linear({.input = {.x = hidden, .norm = srms_norm_},
                                     .w = head_,
                                     .y = logits,
                                     .num_decode_tokens = hidden.rows()}));
  }

 private:
  absl::Status LoadLayer(int64_t index, WeightLoader& loader) {
    const std::string prefix = absl::StrCat("model.layers.", index, ".");
    const int64_t d_model = config_.d_model, d_ff = config_.d_ff;
    Layer layer;
    ASSIGN_OR_RETURN(
        layer.qkvu,
        loader.Matrix({{prefix + "token_mixer.qkvu_proj.weight", 4 * hidden_}}, d_model));
    ASSIGN_OR_RETURN(layer.out,
                     loader.Matrix({{prefix + "token_mixer.out_proj.weight", d_model}}, hidden_));
    if (config_.lrpe_layers[static_cast<size_t>(index)]) {
      ASSIGN_OR_RETURN(layer.lrpe_theta, loader.Table(prefix + "token_mixer.lrpe.theta",
                                                      {config_.num_heads, 1, config_.head_dim},
                                                      config_.num_heads, config_.head_dim));
    }
    ASSIGN_OR_RETURN(layer.l1,
                     loader.Matrix({{prefix + "channel_mixer.l1.weight", d_ff}}, d_model));
    ASSIGN_OR_RETURN(layer.l2,
                     loader.Matrix({{prefix + "channel_mixer.l2.weight", d_ff}}, d_model));
    ASSIGN_OR_RETURN(layer.l3,
                     loader.Matrix({{prefix + "channel_mixer.l3.weight", d_model}}, d_ff));

    const DecayTables tables = MakeDecayTables(
        DecayRates(config_.decay_rule, config_.num_heads, index, config_.num_layers));
    ASSIGN_OR_RETURN(layer.decay.decay,
                     weights_.Upload(tables.decay, config_.num_heads, kPrefillBlock + 1));
    ASSIGN_OR_RETURN(layer.decay.fold_epsilon,
                     weights_.Upload(tables.fold_epsilon, config_.num_heads, 2));

    const int64_t d_v = config_.head_dim, d_k = KeyWidth(layer);
    components_.push_back(
        {.name = absl::StrCat("layers.", index, ".lightning"),
         .base_bytes = config_.num_heads * d_k * d_v * DTypeBytes(DType::kF32),
         .row_bytes = config_.num_heads * (d_k + d_v) * DTypeBytes(options_.dtype),
         .block = kWindow,
         .lag = 0,
         .retain = 0,
         .shard = ShardAxis::kHeads});
    layers_.push_back(layer);
    return absl::OkStatus();
  }

  absl::Status AllocateWorkspace() {
    const int64_t num_tokens = options_.max_tokens_per_step;
    ASSIGN_OR_RETURN(x_, workspace_.Tensor(DType::kF32, num_tokens, config_.d_model));
    ASSIGN_OR_RETURN(qkvu_, workspace_.Tensor(options_.dtype, num_tokens, 4 * hidden_));
    ASSIGN_OR_RETURN(o_, workspace_.Tensor(DType::kF32, num_tokens, hidden_));
    ASSIGN_OR_RETURN(product_, workspace_.Tensor(options_.dtype, num_tokens, config_.d_ff));
    return absl::OkStatus();
  }

  int64_t KeyWidth(const Layer& layer) const {
    return layer.lrpe_theta ? 2 * config_.head_dim : config_.head_dim;
  }

  // Gated linear attention (2307.14995 §3.1).
  absl::Status TokenMixer(int index, const ForwardPlan& plan, CachePool& pool,
                          const TensorView& x) {
    const Layer& layer = layers_[static_cast<size_t>(index)];
    const int64_t decode = plan.num_decode_tokens;
    const TensorView qkvu = RowRange(qkvu_, 0, plan.num_tokens);  // [T, 4 hidden]
    const TensorView o = RowRange(o_, 0, plan.num_tokens);        // [T, hidden]
    const TensorView u = ColumnRange(qkvu, 3 * hidden_, hidden_);
    const int64_t d_v = config_.head_dim, d_k = KeyWidth(layer);
    const int component = options_.first_component + index;
    const int64_t slots = pool.geometry().num_slots, window_rows = pool.geometry().window_rows;

    RETURN_IF_ERROR(backend_.Linear({.input = {.x = x, .norm = srms_norm_},
                                     .w = layer.qkvu,
                                     .y = qkvu,
                                     .num_decode_tokens = decode}));
    RETURN_IF_ERROR(backend_.LightningAttention(
        {.q = ColumnRange(qkvu, 0, hidden_),
         .k = ColumnRange(qkvu, hidden_, hidden_),
         .v = ColumnRange(qkvu, 2 * hidden_, hidden_),
         .qk_activation = config_.qk_activation,
         .q_scale = config_.q_scale,
         .theta = layer.lrpe_theta,
         .decay = layer.decay,
         .num_heads = static_cast<int32_t>(config_.num_heads),
         .head_dim = static_cast<int32_t>(config_.head_dim),
         .state = MakeView(pool.bases(component), DType::kF32, slots, config_.num_heads, d_k, d_v),
         .window = MakeView(pool.windows(component), options_.dtype, slots, window_rows,
                            config_.num_heads * (d_k + d_v)),
         .rows = plan.rows,
         .num_rows = plan.num_rows,
         .num_decode_rows = plan.num_decode_rows,
         .num_decode_tokens = decode,
         .o = o}));
    return ToStatus(backend_.Linear({.input = {.x = o, .norm = srms_norm_, .gate = u},
                                     .w = layer.out,
                                     .epilogue = Epilogue::kAdd,
                                     .y = x,
                                     .num_decode_tokens = decode}));
  }

  // SGLU: a gated product without activation (§3.2).
  absl::Status ChannelMixer(const Layer& layer, const ForwardPlan& plan, const TensorView& x) {
    const TensorView product = RowRange(product_, 0, plan.num_tokens);  // [T, d_ff]
    RETURN_IF_ERROR(backend_.GatedLinear({.input = {.x = x, .norm = srms_norm_},
                                          .gate = layer.l1,
                                          .up = layer.l2,
                                          .activation = config_.gate_activation,
                                          .y = product,
                                          .num_decode_tokens = plan.num_decode_tokens}));
    return ToStatus(backend_.Linear({.input = {.x = product},
                                     .w = layer.l3,
                                     .epilogue = Epilogue::kAdd,
                                     .y = x,
                                     .num_decode_tokens = plan.num_decode_tokens}));
  }

  const ModelConfig config_;
  const ModelOptions options_;
  const int64_t hidden_;  // num_heads * head_dim
  Backend& backend_;
  DeviceMemory weights_, workspace_;
  const NormSpec srms_norm_;
  MatrixView embedding_, head_;  // [vocab, d_model]; one matrix when tied
  std::vector<Layer> layers_;
  std::vector<StateComponent> components_;  // one per layer
  TensorView x_, qkvu_, o_, product_;
  int64_t num_parameters_ = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Model>> LoadTransnormer(const ModelConfig& config,
                                                       const WeightSource& source,
                                                       const ModelOptions& options,
                                                       Backend& backend) {
  auto model = std::make_unique<Transnormer>(config, options, backend);
  RETURN_IF_ERROR(model->Load(source));
  return model;
}

}  // namespace godwit
