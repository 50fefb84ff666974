#include "engine/model_shapes.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace godwit {
namespace {

struct Shape {
  absl::string_view name;
  bool is_transnormer = false;  // else llama
  int d_model = 0, num_layers = 0, num_heads = 0, d_ff = 0, vocab_size = 0;
};

// The tiny ones are for tests: every op in a few milliseconds on a CPU.
constexpr Shape kShapes[] = {
    {"tnl-tiny", true, 64, 3, 4, 96, 320},
    {"tnl-1b", true, 2048, 16, 16, 5632, 64000},
    {"tnl-7b", true, 4096, 30, 32, 11008, 64000},
    {"llama-tiny", false, 64, 3, 4, 96, 320},
    {"llama-2-7b", false, 4096, 32, 32, 11008, 32000},
    {"llama-2-13b", false, 5120, 40, 40, 13824, 32000},
};

// Positions by LRPE in the first layer only, one matrix for embedding and head.
std::string TransnormerConfig(const Shape& shape) {
  std::string lrpe = "1";
  for (int layer = 1; layer < shape.num_layers; ++layer) absl::StrAppend(&lrpe, ",0");
  return absl::StrCat("{\"model_type\":\"transnormer\",\"vocab_size\":", shape.vocab_size,
                      ",\"decoder_embed_dim\":", shape.d_model, ",\"hidden_dim\":", shape.d_model,
                      ",\"decoder_layers\":", shape.num_layers,
                      ",\"decoder_attention_heads\":", shape.num_heads, ",\"glu_dim\":", shape.d_ff,
                      ",\"linear_use_lrpe_list\":[", lrpe, "],\"tie_word_embeddings\":true}");
}

std::string LlamaConfig(const Shape& shape) {
  return absl::StrCat(
      "{\"model_type\":\"llama\",\"vocab_size\":", shape.vocab_size,
      ",\"hidden_size\":", shape.d_model, ",\"num_hidden_layers\":", shape.num_layers,
      ",\"num_attention_heads\":", shape.num_heads, ",\"intermediate_size\":", shape.d_ff,
      ",\"max_position_embeddings\":4096,\"rms_norm_eps\":1e-5,"
      "\"tie_word_embeddings\":false}");
}

}  // namespace

absl::StatusOr<std::string> ConfigOfShape(absl::string_view name) {
  for (const Shape& shape : kShapes) {
    if (shape.name == name) {
      return shape.is_transnormer ? TransnormerConfig(shape) : LlamaConfig(shape);
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat("shape '", name, "' is not one of ", absl::StrJoin(ShapeNames(), ", ")));
}

std::vector<std::string> ShapeNames() {
  std::vector<std::string> names;
  for (const Shape& shape : kShapes) names.emplace_back(shape.name);
  return names;
}

}  // namespace godwit
