// Lightning attention of prompt rows: their whole blocks of P = 64 tokens on Hopper's tensor cores,
// what lies before and after them (and everything on other devices, in f32, or of other widths) by
// lightning_attention.cu.
//
// One thread block per (row, head, kColumns columns of d_v) scans the row's P-blocks in order; its
// part of the f32 state stays in registers throughout. Its warpgroups have roles:
//   loader  one thread: q, k, v of a block by TMA into a ring of stages.
//   output  O = [(Q K^T) . M] V + diag(lambda^(i+1)) Q S with S as bf16 from shared memory; o
//   leaves
//           by TMA.
//   state   dS = K^T (diag(lambda^(63-j)) V), the scaled V as the sum of two bf16;
//           S <- S + (dS - eps S); S as bf16 for the next block's output.
// So the only chain from block to block is the fold, and outputs overlap it. A column's arithmetic
// is the same whatever kColumns is: where there are few (row, head) pairs d_v is cut finer, so that
// every multiprocessor has work.
//
// Bound by memory where there are enough pairs (4 * 128 bf16 a token and head, of which 92% of a
// copy's speed is reached at 4 rows of 32 heads), else by a block's traffic with shared memory.
// Tried and dropped: kColumns = 128 (1.3 to 2 times slower than 64: one output warpgroup and one
// buffer of S is all that fits), multicast of q and k in clusters (-1 to +3% at 2 blocks; at 4
// the clusters do not fill the device: half the speed).

#include <algorithm>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/lightning_rows.cuh"
#include "kernels/cuda/pdl.cuh"

namespace godwit::cuda {
namespace {

using namespace hopper;

constexpr int kWarpgroup = 128;
constexpr int kMaxSharedBytes = 227 * 1024;
constexpr int kBarrierBytes = 1024;

// How a thread block is laid out.
template <int kKeyDim, int kColumns>
struct Plan {
  static constexpr int kBoxBytes = 2 * kColumns;  // of v, o, S and the scaled v: one box each
  static constexpr int kKeyBoxBytes = kPrefillBlock * 128;  // q and k: boxes of 64 columns
  static constexpr int kStateGroups = std::min(kKeyDim / 64, 2);
  static constexpr int kTiles = kKeyDim / 64 / kStateGroups;  // of 64 rows of S, a warpgroup's
  static constexpr int kOutputGroups = kColumns * kKeyDim > 128 * 64 ? 1 : 2;  // they take turns
  static constexpr int kThreads = (1 + kOutputGroups + kStateGroups) * kWarpgroup;
  // Together no more than the kernel begins with: 96 for 5 warpgroups, 128 for 4.
  static constexpr int kLoaderRegisters = 32;
  static constexpr int kRegisters = kThreads == 5 * kWarpgroup ? 112 : 152;

  static constexpr int kKeyBytes = kPrefillBlock * kKeyDim * 2;
  static constexpr int kValueBytes = kPrefillBlock * kColumns * 2;
  static constexpr int kStageBytes = 2 * kKeyBytes + kValueBytes;
  static constexpr int kStateBytes = kKeyDim * kColumns * 2;
  static constexpr int kStateBuffers = kOutputGroups;
  // Accumulators of dS. Two where registers and stages allow it: the products of a block then run
  // during the fold of the one before.
  static constexpr int kChanges = kColumns == 32 && kKeyDim <= 128 ? 2 : 1;
  static constexpr int kScaledBuffers = 2 * kChanges;
  static constexpr int kFixedBytes = kStateBuffers * kStateBytes +
                                     kScaledBuffers * 2 * kValueBytes +
                                     kOutputGroups * kValueBytes + kBarrierBytes;
  static constexpr int kStages = std::min((kMaxSharedBytes - kFixedBytes) / kStageBytes, 4);
  static constexpr int kSharedBytes = kStages * kStageBytes + kFixedBytes;
  static_assert(kStages > kChanges);  // or the next block to scale waits for one not yet folded
};

// Shared memory of a thread block, from offset 0: every part begins at a multiple of 1024.
template <int kKeyDim, int kColumns>
struct Shared {
  using P = Plan<kKeyDim, kColumns>;
  uint8_t* memory;

  struct Barriers {
    uint64_t full_kv[P::kStages], full_q[P::kStages], empty[P::kStages];
    uint64_t state_full[P::kStateBuffers], state_empty[P::kStateBuffers];
  };
  static_assert(sizeof(Barriers) <= kBarrierBytes);

  __device__ uint8_t* Q(int stage) const { return memory + stage * P::kStageBytes; }
  __device__ uint8_t* K(int stage) const { return Q(stage) + P::kKeyBytes; }
  __device__ uint8_t* V(int stage) const { return Q(stage) + 2 * P::kKeyBytes; }
  __device__ uint8_t* State(int buffer) const {
    return memory + P::kStages * P::kStageBytes + buffer * P::kStateBytes;
  }
  // The scaled v: its high parts, then its low parts.
  __device__ uint8_t* Scaled(int buffer) const {
    return State(P::kStateBuffers) + buffer * 2 * P::kValueBytes;
  }
  __device__ uint8_t* Output(int group) const {
    return Scaled(P::kScaledBuffers) + group * P::kValueBytes;
  }
  __device__ Barriers& barriers() const {
    return *reinterpret_cast<Barriers*>(Output(P::kOutputGroups));
  }
};

struct Maps {
  CUtensorMap q, k, v, o;  // o: only for bf16
};

// What a thread block works on.
struct Work {
  const LightningAttentionArgs& args;
  const StepRow& row;
  int head;
  int column;  // first of d_v
  int num_blocks;
  int first_token;  // of the first block

  __device__ const float* Decay() const { return Row<const float>(args.decay.decay, head); }
};

// Ring position of block `index`: which buffer, and the parity of its turn.
struct Turn {
  int buffer;
  uint32_t parity;
  __device__ Turn(int index, int num_buffers)
      : buffer(index % num_buffers), parity(static_cast<uint32_t>(index / num_buffers) & 1) {}
};

// One arrival for the warp, after what all of its lanes read or wrote.
__device__ __forceinline__ void WarpArrive(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % kWarp == 0) BarrierArrive(barrier);
}

template <int kKeyDim, int kColumns>
__device__ __forceinline__ void LoadBlocks(const Shared<kKeyDim, kColumns>& shared,
                                           const Work& work, const Maps& maps) {
  using P = Plan<kKeyDim, kColumns>;
  auto& barriers = shared.barriers();
  auto load_keys = [&](uint8_t* to, const CUtensorMap* map, int token, uint64_t* barrier) {
    for (int box = 0; box < kKeyDim / 64; ++box) {
      LoadBox(to + box * P::kKeyBoxBytes, map, work.head * kKeyDim + box * 64, token, barrier);
    }
  };
  for (int block = 0; block < work.num_blocks; ++block) {
    const Turn turn(block, P::kStages);
    const int token = work.first_token + block * kPrefillBlock;
    BarrierWait(&barriers.empty[turn.buffer], turn.parity ^ 1);
    uint64_t* full_kv = &barriers.full_kv[turn.buffer];
    uint64_t* full_q = &barriers.full_q[turn.buffer];
    BarrierArriveExpect(full_kv, P::kKeyBytes + P::kValueBytes);
    BarrierArriveExpect(full_q, P::kKeyBytes);
    load_keys(shared.K(turn.buffer), &maps.k, token, full_kv);
    LoadBox(shared.V(turn.buffer), &maps.v, work.head * work.args.head_dim + work.column, token,
            full_kv);
    load_keys(shared.Q(turn.buffer), &maps.q, token, full_q);
  }
}

// Rows [first_row, first_row + 64) of a tile from an accumulator, rounded to bf16.
template <int kColumns>
__device__ __forceinline__ void WriteTile(uint8_t* tile, int first_row,
                                          const float (&x)[kColumns / 2]) {
  const int warp = threadIdx.x / kWarp % 4, lane = threadIdx.x % kWarp, matrix = lane / 8;
  const auto row = static_cast<uint32_t>(first_row + warp * 16 + matrix % 2 * 8 + lane % 8);
  const uint32_t address = SharedAddress(tile);
#pragma unroll
  for (int j = 0; j < kColumns / 8; j += 2) {
    const auto piece = static_cast<uint32_t>(j + matrix / 2);
    const float* y = &x[4 * j];
    StoreMatrices(address + Tile<2 * kColumns>::Offset(row, piece), PackBf16(y[0], y[1]),
                  PackBf16(y[2], y[3]), PackBf16(y[4], y[5]), PackBf16(y[6], y[7]));
  }
}

// One warpgroup's factors of M and of the rows of Q S, with q_scale.
struct OutputFactors {
  // Row 16 warp + lane / 4 + 8 r and column 8 n + 2 (lane % 4) + c of a block are 8 (r - n) + near
  // apart; [r - n + 7][c].
  float mask[9][2];
  float state[2];  // of the two rows

  __device__ explicit OutputFactors(const Work& work) {
    const int warp = threadIdx.x / kWarp % 4, lane = threadIdx.x % kWarp;
    const float* decay = work.Decay();
#pragma unroll
    for (int d = 0; d < 9; ++d) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int distance = 16 * warp + 8 * (d - 7) + lane / 4 - 2 * (lane % 4) - c;
        mask[d][c] = distance >= 0 ? work.args.q_scale * decay[distance] : 0;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
      state[r] = work.args.q_scale * decay[16 * warp + lane / 4 + 8 * r + 1];
  }

  // (Q K^T) . M as the A operand of the product with V, rounded to bf16.
  __device__ __forceinline__ void Mask(const float (&scores)[32], uint32_t (&p)[4][4]) const {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float* x = &scores[4 * n + 2 * r];
        const float* m = mask[r - n + 7];
        p[n / 2][n % 2 * 2 + r] = PackBf16(x[0] * m[0], x[1] * m[1]);
      }
    }
  }
};

template <int kKeyDim, int kColumns>
struct OutputRole {
  using P = Plan<kKeyDim, kColumns>;
  using KeyTile = Tile<128>;
  using ValueTile = Tile<P::kBoxBytes>;
  const Shared<kKeyDim, kColumns>& shared;
  const Work& work;
  const Maps& maps;
  int group;

  // Byte offset of columns [16 step, 16 step + 16) of q or k.
  __device__ static constexpr uint32_t KeyStep(int step) {
    return static_cast<uint32_t>(step / 4 * P::kKeyBoxBytes + step % 4 * 32);
  }

  __device__ void Run() const {
    auto& barriers = shared.barriers();
    const OutputFactors factors(work);
    for (int block = group; block < work.num_blocks; block += P::kOutputGroups) {
      const Turn stage(block, P::kStages), state(block, P::kStateBuffers);
      const uint32_t q = SharedAddress(shared.Q(stage.buffer)),
                     k = SharedAddress(shared.K(stage.buffer));
      BarrierWait(&barriers.full_kv[stage.buffer], stage.parity);
      BarrierWait(&barriers.full_q[stage.buffer], stage.parity);
      float scores[32];
      ProductsBegin();
      Pin(scores);
#pragma unroll
      for (int step = 0; step < kKeyDim / 16; ++step) {
        Product<64, Contract::kColumns, Contract::kColumns>(
            scores, KeyTile::ContractColumns(q + KeyStep(step)),
            KeyTile::ContractColumns(k + KeyStep(step)), step > 0);
      }
      ProductsCommit();
      BarrierWait(&barriers.state_full[state.buffer], state.parity);
      const uint32_t s = SharedAddress(shared.State(state.buffer));
      float o[kColumns / 2];
      ProductsBegin();
      Pin(o);
#pragma unroll
      for (int step = 0; step < kKeyDim / 16; ++step) {
        const uint32_t s_step = s + static_cast<uint32_t>(step) * 2 * ValueTile::kGroupBytes;
        Product<kColumns, Contract::kColumns, Contract::kRows>(
            o, KeyTile::ContractColumns(q + KeyStep(step)), ValueTile::ContractRows(s_step),
            step > 0);
      }
      ProductsCommit();
      ProductsWait<1>();
      Pin(scores);
      uint32_t p[4][4];
      factors.Mask(scores, p);
      ProductsWait<0>();
      Pin(o);
      WarpArrive(&barriers.state_empty[state.buffer]);
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) o[i] *= factors.state[i / 2 % 2];
      const uint32_t v = SharedAddress(shared.V(stage.buffer));
      ProductsBegin();
      Pin(o);
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const uint32_t v_step = v + static_cast<uint32_t>(step) * 2 * ValueTile::kGroupBytes;
        Product<kColumns, Contract::kRows>(o, p[step], ValueTile::ContractRows(v_step), 1);
      }
      ProductsCommit();
      ProductsWait<0>();
      Pin(o);
      WarpArrive(&barriers.empty[stage.buffer]);
      StoreOutput(o, work.first_token + block * kPrefillBlock);
    }
    if (threadIdx.x % kWarpgroup == 0) StoreWaitRead<0>();
  }

  __device__ __forceinline__ void StoreOutput(const float (&o)[kColumns / 2], int token) const {
    const int o_column = work.head * work.args.head_dim + work.column;
    if (work.args.o.dtype == DType::kF32) {
      const int warp = threadIdx.x / kWarp % 4, lane = threadIdx.x % kWarp;
      float* to = Row<float>(work.args.o, token + 16 * warp + lane / 4) + o_column + 2 * (lane % 4);
#pragma unroll
      for (int i = 0; i < kColumns / 2; i += 2) {
        float* at = to + i / 2 % 2 * 8 * work.args.o.row_stride + i / 4 * 8;
        *reinterpret_cast<float2*>(at) = make_float2(o[i], o[i + 1]);
      }
      return;
    }
    uint8_t* tile = shared.Output(group);
    const bool is_first = threadIdx.x % kWarpgroup == 0;
    if (is_first) StoreWaitRead<0>();  // the tile before has left
    NamedBarrierSync(1 + group, kWarpgroup);
    WriteTile<kColumns>(tile, 0, o);
    FenceAsyncShared();
    NamedBarrierSync(1 + group, kWarpgroup);
    if (!is_first) return;
    StoreBox(&maps.o, o_column, token, tile);
    StoreCommit();
  }
};

template <int kKeyDim, int kColumns>
struct StateRole {
  using P = Plan<kKeyDim, kColumns>;
  using KeyTile = Tile<128>;
  using ValueTile = Tile<P::kBoxBytes>;
  static constexpr int kThreads = P::kStateGroups * kWarpgroup;
  static constexpr int kPieces = P::kValueBytes / 16 / kThreads;  // 16-byte pieces of v, a thread's
  const Shared<kKeyDim, kColumns>& shared;
  const Work& work;
  int thread;  // of kThreads

  __device__ __forceinline__ int first_row() const { return thread / kWarpgroup * P::kTiles * 64; }

  // hi + lo = decay[63 - j] v_j up to 2^-17 of it: the products with k are then exact to what f32
  // sums lose.
  __device__ __forceinline__ void ScaleValues(const float (&weights)[kPieces], const uint8_t* v,
                                              uint8_t* scaled) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int offset = (thread + i * kThreads) * 16;
      uint4 in = *reinterpret_cast<const uint4*>(v + offset), high, low;
      const auto* x = reinterpret_cast<const __nv_bfloat162*>(&in);
      auto* hi = reinterpret_cast<__nv_bfloat162*>(&high);
      auto* lo = reinterpret_cast<__nv_bfloat162*>(&low);
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        float2 y = __bfloat1622float2(x[pair]);
        y.x *= weights[i];
        y.y *= weights[i];
        hi[pair] = __floats2bfloat162_rn(y.x, y.y);
        const float2 rounded = __bfloat1622float2(hi[pair]);
        lo[pair] = __floats2bfloat162_rn(y.x - rounded.x, y.y - rounded.y);
      }
      *reinterpret_cast<uint4*>(scaled + offset) = high;
      *reinterpret_cast<uint4*>(scaled + P::kValueBytes + offset) = low;
    }
    FenceAsyncShared();
  }

  __device__ __forceinline__ void PublishState(int block,
                                               const float (&s)[P::kTiles][kColumns / 2]) const {
    auto& barriers = shared.barriers();
    const Turn turn(block, P::kStateBuffers);
    BarrierWait(&barriers.state_empty[turn.buffer], turn.parity ^ 1);
#pragma unroll
    for (int tile = 0; tile < P::kTiles; ++tile) {
      WriteTile<kColumns>(shared.State(turn.buffer), first_row() + tile * 64, s[tile]);
    }
    FenceAsyncShared();
    WarpArrive(&barriers.state_full[turn.buffer]);
  }

  // Element [tile][i] of this thread's part of the state in memory; i even, [i + 1] follows it.
  __device__ __forceinline__ float2* Stored(int tile, int i) const {
    const int warp = threadIdx.x / kWarp % 4, lane = threadIdx.x % kWarp;
    const int key_row = first_row() + tile * 64 + 16 * warp + lane / 4 + i / 2 % 2 * 8;
    const int64_t value_dim = work.args.head_dim;
    return reinterpret_cast<float2*>(Row<float>(work.args.state, work.row.slot) +
                                     (int64_t{work.head} * kKeyDim + key_row) * value_dim +
                                     work.column + i / 4 * 8 + 2 * (lane % 4));
  }

  __device__ __forceinline__ void Multiply(int block,
                                           float (&change)[P::kTiles][kColumns / 2]) const {
    const uint32_t k = SharedAddress(shared.K(block % P::kStages)),
                   scaled = SharedAddress(shared.Scaled(block % P::kScaledBuffers));
    ProductsBegin();
#pragma unroll
    for (int tile = 0; tile < P::kTiles; ++tile) {
      Pin(change[tile]);
      const uint32_t k_tile = k + static_cast<uint32_t>(first_row() / 64 + tile) * P::kKeyBoxBytes;
#pragma unroll
      for (int step = 0; step < 8; ++step) {  // the low parts first: they are small
        const uint32_t v_step = scaled + (step < 4 ? P::kValueBytes : 0) +
                                static_cast<uint32_t>(step % 4) * 2 * ValueTile::kGroupBytes;
        const uint32_t k_step = k_tile + static_cast<uint32_t>(step % 4) * 2 * KeyTile::kGroupBytes;
        Product<kColumns, Contract::kRows, Contract::kRows>(
            change[tile], KeyTile::ContractRows(k_step), ValueTile::ContractRows(v_step), step > 0);
      }
    }
    ProductsCommit();
  }

  // A buffer of the scaled v is written again only after a barrier that every warp passed when its
  // products with it were done.
  __device__ __forceinline__ void Scale(const float (&weights)[kPieces], int block) const {
    const Turn stage(block, P::kStages);
    BarrierWait(&shared.barriers().full_kv[stage.buffer], stage.parity);
    ScaleValues(weights, shared.V(stage.buffer), shared.Scaled(block % P::kScaledBuffers));
  }

  __device__ void Run() const {
    auto& barriers = shared.barriers();
    float s[P::kTiles][kColumns / 2];
#pragma unroll
    for (int tile = 0; tile < P::kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < kColumns / 2; i += 2) {
        const float2 pair = *Stored(tile, i);
        s[tile][i] = pair.x;
        s[tile][i + 1] = pair.y;
      }
    }
    PublishState(0, s);
    float weights[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int j = (thread + i * kThreads) * 16 / P::kBoxBytes % kPrefillBlock;
      weights[i] = work.Decay()[kPrefillBlock - 1 - j];
    }
    const float epsilon = Row<const float>(work.args.decay.fold_epsilon, work.head)[1];
    // The fold of a block whose products are done.
    auto fold = [&](int block, float(&change)[P::kTiles][kColumns / 2]) {
      WarpArrive(&barriers.empty[block % P::kStages]);
#pragma unroll
      for (int tile = 0; tile < P::kTiles; ++tile) {
        Pin(change[tile]);
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) s[tile][i] += change[tile][i] - epsilon * s[tile][i];
      }
    };
    const int num_blocks = work.num_blocks;
    Scale(weights, 0);
    if (P::kChanges == 2 && num_blocks > 1) Scale(weights, 1);
    float change[P::kTiles][kColumns / 2];
    int block = 0;
    if constexpr (P::kChanges == 2) {
      for (; block + 1 < num_blocks; block += 2) {
        float next_change[P::kTiles][kColumns / 2];
        NamedBarrierSync(1 + P::kOutputGroups, kThreads);
        Multiply(block, change);
        Multiply(block + 1, next_change);
        if (block + 2 < num_blocks) Scale(weights, block + 2);
        ProductsWait<1>();
        fold(block, change);
        PublishState(block + 1, s);
        if (block + 3 < num_blocks) Scale(weights, block + 3);
        ProductsWait<0>();
        fold(block + 1, next_change);
        if (block + 2 < num_blocks) PublishState(block + 2, s);
      }
    }
    for (; block < num_blocks; ++block) {
      const bool is_last = block + 1 == num_blocks;
      NamedBarrierSync(1 + P::kOutputGroups, kThreads);
      Multiply(block, change);
      if (!is_last) Scale(weights, block + 1);
      ProductsWait<0>();
      fold(block, change);
      if (!is_last) PublishState(block + 1, s);
    }
#pragma unroll
    for (int tile = 0; tile < P::kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < kColumns / 2; i += 2)
        *Stored(tile, i) = make_float2(s[tile][i], s[tile][i + 1]);
    }
  }
};

template <int kKeyDim, int kColumns>
__global__ void __launch_bounds__(Plan<kKeyDim, kColumns>::kThreads, 1)
    BlocksKernel(const __grid_constant__ LightningAttentionArgs args,
                 const __grid_constant__ Maps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using P = Plan<kKeyDim, kColumns>;
  extern __shared__ __align__(1024) uint8_t memory[];
  const Shared<kKeyDim, kColumns> shared = {memory};
  DependencyTrigger();
  if (threadIdx.x == 0) {
    auto& barriers = shared.barriers();
    for (int stage = 0; stage < P::kStages; ++stage) {
      BarrierInit(&barriers.full_kv[stage], 1);
      BarrierInit(&barriers.full_q[stage], 1);
      BarrierInit(&barriers.empty[stage], 4 * (1 + P::kStateGroups));
    }
    for (int buffer = 0; buffer < P::kStateBuffers; ++buffer) {
      BarrierInit(&barriers.state_full[buffer], 4 * P::kStateGroups);
      BarrierInit(&barriers.state_empty[buffer], 4);
    }
    BarrierInitFence();
  }
  DependencyWait();
  const StepRow& row = args.rows[args.num_decode_rows + static_cast<int>(blockIdx.z)];
  if (!HasBlocks(row)) return;
  const Work work = {args,
                     row,
                     static_cast<int>(blockIdx.y),
                     static_cast<int>(blockIdx.x) * kColumns,
                     static_cast<int>((row.p_end - row.p_begin) / kPrefillBlock),
                     static_cast<int>(row.first_token + row.p_begin - row.position)};
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (warpgroup == 0) {
    GiveRegistersBack<P::kLoaderRegisters>();
    if (threadIdx.x < kWarp && ElectOne()) LoadBlocks<kKeyDim, kColumns>(shared, work, maps);
  } else if (warpgroup <= P::kOutputGroups) {
    TakeRegisters<P::kRegisters>();
    OutputRole<kKeyDim, kColumns>{shared, work, maps, warpgroup - 1}.Run();
  } else {
    TakeRegisters<P::kRegisters>();
    StateRole<kKeyDim, kColumns>{
        shared, work, static_cast<int>(threadIdx.x) - (1 + P::kOutputGroups) * kWarpgroup}
        .Run();
  }
#endif
}

template <int kKeyDim, int kColumns>
cudaError_t LaunchBlocks(const LightningAttentionArgs& args, const Maps& maps,
                         cudaStream_t stream) {
  using P = Plan<kKeyDim, kColumns>;
  const auto kernel = BlocksKernel<kKeyDim, kColumns>;
  if (const cudaError_t error = cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, P::kSharedBytes);
      error != cudaSuccess) {
    return error;
  }
  const dim3 grid(static_cast<unsigned>(args.head_dim / kColumns),
                  static_cast<unsigned>(args.num_heads),
                  static_cast<unsigned>(args.num_rows - args.num_decode_rows));
  return LaunchDependent(kernel, grid, P::kThreads, P::kSharedBytes, stream, args, maps);
}

// q and k of the P-blocks of a row as bf16: 8 columns a thread at a time. Blocks with the same
// blockIdx.x share a row.
constexpr int kFormThreads = 256;

__device__ __forceinline__ void Unpack(const uint4& packed, float (&x)[8]) {
  const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(&packed);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __bfloat1622float2(pairs[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}
__device__ __forceinline__ uint4 Pack(const float (&x)[8], const float (&factor)[8]) {
  uint4 packed;
  auto* pairs = reinterpret_cast<__nv_bfloat162*>(&packed);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i] = __floats2bfloat162_rn(x[2 * i] * factor[2 * i], x[2 * i + 1] * factor[2 * i + 1]);
  }
  return packed;
}

__global__ void __launch_bounds__(kFormThreads)
    FormBlocksKernel(const __grid_constant__ LightningAttentionArgs args, Bf16* q, Bf16* k) {
  DependencyTrigger();
  DependencyWait();
  const StepRow& row = args.rows[args.num_decode_rows + blockIdx.x];
  if (!HasBlocks(row)) return;
  const int64_t width = int64_t{args.num_heads} * KeyDim(args);
  const int num_pieces = args.num_heads * args.head_dim / 8;
  for (int64_t position = row.p_begin + blockIdx.y; position < row.p_end; position += gridDim.y) {
    const int64_t token = row.first_token + position - row.position;
    for (int piece = threadIdx.x; piece < num_pieces; piece += kFormThreads) {
      const int column = piece * 8, head = column / args.head_dim;
      const int64_t index = int64_t{head} * KeyDim(args) + column % args.head_dim;
      float x[2][8], sine[8], cosine[8];
      Unpack(*reinterpret_cast<const uint4*>(Row<const Bf16>(args.q, token) + column), x[0]);
      Unpack(*reinterpret_cast<const uint4*>(Row<const Bf16>(args.k, token) + column), x[1]);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        cosine[i] = 1;
        if (args.theta.data != nullptr) {
          SineAndCosine(static_cast<const float*>(args.theta.data)[column + i],
                        static_cast<double>(position), &sine[i], &cosine[i]);
        }
        if (args.qk_activation == Activation::kSilu) {
          x[0][i] = Silu(x[0][i]);
          x[1][i] = Silu(x[1][i]);
        }
      }
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        Bf16* to = part == 0 ? q + token * 2 * width : k + token * width;
        *reinterpret_cast<uint4*>(to + index) = Pack(x[part], cosine);
        if (args.theta.data == nullptr) continue;
        *reinterpret_cast<uint4*>(to + index + args.head_dim) = Pack(x[part], sine);
      }
    }
  }
}

bool Aligned(const TensorView& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.row_stride % 8 == 0;
}

// Static properties of a layer only: the bits of a sequence depend on them alone.
bool HasKernel(const LightningAttentionArgs& args, const Context& context) {
  return context.compute_capability == 90 && args.q.dtype == DType::kBF16 &&
         (args.head_dim == 64 || args.head_dim == 128) && Aligned(args.q) && Aligned(args.k) &&
         Aligned(args.v) && Aligned(args.o);
}

// Columns of d_v per thread block, the same bits whichever. 64 move q and k half as often as 32, a
// block of tokens takes them 1.3 times as long: where as many rounds of thread blocks do.
int NumColumns(const LightningAttentionArgs& args, const Context& context) {
  auto rounds = [&](int columns) {
    const int64_t num_blocks =
        int64_t{args.num_rows - args.num_decode_rows} * args.num_heads * (args.head_dim / columns);
    return static_cast<double>(DivideUp(num_blocks, context.num_multiprocessors));
  };
  return 1.3 * rounds(64) <= rounds(32) ? 64 : 32;
}

cudaError_t LaunchBlocksOf(const LightningAttentionArgs& args, const Maps& maps, int num_columns,
                           cudaStream_t stream) {
  switch (KeyDim(args) * 1000 + num_columns) {
    case 64064:
      return LaunchBlocks<64, 64>(args, maps, stream);
    case 64032:
      return LaunchBlocks<64, 32>(args, maps, stream);
    case 128064:
      return LaunchBlocks<128, 64>(args, maps, stream);
    case 128032:
      return LaunchBlocks<128, 32>(args, maps, stream);
    case 256064:
      return LaunchBlocks<256, 64>(args, maps, stream);
    case 256032:
      return LaunchBlocks<256, 32>(args, maps, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t MakeMaps(const LightningAttentionArgs& args, const FormedLightning& formed,
                     bool is_formed, int num_columns, Maps* maps) {
  const int64_t num_tokens = args.q.rows(), values = int64_t{args.num_heads} * args.head_dim;
  const int64_t keys = int64_t{args.num_heads} * KeyDim(args);
  const void* q = is_formed ? formed.q : args.q.data;
  const void* k = is_formed ? formed.k : args.k.data;
  const int box_bytes = 2 * num_columns;
  cudaError_t error = MakeTensorMap(q, num_tokens, keys, is_formed ? 2 * keys : args.q.row_stride,
                                    kPrefillBlock, 128, &maps->q);
  if (error != cudaSuccess) return error;
  error = MakeTensorMap(k, num_tokens, keys, is_formed ? keys : args.k.row_stride, kPrefillBlock,
                        128, &maps->k);
  if (error != cudaSuccess) return error;
  error = MakeTensorMap(args.v.data, num_tokens, values, args.v.row_stride, kPrefillBlock,
                        box_bytes, &maps->v);
  if (error != cudaSuccess || args.o.dtype != DType::kBF16) return error;
  return MakeTensorMap(args.o.data, num_tokens, values, args.o.row_stride, kPrefillBlock, box_bytes,
                       &maps->o);
}

cudaError_t LaunchAllBlocks(const LightningAttentionArgs& args, const FormedLightning& formed,
                            Context& context) {
  const bool is_formed = args.qk_activation != Activation::kNone || args.theta;
  if (is_formed) {
    const auto num_tokens = static_cast<unsigned>(args.q.rows() - args.num_decode_tokens);
    const dim3 grid(static_cast<unsigned>(args.num_rows - args.num_decode_rows),
                    std::min(num_tokens, 2048u));
    const cudaError_t error =
        LaunchDependent(FormBlocksKernel, grid, kFormThreads, 0, context.stream, args,
                        static_cast<Bf16*>(formed.q), static_cast<Bf16*>(formed.k));
    if (error != cudaSuccess) return error;
  }
  const int num_columns = NumColumns(args, context);
  Maps maps = {};
  const cudaError_t error = MakeMaps(args, formed, is_formed, num_columns, &maps);
  return error == cudaSuccess ? LaunchBlocksOf(args, maps, num_columns, context.stream) : error;
}

}  // namespace

cudaError_t LaunchLightningPrefill(const LightningAttentionArgs& args, Context& context) {
  const LightningRows rows = {args.num_decode_rows, args.num_rows - args.num_decode_rows,
                              args.num_decode_tokens, args.q.rows() - args.num_decode_tokens};
  if (rows.num_rows == 0 || rows.num_tokens == 0) return cudaSuccess;
  if (!HasKernel(args, context)) return LaunchLightningRows(args, rows, context);
  FormedLightning formed;
  cudaError_t error = FormLightning(args, rows, /*skip_blocks=*/true, context, &formed);
  if (error != cudaSuccess) return error;
  error = WalkLightning(args, rows, LightningPart::kBeforeBlocks, formed, context);
  if (error == cudaSuccess) error = LaunchAllBlocks(args, formed, context);
  if (error != cudaSuccess) return error;
  return WalkLightning(args, rows, LightningPart::kAfterBlocks, formed, context);
}

}  // namespace godwit::cuda
