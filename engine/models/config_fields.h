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

// The rotary embedding: `rope_scaling` with a top-level `rope_theta`, or `rope_parameters` (the
// newer spelling of both). `rope_override` (the --rope flag) replaces type and factor; theta stays
// the checkpoint's unless it states one.
absl::StatusOr<RopeConfig> ReadRope(JsonObject& json, int64_t head_dim,
                                    absl::string_view rope_override);

}  // namespace godwit
