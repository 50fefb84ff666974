// Products on Hopper: bf16 in, f32 accumulators, one pass of TMA and wgmma. Bound by the memory up
// to some 200 rows, by the tensor cores beyond.
//
// A block computes tiles of 64 or 128 rows x Shape::kColumns columns of operand B: so many
// features, or half as many gate rows and the up rows of the same features, whose products then
// meet in the registers of one thread. Each of one or two warpgroups multiplies 64 rows; one thread
// of another warp copies: k in stages, as many as fit, running ahead into the next tile while this
// one is stored, and with the first weights before the kernels in front have ended (pdl.cuh).
//
// Up to 128 rows the width of a tile is chosen so that all multiprocessors have the same number of
// tiles, mostly one. Beyond, a cluster of two blocks has the same features and neighbouring rows:
// each copies half of B into both, which at 256 columns brings what an SM reads from the
// second-level cache to 32 KB per 4.2 million multiply-adds. Blocks are persistent; neighbours in
// time share rows and features.
//
// Results of 256 columns pass through shared memory in boxes of 128 bytes x 64 rows and leave as
// bulk stores, or as bulk additions (f32) which the second-level cache performs: the residual
// stream is not read here. Both drop what lies outside of y. Narrower ones are stored from the
// registers.
//
// What issues copies and products is uniform in the compiler's eyes (ElectOne, a shuffled index of
// the warpgroup): with descriptors in vector registers a stage costs 300 cycles of issue, and
// 4096 x 4096 takes 24 us for 16 rows instead of 16.
//
// Order of a sum: k ascending, 16 at a time, in one accumulator, in every shape. A row has the same
// bits whatever the number of rows.
//
// Measured on an H100 (copy 3.02 TB/s), with the forming of rows: 16384 x 4096 2.79 TB/s for 16
// rows and 2.70 for 64, 4096 x 4096 2.10 and 2.04, gated 11008 x 4096 2.86 and 2.79.

#include <algorithm>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/pdl.cuh"

namespace godwit::cuda {
namespace {

using hopper::SharedAddress;

constexpr int kBlockDepth = 64;  // of k: boxes of 128 bytes
constexpr int kGroup = 128;      // threads of a warpgroup
constexpr int kGroupRows = 64;
constexpr int kBoxBytes = kGroupRows * 128;  // of a result on its way out
constexpr int kBoxes = 2;                    // per warpgroup
constexpr int kRowPairsPerGroup =
    8;  // pairs of row tiles that are walked together, feature by feature
constexpr int kMaxSharedBytes = 227 << 10;

// What a block computes at a time.
template <int kGroups_, int kColumns_, int kCluster_>
struct Shape {
  static constexpr int kGroups = kGroups_;    // warpgroups, 64 rows each
  static constexpr int kColumns = kColumns_;  // rows of weights
  static constexpr int kCluster = kCluster_;  // blocks of neighbouring rows
  static constexpr int kRows = kGroups * kGroupRows;
  static constexpr int kHalf = kColumns / 2;
  static constexpr int kBlocks = kGroups == 1 && kColumns <= 64 ? 2 : 1;  // of k, in a stage
  static constexpr int kBlockWeightBytes = kColumns * kBlockDepth * 2;
  static constexpr int kWeightBytes = kBlocks * kBlockWeightBytes;
  static constexpr int kStageBytes = kWeightBytes + kBlocks * kRows * kBlockDepth * 2;
  static constexpr bool kBoxed = kColumns == 256;  // results leave through shared memory
  static constexpr int kResultBytes = kBoxed ? kGroups * kBoxes * kBoxBytes : 0;
  static constexpr int kOtherBytes = 1024 + kResultBytes + 256;
  static constexpr int kStages = (kMaxSharedBytes - kOtherBytes) / kStageBytes;
  static_assert(kStages >= 3 && 2 * kStages * 8 <= 256);
  static constexpr int kSharedBytes = kOtherBytes + kStages * kStageBytes;
  static constexpr int kThreads = kGroups * kGroup + (kBoxed ? kGroup : kWarp);
};

struct HopperArgs {
  int64_t num_rows, n, k;
  int32_t row_pairs;  // of row tiles: one cluster's
  int32_t feature_tiles;
  int32_t box_rows;  // of x, that a copy brings
  Activation activation;
  bool pairs;  // of results are aligned
  TensorView y;
};

// d (64, kN) = or += a (64, 16) b (kN, 16)^T, both from shared memory, columns contracted; d as in
// hopper::Product, whose other widths these are.
template <int kN>
__device__ __forceinline__ void WideProduct(float (&d)[kN / 2], uint64_t a, uint64_t b,
                                            int accumulate) {
  static_assert(kN == 96 || kN == 176 || kN == 256 || kN <= 128);
  // clang-format off
  if constexpr (kN == 96) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %50, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
        "}, %48, %49, p, 1, 1, 0, 0;\n}\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
        : "l"(a), "l"(b), "r"(accumulate));
  } else if constexpr (kN == 176) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %90, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n176k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87"
        "}, %88, %89, p, 1, 1, 0, 0;\n}\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
        : "l"(a), "l"(b), "r"(accumulate));
  } else if constexpr (kN == 256) {
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
  } else {
    hopper::Product<kN, hopper::Contract::kColumns, hopper::Contract::kColumns>(d, a, b, accumulate);
  }
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

// The tiles of a block, in the order in which it takes them.
template <typename S>
struct TileWalk {
  __device__ TileWalk(const HopperArgs& args)
      : args(args),
        tile(blockIdx.x / S::kCluster),
        step(gridDim.x / S::kCluster),
        rank(S::kCluster > 1 ? hopper::ClusterRank() : 0),
        count(args.row_pairs * args.feature_tiles) {}
  __device__ bool done() const { return tile >= count; }
  __device__ void Next() { tile += step; }
  // Groups of kRowPairsPerGroup row pairs; inside, all features, rows fastest.
  __device__ int row() const {
    if constexpr (S::kCluster == 1) return 0;
    return ((first_pair() + in_group() % pairs()) * S::kCluster + rank) * S::kRows;
  }
  __device__ int feature_tile() const { return S::kCluster == 1 ? tile : in_group() / pairs(); }

 private:
  __device__ int group_tiles() const { return kRowPairsPerGroup * args.feature_tiles; }
  __device__ int first_pair() const { return tile / group_tiles() * kRowPairsPerGroup; }
  __device__ int in_group() const { return tile % group_tiles(); }
  __device__ int pairs() const { return min(kRowPairsPerGroup, args.row_pairs - first_pair()); }
  const HopperArgs& args;
  int tile, step, rank, count;
};

// Stage and parity of a ring.
template <int kStages>
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

struct Maps {
  const CUtensorMap *x, *low, *high;
};

template <typename S, bool kGated>
__device__ __forceinline__ void CopyWeights(const Maps& maps, int feature_tile, int column,
                                            unsigned char* to, uint64_t* full) {
  const int feature = feature_tile * (kGated ? S::kHalf : S::kColumns);
  constexpr int kHalfBytes = S::kBlockWeightBytes / 2;
#pragma unroll
  for (int block = 0; block < S::kBlocks; ++block) {
    if constexpr (S::kCluster > 1) {
      const int rank = static_cast<int>(hopper::ClusterRank());
      hopper::LoadBoxMulticast(to + rank * kHalfBytes, rank == 0 ? maps.low : maps.high, column,
                               feature + (kGated ? 0 : rank * S::kHalf), full, 3);
    } else {
      hopper::LoadBox(to, maps.low, column, feature, full);
      if constexpr (kGated) hopper::LoadBox(to + kHalfBytes, maps.high, column, feature, full);
    }
    to += S::kBlockWeightBytes;
    column += kBlockDepth;
  }
}
template <typename S>
__device__ __forceinline__ void CopyRows(const HopperArgs& args, const Maps& maps, int row,
                                         int column, unsigned char* to, uint64_t* full) {
#pragma unroll
  for (int block = 0; block < S::kBlocks; ++block) {
    hopper::LoadBox(to + block * args.box_rows * 128, maps.x, column + block * kBlockDepth, row,
                    full);
  }
}

template <typename S>
__device__ __forceinline__ int NumSteps(const HopperArgs& args) {
  constexpr int kDepth = S::kBlocks * kBlockDepth;
  return static_cast<int>((args.k + kDepth - 1) / kDepth);
}

// One thread. The first weights come before the kernels in front have ended (pdl.cuh).
template <typename S, bool kGated>
__device__ __forceinline__ void CopyTiles(const HopperArgs& args, const Maps& maps,
                                          const Shared& shared) {
  constexpr int kDepth = S::kBlocks * kBlockDepth;
  const int num_steps = NumSteps<S>(args), num_ahead = min(S::kStages, num_steps);
  const uint32_t num_bytes = S::kWeightBytes + S::kBlocks * args.box_rows * 128;
  auto stage = [&](int i) { return shared.stages + i * S::kStageBytes; };
  TileWalk<S> walk(args);
  for (int step = 0; step < num_ahead; ++step) {
    hopper::BarrierArriveExpect(&shared.full[step], num_bytes);
    CopyWeights<S, kGated>(maps, walk.feature_tile(), step * kDepth, stage(step),
                           &shared.full[step]);
  }
  DependencyWait();
  RingPosition<S::kStages> at;
  for (int step = 0; step < num_ahead; ++step, at.Next()) {
    CopyRows<S>(args, maps, walk.row(), step * kDepth, stage(step) + S::kWeightBytes,
                &shared.full[step]);
  }
  for (int first = num_ahead; !walk.done(); walk.Next(), first = 0) {
    for (int step = first; step < num_steps; ++step, at.Next()) {
      hopper::BarrierWait(&shared.empty[at.stage], at.parity ^ 1);
      uint64_t* full = &shared.full[at.stage];
      hopper::BarrierArriveExpect(full, num_bytes);
      CopyWeights<S, kGated>(maps, walk.feature_tile(), step * kDepth, stage(at.stage), full);
      CopyRows<S>(args, maps, walk.row(), step * kDepth, stage(at.stage) + S::kWeightBytes, full);
    }
  }
}

// The blocks that copy may fill the stage again. Nothing was written that the arrival would
// have to publish: with release semantics for the cluster it costs a fence of the whole device.
template <typename S>
__device__ __forceinline__ void ReleaseStage(const Shared& shared, int stage) {
  const uint32_t rank = threadIdx.x % kGroup;
  if constexpr (S::kCluster > 1) {
    if (rank < S::kCluster) hopper::BarrierArriveRemote(&shared.empty[stage], rank);
  } else {
    if (rank == 0) hopper::BarrierArrive(&shared.empty[stage]);
  }
}

// All of k into `sums`. Stage s is released when the products of stage s + 1 have been issued.
template <typename S>
__device__ __forceinline__ void MultiplyTile(const HopperArgs& args, const Shared& shared,
                                             int group, RingPosition<S::kStages>& at,
                                             float (&sums)[S::kColumns / 2]) {
  using Tile = hopper::Tile<128>;
  const int num_steps = NumSteps<S>(args);
  int previous = -1;
  for (int i = 0; i < num_steps; ++i, at.Next()) {
    hopper::BarrierWait(&shared.full[at.stage], at.parity);
    const uint32_t stage = SharedAddress(shared.stages + at.stage * S::kStageBytes);
    const uint64_t a = Tile::ContractColumns(stage + S::kWeightBytes + group * kGroupRows * 128);
    const uint64_t b = Tile::ContractColumns(stage);
    hopper::Pin(sums);
    hopper::ProductsBegin();
#pragma unroll
    for (int block = 0; block < S::kBlocks; ++block) {
#pragma unroll
      for (int step = 0; step < kBlockDepth / 16; ++step) {
        WideProduct<S::kColumns>(
            sums, a + static_cast<uint32_t>(block * args.box_rows * 8) + step * 2,
            b + block * (S::kBlockWeightBytes / 16) + step * 2, i > 0 || block > 0 || step > 0);
      }
    }
    hopper::ProductsCommit();
    hopper::Pin(sums);
    hopper::ProductsWait<1>();
    if (previous >= 0) ReleaseStage<S>(shared, previous);
    previous = at.stage;
  }
  hopper::ProductsWait<0>();
  hopper::Pin(sums);
  ReleaseStage<S>(shared, previous);
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

// Of a gated product: the first half of the sums become the results.
template <int kSums>
__device__ __forceinline__ void Gate(Activation activation, float (&sums)[kSums]) {
  if (activation == Activation::kSilu) {
#pragma unroll
    for (int i = 0; i < kSums / 2; ++i) sums[i] = Silu(sums[i]);
  }
#pragma unroll
  for (int i = 0; i < kSums / 2; ++i) sums[i] *= sums[i + kSums / 2];
}

// Results through shared memory, in boxes.
template <bool kF32, bool kAdd, int kResults, int kSums>
__device__ __forceinline__ void StoreBoxes(const CUtensorMap* y, unsigned char* boxes, int group,
                                           int row, int column, const float (&results)[kSums]) {
  constexpr int kColumns = kF32 ? 32 : 64;  // of a box
  constexpr int kValues = kColumns / 2;     // of a thread
  const bool leader = threadIdx.x % kGroup == 0;
#pragma unroll
  for (int part = 0; part < kResults / kValues; ++part) {
    unsigned char* box = boxes + part % kBoxes * kBoxBytes;
    if (leader) hopper::StoreWaitRead<kBoxes - 1>();
    hopper::NamedBarrierSync(1 + group, kGroup);
    WriteBox<kF32>(results + part * kValues, box);
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

__device__ __forceinline__ void AddPair(float* to, float a, float b) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(a), "f"(b)
               : "memory");
}

// Results column and column + 1 of a row, as far as they exist.
template <bool kF32, bool kAdd>
__device__ __forceinline__ void StorePair(const HopperArgs& args, int row, int column, float a,
                                          float b) {
  if (column >= args.n) return;
  if (!args.pairs) {
    StoreAny(args.y, row, column, kAdd ? a + LoadAny(args.y, row, column) : a);
    if (column + 1 >= args.n) return;
    StoreAny(args.y, row, column + 1, kAdd ? b + LoadAny(args.y, row, column + 1) : b);
  } else if constexpr (kAdd) {
    AddPair(Row<float>(args.y, row) + column, a, b);
  } else if constexpr (kF32) {
    *reinterpret_cast<float2*>(Row<float>(args.y, row) + column) = {a, b};
  } else {
    *reinterpret_cast<uint32_t*>(Row<Bf16>(args.y, row) + column) = hopper::PackBf16(a, b);
  }
}

// Results from the registers: of few rows, or of a width that boxes do not divide.
template <bool kF32, bool kAdd, int kResults, int kSums>
__device__ __forceinline__ void StoreDirectly(const HopperArgs& args, int row, int column,
                                              const float (&results)[kSums]) {
  const int lane = threadIdx.x % kWarp;
  row += threadIdx.x % kGroup / kWarp * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half, row += 8) {
    if (row >= args.num_rows) break;
#pragma unroll
    for (int part = 0; part < kResults / 4; ++part) {  // of 8 columns
      StorePair<kF32, kAdd>(args, row, column + part * 8 + lane % 4 * 2,
                            results[4 * part + 2 * half], results[4 * part + 2 * half + 1]);
    }
  }
}

template <typename S, bool kGated, bool kF32, bool kAdd>
__global__ void __launch_bounds__(S::kThreads, 1)
    HopperProductKernel(const __grid_constant__ CUtensorMap x,
                        const __grid_constant__ CUtensorMap low,
                        const __grid_constant__ CUtensorMap high,
                        const __grid_constant__ CUtensorMap y,
                        const __grid_constant__ HopperArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ unsigned char raw[];
  Shared shared;
  shared.stages = raw + (1024 - SharedAddress(raw) % 1024) % 1024;
  shared.boxes = shared.stages + S::kStages * S::kStageBytes;
  shared.full = reinterpret_cast<uint64_t*>(shared.boxes + S::kResultBytes);
  shared.empty = shared.full + S::kStages;
  DependencyTrigger();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < S::kStages; ++stage) {
      hopper::BarrierInit(&shared.full[stage], 1);
      hopper::BarrierInit(&shared.empty[stage], S::kGroups * S::kCluster);
    }
    hopper::BarrierInitFence();
  }
  S::kCluster > 1 ? hopper::ClusterSync() : __syncthreads();
  // The same in all lanes, for the compiler too.
  const int group = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / kGroup, 0);
  if (group == S::kGroups) {
    if constexpr (S::kBoxed) hopper::GiveRegistersBack<24>();
    if (threadIdx.x < S::kGroups * kGroup + kWarp && hopper::ElectOne()) {
      CopyTiles<S, kGated>(args, {.x = &x, .low = &low, .high = &high}, shared);
    }
  } else {
    if constexpr (S::kBoxed) hopper::TakeRegisters<240>();
    DependencyWait();
    constexpr int kResults = S::kColumns / (kGated ? 4 : 2);
    RingPosition<S::kStages> at;
    float sums[S::kColumns / 2];
    for (TileWalk<S> walk(args); !walk.done(); walk.Next()) {
      MultiplyTile<S>(args, shared, group, at, sums);
      const int row = walk.row() + group * kGroupRows;
      const int column = walk.feature_tile() * (kGated ? S::kHalf : S::kColumns);
      if constexpr (kGated) Gate(args.activation, sums);
      if constexpr (S::kBoxed) {
        StoreBoxes<kF32, kAdd, kResults>(&y, shared.boxes + group * kBoxes * kBoxBytes, group, row,
                                         column, sums);
      } else {
        StoreDirectly<kF32, kAdd, kResults>(args, row, column, sums);
      }
    }
    if (S::kBoxed && threadIdx.x % kGroup == 0) hopper::StoreWait<0>();
  }
  if constexpr (S::kCluster > 1) {
    __syncwarp();
    hopper::ClusterSync();  // nobody arrives in a block that has ended
  }
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

// y in boxes of kGroupRows x 128 bytes.
cudaError_t MakeResultMap(const TensorView& y, CUtensorMap* map) {
  const int64_t row_stride = y.rows() > 1 ? y.row_stride : y.shape[1];
  return y.dtype == DType::kBF16
             ? hopper::MakeTensorMap(y.data, y.rows(), y.shape[1], row_stride, kGroupRows, 128, map)
             : MakeFloatTensorMap(y, row_stride, kGroupRows, map);
}

template <typename S, bool kGated, bool kF32, bool kAdd>
cudaError_t LaunchKernel(const CUtensorMap (&maps)[4], const HopperArgs& args,
                         const Context& context) {
  auto* kernel = HopperProductKernel<S, kGated, kF32, kAdd>;
  static const cudaError_t raised =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
  if (raised != cudaSuccess) return raised;
  const int64_t clusters = std::min<int64_t>(context.num_multiprocessors / S::kCluster,
                                             int64_t{args.row_pairs} * args.feature_tiles);
  return LaunchDependent<S::kCluster>(kernel, dim3(static_cast<unsigned>(clusters * S::kCluster)),
                                      dim3(S::kThreads), S::kSharedBytes, context.stream, maps[0],
                                      maps[1], maps[2], maps[3], args);
}

template <typename S, bool kGated>
cudaError_t Launch(const Product& product, const Bf16* x, int64_t x_stride,
                   const Context& context) {
  const int64_t num_rows = product.num_rows(), n = product.n, k = product.k;
  const auto box_rows = static_cast<int>(std::min<int64_t>(S::kRows, DivideUp(num_rows, 8) * 8));
  CUtensorMap maps[4] = {};
  cudaError_t error = hopper::MakeTensorMap(x, num_rows, k, x_stride, box_rows, 128, &maps[0]);
  const Bf16* const halves[] = {kGated ? product.gate : product.w, product.w};
  constexpr int kWeightRows = S::kCluster > 1 || kGated ? S::kHalf : S::kColumns;
  for (int half = 0; half < 2 && error == cudaSuccess; ++half) {
    error = hopper::MakeTensorMap(halves[half], n, k, k, kWeightRows, 128, &maps[1 + half]);
  }
  if (error == cudaSuccess && S::kBoxed) error = MakeResultMap(product.y, &maps[3]);
  if (error != cudaSuccess) return error;
  const HopperArgs args = {
      .num_rows = num_rows,
      .n = n,
      .k = k,
      .row_pairs = static_cast<int32_t>(DivideUp(num_rows, S::kRows * S::kCluster)),
      .feature_tiles = static_cast<int32_t>(DivideUp(n, kGated ? S::kHalf : S::kColumns)),
      .box_rows = box_rows,
      .activation = product.activation,
      .pairs = n % 2 == 0 && Aligned(product.y),
      .y = product.y};
  const bool f32 = product.y.dtype == DType::kF32;
  if constexpr (!kGated) {
    if (product.add) return LaunchKernel<S, false, true, true>(maps, args, context);
  }
  return f32 ? LaunchKernel<S, kGated, true, false>(maps, args, context)
             : LaunchKernel<S, kGated, false, false>(maps, args, context);
}

// The time of a product, in rows of operands that one block copies: every wave of tiles takes its
// weights and rows.
template <typename S, bool kGated>
int64_t Cost(const Product& product, int num_multiprocessors) {
  const int64_t tiles = DivideUp(product.num_rows(), S::kRows * S::kCluster) *
                        DivideUp(product.n, kGated ? S::kHalf : S::kColumns);
  return DivideUp(tiles, num_multiprocessors / S::kCluster) * (S::kColumns + kGroupRows);
}

template <bool kGated, typename... Shapes>
cudaError_t LaunchFastest(const Product& product, const Bf16* x, int64_t x_stride,
                          const Context& context) {
  const int64_t costs[] = {Cost<Shapes, kGated>(product, context.num_multiprocessors)...};
  const auto fastest = std::min_element(std::begin(costs), std::end(costs)) - std::begin(costs);
  cudaError_t error = cudaErrorInvalidValue;
  int64_t index = 0;
  ((index++ == fastest ? void(error = Launch<Shapes, kGated>(product, x, x_stride, context))
                       : void()),
   ...);
  return error;
}

template <int kGroups>
cudaError_t LaunchFewRows(const Product& product, const Bf16* x, int64_t x_stride,
                          const Context& context) {
  return product.gate != nullptr
             ? LaunchFastest<true, Shape<kGroups, 176, 1>, Shape<kGroups, 128, 1>,
                             Shape<kGroups, 96, 1>, Shape<kGroups, 64, 1>>(product, x, x_stride,
                                                                           context)
             : LaunchFastest<false, Shape<kGroups, 128, 1>, Shape<kGroups, 96, 1>,
                             Shape<kGroups, 64, 1>, Shape<kGroups, 32, 1>>(product, x, x_stride,
                                                                           context);
}

}  // namespace

bool HopperTakes(const Context& context) { return context.compute_capability == 90; }

cudaError_t LaunchHopperProduct(const Product& product, const Bf16* x, int64_t x_stride,
                                Context& context) {
  if (product.num_rows() <= kGroupRows) {
    return LaunchFewRows<1>(product, x, x_stride, context);
  }
  if (product.num_rows() <= kFewRows) return LaunchFewRows<2>(product, x, x_stride, context);
  return product.gate != nullptr
             ? LaunchFastest<true, Shape<2, 256, 2>, Shape<2, 176, 2>>(product, x, x_stride,
                                                                       context)
             : LaunchFastest<false, Shape<2, 256, 2>, Shape<2, 128, 2>, Shape<2, 64, 2>>(
                   product, x, x_stride, context);
}

}  // namespace godwit::cuda
