#pragma once
// What the config.json of several families have in common: limits, token ids, rope dictionaries,
// metadata without effect.

#include <cstdint>
#include <initializer_list>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "engine/json_object.h"
#include "engine/model_config.h"

namespace godwit {

inline constexpr int64_t kMaxVocabSize = 1 << 24;
inline constexpr int64_t kMaxWidth = 1 << 20;  // d_model, d_ff, num_heads * head_dim
inline constexpr int64_t kMaxLayers = 1 << 12;
inline constexpr int64_t kMaxHeads = 1 << 12;
inline constexpr int64_t kMaxHeadDim = 1 << 10;
inline constexpr int64_t kMaxContextLength = int64_t{1} << 40;
inline constexpr int64_t kMaxEosTokenIds = 64;
// With these no count below overflows: the parameters of all layers, and the bytes of one layer's
// state.
static_assert(kMaxLayers * 16 * kMaxWidth < (int64_t{1} << 62) / kMaxWidth);
static_assert(kMaxHeads * 2 * kMaxHeadDim * kMaxHeadDim < (int64_t{1} << 62) / 8);

// Marks the fields that no forward pass reads: how it was trained, by which library, how to sample,
// what to return.
void IgnoreMetadata(JsonObject& json);

// Refuses an `architectures` list that names another class than these (compared without case).
void CheckArchitecture(JsonObject& json, std::initializer_list<absl::string_view> classes);

// eos_token_id (one, a list, null), bos_token_id, each in [0, vocab_size), and add_bos_token; where
// the last is absent the family's custom decides, as far as there is a bos.
void ReadTokenIds(JsonObject& json, bool adds_bos, ModelConfig& config);

// The rotary embedding into config.rope, and what it says about the context into context_length and
// context_note. Before: head_dim and context_length, which is max_position_embeddings, are set.
//
// `rope_scaling` with a top-level `rope_theta`, or `rope_parameters` (the newer spelling of both),
// flat or one dictionary per layer type, of which `full_attention` is read. `rope_override` (the
// --rope flag) replaces the method; theta, rotary width, pair layout and original length stay the
// checkpoint's unless it states them.
//
// The context: original_max_position_embeddings, where stated, tells which length is which: the
// limit is max_position_embeddings if that is larger, else original * factor. Where it is not, some
// checkpoints state the length before scaling (Giraffe 70B's first revision, 4096 with factor 8) and
// some that after (32768); nothing in the file tells which, so the stated length is the limit and the
// note names both.
absl::Status ReadRope(JsonObject& json, absl::string_view rope_override, ModelConfig& config);

}  // namespace godwit
