// Products of many rows on Hopper: bf16 in, f32 accumulators, one pass of TMA and wgmma. Bound by
// the tensor cores.
//
// A block computes tiles of 128 rows x 256 columns of operand B: 256 features, or 128 gate and the
// 128 up rows of the same features, whose products then meet in the registers of one thread. Two
// warpgroups multiply 64 rows each, one thread of a third copies: k in stages of 64 columns,
// kStages deep, running ahead into the next tile while this one is stored. A cluster of two blocks
// has the same features and neighbouring rows: each copies half of B into both, which brings what
// an SM reads from the second-level cache to 32 KB per 4.2 million multiply-adds. Blocks are
// persistent; neighbours in time share rows and features.
//
// Results pass through shared memory in boxes of 128 bytes x 64 rows and leave as bulk stores, or
// as bulk additions (f32) which the second-level cache performs: the residual stream is not read
// here. Both drop what lies outside of y.
//
// Order of a sum: k ascending, 16 at a time, in one accumulator. A row has the same bits whatever
// the number of rows.

#include <algorithm>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/pdl.cuh"

namespace godwit::cuda {
namespace {

using hopper::SharedAddress;

constexpr int kTileRows = 128;
constexpr int kTileColumns = 256;  // rows of weights
constexpr int kHalfColumns = kTileColumns / 2;
constexpr int kStageDepth = 64;  // of k: boxes of 128 bytes
constexpr int kStages = 4;
constexpr int kCluster = 2;
constexpr int kConsumers = 2;  // warpgroups of 64 rows
constexpr int kGroup = 128;    // threads of a warpgroup
constexpr int kThreads = (kConsumers + 1) * kGroup;
constexpr int kRowsBytes = kTileRows * kStageDepth * 2;
constexpr int kHalfBytes = kHalfColumns * kStageDepth * 2;
constexpr int kStageBytes = kRowsBytes + 2 * kHalfBytes;
constexpr int kBoxRows = 64;
constexpr int kBoxBytes = kBoxRows * 128;  // of a result on its way out
constexpr int kBoxes = 2;                  // per warpgroup
constexpr int kSharedBytes =
    1024 + kStages * kStageBytes + kConsumers * kBoxes * kBoxBytes + 2 * kStages * 8;
static_assert(kSharedBytes <= 227 << 10);
constexpr int kRowPairsPerGroup =
    8;  // pairs of row tiles that are walked together, feature by feature

struct HopperArgs {
  int64_t num_rows, n, k;
  int32_t row_pairs;  // of row tiles: one cluster's
  int32_t feature_tiles;
  Activation activation;
};

// d (64, 256) = or += a (64, 16) b (256, 16)^T, both from shared memory, columns contracted; d as
// in hopper::Product.
__device__ __forceinline__ void Product256(float (&d)[128], uint64_t a, uint64_t b,
                                           int accumulate) {
  // clang-format off
  asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
        "}, %128, %129, p, 1, 1, 0, 0;\n}\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
        : "l"(a), "l"(b), "r"(accumulate));
  // clang-format on
}

// y[row.., column..] += the box, in f32.
__device__ __forceinline__ void AddBox(const CUtensorMap* map, int32_t column, int32_t row,
                                       const void* from) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%1, %2}], "
      "[%3];" ::"l"(map),
      "r"(column), "r"(row), "r"(SharedAddress(from))
      : "memory");
}

// The tiles of a cluster, in the order in which it takes them.
struct TileWalk {
  __device__ TileWalk(const HopperArgs& args)
      : args(args),
        tile(blockIdx.x / kCluster),
        step(gridDim.x / kCluster),
        count(args.row_pairs * args.feature_tiles) {}
  __device__ bool done() const { return tile >= count; }
  __device__ void Next() { tile += step; }
  // Groups of kRowPairsPerGroup row pairs; inside, all features, rows fastest.
  __device__ int row_pair() const { return first_pair() + in_group() % pairs(); }
  __device__ int feature_tile() const { return in_group() / pairs(); }

 private:
  __device__ int group_tiles() const { return kRowPairsPerGroup * args.feature_tiles; }
  __device__ int first_pair() const { return tile / group_tiles() * kRowPairsPerGroup; }
  __device__ int in_group() const { return tile % group_tiles(); }
  __device__ int pairs() const { return min(kRowPairsPerGroup, args.row_pairs - first_pair()); }
  const HopperArgs& args;
  int tile, step, count;
};

// Stage and parity of a ring.
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void Next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

struct Shared {
  unsigned char* stages;
  unsigned char* boxes;
  uint64_t *full, *empty;
};

template <bool kGated>
__device__ __forceinline__ void CopyTiles(const HopperArgs& args, const CUtensorMap* x,
                                          const CUtensorMap* low, const CUtensorMap* high,
                                          const Shared& shared) {
  const uint32_t rank = hopper::ClusterRank();
  const CUtensorMap* half = rank == 0 ? low : high;
  RingPosition at;
  for (TileWalk walk(args); !walk.done(); walk.Next()) {
    const int row = (walk.row_pair() * kCluster + static_cast<int>(rank)) * kTileRows;
    const int feature = walk.feature_tile() * (kGated ? kHalfColumns : kTileColumns) +
                        (kGated ? 0 : static_cast<int>(rank) * kHalfColumns);
    for (int column = 0; column < args.k; column += kStageDepth, at.Next()) {
      hopper::BarrierWait(&shared.empty[at.stage], at.parity ^ 1);
      uint64_t* full = &shared.full[at.stage];
      unsigned char* stage = shared.stages + at.stage * kStageBytes;
      hopper::BarrierArriveExpect(full, kStageBytes);
      hopper::LoadBox(stage, x, column, row, full);
      hopper::LoadBoxMulticast(stage + kRowsBytes + rank * kHalfBytes, half, column, feature, full,
                               (1 << kCluster) - 1);
    }
  }
}

// Both blocks of the cluster may fill the stage again. Nothing was written that the arrival would
// have to publish: with release semantics for the cluster it costs a fence of the whole device.
__device__ __forceinline__ void ReleaseStage(const Shared& shared, int stage) {
  const uint32_t rank = threadIdx.x % kGroup;
  if (rank >= kCluster) return;
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(
          SharedAddress(&shared.empty[stage])),
      "r"(rank)
      : "memory");
}

// All of k into `sums`. Stage s is released when the products of stage s + 1 have been issued.
__device__ __forceinline__ void MultiplyTile(const HopperArgs& args, const Shared& shared,
                                             int group, RingPosition& at,
                                             float (&sums)[kTileColumns / 2]) {
  using Tile = hopper::Tile<128>;
  const int num_stages = static_cast<int>((args.k + kStageDepth - 1) / kStageDepth);
  int previous = -1;
  for (int i = 0; i < num_stages; ++i, at.Next()) {
    hopper::BarrierWait(&shared.full[at.stage], at.parity);
    const uint32_t stage = SharedAddress(shared.stages + at.stage * kStageBytes);
    const uint64_t a = Tile::ContractColumns(stage + group * (kRowsBytes / kConsumers));
    const uint64_t b = Tile::ContractColumns(stage + kRowsBytes);
    hopper::Pin(sums);
    hopper::ProductsBegin();
#pragma unroll
    for (int step = 0; step < kStageDepth / 16; ++step) {
      Product256(sums, a + step * 2, b + step * 2, i > 0 || step > 0);
    }
    hopper::ProductsCommit();
    hopper::Pin(sums);
    hopper::ProductsWait<1>();
    if (previous >= 0) ReleaseStage(shared, previous);
    previous = at.stage;
  }
  hopper::ProductsWait<0>();
  hopper::Pin(sums);
  ReleaseStage(shared, previous);
}

// 32 f32 or 64 bf16 columns of the warpgroup's 64 rows, from `values` (as an accumulator lies),
// into a swizzled box.
template <bool kF32>
__device__ __forceinline__ void WriteBox(const float* values, unsigned char* box) {
  using Tile = hopper::Tile<128>;
  const uint32_t lane = threadIdx.x % kWarp, row = threadIdx.x % kGroup / kWarp * 16 + lane / 4;
  const uint32_t base = SharedAddress(box);
  if constexpr (kF32) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {  // of 8 columns
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t to =
            base + Tile::Offset(row + half * 8, part * 2 + lane % 4 / 2) + lane % 2 * 8;
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(values[4 * part + 2 * half]),
                     "f"(values[4 * part + 2 * half + 1])
                     : "memory");
      }
    }
  } else {
    // Lane l addresses row l % 16 of the warp, piece l / 16 of a pair.
    const uint32_t address_row = threadIdx.x % kGroup / kWarp * 16 + lane % 16;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {  // of 16 columns
      const float* v = values + 8 * pair;
      hopper::StoreMatrices(base + Tile::Offset(address_row, pair * 2 + lane / 16),
                            hopper::PackBf16(v[0], v[1]), hopper::PackBf16(v[2], v[3]),
                            hopper::PackBf16(v[4], v[5]), hopper::PackBf16(v[6], v[7]));
    }
  }
}

template <bool kGated, bool kF32, bool kAdd>
__device__ __forceinline__ void StoreTile(const HopperArgs& args, const CUtensorMap* y,
                                          unsigned char* boxes, int group, int row, int column,
                                          float (&sums)[kTileColumns / 2]) {
  constexpr int kColumns = kF32 ? 32 : 64;  // of a box
  constexpr int kValues = kColumns / 2;     // of a thread
  if constexpr (kGated) {
    constexpr int kResults = kTileColumns / 4;
    if (args.activation == Activation::kSilu) {
#pragma unroll
      for (int i = 0; i < kResults; ++i) sums[i] = Silu(sums[i]);
    }
#pragma unroll
    for (int i = 0; i < kResults; ++i) sums[i] *= sums[i + kResults];
  }
  const bool leader = threadIdx.x % kGroup == 0;
#pragma unroll
  for (int part = 0; part < (kGated ? kHalfColumns : kTileColumns) / kColumns; ++part) {
    unsigned char* box = boxes + part % kBoxes * kBoxBytes;
    if (leader) hopper::StoreWaitRead<kBoxes - 1>();
    hopper::NamedBarrierSync(1 + group, kGroup);
    WriteBox<kF32>(sums + part * kValues, box);
    hopper::FenceAsyncShared();
    hopper::NamedBarrierSync(1 + group, kGroup);
    if (!leader) continue;
    if constexpr (kAdd) {
      AddBox(y, column + part * kColumns, row, box);
    } else {
      hopper::StoreBox(y, column + part * kColumns, row, box);
    }
    hopper::StoreCommit();
  }
}

template <bool kGated, bool kF32, bool kAdd>
__global__ void __launch_bounds__(kThreads, 1)
    HopperProductKernel(const __grid_constant__ CUtensorMap x,
                        const __grid_constant__ CUtensorMap low,
                        const __grid_constant__ CUtensorMap high,
                        const __grid_constant__ CUtensorMap y,
                        const __grid_constant__ HopperArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ unsigned char raw[];
  Shared shared;
  shared.stages = raw + (1024 - SharedAddress(raw) % 1024) % 1024;
  shared.boxes = shared.stages + kStages * kStageBytes;
  shared.full = reinterpret_cast<uint64_t*>(shared.boxes + kConsumers * kBoxes * kBoxBytes);
  shared.empty = shared.full + kStages;
  DependencyTrigger();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      hopper::BarrierInit(&shared.full[stage], 1);
      hopper::BarrierInit(&shared.empty[stage], kConsumers * kCluster);
    }
    hopper::BarrierInitFence();
  }
  hopper::ClusterSync();
  DependencyWait();
  const int group = static_cast<int>(threadIdx.x) / kGroup;
  if (group == kConsumers) {
    hopper::GiveRegistersBack<24>();
    if (threadIdx.x == kConsumers * kGroup) CopyTiles<kGated>(args, &x, &low, &high, shared);
  } else {
    hopper::TakeRegisters<240>();
    RingPosition at;
    float sums[kTileColumns / 2];
    for (TileWalk walk(args); !walk.done(); walk.Next()) {
      MultiplyTile(args, shared, group, at, sums);
      const int row =
          (walk.row_pair() * kCluster + static_cast<int>(hopper::ClusterRank())) * kTileRows +
          group * kBoxRows;
      const int column = walk.feature_tile() * (kGated ? kHalfColumns : kTileColumns);
      StoreTile<kGated, kF32, kAdd>(args, &y, shared.boxes + group * kBoxes * kBoxBytes, group, row,
                                    column, sums);
    }
    if (threadIdx.x % kGroup == 0) hopper::StoreWait<0>();
  }
  __syncwarp();
  hopper::ClusterSync();  // nobody arrives in a block that has ended
#endif
}

// hopper::MakeTensorMap for f32: boxes of box_rows x 32 columns.
cudaError_t MakeFloatTensorMap(const TensorView& y, int64_t row_stride, int box_rows,
                               CUtensorMap* map) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                     &result);
    return reinterpret_cast<Encode>(function);
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(y.shape[1]),
                              static_cast<cuuint64_t>(y.rows())};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_stride) * 4};
  const cuuint32_t box[] = {32, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2, y.data, sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// y in boxes of kBoxRows x 128 bytes.
cudaError_t MakeResultMap(const TensorView& y, CUtensorMap* map) {
  const int64_t row_stride = y.rows() > 1 ? y.row_stride : y.shape[1];
  return y.dtype == DType::kBF16
             ? hopper::MakeTensorMap(y.data, y.rows(), y.shape[1], row_stride, kBoxRows, 128, map)
             : MakeFloatTensorMap(y, row_stride, kBoxRows, map);
}

template <bool kGated, bool kF32, bool kAdd>
cudaError_t Launch(const CUtensorMap (&maps)[4], const HopperArgs& args, int num_multiprocessors,
                   cudaStream_t stream) {
  auto* kernel = HopperProductKernel<kGated, kF32, kAdd>;
  static const cudaError_t raised =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (raised != cudaSuccess) return raised;
  const int64_t clusters = std::min<int64_t>(num_multiprocessors / kCluster,
                                             int64_t{args.row_pairs} * args.feature_tiles);
  return LaunchDependent<kCluster>(kernel, dim3(static_cast<unsigned>(clusters * kCluster)),
                                   dim3(kThreads), kSharedBytes, stream, maps[0], maps[1], maps[2],
                                   maps[3], args);
}

}  // namespace

bool HopperTakes(const Context& context) { return context.compute_capability == 90; }

cudaError_t LaunchHopperProduct(const Product& product, const Bf16* x, int64_t x_stride,
                                Context& context) {
  const int64_t num_rows = product.num_rows(), n = product.n, k = product.k;
  const bool gated = product.gate != nullptr, f32 = product.y.dtype == DType::kF32;
  CUtensorMap maps[4];
  cudaError_t error = hopper::MakeTensorMap(x, num_rows, k, x_stride, kTileRows, 128, &maps[0]);
  const Bf16* const halves[] = {gated ? product.gate : product.w, product.w};
  for (int half = 0; half < 2 && error == cudaSuccess; ++half) {
    error = hopper::MakeTensorMap(halves[half], n, k, k, kHalfColumns, 128, &maps[1 + half]);
  }
  if (error == cudaSuccess) error = MakeResultMap(product.y, &maps[3]);
  if (error != cudaSuccess) return error;
  const HopperArgs args = {
      .num_rows = num_rows,
      .n = n,
      .k = k,
      .row_pairs = static_cast<int32_t>(DivideUp(num_rows, kTileRows * kCluster)),
      .feature_tiles = static_cast<int32_t>(DivideUp(n, gated ? kHalfColumns : kTileColumns)),
      .activation = product.activation};
  const int sms = context.num_multiprocessors;
  if (gated && f32) return Launch<true, true, false>(maps, args, sms, context.stream);
  if (gated) return Launch<true, false, false>(maps, args, sms, context.stream);
  if (product.add) return Launch<false, true, true>(maps, args, sms, context.stream);
  if (f32) return Launch<false, true, false>(maps, args, sms, context.stream);
  return Launch<false, false, false>(maps, args, sms, context.stream);
}

}  // namespace godwit::cuda
