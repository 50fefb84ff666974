#include "tests/engine/tiny_model.h"

#include <cmath>
#include <cstdlib>
#include <deque>
#include <filesystem>
#include <fstream>
#include <random>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/safetensors.h"
#include "gtest/gtest.h"
#include "kernels/base/bf16.h"

namespace godwit {
namespace {

class Weights {
 public:
  explicit Weights(const TinyModelOptions& options)
      : random_(options.seed), scale_(options.scale) {}

  // Normal with deviation scale / sqrt(columns), so that a product keeps the size of its input.
  void Matrix(const std::string& name, int64_t rows, int64_t columns) {
    std::normal_distribution<double> normal(0, scale_ / std::sqrt(static_cast<double>(columns)));
    Add(name, {rows, columns}, [&] { return normal(random_); });
  }
  void NormWeight(const std::string& name, int64_t size) {
    std::uniform_real_distribution<double> uniform(0.5, 1.5);
    Add(name, {size}, [&] { return uniform(random_); });
  }
  void Theta(const std::string& name, int64_t heads, int64_t head_dim) {
    std::uniform_real_distribution<double> uniform(0, 1);
    Add(name, {heads, 1, head_dim}, [&] { return uniform(random_); });
  }
  const std::vector<NamedTensor>& tensors() const { return tensors_; }

 private:
  template <typename Draw>
  void Add(const std::string& name, std::vector<int64_t> shape, const Draw& draw) {
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    std::vector<BF16>& values = values_.emplace_back();
    for (int64_t index = 0; index < count; ++index)
      values.push_back(ToBF16(static_cast<float>(draw())));
    tensors_.push_back({name, "BF16", std::move(shape), values.data()});
  }

  std::mt19937_64 random_;
  double scale_;
  std::deque<std::vector<BF16>> values_;  // stable addresses
  std::vector<NamedTensor> tensors_;
};

std::string TransnormerConfig(const TinyModelOptions& options) {
  std::string lrpe = "1";
  for (int layer = 1; layer < options.num_layers; ++layer) lrpe += ", 0";
  return absl::StrFormat(
      R"({"architectures": ["TransnormerForCausalLM"], "model_type": "transnormer",
"vocab_size": %d, "decoder_embed_dim": %d, "decoder_layers": %d, "decoder_attention_heads": %d, "hidden_dim": %d,
"glu_dim": %d, "linear_use_lrpe_list": [%s], "linear_act_fun": "swish", "norm_type": "simplermsnorm",
"no_scale_embedding": false, "add_bos_token": false, "bias": false, "pad_token_id": 0, "bos_token_id": 1,
"eos_token_id": 2, "tie_word_embeddings": false, "torch_dtype": "bfloat16"})",
      options.vocab_size, options.d_model, options.num_layers, options.num_heads, options.d_model,
      options.d_ff, lrpe);
}

void TransnormerWeights(const TinyModelOptions& options, Weights& weights) {
  const int64_t d = options.d_model, d_ff = options.d_ff;
  weights.Matrix("model.embed_tokens.weight", options.vocab_size, d);
  for (int layer = 0; layer < options.num_layers; ++layer) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    weights.Matrix(prefix + "token_mixer.qkvu_proj.weight", 4 * d, d);
    weights.Matrix(prefix + "token_mixer.out_proj.weight", d, d);
    if (layer == 0)
      weights.Theta(prefix + "token_mixer.lrpe.theta", options.num_heads, d / options.num_heads);
    weights.Matrix(prefix + "channel_mixer.l1.weight", d_ff, d);
    weights.Matrix(prefix + "channel_mixer.l2.weight", d_ff, d);
    weights.Matrix(prefix + "channel_mixer.l3.weight", d, d_ff);
  }
  weights.Matrix("lm_head.weight", options.vocab_size, d);
}

std::string LlamaConfig(const TinyModelOptions& options) {
  return absl::StrFormat(
      R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": %d,
"hidden_size": %d, "num_hidden_layers": %d, "num_attention_heads": %d, "num_key_value_heads": %d, "head_dim": %d,
"intermediate_size": %d, "max_position_embeddings": %d, "hidden_act": "silu", "rms_norm_eps": 1e-05,
"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "attention_bias": false, "mlp_bias": false,
"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": false, "torch_dtype": "bfloat16"})",
      options.vocab_size, options.d_model, options.num_layers, options.num_heads,
      options.num_kv_heads, options.d_model / options.num_heads, options.d_ff,
      options.context_length);
}

void LlamaWeights(const TinyModelOptions& options, Weights& weights) {
  const int64_t d = options.d_model, d_ff = options.d_ff;
  const int64_t d_kv = d / options.num_heads * options.num_kv_heads;
  weights.Matrix("model.embed_tokens.weight", options.vocab_size, d);
  for (int layer = 0; layer < options.num_layers; ++layer) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    weights.NormWeight(prefix + "input_layernorm.weight", d);
    weights.Matrix(prefix + "self_attn.q_proj.weight", d, d);
    weights.Matrix(prefix + "self_attn.k_proj.weight", d_kv, d);
    weights.Matrix(prefix + "self_attn.v_proj.weight", d_kv, d);
    weights.Matrix(prefix + "self_attn.o_proj.weight", d, d);
    weights.NormWeight(prefix + "post_attention_layernorm.weight", d);
    weights.Matrix(prefix + "mlp.gate_proj.weight", d_ff, d);
    weights.Matrix(prefix + "mlp.up_proj.weight", d_ff, d);
    weights.Matrix(prefix + "mlp.down_proj.weight", d, d_ff);
  }
  weights.NormWeight("model.norm.weight", d);
  weights.Matrix("lm_head.weight", options.vocab_size, d);
}

std::string MakeFolder() {
  std::string pattern = (std::filesystem::temp_directory_path() / "godwit-tiny-XXXXXX").string();
  const char* made = mkdtemp(pattern.data());
  EXPECT_NE(made, nullptr) << pattern;
  return pattern;
}

}  // namespace

TinyModel::TinyModel(const TinyModelOptions& options) : options_(options), folder_(MakeFolder()) {
  Weights weights(options);
  const bool lightning = options.family == TinyFamily::kTransnormer;
  lightning ? TransnormerWeights(options, weights) : LlamaWeights(options, weights);
  std::ofstream(folder_ + "/config.json")
      << (lightning ? TransnormerConfig(options) : LlamaConfig(options));
  const absl::Status written = WriteSafetensors(folder_ + "/model.safetensors", weights.tensors());
  EXPECT_TRUE(written.ok()) << written;
}

TinyModel::~TinyModel() {
  std::error_code ignored;
  std::filesystem::remove_all(folder_, ignored);
}

}  // namespace godwit
