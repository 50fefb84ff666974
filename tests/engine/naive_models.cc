#include "tests/engine/naive_models.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <map>
#include <random>

#include "absl/strings/str_cat.h"
#include "engine/safetensors.h"
#include "kernels/base/bf16.h"
#include "nlohmann/json.hpp"

namespace godwit {
namespace {

using Json = nlohmann::ordered_json;
using Rows = std::vector<std::vector<double>>;  // [row][column]
using Weights = std::map<std::string, Rows>;

// --- Writing. ---

uint16_t ToHalf(float x) {  // of values that are normal halves
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const int exponent = static_cast<int>((bits >> 23) & 0xff) - 127 + 15;
  if (exponent <= 0) return static_cast<uint16_t>(bits >> 16 & 0x8000u);
  return static_cast<uint16_t>((bits >> 16 & 0x8000u) | static_cast<uint32_t>(exponent) << 10 |
                               (bits >> 13 & 0x3ffu));
}

class Writer {
 public:
  explicit Writer(const RandomModel& model) : model_(model), random_(model.seed) {}

  void Add(const std::string& name, std::vector<int64_t> shape, double scale, double offset = 0) {
    int64_t count = 1;
    for (const int64_t dimension : shape) count *= dimension;
    std::normal_distribution<double> normal;
    std::string& bytes = bytes_.emplace_back();
    for (int64_t index = 0; index < count; ++index) {
      double drawn = offset + scale * normal(random_);
      if (std::abs(drawn) < 1e-4) drawn = 1e-4;  // normal also as f16
      const BF16 rounded = ToBF16(static_cast<float>(drawn));
      const float value = ToF32(rounded);
      const uint16_t half = ToHalf(value);
      if (model_.dtype == "F32") bytes.append(reinterpret_cast<const char*>(&value), 4);
      if (model_.dtype == "BF16") bytes.append(reinterpret_cast<const char*>(&rounded), 2);
      if (model_.dtype == "F16") bytes.append(reinterpret_cast<const char*>(&half), 2);
    }
    names_.push_back(name);
    shapes_.push_back(std::move(shape));
  }
  void AddMatrix(const std::string& name, int64_t rows, int64_t columns) {
    Add(name, {rows, columns}, 1 / std::sqrt(static_cast<double>(columns)));
  }
  void Finish(const std::string& folder) {
    std::vector<NamedTensor> tensors;
    for (size_t index = 0; index < names_.size(); ++index) {
      tensors.push_back({names_[index], model_.dtype, shapes_[index], bytes_[index].data()});
    }
    const absl::Status status = WriteSafetensors(folder + "/model.safetensors", tensors);
    EXPECT_TRUE(status.ok()) << status;
  }

 private:
  const RandomModel& model_;
  std::mt19937_64 random_;
  std::vector<std::string> names_;
  std::vector<std::vector<int64_t>> shapes_;
  std::vector<std::string> bytes_;
};

void WriteTransnormer(const RandomModel& model, const std::string& folder) {
  const int64_t hidden = model.num_heads * model.head_dim;
  Writer writer(model);
  // Scaled by sqrt(d), an embedding of 1 / sqrt(d) is of unit size.
  writer.Add("model.embed_tokens.weight", {model.vocab_size, model.d_model},
             model.scaled_embedding ? 1 / std::sqrt(static_cast<double>(model.d_model)) : 1);
  for (int64_t layer = 0; layer < model.num_layers; ++layer) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    writer.AddMatrix(prefix + "token_mixer.qkvu_proj.weight", 4 * hidden, model.d_model);
    writer.AddMatrix(prefix + "token_mixer.out_proj.weight", model.d_model, hidden);
    if (model.lrpe_layers[static_cast<size_t>(layer)] != 0) {
      writer.Add(prefix + "token_mixer.lrpe.theta", {model.num_heads, 1, model.head_dim}, 0.5);
    }
    writer.AddMatrix(prefix + "channel_mixer.l1.weight", model.d_ff, model.d_model);
    writer.AddMatrix(prefix + "channel_mixer.l2.weight", model.d_ff, model.d_model);
    writer.AddMatrix(prefix + "channel_mixer.l3.weight", model.d_model, model.d_ff);
  }
  if (!model.tied) writer.AddMatrix("lm_head.weight", model.vocab_size, model.d_model);
  writer.Finish(folder);
  std::ofstream(folder + "/config.json") << Json{{"model_type", "transnormer"},
                                                 {"vocab_size", model.vocab_size},
                                                 {"decoder_embed_dim", model.d_model},
                                                 {"decoder_layers", model.num_layers},
                                                 {"decoder_attention_heads", model.num_heads},
                                                 {"hidden_dim", hidden},
                                                 {"glu_dim", model.d_ff},
                                                 {"linear_use_lrpe_list", model.lrpe_layers},
                                                 {"linear_act_fun", "swish"},
                                                 {"norm_type", "simplermsnorm"},
                                                 {"no_scale_embedding", !model.scaled_embedding},
                                                 {"tie_word_embeddings", model.tied}};
}

void WriteLlama(const RandomModel& model, const std::string& folder) {
  const int64_t q = model.num_heads * model.head_dim, kv = model.num_kv_heads * model.head_dim;
  Writer writer(model);
  writer.Add("model.embed_tokens.weight", {model.vocab_size, model.d_model}, model.tied ? 0.3 : 1);
  for (int64_t layer = 0; layer < model.num_layers; ++layer) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    writer.Add(prefix + "input_layernorm.weight", {model.d_model}, 0.2, 1);
    writer.AddMatrix(prefix + "self_attn.q_proj.weight", q, model.d_model);
    writer.AddMatrix(prefix + "self_attn.k_proj.weight", kv, model.d_model);
    writer.AddMatrix(prefix + "self_attn.v_proj.weight", kv, model.d_model);
    writer.AddMatrix(prefix + "self_attn.o_proj.weight", model.d_model, q);
    writer.Add(prefix + "post_attention_layernorm.weight", {model.d_model}, 0.2, 1);
    writer.AddMatrix(prefix + "mlp.gate_proj.weight", model.d_ff, model.d_model);
    writer.AddMatrix(prefix + "mlp.up_proj.weight", model.d_ff, model.d_model);
    writer.AddMatrix(prefix + "mlp.down_proj.weight", model.d_model, model.d_ff);
  }
  writer.Add("model.norm.weight", {model.d_model}, 0.2, 1);
  if (!model.tied) writer.AddMatrix("lm_head.weight", model.vocab_size, model.d_model);
  writer.Finish(folder);
  Json rope = {{"rope_type", "default"}, {"rope_theta", model.rope_theta}};
  if (model.rope_factor > 1)
    rope = {
        {"rope_type", "linear"}, {"factor", model.rope_factor}, {"rope_theta", model.rope_theta}};
  rope["partial_rotary_factor"] = model.rotary_share;
  rope["interleaved"] = model.interleaved;
  std::ofstream(folder + "/config.json") << Json{{"model_type", "llama"},
                                                 {"vocab_size", model.vocab_size},
                                                 {"hidden_size", model.d_model},
                                                 {"num_hidden_layers", model.num_layers},
                                                 {"num_attention_heads", model.num_heads},
                                                 {"num_key_value_heads", model.num_kv_heads},
                                                 {"head_dim", model.head_dim},
                                                 {"intermediate_size", model.d_ff},
                                                 {"max_position_embeddings", 4096},
                                                 {"rms_norm_eps", 1e-5},
                                                 {"rope_parameters", rope},
                                                 {"tie_word_embeddings", model.tied}};
}

// --- Computing. ---

Weights ReadWeights(const std::string& folder) {
  Weights weights;
  const auto reader = SafetensorsReader::OpenFolder(folder);
  EXPECT_TRUE(reader.ok()) << reader.status();
  if (!reader.ok()) return weights;
  for (const auto& [name, tensor] : (*reader)->tensors()) {
    const int64_t columns = tensor.shape.back();
    int64_t rows = 1;
    for (size_t axis = 0; axis + 1 < tensor.shape.size(); ++axis) rows *= tensor.shape[axis];
    std::vector<float> values(static_cast<size_t>(rows * columns));
    ToF32(tensor, 0, rows * columns, values.data());
    for (int64_t row = 0; row < rows; ++row) {
      const auto begin = values.begin() + row * columns;
      weights[name].emplace_back(begin, begin + columns);
    }
  }
  return weights;
}

double Dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t index = 0; index < a.size(); ++index) sum += a[index] * b[index];
  return sum;
}

Rows Product(const Rows& x, const Rows& w) {  // x w^T
  Rows y;
  for (const auto& row : x) {
    auto& out = y.emplace_back();
    for (const auto& w_row : w) out.push_back(Dot(row, w_row));
  }
  return y;
}

Rows RmsNorm(const Rows& x, double epsilon, const std::vector<double>* weight = nullptr) {
  Rows y = x;
  for (auto& row : y) {
    const double factor = 1 / std::sqrt(Dot(row, row) / static_cast<double>(row.size()) + epsilon);
    for (size_t column = 0; column < row.size(); ++column)
      row[column] *= factor * (weight ? (*weight)[column] : 1);
  }
  return y;
}

double Silu(double x) { return x / (1 + std::exp(-x)); }

Rows Times(const Rows& a, const Rows& b) {
  Rows y = a;
  for (size_t row = 0; row < y.size(); ++row) {
    for (size_t column = 0; column < y[row].size(); ++column) y[row][column] *= b[row][column];
  }
  return y;
}

void AddTo(Rows& x, const Rows& y) {
  for (size_t row = 0; row < x.size(); ++row) {
    for (size_t column = 0; column < x[row].size(); ++column) x[row][column] += y[row][column];
  }
}

Rows Embed(const Rows& table, const std::vector<int32_t>& tokens, double scale) {
  Rows x;
  for (const int32_t token : tokens) {
    x.push_back(table[static_cast<size_t>(token)]);
    for (double& value : x.back()) value *= scale;
  }
  return x;
}

Rows Columns(const Rows& x, int64_t begin, int64_t count) {
  Rows y;
  for (const auto& row : x) y.emplace_back(row.begin() + begin, row.begin() + begin + count);
  return y;
}

double AlibiSlope(int64_t head, int64_t num_heads) {  // facts of the publication, written anew
  int64_t power = 1;
  while (power * 2 <= num_heads) power *= 2;
  if (head < power)
    return std::pow(2.0, -8.0 * static_cast<double>(head + 1) / static_cast<double>(power));
  return std::pow(
      2.0, -8.0 * static_cast<double>(2 * (head - power) + 1) / static_cast<double>(2 * power));
}

// [q cos(theta pos), q sin(theta pos)]
std::vector<double> Lrpe(const std::vector<double>& q, const std::vector<double>& theta,
                         size_t position) {
  std::vector<double> y;
  for (size_t column = 0; column < q.size(); ++column)
    y.push_back(q[column] * std::cos(theta[column] * static_cast<double>(position)));
  for (size_t column = 0; column < q.size(); ++column)
    y.push_back(q[column] * std::sin(theta[column] * static_cast<double>(position)));
  return y;
}

// o_t = sum_j lambda^(t - j) (q_t . k_j) v_j for one head.
Rows LightningHead(const Rows& q, const Rows& k, const Rows& v, double rate) {
  Rows o(q.size(), std::vector<double>(v[0].size(), 0.0));
  for (size_t t = 0; t < q.size(); ++t) {
    for (size_t j = 0; j <= t; ++j) {
      const double score = std::exp(-rate * static_cast<double>(t - j)) * Dot(q[t], k[j]);
      for (size_t column = 0; column < v[j].size(); ++column) o[t][column] += score * v[j][column];
    }
  }
  return o;
}

Rows TransnormerLogits(const RandomModel& model, Weights& weights,
                       const std::vector<int32_t>& tokens) {
  const int64_t hidden = model.num_heads * model.head_dim;
  Rows x = Embed(weights["model.embed_tokens.weight"], tokens,
                 model.scaled_embedding ? std::sqrt(static_cast<double>(model.d_model)) : 1);
  for (int64_t layer = 0; layer < model.num_layers; ++layer) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    const Rows qkvu = Product(RmsNorm(x, 1e-6), weights[prefix + "token_mixer.qkvu_proj.weight"]);
    Rows o(tokens.size());
    for (int64_t head = 0; head < model.num_heads; ++head) {
      Rows q = Columns(qkvu, head * model.head_dim, model.head_dim);
      Rows k = Columns(qkvu, hidden + head * model.head_dim, model.head_dim);
      for (size_t t = 0; t < tokens.size(); ++t) {
        for (double& value : q[t]) value = Silu(value);
        for (double& value : k[t]) value = Silu(value);
        if (model.lrpe_layers[static_cast<size_t>(layer)] == 0) continue;
        const auto& theta = weights[prefix + "token_mixer.lrpe.theta"][static_cast<size_t>(head)];
        q[t] = Lrpe(q[t], theta, t);
        k[t] = Lrpe(k[t], theta, t);
      }
      const double rate =
          AlibiSlope(head, model.num_heads) *
          (1 - static_cast<double>(layer) / static_cast<double>(model.num_layers - 1) + 1e-5);
      const Rows v = Columns(qkvu, 2 * hidden + head * model.head_dim, model.head_dim);
      const Rows o_head = LightningHead(q, k, v, rate);
      for (size_t t = 0; t < tokens.size(); ++t)
        o[t].insert(o[t].end(), o_head[t].begin(), o_head[t].end());
    }
    const Rows gated = Times(Columns(qkvu, 3 * hidden, hidden), RmsNorm(o, 1e-6));
    AddTo(x, Product(gated, weights[prefix + "token_mixer.out_proj.weight"]));
    const Rows normed = RmsNorm(x, 1e-6);
    const Rows product = Times(Product(normed, weights[prefix + "channel_mixer.l1.weight"]),
                               Product(normed, weights[prefix + "channel_mixer.l2.weight"]));
    AddTo(x, Product(product, weights[prefix + "channel_mixer.l3.weight"]));
  }
  return Product(RmsNorm(x, 1e-6),
                 weights[model.tied ? "model.embed_tokens.weight" : "lm_head.weight"]);
}

std::vector<double> Rotate(const RandomModel& model, const std::vector<double>& x,
                           size_t position) {
  const auto width = static_cast<size_t>(static_cast<double>(x.size()) * model.rotary_share);
  std::vector<double> y = x;
  for (size_t pair = 0; pair < width / 2; ++pair) {
    const double frequency =
        std::pow(model.rope_theta, -2.0 * static_cast<double>(pair) / static_cast<double>(width)) /
        model.rope_factor;
    const double angle = frequency * static_cast<double>(position);
    const size_t first = model.interleaved ? 2 * pair : pair;
    const size_t second = model.interleaved ? 2 * pair + 1 : pair + width / 2;
    y[first] = x[first] * std::cos(angle) - x[second] * std::sin(angle);
    y[second] = x[second] * std::cos(angle) + x[first] * std::sin(angle);
  }
  return y;
}

// Of rotated q and k.
std::vector<double> SoftmaxRow(const std::vector<double>& q, std::span<const std::vector<double>> k,
                               std::span<const std::vector<double>> v) {
  std::vector<double> o(v[0].size(), 0.0), scores;
  double max = -INFINITY, sum = 0;
  for (const auto& key : k) {
    scores.push_back(Dot(q, key) / std::sqrt(static_cast<double>(q.size())));
    max = std::max(max, scores.back());
  }
  for (double& score : scores) sum += score = std::exp(score - max);
  for (size_t j = 0; j < k.size(); ++j) {
    for (size_t column = 0; column < o.size(); ++column)
      o[column] += scores[j] / sum * v[j][column];
  }
  return o;
}

Rows SoftmaxHead(const RandomModel& model, Rows q, Rows k, const Rows& v) {
  Rows o;
  for (size_t t = 0; t < q.size(); ++t) {
    q[t] = Rotate(model, q[t], t);
    k[t] = Rotate(model, k[t], t);
    o.push_back(SoftmaxRow(q[t], std::span(k).first(t + 1), std::span(v).first(t + 1)));
  }
  return o;
}

// Token t attends to what is kept, at the places where it is kept.
Rows BoundedHead(const RandomModel& model, const NaiveBound& bound, const Rows& q, const Rows& k,
                 const Rows& v) {
  Rows o;
  for (size_t t = 0; t < q.size(); ++t) {
    size_t dropped = 0;
    while (t - dropped >= bound.most) dropped += bound.block;
    Rows keys, values;
    for (size_t j = 0; j <= t; ++j) {
      if (j >= bound.block && j < bound.block + dropped) continue;
      keys.push_back(Rotate(model, k[j], keys.size()));
      values.push_back(v[j]);
    }
    o.push_back(SoftmaxRow(Rotate(model, q[t], t - dropped), keys, values));
  }
  return o;
}

Rows LlamaLogits(const RandomModel& model, Weights& weights, const std::vector<int32_t>& tokens,
                 const NaiveBound& bound) {
  constexpr double kEpsilon = 1e-5;
  Rows x = Embed(weights["model.embed_tokens.weight"], tokens, 1);
  for (int64_t layer = 0; layer < model.num_layers; ++layer) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    const Rows normed = RmsNorm(x, kEpsilon, &weights[prefix + "input_layernorm.weight"][0]);
    const Rows q_all = Product(normed, weights[prefix + "self_attn.q_proj.weight"]);
    const Rows k_all = Product(normed, weights[prefix + "self_attn.k_proj.weight"]);
    const Rows v_all = Product(normed, weights[prefix + "self_attn.v_proj.weight"]);
    Rows o(tokens.size());
    for (int64_t head = 0; head < model.num_heads; ++head) {
      const int64_t kv_head = head / (model.num_heads / model.num_kv_heads);
      Rows q = Columns(q_all, head * model.head_dim, model.head_dim);
      Rows k = Columns(k_all, kv_head * model.head_dim, model.head_dim);
      const Rows v = Columns(v_all, kv_head * model.head_dim, model.head_dim);
      const Rows o_head = bound.most > 0 ? BoundedHead(model, bound, q, k, v)
                                         : SoftmaxHead(model, std::move(q), std::move(k), v);
      for (size_t t = 0; t < tokens.size(); ++t)
        o[t].insert(o[t].end(), o_head[t].begin(), o_head[t].end());
    }
    AddTo(x, Product(o, weights[prefix + "self_attn.o_proj.weight"]));
    const Rows normed_mlp =
        RmsNorm(x, kEpsilon, &weights[prefix + "post_attention_layernorm.weight"][0]);
    Rows gate = Product(normed_mlp, weights[prefix + "mlp.gate_proj.weight"]);
    for (auto& row : gate) {
      for (double& value : row) value = Silu(value);
    }
    const Rows product = Times(gate, Product(normed_mlp, weights[prefix + "mlp.up_proj.weight"]));
    AddTo(x, Product(product, weights[prefix + "mlp.down_proj.weight"]));
  }
  return Product(RmsNorm(x, kEpsilon, &weights["model.norm.weight"][0]),
                 weights[model.tied ? "model.embed_tokens.weight" : "lm_head.weight"]);
}

}  // namespace

void WriteRandomModel(const RandomModel& model, const std::string& folder) {
  model.family == "llama" ? WriteLlama(model, folder) : WriteTransnormer(model, folder);
}

std::vector<double> NaiveLogits(const RandomModel& model, const std::string& folder,
                                const std::vector<int32_t>& tokens, const NaiveBound& bound) {
  Weights weights = ReadWeights(folder);
  const Rows rows = model.family == "llama" ? LlamaLogits(model, weights, tokens, bound)
                                            : TransnormerLogits(model, weights, tokens);
  std::vector<double> logits;
  for (const auto& row : rows) logits.insert(logits.end(), row.begin(), row.end());
  return logits;
}

}  // namespace godwit
