// Lightning attention of decode, draft and verify rows: 1..16 tokens a row against a windowed
// state, one launch.
//
// A block owns one (row, head, kColumns columns of S); columns are independent, so that the bits of
// an output depend neither on the batch nor on how many columns a block takes. Its S slice is read
// once, into registers, 16 bytes a load: a warp holds 32 x 32 of it (lane = 4 g + t: rows 8 u + 2 t
// + e, u < 4, e < 2; columns 4 g + x, x < 4), which is at once the accumulator layout of
// mma.m16n8k16 for dS^T and good for fused multiply-adds with q. Where the stored base lags, or a
// step crosses a multiple of W, whole blocks of W rows are folded in these registers; the same
// registers are stored where base_after says so.
//
// Sums, in a fixed order for every number of tokens: a warp forms, over its 32 rows of S (its 32
// columns of q and k),
//   lambda^(i+1) sum_d q_d S_d  +  sum_{j <= i} (lambda^(i-j) sum_d q_d k_jd) v_j
// for its 32 columns, and the partial sums of the d_k / 32 warps are added in ascending order. The
// first term is f32 fused multiply-adds. The second, and the sums over 16 rows of a fold, are
// matrix products of bf16 terms accumulated in f32: k and v are bf16 anyway, and q, the scores and
// lambda^(15-j) k_j are split into three terms that hold all 24 bits.
//
// Bytes per row and head at d 128: 64 KiB of S, 7.5 x 512 of the window, 4 KiB a step of folds (64
// KiB once in 16 tokens). Flops are 32 k a token; at 16 tokens and a fold about half the issue
// slots that the reading of S leaves.

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/pdl.cuh"

namespace godwit::cuda {
namespace {

constexpr int kTile = 32;     // rows, and columns, of S that a warp holds
constexpr int kPerChunk = 8;  // bf16 of a 16-byte access

// kKeyDim: d_k. kGroups: warps side by side over the columns of S.
template <int kKeyDim_, bool kLrpe_, int kGroups_>
struct Shape {
  static constexpr int kKeyDim = kKeyDim_;
  static constexpr bool kLrpe = kLrpe_;
  static constexpr int kGroups = kGroups_;
  static constexpr int kHeadDim = kLrpe ? kKeyDim / 2 : kKeyDim;
  static constexpr int kKeyWarps = kKeyDim / kTile;
  static constexpr int kThreads = kWarp * kKeyWarps * kGroups;
  static constexpr int kColumns = kTile * kGroups;
  static constexpr int kSlices = kHeadDim / kColumns;
  static_assert(kKeyDim % kTile == 0 && kHeadDim % kColumns == 0);
  // Of S: 128 KiB a multiprocessor, 64 registers a thread.
  static constexpr int kBlocksPerMultiprocessor = 1024 / kThreads;
};

// The rows of one block of W positions, or of two; padded so that 8 rows lie in different banks.
template <typename S, int kRows>
struct KeyValueTile {
  alignas(16) Bf16 k[kRows][S::kKeyDim + 8];
  alignas(16) Bf16 v[kRows][S::kColumns + 8];
};

template <typename S>
struct Shared {
  KeyValueTile<S, 2 * kWindow> rows;  // from the anchor of the first token on
  // Formed queries; 32 columns are kept in the order in which a lane takes its 8 (QuerySlot).
  alignas(16) float q[kWindow][S::kKeyDim + 4];
  union {
    KeyValueTile<S, kWindow> lag;  // a whole block before the anchor, to be folded
    alignas(16) float partial[S::kKeyWarps][kWindow][S::kColumns];
  };
  float decay[kWindow + 1];
};

__device__ inline uint32_t Bits(__nv_bfloat162 x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
__device__ inline float LowHalf(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float HighHalf(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// (x, y) as the sum of three bf16 pairs, small ones first; exact but for what lies below 2^-24 of a
// value.
struct Split {
  uint32_t terms[3];
};
__device__ inline Split SplitPair(float x, float y) {
  Split split;
#pragma unroll
  for (int term = 2; term >= 0; --term) {
    const uint32_t pair = Bits(__floats2bfloat162_rn(x, y));
    split.terms[term] = pair;
    x -= LowHalf(pair);
    y -= HighHalf(pair);
  }
  return split;
}

// d += a b, a [16, 16] and b [16, 8] bf16.
__device__ inline void MultiplyAdd(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                   uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ inline uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
// Four 8 x 8 matrices of bf16; lane i gives the address of row i % 8 of matrix i / 8.
template <bool kTransposed>
__device__ inline void LoadMatrices(uint32_t (&to)[4], const Bf16* row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(SharedAddress(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(SharedAddress(row))
                 : "memory");
  }
}
__device__ inline void CopyAsync(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(SharedAddress(shared)), "l"(global)
               : "memory");
}
__device__ inline void WaitForCopies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ inline void PrefetchL2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// Where column `d` of q lies in its row: lane t of a warp takes 8 floats in a row, columns 8 u + 2
// t + e at 2 u + e.
__device__ inline int QuerySlot(int d) {
  return (d & ~31) | (d >> 1 & 3) << 3 | (d >> 3 & 3) << 1 | (d & 1);
}

template <typename S>
class Step {
 public:
  __device__ Step(const LightningAttentionArgs& args, const StepRow& row, Shared<S>& shared)
      : args_(args),
        shared_(shared),
        row_(row),
        head_(blockIdx.x / S::kSlices),
        first_column_(blockIdx.x % S::kSlices * S::kColumns),
        lane_(threadIdx.x % kWarp),
        key_warp_(threadIdx.x / kWarp % S::kKeyWarps),
        group_(threadIdx.x / kWarp / S::kKeyWarps) {}

  __device__ void Prefetch() const;
  __device__ void Run();

 private:
  __device__ float* State(int local_row) const {
    const int64_t key = key_warp_ * kTile + local_row;
    return Row<float>(args_.state, row_.slot) + (head_ * S::kKeyDim + key) * S::kHeadDim +
           first_column_ + group_ * kTile + lane_ / 4 * 4;
  }
  // Row 8 u + 2 t + e of the warp's 32, r = 2 u + e.
  __device__ int StateRow(int r) const { return r / 2 * 8 + lane_ % 4 * 2 + r % 2; }
  __device__ Bf16* RingRow(int64_t ring_row) const {
    return Row<Bf16>(args_.window, row_.slot) + ring_row * args_.window.shape[2];
  }
  __device__ int64_t ValueOffset() const {
    return int64_t{args_.num_heads} * S::kKeyDim + head_ * S::kHeadDim + first_column_;
  }

  template <int kRows>
  __device__ void LoadOpenRows(KeyValueTile<S, kRows>& tile, int64_t position, int num_open,
                               int num_present, int num_rows) const;
  __device__ void FormTokens(int first_row) const;
  __device__ void FormQueryOrKey(int token, int chunk, bool is_key, Bf16* tile_row,
                                 Bf16* ring_row) const;
  __device__ void LoadState();
  __device__ void StoreState() const;
  __device__ void LoadValues(uint32_t (&v)[4][2], const Bf16 (*tile)[S::kColumns + 8]) const;
  __device__ void Fold(const Bf16 (*k)[S::kKeyDim + 8], const Bf16 (*v)[S::kColumns + 8]);
  __device__ void WithinWindow(int first_token, int num_tokens, int offset,
                               int first_tile_row) const;
  __device__ void AgainstState(int first_token, int num_tokens, int offset) const;
  __device__ void WriteOutputs() const;

  const LightningAttentionArgs& args_;
  Shared<S>& shared_;
  const StepRow row_;
  const int64_t head_;
  const int first_column_;  // of the block's slice of S
  const int lane_;
  const int key_warp_;
  const int group_;
  float state_[8][4];
};

// Lines that Run will read first, into L2: hints alone, since what they name may still be written
// by the kernels before.
template <typename S>
__device__ void Step<S>::Prefetch() const {
  static_assert(S::kThreads == S::kKeyDim * S::kGroups);  // a line of S each
  const int thread = threadIdx.x;
  PrefetchL2(Row<float>(args_.state, row_.slot) +
             (head_ * S::kKeyDim + thread / S::kGroups) * S::kHeadDim + first_column_ +
             thread % S::kGroups * kTile);
  if (thread >= kWindow) return;
  const int64_t position = row_.base + thread;
  if (position >= row_.position) return;
  const Bf16* const open = RingRow(position % args_.window.shape[1]);
  PrefetchL2(open + ValueOffset());
  for (int d = 0; d < S::kKeyDim; d += 64) PrefetchL2(open + head_ * S::kKeyDim + d);
}

// Rows [0, num_open) of a tile from the ring, from `position` on; zeros in [num_present, num_rows).
template <typename S>
template <int kRows>
__device__ void Step<S>::LoadOpenRows(KeyValueTile<S, kRows>& tile, int64_t position, int num_open,
                                      int num_present, int num_rows) const {
  constexpr int kKeyChunks = S::kKeyDim / kPerChunk, kChunks = kKeyChunks + S::kColumns / kPerChunk;
  const int64_t ring_rows = args_.window.shape[1];
  const int64_t first = position % ring_rows;
  for (int i = threadIdx.x; i < num_rows * kChunks; i += S::kThreads) {
    const int r = i / kChunks, chunk = i % kChunks;
    if (r >= num_open && r < num_present) continue;  // the step's own
    const bool is_key = chunk < kKeyChunks;
    const int d = (is_key ? chunk : chunk - kKeyChunks) * kPerChunk;
    Bf16* const to = is_key ? &tile.k[r][d] : &tile.v[r][d];
    if (r < num_open) {
      const int64_t ring_row = first + r < ring_rows ? first + r : first + r - ring_rows;
      CopyAsync(to, RingRow(ring_row) + (is_key ? head_ * S::kKeyDim : ValueOffset()) + d);
    } else {
      *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
    }
  }
}

// Eight columns of q or k of a token: activation, LRPE, scale (q) or rounding (k).
template <typename S>
__device__ void Step<S>::FormQueryOrKey(int token, int chunk, bool is_key, Bf16* tile_row,
                                        Bf16* ring_row) const {
  const int d = chunk * kPerChunk;
  const TensorView& from = is_key ? args_.k : args_.q;
  const uint4 packed = *reinterpret_cast<const uint4*>(
      Row<const Bf16>(from, row_.first_token + token) + head_ * S::kHeadDim + d);
  const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
  float values[kPerChunk], sines[kPerChunk];
#pragma unroll
  for (int i = 0; i < kPerChunk; ++i) {
    float value = i % 2 == 0 ? LowHalf(pairs[i / 2]) : HighHalf(pairs[i / 2]);
    if (args_.qk_activation == Activation::kSilu) value = Silu(value);
    if (!is_key) value *= args_.q_scale;
    if constexpr (S::kLrpe) {
      float sine, cosine;
      SineAndCosine(Row<const float>(args_.theta, head_)[d + i],
                    static_cast<double>(row_.position + token), &sine, &cosine);
      sines[i] = value * sine;
      value *= cosine;
    }
    values[i] = value;
  }
#pragma unroll
  for (int part = 0; part < (S::kLrpe ? 2 : 1); ++part) {
    const float* const x = part == 0 ? values : sines;
    const int column = part * S::kHeadDim + d;
    if (is_key) {
      uint4 rounded;
      rounded.x = Bits(__floats2bfloat162_rn(x[0], x[1]));
      rounded.y = Bits(__floats2bfloat162_rn(x[2], x[3]));
      rounded.z = Bits(__floats2bfloat162_rn(x[4], x[5]));
      rounded.w = Bits(__floats2bfloat162_rn(x[6], x[7]));
      *reinterpret_cast<uint4*>(tile_row + column) = rounded;
      if (ring_row != nullptr)
        *reinterpret_cast<uint4*>(ring_row + head_ * S::kKeyDim + column) = rounded;
    } else {
#pragma unroll
      for (int i = 0; i < kPerChunk; i += 2) {
        *reinterpret_cast<float2*>(&shared_.q[token][QuerySlot(column + i)]) =
            make_float2(x[i], x[i + 1]);
      }
    }
  }
}

// q, k and v of the step: to shared memory, k and v also to the ring. The block of the first slice
// writes the keys.
template <typename S>
__device__ void Step<S>::FormTokens(int first_row) const {
  constexpr int kHeadChunks = S::kHeadDim / kPerChunk,
                kChunks = 2 * kHeadChunks + S::kColumns / kPerChunk;
  const int64_t ring_rows = args_.window.shape[1];
  const int64_t first = row_.position % ring_rows;
  for (int i = threadIdx.x; i < row_.num_tokens * kChunks; i += S::kThreads) {
    const int token = i / kChunks, chunk = i % kChunks;
    const bool open = row_.position + token >= row_.base_after;
    Bf16* const ring =
        RingRow(first + token < ring_rows ? first + token : first + token - ring_rows);
    if (chunk < 2 * kHeadChunks) {
      FormQueryOrKey(token, chunk % kHeadChunks, chunk >= kHeadChunks,
                     shared_.rows.k[first_row + token],
                     open && first_column_ == 0 ? ring : nullptr);
      continue;
    }
    const int d = (chunk - 2 * kHeadChunks) * kPerChunk;
    const uint4 values =
        *reinterpret_cast<const uint4*>(Row<const Bf16>(args_.v, row_.first_token + token) +
                                        head_ * S::kHeadDim + first_column_ + d);
    *reinterpret_cast<uint4*>(&shared_.rows.v[first_row + token][d]) = values;
    if (open) *reinterpret_cast<uint4*>(ring + ValueOffset() + d) = values;
  }
}

template <typename S>
__device__ void Step<S>::LoadState() {
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    const float4 x = __ldcs(reinterpret_cast<const float4*>(State(StateRow(r))));
    state_[r][0] = x.x;
    state_[r][1] = x.y;
    state_[r][2] = x.z;
    state_[r][3] = x.w;
  }
}
template <typename S>
__device__ void Step<S>::StoreState() const {
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    __stcs(reinterpret_cast<float4*>(State(StateRow(r))),
           make_float4(state_[r][0], state_[r][1], state_[r][2], state_[r][3]));
  }
}

// v[x][half]: rows 2 t, 2 t + 1 (+ 8 in the second half) of column 4 g + x.
template <typename S>
__device__ void Step<S>::LoadValues(uint32_t (&v)[4][2],
                                    const Bf16 (*tile)[S::kColumns + 8]) const {
  const int column = group_ * kTile + lane_ / 4 * 4, row = lane_ % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint2 even = *reinterpret_cast<const uint2*>(&tile[half * 8 + row][column]);
    const uint2 odd = *reinterpret_cast<const uint2*>(&tile[half * 8 + row + 1][column]);
    v[0][half] = __byte_perm(even.x, odd.x, 0x5410);
    v[1][half] = __byte_perm(even.x, odd.x, 0x7632);
    v[2][half] = __byte_perm(even.y, odd.y, 0x5410);
    v[3][half] = __byte_perm(even.y, odd.y, 0x7632);
  }
}

// S <- S + (dS - epsilon S), dS^T = v^T (lambda^(15 - j) k) over the W rows of a block.
template <typename S>
__device__ void Step<S>::Fold(const Bf16 (*k)[S::kKeyDim + 8], const Bf16 (*v)[S::kColumns + 8]) {
  uint32_t values[4][2];
  LoadValues(values, v);
  const int t = lane_ % 4;
  float weights[2][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int e = 0; e < 2; ++e)
      weights[half][e] = shared_.decay[kWindow - 1 - 8 * half - 2 * t - e];
  }
  const float epsilon = Row<const float>(args_.decay.fold_epsilon, head_)[0];
#pragma unroll
  for (int u = 0; u < 4; u += 2) {
    uint32_t keys[4];  // [u][half]
    LoadMatrices<true>(keys, &k[lane_ % 16][key_warp_ * kTile + 8 * (u + lane_ / 16)]);
#pragma unroll
    for (int next = 0; next < 2; ++next) {
      Split b[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t pair = keys[2 * next + half];
        b[half] = SplitPair(LowHalf(pair) * weights[half][0], HighHalf(pair) * weights[half][1]);
      }
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        float change[4] = {0, 0, 0, 0};
#pragma unroll
        for (int term = 0; term < 3; ++term) {
          MultiplyAdd(change, values[2 * y][0], values[2 * y + 1][0], values[2 * y][1],
                      values[2 * y + 1][1], b[0].terms[term], b[1].terms[term]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& state = state_[2 * (u + next) + i % 2][2 * y + i / 2];
          state += fmaf(-epsilon, state, change[i]);
        }
      }
    }
  }
}

// Tokens [first_token, first_token + num_tokens) against the rows of their block of W, which begin
// at a row of the tile; the first of them is row `offset` of the block. Sets this warp's partial
// sums.
template <typename S>
__device__ void Step<S>::WithinWindow(int first_token, int num_tokens, int offset,
                                      int first_tile_row) const {
  const int g = lane_ / 4, t = lane_ % 4;
  float scores[2][4] = {};
  {
    float q[2][8] = {};  // [tokens g, g + 8][2 u + e]
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (g + 8 * half >= num_tokens) continue;
      const float* const from = &shared_.q[first_token + g + 8 * half][key_warp_ * kTile + 8 * t];
      *reinterpret_cast<float4*>(q[half]) = *reinterpret_cast<const float4*>(from);
      *reinterpret_cast<float4*>(q[half] + 4) = *reinterpret_cast<const float4*>(from + 4);
    }
    uint32_t keys[2][4];  // [8 rows][u]
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      LoadMatrices<false>(
          keys[n],
          &shared_.rows.k[first_tile_row + 8 * n + lane_ % 8][key_warp_ * kTile + lane_ / 8 * 8]);
    }
#pragma unroll
    for (int u = 0; u < 4; u += 2) {
      const Split a[4] = {
          SplitPair(q[0][2 * u], q[0][2 * u + 1]), SplitPair(q[1][2 * u], q[1][2 * u + 1]),
          SplitPair(q[0][2 * u + 2], q[0][2 * u + 3]), SplitPair(q[1][2 * u + 2], q[1][2 * u + 3])};
#pragma unroll
      for (int term = 0; term < 3; ++term) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          MultiplyAdd(scores[n], a[0].terms[term], a[1].terms[term], a[2].terms[term],
                      a[3].terms[term], keys[n][u], keys[n][u + 1]);
        }
      }
    }
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int distance = offset + g + i / 2 * 8 - (8 * n + 2 * t + i % 2);
      scores[n][i] =
          distance >= 0 && distance < kWindow ? scores[n][i] * shared_.decay[distance] : 0;
    }
  }
  uint32_t values[4][2];
  LoadValues(values, &shared_.rows.v[first_tile_row]);
  const Split a[4] = {SplitPair(scores[0][0], scores[0][1]), SplitPair(scores[0][2], scores[0][3]),
                      SplitPair(scores[1][0], scores[1][1]), SplitPair(scores[1][2], scores[1][3])};
  float sums[4][4] = {};  // [x]: tokens g, g + 8; columns 8 t + x, 8 t + 4 + x
#pragma unroll
  for (int term = 0; term < 3; ++term) {
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      MultiplyAdd(sums[x], a[0].terms[term], a[1].terms[term], a[2].terms[term], a[3].terms[term],
                  values[x][0], values[x][1]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = g + i / 2 * 8;
    if (token >= num_tokens) continue;
    float* const to =
        &shared_.partial[key_warp_][first_token + token][group_ * kTile + 8 * t + i % 2 * 4];
    *reinterpret_cast<float4*>(to) = make_float4(sums[0][i], sums[1][i], sums[2][i], sums[3][i]);
  }
}

// Adds lambda^(offset + i + 1) q_i S over this warp's rows of S.
template <typename S>
__device__ void Step<S>::AgainstState(int first_token, int num_tokens, int offset) const {
  const int t = lane_ % 4;
#pragma unroll 1
  for (int i = 0; i < num_tokens; ++i) {
    const float* const from = &shared_.q[first_token + i][key_warp_ * kTile + 8 * t];
    float q[8];
    *reinterpret_cast<float4*>(q) = *reinterpret_cast<const float4*>(from);
    *reinterpret_cast<float4*>(q + 4) = *reinterpret_cast<const float4*>(from + 4);
    float sums[4] = {};
#pragma unroll
    for (int r = 0; r < 8; ++r) {
#pragma unroll
      for (int x = 0; x < 4; ++x) sums[x] = fmaf(q[r], state_[r][x], sums[x]);
    }
    // Over the 4 lanes t; lane t keeps column 4 g + t.
    const bool upper = t & 2, odd = t & 1;
    float keep0 = upper ? sums[2] : sums[0], keep1 = upper ? sums[3] : sums[1];
    keep0 += __shfl_xor_sync(0xffffffffu, upper ? sums[0] : sums[2], 2);
    keep1 += __shfl_xor_sync(0xffffffffu, upper ? sums[1] : sums[3], 2);
    const float sent = __shfl_xor_sync(0xffffffffu, odd ? keep0 : keep1, 1);
    const float sum = (odd ? keep1 : keep0) + sent;
    float& to = shared_.partial[key_warp_][first_token + i][group_ * kTile + lane_];
    to = fmaf(shared_.decay[offset + i + 1], sum, to);
  }
}

template <typename S>
__device__ void Step<S>::WriteOutputs() const {
  for (int i = threadIdx.x; i < row_.num_tokens * S::kColumns; i += S::kThreads) {
    const int token = i / S::kColumns, column = i % S::kColumns;
    float sum = shared_.partial[0][token][column];
#pragma unroll
    for (int warp = 1; warp < S::kKeyWarps; ++warp) sum += shared_.partial[warp][token][column];
    StoreAny(args_.o, row_.first_token + token, head_ * S::kHeadDim + first_column_ + column, sum);
  }
}

template <typename S>
__device__ void Step<S>::Run() {
  LoadState();
  const int64_t anchor = row_.position / kWindow * kWindow, end = row_.position + row_.num_tokens;
  const int first_row = static_cast<int>(row_.position - anchor);
  const int num_rows = static_cast<int>(end - anchor);
  if (row_.base < anchor) LoadOpenRows(shared_.lag, row_.base, kWindow, kWindow, kWindow);
  LoadOpenRows(shared_.rows, anchor, first_row, num_rows,
               num_rows > kWindow ? 2 * kWindow : kWindow);
  if (threadIdx.x <= kWindow)
    shared_.decay[threadIdx.x] = Row<const float>(args_.decay.decay, head_)[threadIdx.x];
  FormTokens(first_row);
  WaitForCopies();
  __syncthreads();
  for (int64_t block = row_.base; block < anchor; block += kWindow) {
    if (block != row_.base) {
      LoadOpenRows(shared_.lag, block, kWindow, kWindow, kWindow);
      WaitForCopies();
      __syncthreads();
    }
    Fold(shared_.lag.k, shared_.lag.v);
    if (block + kWindow == row_.base_after) StoreState();
    __syncthreads();  // the tile is loaded anew, or overwritten by partial sums
  }
#pragma unroll 1
  for (int first = 0; first < num_rows;
       first += kWindow) {  // the block of the anchor, and the one after it
    const int begin = max(first, first_row), last = min(first + kWindow, num_rows);
    WithinWindow(begin - first_row, last - begin, begin - first, first);
    __syncwarp();
    AgainstState(begin - first_row, last - begin, begin - first);
    const bool store = anchor + first + kWindow == row_.base_after;
    if (num_rows > first + kWindow || store) Fold(&shared_.rows.k[first], &shared_.rows.v[first]);
    if (store) StoreState();
  }
  __syncthreads();
  WriteOutputs();
}

// May be launched beside the end of the kernel before it: until DependencyWait() it gives hints
// only (a row that is still written may name another slot, but always one that exists).
template <typename S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksPerMultiprocessor)
    StepKernel(const __grid_constant__ LightningAttentionArgs args, bool prefetch) {
  extern __shared__ __align__(16) char memory[];
  auto& shared = *reinterpret_cast<Shared<S>*>(memory);
  DependencyTrigger();
  if (prefetch) {
    StepRow row;
    row.num_tokens = __ldcg(&args.rows[blockIdx.y].num_tokens);
    row.slot = __ldcg(&args.rows[blockIdx.y].slot);
    row.position = __ldcg(&args.rows[blockIdx.y].position);
    row.base = __ldcg(&args.rows[blockIdx.y].base);
    if (row.num_tokens > 0) Step<S>(args, row, shared).Prefetch();
  }
  DependencyWait();
  const StepRow row = args.rows[blockIdx.y];
  if (row.num_tokens == 0) return;
  Step<S>(args, row, shared).Run();
}

template <typename S>
cudaError_t Launch(const LightningAttentionArgs& args, const Context& context) {
  const dim3 grid(static_cast<unsigned>(args.num_heads * S::kSlices),
                  static_cast<unsigned>(args.num_decode_rows));
  constexpr int kSharedBytes = sizeof(Shared<S>);
  cudaError_t error = cudaFuncSetAttribute(
      StepKernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  // With more than the device holds at once, a hint only delays what is read now.
  const bool prefetch = int64_t{grid.x} * grid.y <=
                        int64_t{context.num_multiprocessors} * S::kBlocksPerMultiprocessor;
  return LaunchDependent(StepKernel<S>, grid, S::kThreads, kSharedBytes, context.stream, args,
                         prefetch);
}

bool IsAligned(const TensorView& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 &&
         x.row_stride * DTypeBytes(x.dtype) % 16 == 0;
}

// Small batches are split over more blocks, large ones share more between the columns of a block.
template <int kKeyDim, bool kLrpe>
cudaError_t LaunchSplit(const LightningAttentionArgs& args, const Context& context) {
  using Narrow = Shape<kKeyDim, kLrpe, 1>;
  using Wide = Shape<kKeyDim, kLrpe, 2>;
  const int64_t num_blocks = int64_t{args.num_decode_rows} * args.num_heads * Wide::kSlices;
  return num_blocks >= 4 * context.num_multiprocessors ? Launch<Wide>(args, context)
                                                       : Launch<Narrow>(args, context);
}

}  // namespace

cudaError_t LaunchLightningStep(const LightningAttentionArgs& args, Context& context) {
  if (args.num_decode_rows == 0) return cudaSuccess;
  const bool aligned = IsAligned(args.q) && IsAligned(args.k) && IsAligned(args.v) &&
                       IsAligned(args.state) && IsAligned(args.window);
  if (args.q.dtype == DType::kBF16 && aligned) {
    if (args.theta && args.head_dim == 64) return LaunchSplit<128, true>(args, context);
    if (args.theta && args.head_dim == 128) return LaunchSplit<256, true>(args, context);
    if (!args.theta && args.head_dim == 64) return LaunchSplit<64, false>(args, context);
    if (!args.theta && args.head_dim == 128) return LaunchSplit<128, false>(args, context);
  }
  return LaunchLightningRows(args, {0, args.num_decode_rows, 0, args.num_decode_tokens}, context);
}

}  // namespace godwit::cuda
