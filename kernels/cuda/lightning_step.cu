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
// Sums, in a fixed order for every number of tokens: scores s_ij = lambda^(i-j) sum_d q_id k_jd in
// f32, 8 columns a lane and a tree over the lanes of a row, are the block's. A warp forms, over its
// 32 rows of S and its share of the rows j of the window,
//   lambda^(i+1) sum_d q_d S_d  +  sum_{j <= i} s_ij v_j
// for its 32 columns, and the partial sums of the d_k / 32 warps are added in ascending order. The
// sums over 16 rows of a fold are matrix products of bf16 terms accumulated in f32: v is bf16
// anyway, and lambda^(15-j) k_j is split into three terms that hold all 24 bits.
//
// What precedes S (forming, scores) is done while it is on its way; what follows is short, so that
// blocks come and go at nearly the pace of a kernel that only reads.
//
// Bytes per row and head at d 128: 64 KiB of S, 7.5 x 512 of the window, 4 KiB a step of folds (64
// KiB once in 16 tokens). Flops are 40 k a token.

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/pdl.cuh"

namespace godwit::cuda {
namespace {

constexpr int kTile = 32;     // rows, and columns, of S that a warp holds
constexpr int kPerChunk = 8;  // bf16 of a 16-byte access

// kKeyDim: d_k.
template <int kKeyDim_, bool kLrpe_>
struct Shape {
  static constexpr int kKeyDim = kKeyDim_;
  static constexpr bool kLrpe = kLrpe_;
  static constexpr int kHeadDim = kLrpe ? kKeyDim / 2 : kKeyDim;
  static constexpr int kGroups = 2;  // warps side by side over the columns of S
  static constexpr int kColumns = kTile * kGroups;
  static constexpr int kSlices = kHeadDim / kColumns;
  static constexpr int kKeyWarps = kKeyDim / kTile;
  static constexpr int kThreads = kWarp * kKeyWarps * kGroups;
  static constexpr int kKeyChunks = kKeyDim / kPerChunk;
  static constexpr int kHeadChunks = kHeadDim / kPerChunk;
  static constexpr int kValueChunks = kColumns / kPerChunk;
  // A chunk of k each, and what goes with it.
  static_assert(kThreads == kWindow * kKeyChunks && kThreads >= kWindow * kValueChunks);
  // Of S: 96 KiB a multiprocessor, 80 registers a thread. A fourth block would have to spill, and
  // only waits for memory that is busy.
  static constexpr int kBlocksPerMultiprocessor = kThreads <= 256 ? 768 / kThreads : 2;
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
  alignas(16) float q[kWindow][S::kKeyDim];
  alignas(16) float scores[kWindow][kWindow];  // of a token with the rows of its block
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
// Two 8 x 8 matrices of bf16; lane i < 16 gives the address of row i % 8 of matrix i / 8.
__device__ inline void LoadTransposed(uint32_t (&to)[2], const Bf16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(SharedAddress(row))
               : "memory");
}
__device__ inline void CopyAsync(void* shared, const Bf16* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(SharedAddress(shared)), "l"(global)
               : "memory");
}
__device__ inline void WaitForCopies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Read once: L1 is for what is spilled and what blocks share.
__device__ inline float4 LoadOnce(const float* global) {
  float4 x;
  asm volatile("ld.global.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(global)
               : "memory");
  return x;
}
__device__ inline void PrefetchL2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
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
        group_(threadIdx.x / kWarp / S::kKeyWarps),
        tile_row_(threadIdx.x / S::kKeyChunks),
        chunk_(threadIdx.x % S::kKeyChunks) {}

  __device__ void Prefetch() const;
  __device__ void Load();
  __device__ void Run();

 private:
  static constexpr int kRowsPerWarp = kWindow / S::kKeyWarps;  // of the window

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
  __device__ const Bf16* Token(const TensorView& x, int token, int column) const {
    return Row<const Bf16>(x, place_.first_token + token) + head_ * S::kHeadDim + column;
  }
  __device__ int NumRows() const { return place_.first_row + place_.num_tokens; }

  // What is this thread's of the rows: a chunk of k of row tile_row_ (+ W), of v for some threads,
  // of q for some. It copies, forms and scores that without asking others.
  __device__ int KeyTokenRow() const {
    return tile_row_ < place_.first_row ? tile_row_ + kWindow : tile_row_;
  }
  __device__ int QueryToken() const {  // far from the threads of the same token's k
    return (tile_row_ - place_.first_row + kWindow + kWindow / 2) % kWindow;
  }
  __device__ bool HasValues() const { return threadIdx.x < kWindow * S::kValueChunks; }

  __device__ void LoadRows() const;
  __device__ void LoadLagging(int block) const;
  __device__ void Form(float (&x)[kPerChunk], const void* from, int token) const;
  __device__ void FormTokens() const;
  template <int kTokens>
  __device__ void ScoreTokens(const float (&k)[kPerChunk], int row, int of) const;
  __device__ void Score() const;
  __device__ void StoreState() const;
  __device__ void LoadValues(uint32_t (&v)[2][2], const Bf16 (*tile)[S::kColumns + 8],
                             int first) const;
  __device__ void Fold(const Bf16 (*k)[S::kKeyDim + 8], const Bf16 (*v)[S::kColumns + 8]);
  __device__ void FoldLagging();
  __device__ void AgainstState(int first_row, int begin, int end) const;
  __device__ void WriteOutputs() const;

  const LightningAttentionArgs& args_;
  Shared<S>& shared_;
  const Place place_;
  const int head_;
  const int first_column_;  // of the block's slice of S
  const int lane_;
  const int key_warp_;
  const int group_;
  const int tile_row_;
  const int chunk_;
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

// Rows from the anchor on: open ones from the ring, the step's own as they are.
template <typename S>
__device__ void Step<S>::LoadRows() const {
  const int num_rows = NumRows(), column = chunk_ * kPerChunk,
            token_column = chunk_ % S::kHeadChunks * kPerChunk;
#pragma unroll 1
  for (int row = tile_row_; row < num_rows; row += kWindow) {
    const int token = row - place_.first_row;
    CopyAsync(&shared_.rows.k[row][column],
              token < 0 ? Ring(row, KeyColumn() + column) : Token(args_.k, token, token_column));
  }
  if (QueryToken() < place_.num_tokens) {
    CopyAsync(&shared_.q[QueryToken()][column], Token(args_.q, QueryToken(), token_column));
  }
  if (!HasValues()) return;
  const int d = threadIdx.x % S::kValueChunks * kPerChunk;
#pragma unroll 1
  for (int row = threadIdx.x / S::kValueChunks; row < num_rows; row += kWindow) {
    const int token = row - place_.first_row;
    CopyAsync(&shared_.rows.v[row][d],
              token < 0 ? Ring(row, ValueColumn() + d) : Token(args_.v, token, first_column_ + d));
  }
}

// The whole block that is `block` blocks after the stored base.
template <typename S>
__device__ void Step<S>::LoadLagging(int block) const {
  const int first = (block - place_.num_lagging) * kWindow;
  CopyAsync(&shared_.lag.k[tile_row_][chunk_ * kPerChunk],
            Ring(first + tile_row_, KeyColumn() + chunk_ * kPerChunk));
  if (!HasValues()) return;
  const int row = threadIdx.x / S::kValueChunks, d = threadIdx.x % S::kValueChunks * kPerChunk;
  CopyAsync(&shared_.lag.v[row][d], Ring(first + row, ValueColumn() + d));
}

// This thread's eight columns of q or k of a token, from what the model gives: activation, LRPE.
template <typename S>
__device__ void Step<S>::Form(float (&x)[kPerChunk], const void* from, int token) const {
  const uint4 packed = *static_cast<const uint4*>(from);
  const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < kPerChunk; ++i) {
    x[i] = i % 2 == 0 ? LowHalf(pairs[i / 2]) : HighHalf(pairs[i / 2]);
    if (args_.qk_activation == Activation::kSilu) x[i] = Silu(x[i]);
  }
  if constexpr (S::kLrpe) {
    const float* const theta =
        Row<const float>(args_.theta, head_) + chunk_ % S::kHeadChunks * kPerChunk;
#pragma unroll
    for (int i = 0; i < kPerChunk; ++i) {
      float sine, cosine;
      SineAndCosine(theta[i], static_cast<double>(place_.position + token), &sine, &cosine);
      x[i] *= chunk_ < S::kHeadChunks ? cosine : sine;
    }
  }
}

// Queries in f32; keys rounded, also to the ring (by the block of the first slice), as values are.
template <typename S>
__device__ void Step<S>::FormTokens() const {
  const int num_rows = NumRows(), column = chunk_ * kPerChunk;
  float x[kPerChunk];
  if (QueryToken() < place_.num_tokens) {
    float* const q = &shared_.q[QueryToken()][column];
    Form(x, q, QueryToken());
#pragma unroll
    for (int i = 0; i < kPerChunk; i += 4) {
      *reinterpret_cast<float4*>(q + i) =
          make_float4(x[i] * args_.q_scale, x[i + 1] * args_.q_scale, x[i + 2] * args_.q_scale,
                      x[i + 3] * args_.q_scale);
    }
  }
  if (const int row = KeyTokenRow(); row < num_rows) {
    Bf16* const k = &shared_.rows.k[row][column];
    Form(x, k, row - place_.first_row);
    const uint4 rounded = make_uint4(RoundPair(x[0], x[1]), RoundPair(x[2], x[3]),
                                     RoundPair(x[4], x[5]), RoundPair(x[6], x[7]));
    *reinterpret_cast<uint4*>(k) = rounded;
    if (first_column_ == 0 && row - place_.first_row >= place_.first_open)
      *reinterpret_cast<uint4*>(Ring(row, KeyColumn() + column)) = rounded;
  }
  if (!HasValues()) return;
  int row = threadIdx.x / S::kValueChunks;
  if (row < place_.first_row) row += kWindow;
  if (row >= num_rows || row - place_.first_row < place_.first_open) return;
  const int d = threadIdx.x % S::kValueChunks * kPerChunk;
  *reinterpret_cast<uint4*>(Ring(row, ValueColumn() + d)) =
      *reinterpret_cast<const uint4*>(&shared_.rows.v[row][d]);
}

// Scores of kTokens tokens, from the one at tile row `of` on, with this thread's row of their block
// of W; 0 where the row comes after the token. The tree over the lanes of a row is the same for one
// token and for four, which share its upper two levels between them.
template <typename S>
template <int kTokens>
__device__ void Step<S>::ScoreTokens(const float (&k)[kPerChunk], int row, int of) const {
  const int first_token = of - place_.first_row;
  float sums[kTokens];
#pragma unroll
  for (int n = 0; n < kTokens; ++n) {
    const float* const q = &shared_.q[first_token + n][chunk_ * kPerChunk];
    sums[n] = 0;
#pragma unroll
    for (int i = 0; i < kPerChunk; i += 4) {
      const float4 x = *reinterpret_cast<const float4*>(q + i);
      sums[n] = fmaf(x.x, k[i], sums[n]);
      sums[n] = fmaf(x.y, k[i + 1], sums[n]);
      sums[n] = fmaf(x.z, k[i + 2], sums[n]);
      sums[n] = fmaf(x.w, k[i + 3], sums[n]);
    }
  }
  int token = 0, offset = S::kKeyChunks / 2;
#pragma unroll
  for (int n = kTokens / 2; n > 0; n /= 2, offset /= 2) {
    const bool upper = chunk_ & offset;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float sent = upper ? sums[i] : sums[i + n];
      sums[i] = upper ? sums[i + n] : sums[i];
      sums[i] += __shfl_xor_sync(0xffffffffu, sent, offset);
    }
    if (upper) token += n;
  }
  const int last = 2 * offset - 1;
#pragma unroll
  for (; offset > 0; offset /= 2) sums[0] += __shfl_xor_sync(0xffffffffu, sums[0], offset);
  if (chunk_ & last) return;
  const int distance = of + token - row;
  shared_.scores[first_token + token][tile_row_] =
      distance >= 0 ? sums[0] * shared_.decay[distance] : 0;
}

template <typename S>
__device__ void Step<S>::Score() const {
  const int num_rows = NumRows();
#pragma unroll 1
  for (int first = 0; first < num_rows; first += kWindow) {
    const int row = first + tile_row_, end = min(first + kWindow, num_rows);
    const uint4 packed = *reinterpret_cast<const uint4*>(&shared_.rows.k[row][chunk_ * kPerChunk]);
    const float k[kPerChunk] = {LowHalf(packed.x),  HighHalf(packed.x), LowHalf(packed.y),
                                HighHalf(packed.y), LowHalf(packed.z),  HighHalf(packed.z),
                                LowHalf(packed.w),  HighHalf(packed.w)};
    int of = max(first, place_.first_row);
#pragma unroll 1
    for (; of + 4 <= end; of += 4) ScoreTokens<4>(k, row, of);
#pragma unroll 1
    for (; of < end; ++of) ScoreTokens<1>(k, row, of);
  }
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

// Tokens whose rows are [begin, end), of the block that begins at first_row: q S over this warp's
// rows of S, and its share of the rows of the window.
template <typename S>
__device__ void Step<S>::AgainstState(int first_row, int begin, int end) const {
  float v[kRowsPerWarp];
#pragma unroll
  for (int m = 0; m < kRowsPerWarp; ++m) {
    const int row = first_row + key_warp_ * kRowsPerWarp + m;
    v[m] = row < end ? __bfloat162float(shared_.rows.v[row][group_ * kTile + lane_]) : 0;
  }
  const bool upper = lane_ & 2, odd = lane_ & 1;
  const float* decay = &shared_.decay[begin - first_row + 1];
#pragma unroll 1
  for (int token = begin - place_.first_row; token < end - place_.first_row; ++token) {
    const float* const q = &shared_.q[token][key_warp_ * kTile + lane_ % 4 * 2];
    float sums[4] = {};
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const float2 x = *reinterpret_cast<const float2*>(q + 8 * u);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[i] = fmaf(x.x, state_[2 * u][i], sums[i]);
        sums[i] = fmaf(x.y, state_[2 * u + 1][i], sums[i]);
      }
    }
    // Over the 4 lanes t; lane t keeps column 4 g + t.
    float keep0 = upper ? sums[2] : sums[0], keep1 = upper ? sums[3] : sums[1];
    keep0 += __shfl_xor_sync(0xffffffffu, upper ? sums[0] : sums[2], 2);
    keep1 += __shfl_xor_sync(0xffffffffu, upper ? sums[1] : sums[3], 2);
    float sum = (odd ? keep1 : keep0) + __shfl_xor_sync(0xffffffffu, odd ? keep0 : keep1, 1);
    sum *= *decay++;
#pragma unroll
    for (int m = 0; m < kRowsPerWarp; ++m)
      sum = fmaf(shared_.scores[token][key_warp_ * kRowsPerWarp + m], v[m], sum);
    shared_.partial[key_warp_][token][group_ * kTile + lane_] = sum;
  }
}

template <typename S>
__device__ void Step<S>::WriteOutputs() const {
  constexpr int kPieces = S::kColumns / 4;
#pragma unroll 1
  for (int i = threadIdx.x; i < place_.num_tokens * kPieces; i += S::kThreads) {
    const int token = i / kPieces, d = i % kPieces * 4;
    float4 sum = *reinterpret_cast<const float4*>(&shared_.partial[0][token][d]);
#pragma unroll
    for (int warp = 1; warp < S::kKeyWarps; ++warp) {
      const float4 more = *reinterpret_cast<const float4*>(&shared_.partial[warp][token][d]);
      sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
    }
    const int64_t row = place_.first_token + token,
                  column = head_ * S::kHeadDim + first_column_ + d;
    if (args_.o.dtype == DType::kF32) {
      *reinterpret_cast<float4*>(Row<float>(args_.o, row) + column) = sum;
    } else {
      *reinterpret_cast<uint2*>(Row<Bf16>(args_.o, row) + column) =
          make_uint2(RoundPair(sum.x, sum.y), RoundPair(sum.z, sum.w));
    }
  }
}

// Asks for everything that the block reads.
template <typename S>
__device__ void Step<S>::Load() {
  const float* const from = State();
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    const float4 x = LoadOnce(from + (r / 2 * 8 + r % 2) * S::kHeadDim);
    state_[r][0] = x.x;
    state_[r][1] = x.y;
    state_[r][2] = x.z;
    state_[r][3] = x.w;
  }
  LoadRows();
  if (place_.num_lagging > 0) LoadLagging(0);
  if (threadIdx.x <= kWindow)
    shared_.decay[threadIdx.x] = Row<const float>(args_.decay.decay, head_)[threadIdx.x];
}

// The blocks between the stored base and the anchor; the first is loaded.
template <typename S>
__device__ void Step<S>::FoldLagging() {
  for (int block = 0; block < place_.num_lagging; ++block) {
    if (block > 0) {
      LoadLagging(block);
      WaitForCopies();
      __syncthreads();
    }
    Fold(shared_.lag.k, shared_.lag.v);
    if (block + 1 == place_.num_stored) StoreState();
    __syncthreads();  // the tile is loaded anew, or overwritten by partial sums
  }
}

template <typename S>
__device__ void Step<S>::Run() {
  WaitForCopies();
  FormTokens();
  __syncthreads();
  Score();
  FoldLagging();
  __syncthreads();
  const int num_rows = NumRows();
#pragma unroll 1
  for (int first = 0; first < num_rows;
       first += kWindow) {  // the block of the anchor, and the one after it
    AgainstState(first, max(first, place_.first_row), min(first + kWindow, num_rows));
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

}  // namespace

cudaError_t LaunchLightningStep(const LightningAttentionArgs& args, Context& context) {
  if (args.num_decode_rows == 0) return cudaSuccess;
  const bool aligned = Aligned(args.q) && Aligned(args.k) && Aligned(args.v) &&
                       Aligned(args.state) && Aligned(args.window) && Aligned(args.o);
  if (args.q.dtype == DType::kBF16 && aligned) {
    if (args.theta && args.head_dim == 64) return Launch<Shape<128, true>>(args, context);
    if (args.theta && args.head_dim == 128) return Launch<Shape<256, true>>(args, context);
    if (!args.theta && args.head_dim == 64) return Launch<Shape<64, false>>(args, context);
    if (!args.theta && args.head_dim == 128) return Launch<Shape<128, false>>(args, context);
  }
  return LaunchLightningRows(args, {0, args.num_decode_rows, 0, args.num_decode_tokens}, context);
}

}  // namespace godwit::cuda
