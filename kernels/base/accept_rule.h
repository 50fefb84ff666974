#pragma once
// How a drafted token is accepted (AcceptRule::kStandard), as plain functions, and which random
// numbers each decision takes. Host and CUDA code. An implementation takes the rule as a template
// parameter, so that tests can replace any part of it and see that it is missed.

#include <cstdint>

#include "kernels/base/philox.h"

namespace godwit {

// A position stays below 2^31, so the high half of the counter's position names a stream. Plain
// draws are stream 0; a round of speculation that begins at `position` has three streams for each
// of its drafts. No number is used twice: a round makes at least one token, so the next one begins
// at another position, and a draft that was dropped leaves no trace in what is drawn afterwards.
GODWIT_HOST_DEVICE inline constexpr int64_t NoisePosition(int64_t position, int stream) {
  return position | static_cast<int64_t>(stream) << 32;
}

struct StandardRule {
  // Draft `index` of a round is drawn with this noise, accepted by one uniform number of the next
  // stream, and replaced with the noise of the third, which also draws the bonus token.
  GODWIT_HOST_DEVICE static constexpr int DraftStream(int index) { return 3 * index + 1; }
  GODWIT_HOST_DEVICE static constexpr int AcceptStream(int index) { return 3 * index + 2; }
  GODWIT_HOST_DEVICE static constexpr int ReplaceStream(int index) { return 3 * index + 3; }

  // Multiplied, not divided: q may be 0 by rounding.
  GODWIT_HOST_DEVICE static bool Accepts(int /*index*/, int /*num_drafts*/, double u, float p,
                                         float q) {
    return u * static_cast<double>(q) <= static_cast<double>(p);
  }

  // Weight of a token in the distribution that replaces a rejected draft.
  GODWIT_HOST_DEVICE static float Replacement(float p, float q) { return p > q ? p - q : 0; }
};

// In (0, 1).
GODWIT_HOST_DEVICE inline double UniformOf(uint64_t seed, int32_t output_index, int64_t position) {
  const PhiloxWords words = SampleWords(seed, 0, output_index, position);
  return (static_cast<double>(words.word[0]) + 0.5) * 2.3283064365386963e-10;  // 2^-32
}

}  // namespace godwit
