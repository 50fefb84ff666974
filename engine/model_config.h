#pragma once
// What a model is, as features (norm kind, gate activation, decay rule, q scale, rope table), never as a brand name; and the
// reading of config.json, where an unknown feature is refused by name.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/ops.h"

namespace godwit {

// Rotary position embedding as the checkpoint declares it. MakeRopeTable (rope_table.h) turns it into frequencies.
struct RopeConfig {
  std::string type = "default";  // "default", "linear"
  double theta = 10000;
  double factor = 1;             // linear: >= 1
  int64_t rotary_dim = 0;        // even, <= head_dim
  PairLayout pair_layout = PairLayout::kHalfSplit;
};

// Decay of head h in layer l: slope(h) * (1 - l / (L - 1) + 1e-5), ALiBi slopes (facts in docs/architecture.md).
enum class DecayRule { kNone, kAlibiLayer };

struct ModelConfig {
  std::string family;            // row of model_registry.cc: "transnormer", "llama"
  int64_t vocab_size = 0;
  int64_t d_model = 0;
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;      // = num_heads for lightning layers
  int64_t head_dim = 0;
  int64_t d_ff = 0;              // width of the gated product
  int64_t context_length = 0;    // 0: unbounded by the model (recurrent)
  bool tie_word_embeddings = false;  // use embedding when lm_head.weight is absent
  float embedding_scale = 1;

  float norm_epsilon = 1e-6f;
  bool norm_has_weight = false;
  Activation gate_activation = Activation::kNone;

  std::optional<RopeConfig> rope;            // softmax layers
  DecayRule decay_rule = DecayRule::kNone;   // lightning layers
  Activation qk_activation = Activation::kNone;
  float q_scale = 1;
  std::vector<bool> lrpe_layers;             // [num_layers]

  std::vector<int32_t> eos_token_ids;
  std::optional<int32_t> bos_token_id;
  bool add_bos = false;          // prepend bos to a text prompt
};

// text: config.json. rope_override: "" or JSON of the --rope flag ({"type":"linear","factor":16}), replaces the checkpoint's.
// INVALID_ARGUMENT naming field, expected and found; UNIMPLEMENTED for a known field with a value that is not built in.
absl::StatusOr<ModelConfig> ParseModelConfig(absl::string_view text, absl::string_view rope_override);

// config.json of a Hugging Face folder, and what its neighbours add where they exist: eos_token_id of generation_config.json
// replaces that of config.json; add_bos_token of tokenizer_config.json counts where config.json has no such field.
absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& folder, absl::string_view rope_override);

}  // namespace godwit
