#pragma once
// What one request may ask for. Everything above is INVALID_ARGUMENT, never clamped.

#include <cstdint>

#include "engine/batch.h"

namespace godwit {

struct RequestLimits {
  int64_t default_max_tokens =
      256;  // of a request that does not say; less when less of the context is left
  int64_t max_tokens = 1 << 20;          // cap of stopping.max_tokens
  int32_t max_n = 16;                    // cap of sampling.n; never more than sequences fit at once
  double max_rope_factor = 0;            // of a rope that a request chooses; 0: it may choose none
  int64_t max_prompt_bytes = 8 << 20;    // of a text to split into tokens
  int64_t max_message_bytes = 16 << 20;  // of one request on the wire
  bool speculate = true;  // with a draft model, where the request leaves it to the server
  // Of a request that does not say.
  int max_draft_tokens = 8;
  DraftPolicy draft_policy = DraftPolicy::kThroughput;
  float draft_threshold = 0.5f;
  bool share_prefixes = false;  // between requests with different bearer tokens
};

inline constexpr int kMaxCacheSaltBytes = 256;
inline constexpr int kMaxCacheBoundaries = 16;
inline constexpr int kMaxStopStrings = 16;
inline constexpr int kMaxStopBytes = 256;  // of one stop string
inline constexpr int kMaxRequestIdBytes = 128;
inline constexpr int64_t kMaxRopeBytes = 64 << 10;
inline constexpr int64_t kMaxTimeLimitMs = (int64_t{1} << 31) - 1;

}  // namespace godwit
