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
    struct {
      KeyValueTile<S, kWindow> lag;  // a whole block before the anchor, to be folded
      alignas(16) Bf16 q[kWindow][S::kHeadDim];
    } loaded;
    alignas(16) float partial[S::kKeyWarps][kWindow][S::kColumns];
  };
  float decay[kWindow + 1];
};

__device__ inline uint32_t Bits(__nv_bfloat162 x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
__device__ inline uint32_t RoundPair(float low, float high) {
  return Bits(__floats2bfloat162_rn(low, high));
}
__device__ inline float LowHalf(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float HighHalf(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// (x, y) rounded to bf16, and what is left of it. Three terms hold all 24 bits of a value.
constexpr int kTerms = 3;
__device__ inline uint32_t TakeTerm(float& x, float& y) {
  const uint32_t pair = RoundPair(x, y);
  x -= LowHalf(pair);
  y -= HighHalf(pair);
  return pair;
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
// 8 x 8 matrices of bf16; lane i gives the address of row i % 8 of matrix i / 8.
__device__ inline void LoadMatrices(uint32_t (&to)[4], const Bf16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(SharedAddress(row))
               : "memory");
}
__device__ inline void LoadTransposed(uint32_t (&to)[2], const Bf16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(SharedAddress(row))
               : "memory");
}
// 16 bytes; zeros if not present.
__device__ inline void CopyAsync(Bf16* shared, const Bf16* global, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(shared)),
               "l"(global), "r"(present ? 16 : 0)
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

// A row of the step as its blocks see it. Positions are below 2^32.
struct Place {
  __device__ Place(const StepRow& row, int64_t ring_rows)
      : slot(row.slot),
        first_token(row.first_token),
        num_tokens(row.num_tokens),
        first_row(static_cast<int>(row.position % kWindow)),
        num_lagging(static_cast<int>((row.position - row.base) / kWindow)),
        num_stored(static_cast<int>(row.base_after - row.base) / kWindow),
        first_open(static_cast<int>(row.base_after - row.position)),
        ring_row(static_cast<uint32_t>(row.position - first_row) %
                 static_cast<uint32_t>(ring_rows)),
        position(row.position) {}

  int slot;
  int first_token;
  int num_tokens;
  int first_row;      // of the first token, in the block of W of its anchor
  int num_lagging;    // blocks between the stored base and the anchor
  int num_stored;     // blocks from the stored base on that are folded into it
  int first_open;     // token from which on rows go to the ring; may be negative
  uint32_t ring_row;  // of the anchor
  int64_t position;
};

template <typename S>
class Step {
 public:
  __device__ Step(const LightningAttentionArgs& args, const Place& place, Shared<S>& shared)
      : args_(args),
        shared_(shared),
        place_(place),
        head_(blockIdx.x / S::kSlices),
        first_column_(blockIdx.x % S::kSlices * S::kColumns),
        lane_(threadIdx.x % kWarp),
        key_warp_(threadIdx.x / kWarp % S::kKeyWarps),
        group_(threadIdx.x / kWarp / S::kKeyWarps) {}

  __device__ void Prefetch() const;
  __device__ void Load();
  __device__ void Run();

 private:
  static constexpr int kHeadChunks = S::kHeadDim / kPerChunk;

  // Row 2 t, column 4 g of the warp's tile; its other rows are 8 u + e further.
  __device__ float* State() const {
    return Row<float>(args_.state, place_.slot) +
           (head_ * S::kKeyDim + key_warp_ * kTile + lane_ % 4 * 2) * S::kHeadDim + first_column_ +
           group_ * kTile + lane_ / 4 * 4;
  }
  // The ring row that lies `rows` after the anchor, or before it.
  __device__ uint32_t RingRow(int rows) const {
    const auto ring_rows = static_cast<int>(args_.window.shape[1]);
    int row = static_cast<int>(place_.ring_row) + rows;
    row = row < 0 ? row + ring_rows : row;
    return row < ring_rows ? row : row - ring_rows;
  }
  __device__ Bf16* Ring(int rows, int64_t column) const {
    return Row<Bf16>(args_.window, place_.slot) + column +
           int64_t{RingRow(rows)} * args_.window.shape[2];
  }
  __device__ int64_t KeyColumn() const { return int64_t{head_} * S::kKeyDim; }
  __device__ int64_t ValueColumn() const {
    return int64_t{args_.num_heads} * S::kKeyDim + head_ * S::kHeadDim + first_column_;
  }

  // Calls f(row, first of 8 columns) for what of [num_rows, 8 kChunks) is this thread's.
  template <int kChunks, typename F>
  __device__ static void ForChunks(int thread, int num_rows, const F& f) {
    static_assert(S::kThreads % kChunks == 0);
#pragma unroll 1
    for (int row = thread / kChunks; row < num_rows; row += S::kThreads / kChunks)
      f(row, thread % kChunks * kPerChunk);
  }
  // Threads that form the first keys, while others form the first queries.
  __device__ static int KeyThread() { return threadIdx.x ^ S::kThreads / 2; }

  template <int kRows>
  __device__ void LoadOpenRows(KeyValueTile<S, kRows>& tile, int first, int num_open,
                               int num_present, int num_rows) const;
  __device__ void LoadTokens() const;
  __device__ void FormTokens() const;
  template <bool kIsKey>
  __device__ void FormChunk(int token, int d) const;
  __device__ void StoreState() const;
  __device__ void LoadValues(uint32_t (&v)[2][2], const Bf16 (*tile)[S::kColumns + 8],
                             int first) const;
  __device__ void Fold(const Bf16 (*k)[S::kKeyDim + 8], const Bf16 (*v)[S::kColumns + 8]);
  __device__ void FoldLagging();
  __device__ void Score(float (&scores)[2][4], int first_token, int num_tokens, int offset,
                        int first_tile_row) const;
  __device__ void WithinWindow(int first_token, int num_tokens, int offset,
                               int first_tile_row) const;
  __device__ void AgainstState(int first_token, int num_tokens, int offset) const;
  __device__ void WriteOutputs() const;

  const LightningAttentionArgs& args_;
  Shared<S>& shared_;
  const Place place_;
  const int head_;
  const int first_column_;  // of the block's slice of S
  const int lane_;
  const int key_warp_;
  const int group_;
  float state_[8][4];
};

// Lines that Load will ask for, into L2: hints alone.
template <typename S>
__device__ void Step<S>::Prefetch() const {
  static_assert(S::kThreads == S::kKeyDim * S::kGroups);  // a line of S each
  const int thread = threadIdx.x;
  PrefetchL2(Row<float>(args_.state, place_.slot) +
             (head_ * S::kKeyDim + thread / S::kGroups) * S::kHeadDim + first_column_ +
             thread % S::kGroups * kTile);
  const int first = -place_.num_lagging * kWindow;
  if (thread >= 2 * kWindow || first + thread >= place_.first_row) return;
  PrefetchL2(Ring(first + thread, ValueColumn()));
  for (int d = 0; d < S::kKeyDim; d += 64) PrefetchL2(Ring(first + thread, KeyColumn() + d));
}

// Rows of a tile from the ring, `first` rows after the anchor: [0, num_open), and zeros in
// [num_present, num_rows).
template <typename S>
template <int kRows>
__device__ void Step<S>::LoadOpenRows(KeyValueTile<S, kRows>& tile, int first, int num_open,
                                      int num_present, int num_rows) const {
  ForChunks<S::kKeyDim / kPerChunk>(threadIdx.x, num_rows, [&](int row, int d) {
    if (row < num_open || row >= num_present)
      CopyAsync(&tile.k[row][d], Ring(first + row, KeyColumn() + d), row < num_open);
  });
  ForChunks<S::kColumns / kPerChunk>(threadIdx.x, num_rows, [&](int row, int d) {
    if (row < num_open || row >= num_present)
      CopyAsync(&tile.v[row][d], Ring(first + row, ValueColumn() + d), row < num_open);
  });
}

// q, k and v of the step, as they are.
template <typename S>
__device__ void Step<S>::LoadTokens() const {
  const int64_t column = int64_t{head_} * S::kHeadDim;
  auto from = [&](const TensorView& x, int token, int64_t d) {
    return Row<const Bf16>(x, place_.first_token + token) + d;
  };
  ForChunks<kHeadChunks>(threadIdx.x, place_.num_tokens, [&](int token, int d) {
    CopyAsync(&shared_.loaded.q[token][d], from(args_.q, token, column + d), true);
  });
  ForChunks<kHeadChunks>(KeyThread(), place_.num_tokens, [&](int token, int d) {
    CopyAsync(&shared_.rows.k[place_.first_row + token][d], from(args_.k, token, column + d), true);
  });
  ForChunks<S::kColumns / kPerChunk>(KeyThread(), place_.num_tokens, [&](int token, int d) {
    CopyAsync(&shared_.rows.v[place_.first_row + token][d],
              from(args_.v, token, column + first_column_ + d), true);
  });
}

// Eight columns of q or k of a token: activation, LRPE, scale (q) or rounding (k, which also goes
// to the ring).
template <typename S>
template <bool kIsKey>
__device__ void Step<S>::FormChunk(int token, int d) const {
  Bf16* const row = shared_.rows.k[place_.first_row + token];
  const uint4 packed =
      *reinterpret_cast<const uint4*>(kIsKey ? row + d : &shared_.loaded.q[token][d]);
  const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
  float values[S::kLrpe ? 2 : 1][kPerChunk];
#pragma unroll
  for (int i = 0; i < kPerChunk; ++i) {
    float value = i % 2 == 0 ? LowHalf(pairs[i / 2]) : HighHalf(pairs[i / 2]);
    if (args_.qk_activation == Activation::kSilu) value = Silu(value);
    if (!kIsKey) value *= args_.q_scale;
    if constexpr (S::kLrpe) {
      float sine, cosine;
      SineAndCosine(Row<const float>(args_.theta, head_)[d + i],
                    static_cast<double>(place_.position + token), &sine, &cosine);
      values[1][i] = value * sine;
      value *= cosine;
    }
    values[0][i] = value;
  }
#pragma unroll
  for (int part = 0; part < (S::kLrpe ? 2 : 1); ++part) {
    const float(&x)[kPerChunk] = values[part];
    const int column = part * S::kHeadDim + d;
    if constexpr (kIsKey) {
      const uint4 rounded = make_uint4(RoundPair(x[0], x[1]), RoundPair(x[2], x[3]),
                                       RoundPair(x[4], x[5]), RoundPair(x[6], x[7]));
      *reinterpret_cast<uint4*>(row + column) = rounded;
      if (first_column_ == 0 && token >= place_.first_open) {
        *reinterpret_cast<uint4*>(Ring(place_.first_row + token, KeyColumn() + column)) = rounded;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPerChunk; i += 2) {
        *reinterpret_cast<float2*>(&shared_.q[token][QuerySlot(column + i)]) =
            make_float2(x[i], x[i + 1]);
      }
    }
  }
}

// Each thread forms what it loaded itself. The block of the first slice writes the keys to the
// ring.
template <typename S>
__device__ void Step<S>::FormTokens() const {
  ForChunks<kHeadChunks>(threadIdx.x, place_.num_tokens,
                         [&](int token, int d) { FormChunk<false>(token, d); });
  ForChunks<kHeadChunks>(KeyThread(), place_.num_tokens,
                         [&](int token, int d) { FormChunk<true>(token, d); });
  ForChunks<S::kColumns / kPerChunk>(KeyThread(), place_.num_tokens, [&](int token, int d) {
    if (token < place_.first_open) return;
    *reinterpret_cast<uint4*>(Ring(place_.first_row + token, ValueColumn() + d)) =
        *reinterpret_cast<const uint4*>(&shared_.rows.v[place_.first_row + token][d]);
  });
}

template <typename S>
__device__ void Step<S>::StoreState() const {
  float* const to = State();
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    __stcs(reinterpret_cast<float4*>(to + (r / 2 * 8 + r % 2) * S::kHeadDim),
           make_float4(state_[r][0], state_[r][1], state_[r][2], state_[r][3]));
  }
}

// v[x][half]: rows 2 t, 2 t + 1 (+ 8 in the second half) of columns 4 g + first + x.
template <typename S>
__device__ void Step<S>::LoadValues(uint32_t (&v)[2][2], const Bf16 (*tile)[S::kColumns + 8],
                                    int first) const {
  const int column = group_ * kTile + lane_ / 4 * 4 + first, row = lane_ % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto even = *reinterpret_cast<const uint32_t*>(&tile[half * 8 + row][column]);
    const auto odd = *reinterpret_cast<const uint32_t*>(&tile[half * 8 + row + 1][column]);
    v[0][half] = __byte_perm(even, odd, 0x5410);
    v[1][half] = __byte_perm(even, odd, 0x7632);
  }
}

// S <- S + (dS - epsilon S), dS^T = v^T (lambda^(15 - j) k) over the W rows of a block.
template <typename S>
__device__ void Step<S>::Fold(const Bf16 (*k)[S::kKeyDim + 8], const Bf16 (*v)[S::kColumns + 8]) {
  uint32_t values[2][2][2];
#pragma unroll
  for (int y = 0; y < 2; ++y) LoadValues(values[y], v, 2 * y);
  const float* const decay = &shared_.decay[kWindow - 1 - lane_ % 4 * 2];
  const float weights[2][2] = {{decay[0], decay[-1]}, {decay[-8], decay[-9]}};  // [half][e]
  const float epsilon = Row<const float>(args_.decay.fold_epsilon, head_)[0];
#pragma unroll
  for (int u = 0; u < 4; ++u) {
    uint32_t keys[2];  // [half]
    LoadTransposed(keys, &k[lane_ % 16][key_warp_ * kTile + 8 * u]);
    uint32_t b[2][kTerms];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float low = LowHalf(keys[half]) * weights[half][0],
            high = HighHalf(keys[half]) * weights[half][1];
#pragma unroll
      for (int term = 0; term < kTerms; ++term) b[half][term] = TakeTerm(low, high);
    }
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      float change[4] = {0, 0, 0, 0};
#pragma unroll
      for (int term = kTerms - 1; term >= 0; --term) {
        MultiplyAdd(change, values[y][0][0], values[y][1][0], values[y][0][1], values[y][1][1],
                    b[0][term], b[1][term]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& state = state_[2 * u + i % 2][2 * y + i / 2];
        state += fmaf(-epsilon, state, change[i]);
      }
    }
  }
}

// lambda^(i - j) q_i . k_j over this warp's columns, 0 for j > i: tokens i = g, g + 8, rows j = 8 n
// + 2 t, + 1.
template <typename S>
__device__ void Step<S>::Score(float (&scores)[2][4], int first_token, int num_tokens, int offset,
                               int first_tile_row) const {
  const int g = lane_ / 4, t = lane_ % 4;
#pragma unroll
  for (int u = 0; u < 4; u += 2) {
    float q[2][4] = {};  // [tokens g, g + 8][2 u + e]
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (g + 8 * half >= num_tokens) continue;
      *reinterpret_cast<float4*>(q[half]) = *reinterpret_cast<const float4*>(
          &shared_.q[first_token + g + 8 * half][key_warp_ * kTile + 8 * t + 2 * u]);
    }
    uint32_t keys[4];  // [8 rows][u, u + 1]
    LoadMatrices(keys, &shared_.rows.k[first_tile_row + lane_ / 16 * 8 + lane_ % 8]
                                      [key_warp_ * kTile + 8 * (u + lane_ / 8 % 2)]);
#pragma unroll
    for (int term = 0; term < kTerms; ++term) {
      const uint32_t a0 = TakeTerm(q[0][0], q[0][1]), a1 = TakeTerm(q[1][0], q[1][1]),
                     a2 = TakeTerm(q[0][2], q[0][3]), a3 = TakeTerm(q[1][2], q[1][3]);
      MultiplyAdd(scores[0], a0, a1, a2, a3, keys[0], keys[1]);
      MultiplyAdd(scores[1], a0, a1, a2, a3, keys[2], keys[3]);
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
}

// Tokens [first_token, first_token + num_tokens) against the rows of their block of W, which begin
// at a row of the tile; the first of them is row `offset` of the block. Sets this warp's partial
// sums.
template <typename S>
__device__ void Step<S>::WithinWindow(int first_token, int num_tokens, int offset,
                                      int first_tile_row) const {
  const int g = lane_ / 4, t = lane_ % 4;
  float scores[2][4] = {};
  Score(scores, first_token, num_tokens, offset, first_tile_row);
  uint32_t a[kTerms][4];
#pragma unroll
  for (int term = 0; term < kTerms; ++term) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[term][i] = TakeTerm(scores[i / 2][i % 2 * 2], scores[i / 2][i % 2 * 2 + 1]);
  }
#pragma unroll
  for (int first = 0; first < 4; first += 2) {  // column 4 g + first + x
    uint32_t values[2][2];
    LoadValues(values, &shared_.rows.v[first_tile_row], first);
    float sums[2][4] = {};  // [x]: tokens g, g + 8; columns 8 t + first + x, + 4
#pragma unroll
    for (int term = kTerms - 1; term >= 0; --term) {
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        MultiplyAdd(sums[x], a[term][0], a[term][1], a[term][2], a[term][3], values[x][0],
                    values[x][1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = g + i / 2 * 8;
      if (token >= num_tokens) continue;
      *reinterpret_cast<float2*>(&shared_.partial[key_warp_][first_token + token]
                                                 [group_ * kTile + 8 * t + i % 2 * 4 + first]) =
          make_float2(sums[0][i], sums[1][i]);
    }
  }
}

// Adds lambda^(offset + i + 1) q_i S over this warp's rows of S.
template <typename S>
__device__ void Step<S>::AgainstState(int first_token, int num_tokens, int offset) const {
  const float* from = &shared_.q[first_token][key_warp_ * kTile + lane_ % 4 * 8];
  const float* decay = &shared_.decay[offset + 1];
  float* to = &shared_.partial[key_warp_][first_token][group_ * kTile + lane_];
  const bool upper = lane_ & 2, odd = lane_ & 1;
#pragma unroll 1
  for (int i = 0; i < num_tokens; ++i) {
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
    float keep0 = upper ? sums[2] : sums[0], keep1 = upper ? sums[3] : sums[1];
    keep0 += __shfl_xor_sync(0xffffffffu, upper ? sums[0] : sums[2], 2);
    keep1 += __shfl_xor_sync(0xffffffffu, upper ? sums[1] : sums[3], 2);
    const float sum = (odd ? keep1 : keep0) + __shfl_xor_sync(0xffffffffu, odd ? keep0 : keep1, 1);
    *to = fmaf(*decay++, sum, *to);
    from += S::kKeyDim + 4;
    to += S::kColumns;
  }
}

template <typename S>
__device__ void Step<S>::WriteOutputs() const {
  ForChunks<S::kColumns / 4>(threadIdx.x, place_.num_tokens, [&](int token, int d) {
    d /= 2;  // 4 columns
    float4 sum = *reinterpret_cast<const float4*>(&shared_.partial[0][token][d]);
#pragma unroll
    for (int warp = 1; warp < S::kKeyWarps; ++warp) {
      const float4 more = *reinterpret_cast<const float4*>(&shared_.partial[warp][token][d]);
      sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
    }
    const int64_t column = int64_t{head_} * S::kHeadDim + first_column_ + d;
    if (args_.o.dtype == DType::kF32) {
      *reinterpret_cast<float4*>(Row<float>(args_.o, place_.first_token + token) + column) = sum;
    } else {
      *reinterpret_cast<uint2*>(Row<Bf16>(args_.o, place_.first_token + token) + column) =
          make_uint2(RoundPair(sum.x, sum.y), RoundPair(sum.z, sum.w));
    }
  });
}

// Asks for everything that the block reads.
template <typename S>
__device__ void Step<S>::Load() {
  const float* const from = State();
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    const float4 x =
        __ldcs(reinterpret_cast<const float4*>(from + (r / 2 * 8 + r % 2) * S::kHeadDim));
    state_[r][0] = x.x;
    state_[r][1] = x.y;
    state_[r][2] = x.z;
    state_[r][3] = x.w;
  }
  LoadTokens();
  const int num_rows = place_.first_row + place_.num_tokens;
  LoadOpenRows(shared_.rows, 0, place_.first_row, num_rows,
               num_rows > kWindow ? 2 * kWindow : kWindow);
  if (place_.num_lagging > 0) {
    LoadOpenRows(shared_.loaded.lag, -place_.num_lagging * kWindow, kWindow, kWindow, kWindow);
  }
  if (threadIdx.x <= kWindow)
    shared_.decay[threadIdx.x] = Row<const float>(args_.decay.decay, head_)[threadIdx.x];
}

// The blocks between the stored base and the anchor; the first is loaded.
template <typename S>
__device__ void Step<S>::FoldLagging() {
  for (int block = 0; block < place_.num_lagging; ++block) {
    if (block > 0) {
      LoadOpenRows(shared_.loaded.lag, (block - place_.num_lagging) * kWindow, kWindow, kWindow,
                   kWindow);
      WaitForCopies();
      __syncthreads();
    }
    Fold(shared_.loaded.lag.k, shared_.loaded.lag.v);
    if (block + 1 == place_.num_stored) StoreState();
    __syncthreads();  // the tile is loaded anew, or overwritten by partial sums
  }
}

template <typename S>
__device__ void Step<S>::Run() {
  WaitForCopies();
  FormTokens();
  __syncthreads();
  FoldLagging();
  const int first_row = place_.first_row, num_rows = first_row + place_.num_tokens;
#pragma unroll 1
  for (int first = 0; first < num_rows;
       first += kWindow) {  // the block of the anchor, and the one after it
    const int begin = max(first, first_row), end = min(first + kWindow, num_rows);
    WithinWindow(begin - first_row, end - begin, begin - first, first);
    __syncwarp();
    AgainstState(begin - first_row, end - begin, begin - first);
    const bool store = place_.num_lagging + first / kWindow + 1 == place_.num_stored;
    if (num_rows > first + kWindow || store) Fold(&shared_.rows.k[first], &shared_.rows.v[first]);
    if (store) StoreState();
  }
  __syncthreads();
  WriteOutputs();
}

// May be launched beside the end of the kernel before it. Until DependencyWait() it gives hints
// alone: rows are copied to the device before the first kernel of a step, but what they name may
// still be written. With more than the device holds at once a hint only delays what is read now.
template <typename S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksPerMultiprocessor)
    StepKernel(const __grid_constant__ LightningAttentionArgs args, int num_hinted_rows) {
  extern __shared__ __align__(16) char memory[];
  DependencyTrigger();
  const int index = static_cast<int>(blockIdx.y);
  const StepRow row = args.rows[index];
  Step<S> step(args, Place(row, args.window.shape[1]), *reinterpret_cast<Shared<S>*>(memory));
  if (row.num_tokens > 0 && index < num_hinted_rows) step.Prefetch();
  DependencyWait();
  if (row.num_tokens == 0) return;
  step.Load();
  step.Run();
}

template <typename S>
cudaError_t Launch(const LightningAttentionArgs& args, const Context& context) {
  const dim3 grid(static_cast<unsigned>(args.num_heads * S::kSlices),
                  static_cast<unsigned>(args.num_decode_rows));
  constexpr int kSharedBytes = sizeof(Shared<S>);
  cudaError_t error = cudaFuncSetAttribute(
      StepKernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  const auto num_resident =
      static_cast<unsigned>(context.num_multiprocessors * S::kBlocksPerMultiprocessor);
  const int num_hinted_rows = static_cast<int>(num_resident / grid.x);
  return LaunchDependent(StepKernel<S>, grid, S::kThreads, kSharedBytes, context.stream, args,
                         num_hinted_rows);
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
  const bool aligned = Aligned(args.q) && Aligned(args.k) && Aligned(args.v) &&
                       Aligned(args.state) && Aligned(args.window) && Aligned(args.o);
  if (args.q.dtype == DType::kBF16 && aligned) {
    if (args.theta && args.head_dim == 64) return LaunchSplit<128, true>(args, context);
    if (args.theta && args.head_dim == 128) return LaunchSplit<256, true>(args, context);
    if (!args.theta && args.head_dim == 64) return LaunchSplit<64, false>(args, context);
    if (!args.theta && args.head_dim == 128) return LaunchSplit<128, false>(args, context);
  }
  return LaunchLightningRows(args, {0, args.num_decode_rows, 0, args.num_decode_tokens}, context);
}

}  // namespace godwit::cuda
