#pragma once
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a
// counter-based generator, so that a draw depends on its key and counter alone. And the Gumbel
// variate that sampling makes of a word. Host and CUDA code.

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define GODWIT_HOST_DEVICE __host__ __device__
#else
#define GODWIT_HOST_DEVICE
#endif

namespace godwit {

inline constexpr int kPhiloxRounds = 10;
inline constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
inline constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
inline constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;  // the key grows by these each round
inline constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;

struct PhiloxWords {
  uint32_t word[4];
};

GODWIT_HOST_DEVICE inline PhiloxWords Philox4x32(PhiloxWords counter, uint64_t key) {
  uint32_t key0 = static_cast<uint32_t>(key);
  uint32_t key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * counter.word[0];
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0,
                static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1,
                static_cast<uint32_t>(product0)}};
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return counter;
}

// -log(-log(u)), u = (x + 0.5) / 2^32. The inner logarithm is taken of 1 - u where u > 1/2: in f32,
// u itself would round to 1 there and the variate to infinity. In [-3.2, 22.9].
GODWIT_HOST_DEVICE inline float GumbelOfWord(uint32_t x) {
  constexpr float kScale = 2.3283064365386963e-10f;  // 2^-32
  const bool upper = x >= 0x80000000u;
  const float distance = (static_cast<float>(upper ? ~x : x) + 0.5f) * kScale;  // u, or 1 - u
  const float exponential = upper ? -log1pf(-distance) : -logf(distance);
  return -logf(exponential);
}

// The words of SampleRow: token_id % 4 picks one.
GODWIT_HOST_DEVICE inline PhiloxWords SampleWords(uint64_t seed, uint32_t token_id_div_4,
                                                  int32_t output_index, int64_t position) {
  return Philox4x32(
      {{token_id_div_4, static_cast<uint32_t>(output_index), static_cast<uint32_t>(position),
        static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32)}},
      seed);
}

}  // namespace godwit
