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

// Rotary position embedding as the checkpoint or an operator declares it. MakeRopeTable (rope_table.h) turns it into
// frequencies and says what each type computes; a field that the type does not read has no effect.
struct RopeConfig {
  std::string type = "default";  // a row of rope_table.cc
  double theta = 10000;
  double factor = 1;             // s >= 1
  int64_t rotary_dim = 0;        // D: even, <= head_dim
  PairLayout pair_layout = PairLayout::kHalfSplit;
  int64_t original_length = 0;   // L, the length before scaling in tokens; 0: not stated

  std::optional<double> attention_factor;           // yarn, longrope: wins over their formula
  double beta_fast = 32, beta_slow = 1;             // yarn: turns within L
  bool truncate = true;                             // yarn: correction range rounded outwards
  double mscale = 0, mscale_all_dim = 0;            // yarn; 0: absent
  double low_freq_factor = 1, high_freq_factor = 4;  // llama3, ntk-by-parts: turns within L
  std::optional<double> alpha;                      // dynamic: fixed, instead of one by length
  std::optional<double> mixed_b;                    // ntk
  std::vector<double> short_factor, long_factor;    // longrope: [D / 2]
  std::optional<double> short_mscale, long_mscale;  // longrope: attention factors
  double rotated_share = 1;                         // proportional
  double power = 0;                                 // giraffe: k
  int32_t power_first_index = 0;                    // giraffe: 0 as the repository counts, 1 as the paper
  double truncate_low = 0, truncate_high = 0, truncate_value = 0;  // giraffe: a, b, rho; b = 0: none
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
  std::string context_note;      // why that length, where config.json leaves a doubt; for logs
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

// text: config.json. rope_override: "" or JSON of the --rope flag ({"type":"linear","factor":16}), replaces the checkpoint's
// method; what it does not state of theta, rotary width and pair layout stays.
// INVALID_ARGUMENT naming field, expected and found; UNIMPLEMENTED for a known field with a value that is not built in.
absl::StatusOr<ModelConfig> ParseModelConfig(absl::string_view text, absl::string_view rope_override);

// config.json of a Hugging Face folder, and what its neighbours add where they exist: eos_token_id of generation_config.json
// replaces that of config.json; add_bos_token of tokenizer_config.json counts where config.json has no such field.
absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& folder, absl::string_view rope_override);

// The rope of a model with another method, as JSON of the same form as --rope: what one request may choose. `where` names
// the text in errors. INVALID_ARGUMENT also for a model without RoPE and for another rotary width or pair layout.
absl::StatusOr<RopeConfig> OverrideRope(const ModelConfig& config, absl::string_view text, const std::string& where);

}  // namespace godwit
