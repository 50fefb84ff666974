// Products of one row: decode of one sequence. Bound by memory: weights pass once, 2 bytes an
// entry.
//
// One block per multiprocessor owns n / grid output features and all of k, and reads its weights
// nearly as they lie: eight rows at a time (the N side of mma.m16n8k16; the step's row is one of
// the M side), of these kSegmentBytes at a time by bulk copies. The size of a copy matters: pieces
// of 1 KB reach 2.6 TB/s where those of 2 KB reach 4 (H200). A ninth warp copies, a ring ahead, and
// starts before the kernels in front have ended (pdl.cuh). Eight warps multiply: a warp takes 64
// columns of every 512, a lane 8 of every 32. A dot product does not care which of its terms an
// instruction calls k = 0..15, so 16 bytes of a lane are two fragments' worth of either operand.
//
// Every block forms the row in its shared memory (norm, gate, rounding): no kernel in front, which
// is what it has over the Hopper kernel, the faster one from two rows on.
//
// Order of a sum: within a warp ascending k, then warps 0..7.
//
// Measured on an H100 that copies at 3.02 TB/s: 2.94 TB/s for 16384 x 4096, 2.50 for 4096 x 4096,
// 3.05 for 64000 x 4096; the products of a TransNormerLLM-7B step 2.89 TB/s, launch to launch.

#include <algorithm>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/form_rows.cuh"
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/pdl.cuh"

namespace godwit::cuda {
namespace {

using hopper::SharedAddress;

constexpr int kConsumerWarps = 8;
constexpr int kConsumers = kConsumerWarps * kWarp;
constexpr int kThreads = kConsumers + kWarp;
static_assert(kConsumers == kFormThreads);
constexpr int kGroupRows = 8;        // of weights: one pass over k
constexpr int kTileGroups = 2;       // of which the sums are reduced together
constexpr int kSegmentBytes = 2048;  // of a row
constexpr int kTurnBytes = 1024;     // of a row, 128 for each warp
constexpr int kTurns = kSegmentBytes / kTurnBytes;
constexpr int kPadBytes = 64;  // neighbouring rows start in different halves of the banks
constexpr int kRowBytes = kSegmentBytes + kPadBytes;
constexpr int kStageBytes = kGroupRows * kRowBytes;
// On their way are only kInFlight stages: on an H100 a step reads 2.89 TB/s with 3 into 8, 2.84
// with 4 into 4; two blocks of a multiprocessor with 2 or 3 each read 2.68 to 2.80. What is asked
// for at once decides, and one block must have it all.
constexpr int kStages = 8;
constexpr int kInFlight = 3;
constexpr int kRingBytes = kStages * kStageBytes;
constexpr int kReduceStride = kTileGroups * kGroupRows + 4;           // floats
constexpr int kReduceBytes = 2 * kConsumerWarps * kReduceStride * 4;  // two: one barrier a tile
constexpr int kBarrierBytes = 2 * kStages * 8;
static_assert((kRingBytes + kReduceBytes) % 16 == 0);
constexpr int64_t kMaxSharedBytes = 227 << 10;
// The next product's block comes when this one's has gone.
static_assert(kRingBytes > kMaxSharedBytes / 2);

struct StreamArgs {
  RowInput input;  // one row
  const Bf16* w;
  const Bf16* gate;
  int64_t n, k;
  bool add;
  Activation activation;
  TensorView y;
};

constexpr int64_t SharedBytes(int64_t k) {
  return kRingBytes + kReduceBytes + kBarrierBytes + k * 2;
}

__device__ __forceinline__ uint4 LoadShared(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address));
  return value;
}
__device__ __forceinline__ void MultiplyAdd(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                            uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void CopyBulk(uint32_t to, const void* from, uint32_t num_bytes,
                                         uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(num_bytes), "r"(SharedAddress(barrier)), "l"(policy)
      : "memory");
}

// The features of a block, in tiles of two groups of eight rows: neighbours, or gate and up rows of
// the same features.
struct Tiles {
  __device__ Tiles(const StreamArgs& args)
      : begin(args.n * blockIdx.x / gridDim.x),
        count(static_cast<int>(args.n * (blockIdx.x + int64_t{1}) / gridDim.x - begin)),
        features(args.gate != nullptr ? kGroupRows : kTileGroups * kGroupRows),
        num_tiles((count + features - 1) / features) {}
  int64_t begin;  // feature
  int count, features, num_tiles;
};

// A stage of the ring and the parity of its phase.
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void Next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// The copying warp: lane r brings row r of each group.
__device__ __forceinline__ void CopyWeights(const StreamArgs& args, const Tiles& tiles,
                                            unsigned char* ring, uint64_t* full, uint64_t* empty) {
  const int lane = threadIdx.x % kWarp;
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  const int64_t row_bytes = args.k * 2;
  RingPosition at, landing;
  int in_flight = 0;
  for (int tile = 0; tile < tiles.num_tiles; ++tile) {
    for (int group = 0; group < kTileGroups; ++group) {
      const bool gated = args.gate != nullptr;
      const int feature = tile * tiles.features + (gated ? 0 : group * kGroupRows);
      const int rows = min(kGroupRows, tiles.count - feature);
      if (rows <= 0) break;
      const auto* from = reinterpret_cast<const char*>(gated && group == 0 ? args.gate : args.w) +
                         (tiles.begin + feature + lane) * row_bytes;
      for (int64_t offset = 0; offset < row_bytes; offset += kSegmentBytes) {
        const auto num_bytes =
            static_cast<uint32_t>(min(int64_t{kSegmentBytes}, row_bytes - offset));
        hopper::BarrierWait(&empty[at.stage], at.parity ^ 1);
        if (in_flight < kInFlight) {
          ++in_flight;
        } else {
          hopper::BarrierWait(&full[landing.stage], landing.parity);
          landing.Next();
        }
        if (lane == 0) hopper::BarrierArriveExpect(&full[at.stage], num_bytes * rows);
        __syncwarp();
        if (lane < rows) {
          CopyBulk(SharedAddress(ring) + at.stage * kStageBytes + lane * kRowBytes, from + offset,
                   num_bytes, &full[at.stage], policy);
        }
        at.Next();
      }
    }
  }
}

// Sums over the warps, in their order, and what becomes of them: thread f has feature f.
__device__ __forceinline__ void Finish(const StreamArgs& args, const float* reduce, int64_t feature,
                                       float residual) {
  const bool gated = args.gate != nullptr;
  float sum = 0, up = 0;
#pragma unroll
  for (int warp = 0; warp < kConsumerWarps; ++warp) {
    const float* of_warp = reduce + warp * kReduceStride + threadIdx.x;
    sum += of_warp[0];
    if (gated) up += of_warp[kGroupRows];
  }
  if (gated) sum = (args.activation == Activation::kSilu ? Silu(sum) : sum) * up;
  StoreAny(args.y, 0, feature, sum + residual);
}

__device__ __forceinline__ void MultiplyTiles(const StreamArgs& args, const Tiles& tiles,
                                              unsigned char* ring, uint64_t* full, uint64_t* empty,
                                              float* reduce, const unsigned char* row) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const uint32_t operand = SharedAddress(row) + warp * 128 + t * 16;
  const uint32_t weights = SharedAddress(ring) + g * kRowBytes + warp * 128 + t * 16;
  const auto row_bytes = static_cast<int>(args.k * 2);
  RingPosition at;
  for (int tile = 0; tile < tiles.num_tiles; ++tile) {
    const int first = tile * tiles.features;
    const bool finishes = static_cast<int>(threadIdx.x) < min(tiles.features, tiles.count - first);
    const int64_t feature = tiles.begin + first + threadIdx.x;
    float residual = 0;
    if (args.add && finishes) residual = Row<float>(args.y, 0)[feature];
    float sums[kTileGroups][4] = {};
#pragma unroll
    for (int group = 0; group < kTileGroups; ++group) {
      if (args.gate == nullptr && first + group * kGroupRows >= tiles.count) break;
      for (int offset = 0; offset < row_bytes; offset += kSegmentBytes) {
        hopper::BarrierWait(&full[at.stage], at.parity);
#pragma unroll
        for (int part = 0; part < 2 * kTurns; ++part) {  // of 32 columns
          const int column = offset + part / 2 * kTurnBytes + part % 2 * 64;
          if (column + warp * 128 >= row_bytes) break;
          const uint4 b = LoadShared(weights + at.stage * kStageBytes + column - offset);
          const uint4 a = LoadShared(operand + column);
          MultiplyAdd(sums[group], a.x, 0, a.y, 0, b.x, b.y);
          MultiplyAdd(sums[group], a.z, 0, a.w, 0, b.z, b.w);
        }
        __syncwarp();
        if (lane == 0) hopper::BarrierArrive(&empty[at.stage]);
        at.Next();
      }
    }
    float* buffer = reduce + tile % 2 * kConsumerWarps * kReduceStride;
    if (g == 0) {
#pragma unroll
      for (int group = 0; group < kTileGroups; ++group) {
        *reinterpret_cast<float2*>(buffer + warp * kReduceStride + group * kGroupRows + 2 * t) = {
            sums[group][0], sums[group][1]};
      }
    }
    FormBarrier();
    if (finishes) Finish(args, buffer, feature, residual);
  }
}

// Three blocks fit the registers of a multiprocessor: this kernel's, the next product's and what
// lies between them.
__global__ void __launch_bounds__(kThreads, 3)
    StreamKernel(const __grid_constant__ StreamArgs args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char ring[];
  auto* reduce = reinterpret_cast<float*>(ring + kRingBytes);
  auto* full = reinterpret_cast<uint64_t*>(ring + kRingBytes + kReduceBytes);
  uint64_t* empty = full + kStages;
  auto* row = reinterpret_cast<unsigned char*>(empty + kStages);
  DependencyTrigger();
  if (threadIdx.x == kConsumers) {
    for (int stage = 0; stage < kStages; ++stage) {
      hopper::BarrierInit(&full[stage], 1);
      hopper::BarrierInit(&empty[stage], kConsumerWarps);
    }
    hopper::BarrierInitFence();
  }
  __syncthreads();
  const Tiles tiles(args);
  if (threadIdx.x >= kConsumers) {
    CopyWeights(args, tiles, ring, full, empty);
    return;
  }
  DependencyWait();
  FormRows<1>(args.input, 0, 1, args.k, reduce, [&](int, int64_t column, uint2 value) {
    *reinterpret_cast<uint2*>(row + column * 2) = value;
  });
  FormBarrier();
  MultiplyTiles(args, tiles, ring, full, empty, reduce, row);
#endif
}

}  // namespace

bool StreamTakes(const Product& product) {
  return product.num_rows() == 1 && SharedBytes(product.k) <= kMaxSharedBytes;
}

cudaError_t LaunchStreamProduct(const Product& product, Context& context) {
  static const cudaError_t raised = cudaFuncSetAttribute(
      StreamKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedBytes);
  if (raised != cudaSuccess) return raised;
  const StreamArgs args = {.input = product.input,
                           .w = product.w,
                           .gate = product.gate,
                           .n = product.n,
                           .k = product.k,
                           .add = product.add,
                           .activation = product.activation,
                           .y = product.y};
  const auto grid = static_cast<unsigned>(std::min<int64_t>(context.num_multiprocessors, args.n));
  return LaunchDependent(StreamKernel, dim3(grid), dim3(kThreads),
                         static_cast<size_t>(SharedBytes(args.k)), context.stream, args);
}

}  // namespace godwit::cuda
