// Products of some rows whose bits must not depend on their number, or whose shape the library does
// not take: the sums of linear_stream.cu, in the same order, with weights passing once per 32 rows.
//
// One block per multiprocessor owns n / grid output features and all of k. A tile is 16 rows of
// weights (16 features, or 8 of a gated product: gate rows, then up rows), the M side of
// mma.m16n8k16; rows of the step are the N side. A warp takes k-steps of 32 for up to kTiles tiles
// at once: lane 4 g + t copies 8 consecutive columns of rows g and g + 8 of each tile, exactly the
// bytes it multiplies. A dot product does not care which of its terms an instruction calls k =
// 0..15, so the 16 bytes are two fragments' worth, and the operand of the step is read in the same
// order. Because a lane reads only what it copied itself (cp.async into its own slots), the ring
// needs no barrier. Pieces of 64 bytes of a row: 75 to 80 % of the memory's bandwidth up to 32
// rows.
//
// Order of a sum: within a warp ascending k-steps of that warp, then warps 0..7. It depends on k
// alone, so a row has the same bits whatever the number of rows, their neighbours and the grid.

#include <algorithm>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/pdl.cuh"

namespace godwit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kStepColumns = 32;  // of k: 64 bytes of a row
constexpr int kColumnTiles = 4;   // of 8 rows of the step
constexpr int kBlockRows = 8 * kColumnTiles;
constexpr int kRowsPerTile = 16;
constexpr int kSlotBytes = kWarp * 16;  // what one instruction of a warp copies
constexpr int kRingBytes = 12288;       // a warp's, about

struct SkinnyArgs {
  const Bf16* x;  // [num_rows, k]
  int64_t x_stride;
  const Bf16* w;
  const Bf16* gate;
  int64_t n, k;
  int64_t num_rows;
  TensorView y;
  bool add;
  Activation activation;
};

__device__ __forceinline__ uint32_t SharedAddress(const void* data) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(data));
}
// 16 bytes past the first-level cache; `policy` is that of the second level.
__device__ __forceinline__ void CopyAsync(uint32_t to, const void* from, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "l"(policy));
}
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void WaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ uint4 LoadShared(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address));
  return value;
}
__device__ __forceinline__ uint64_t EvictFirst() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint64_t EvictNormal() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void MultiplyAdd(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                            uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// kTiles tiles of weights times 8 * kColumnTiles rows of the step.
template <int kTiles>
struct Layout {
  static constexpr int kSlots = 2 * kTiles + kColumnTiles;
  static constexpr int kStageBytes = kSlots * kSlotBytes;
  static constexpr int kStages = kRingBytes / kStageBytes > 3 ? kRingBytes / kStageBytes : 3;
  static constexpr int kAllRingBytes = kWarps * kStages * kStageBytes;
  static constexpr int kReduceStride =
      kTiles * kRowsPerTile + 4;  // floats; lanes of a store hit different banks
  __host__ __device__ static constexpr int64_t ReduceBytes(int64_t rows) {
    return int64_t{kWarps} * rows * kReduceStride * 4;
  }
  static int64_t SharedBytes(int64_t rows) { return kAllRingBytes + ReduceBytes(rows); }
};

// A lane's place in the block's weights. Stages are numbered over passes and k-steps alike, so that
// the ring runs on while a pass is reduced.
struct WeightWalk {
  const Bf16* row0;  // row g of tile 0, at this lane's columns
  const Bf16* row1;  // row g + 8
  int64_t tile_stride;
  int tiles0, tiles1;  // tiles in which those rows exist
};

__device__ __forceinline__ WeightWalk MakeWalk(const SkinnyArgs& args, int64_t begin, int count,
                                               int lane) {
  const int g = lane / 4, t = lane % 4;
  const bool gated = args.gate != nullptr;
  const int features = gated ? 8 : 16, second = gated ? 0 : 8;
  WeightWalk walk;
  walk.row0 = (gated ? args.gate : args.w) + (begin + g) * args.k + t * 8;
  walk.row1 = args.w + (begin + g + second) * args.k + t * 8;
  walk.tile_stride = features * args.k;
  walk.tiles0 = (count - g + features - 1) / features;
  walk.tiles1 = (count - g - second + features - 1) / features;
  return walk;
}

// K-steps of a warp: pairs of neighbours, so that both halves of a 128-byte line are asked for
// together.
__device__ __forceinline__ int NumSteps(int64_t k, int warp) {
  const int steps = static_cast<int>(k / kStepColumns);
  const int rest = steps % (2 * kWarps) - 2 * warp;
  return steps / (2 * kWarps) * 2 + (rest < 0 ? 0 : rest > 2 ? 2 : rest);
}
__device__ __forceinline__ int64_t StepColumn(int step, int warp, int64_t k) {
  return (int64_t{step / 2} * (2 * kWarps) + 2 * warp + step % 2) * kStepColumns;
}

template <int kTiles>
__device__ __forceinline__ void CopyWeights(const WeightWalk& walk, int first_tile, int64_t column,
                                            uint32_t slot, uint64_t policy) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int64_t offset = (first_tile + tile) * walk.tile_stride + column;
    if (first_tile + tile < walk.tiles0)
      CopyAsync(slot + (2 * tile) * kSlotBytes, walk.row0 + offset, policy);
    if (first_tile + tile < walk.tiles1)
      CopyAsync(slot + (2 * tile + 1) * kSlotBytes, walk.row1 + offset, policy);
  }
}

// Sums of a pass over the warps, in warp order, and what becomes of them.
template <typename Layout>
__device__ __forceinline__ void Finish(const SkinnyArgs& args, const float* reduce,
                                       int64_t first_feature, int num_features, int64_t first_row,
                                       int num_rows, float residual) {
  const bool gated = args.gate != nullptr;
  for (int index = threadIdx.x; index < num_features * num_rows; index += kThreads) {
    const int row = index / num_features, feature = index % num_features;
    const int tile_row = gated ? feature / 8 * kRowsPerTile + feature % 8 : feature;
    float sum = 0, up = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const float* of_warp = reduce + (warp * num_rows + row) * Layout::kReduceStride + tile_row;
      sum += of_warp[0];
      if (gated) up += of_warp[8];
    }
    if (gated) sum = (args.activation == Activation::kSilu ? Silu(sum) : sum) * up;
    if (args.add) {
      sum += index < kThreads ? residual
                              : Row<float>(args.y, first_row + row)[first_feature + feature];
    }
    StoreAny(args.y, first_row + row, first_feature + feature, sum);
  }
}

template <int kTiles>
__global__ void __launch_bounds__(kThreads, 1)
    SkinnyKernel(const __grid_constant__ SkinnyArgs args) {
  using L = Layout<kTiles>;
  extern __shared__ __align__(128) unsigned char shared[];
  float* reduce = reinterpret_cast<float*>(shared + L::kAllRingBytes);
  DependencyTrigger();

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int64_t begin = args.n * blockIdx.x / gridDim.x,
                end = args.n * (blockIdx.x + int64_t{1}) / gridDim.x;
  const int count = static_cast<int>(end - begin), features = args.gate != nullptr ? 8 : 16;
  const int num_tiles = (count + features - 1) / features,
            num_passes = (num_tiles + kTiles - 1) / kTiles;
  const int num_steps = NumSteps(args.k, warp);
  const int64_t first_row = int64_t{blockIdx.y} * kBlockRows;
  const int num_rows = static_cast<int>(min(int64_t{kBlockRows}, args.num_rows - first_row));
  const WeightWalk walk = MakeWalk(args, begin, count, lane);
  const uint64_t policy = gridDim.y == 1 ? EvictFirst() : EvictNormal();
  const uint32_t ring = SharedAddress(shared) + warp * (L::kStages * L::kStageBytes) + lane * 16;

  // The next stage to copy, and where its weights are.
  int copy_pass = 0, copy_step = 0, copy_slot = 0;
  auto copy_weights = [&] {
    if (copy_pass < num_passes && num_steps > 0) {
      CopyWeights<kTiles>(walk, copy_pass * kTiles, StepColumn(copy_step, warp, args.k),
                          ring + copy_slot * L::kStageBytes, policy);
    }
  };
  const Bf16* x[kColumnTiles];
#pragma unroll
  for (int tile = 0; tile < kColumnTiles; ++tile)
    x[tile] = args.x + (first_row + tile * 8 + g) * args.x_stride + t * 8;
  auto copy_rows = [&] {
    if (copy_pass >= num_passes || num_steps == 0) return;
    const int64_t column = StepColumn(copy_step, warp, args.k);
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
      if (tile * 8 + g >= num_rows)
        continue;  // a column of its own: what the slot holds is never stored
      const uint32_t to = ring + copy_slot * L::kStageBytes + (2 * kTiles + tile) * kSlotBytes;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(x[tile] + column));
    }
  };
  auto advance = [&] {
    if (++copy_step >= num_steps) copy_step = 0, ++copy_pass;
    if (++copy_slot == L::kStages) copy_slot = 0;
  };

  for (int stage = 0; stage < L::kStages - 1; ++stage) copy_weights(), advance();
  CommitCopies();
  DependencyWait();
  copy_pass = copy_step = copy_slot = 0;
  for (int stage = 0; stage < L::kStages - 1; ++stage) copy_rows(), CommitCopies(), advance();

  int slot = 0;
  for (int pass = 0; pass < num_passes; ++pass) {
    const int first = pass * kTiles * features,
              num_features = min(kTiles * features, count - first);
    float residual = 0;
    if (args.add && static_cast<int>(threadIdx.x) < num_features * num_rows) {
      residual = Row<float>(
          args.y,
          first_row + threadIdx.x / num_features)[begin + first + threadIdx.x % num_features];
    }
    float sums[kTiles][kColumnTiles][4] = {};
    for (int step = 0; step < num_steps; ++step) {
      copy_weights(), copy_rows(), CommitCopies(), advance();
      WaitCopies<L::kStages - 1>();
      const uint32_t stage = ring + slot * L::kStageBytes;
      if (++slot == L::kStages) slot = 0;
      uint4 b[kColumnTiles];
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; ++tile) {
        b[tile] = LoadShared(stage + (2 * kTiles + tile) * kSlotBytes);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint4 low = LoadShared(stage + 2 * tile * kSlotBytes),
                    high = LoadShared(stage + (2 * tile + 1) * kSlotBytes);
#pragma unroll
        for (int column = 0; column < kColumnTiles; ++column) {
          MultiplyAdd(sums[tile][column], low.x, high.x, low.y, high.y, b[column].x, b[column].y);
          MultiplyAdd(sums[tile][column], low.z, high.z, low.w, high.w, b[column].z, b[column].w);
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int column = 0; column < kColumnTiles; ++column) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = column * 8 + 2 * t + i % 2;
          if (row < num_rows) {
            reduce[(warp * num_rows + row) * L::kReduceStride + tile * kRowsPerTile + g +
                   i / 2 * 8] = sums[tile][column][i];
          }
        }
      }
    }
    __syncthreads();
    Finish<L>(args, reduce, begin + first, num_features, first_row, num_rows, residual);
    if (pass + 1 < num_passes) __syncthreads();
  }
}

template <int kTiles>
cudaError_t Launch(const SkinnyArgs& args, int grid, cudaStream_t stream) {
  using L = Layout<kTiles>;
  static_assert(L::kAllRingBytes + L::ReduceBytes(kBlockRows) <= 227 << 10);
  static const cudaError_t raised = cudaFuncSetAttribute(
      SkinnyKernel<kTiles>, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 << 10);
  if (raised != cudaSuccess) return raised;
  const auto bytes =
      static_cast<size_t>(L::SharedBytes(std::min<int64_t>(kBlockRows, args.num_rows)));
  const dim3 blocks(static_cast<unsigned>(grid),
                    static_cast<unsigned>(DivideUp(args.num_rows, kBlockRows)));
  return LaunchDependent(SkinnyKernel<kTiles>, blocks, dim3(kThreads), bytes, stream, args);
}

}  // namespace

cudaError_t LaunchSkinnyProduct(const Product& product, Context& context) {
  SkinnyArgs args = {.x = static_cast<const Bf16*>(product.input.x.data),
                     .x_stride = product.input.x.row_stride,
                     .w = product.w,
                     .gate = product.gate,
                     .n = product.n,
                     .k = product.k,
                     .num_rows = product.num_rows(),
                     .y = product.y,
                     .add = product.add,
                     .activation = product.activation};
  if (!product.plain_input()) {
    args.x_stride = args.k;
    const cudaError_t error = LaunchFormScratch(product, &args.x, context);
    if (error != cudaSuccess) return error;
  }
  const int grid = static_cast<int>(std::min<int64_t>(context.num_multiprocessors, args.n));
  const int64_t tiles = DivideUp(DivideUp(args.n, grid), args.gate != nullptr ? 8 : 16);
  return tiles <= 2 ? Launch<2>(args, grid, context.stream) : Launch<4>(args, grid, context.stream);
}

}  // namespace godwit::cuda
