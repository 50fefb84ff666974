// Softmax attention of decode and verify rows over a paged bf16 cache, head_dim 64 or 128, on
// Hopper and later. Bound by the bytes of the cache: 512 a key and kv head at head_dim 128.
//
// One launch. Each multiprocessor holds one block, which takes items (row, kv head, split of
// kAttentionSplit keys, query tile) from a counter until none is left: the grid does not know the
// contexts, so a recorded launch serves growing ones. One warp fetches: whole 16-key blocks of keys
// and values, 4 of them a stage, by bulk copies into a ring of 160 KiB. Eight warps compute, 4 a
// stage and in turns, each a block of 16 keys, with softmax state and output in registers. (Four
// warps, one a scheduler, were bound by the latency of their chains: 3.6 TB/s where memory gave
// 4.5.)
//
// Query tile: 8 queries (token, head of the group), each held as two bf16 rows, its high and low
// half, of an m16n8k16 product; likewise the weights. So a query and a weight keep 16 bits of
// mantissa, the result is that of f32 arithmetic to 4e-6, and one fetch of a key serves all query
// heads of its group. The contraction runs in the order of the lanes' 16-byte loads.
//
// Order of a sum, whatever the batch: within a split warp w adds blocks w, w + 8, ... in ascending
// order; then the 8 warps in order; then the splits in ascending order. The block that ends a (row,
// kv head, tile) last merges its splits.
//
// The step's own keys and values are rotated, rounded and put into the fetched block in shared
// memory by every block that needs them, and written to the cache by one.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/paged.cuh"
#include "kernels/cuda/pdl.cuh"

namespace godwit::cuda {
namespace {

constexpr int kTileQueries = 8;
constexpr int kWarps = 8;  // that compute; one more fetches
constexpr int kThreads = kWarps * kWarp;
constexpr int kStageBlocks = 4;
constexpr int kStagesInTurn = kWarps / kStageBlocks;  // the warps take turns, 4 at a stage
constexpr int kSplitBlocks = kAttentionSplit / kPagedBlock;
constexpr int kMaxRows = 1024;            // decode rows of a step
constexpr int kSharedBytes = 227 * 1024;  // of a block
constexpr int64_t kMaxPartialBytes = int64_t{64}
                                     << 20;  // beyond it a block goes over all splits of its item
constexpr int kConsumers = 1;                // id of the barrier of the computing warps
static_assert(kSplitBlocks % (kStageBlocks * kStagesInTurn) == 0);
constexpr float kLog2E = 1.4426950408889634f;

// kStepKeys: positions of the step are in it.
enum StageFlags : int32_t { kItemBegin = 1, kSplitEnd = 2, kItemEnd = 4, kStepKeys = 8 };

// What a stage holds.
struct Stage {
  int32_t row;  // -1: no more
  int32_t head;
  int32_t tile;  // of the row's queries
  int32_t first_block;
  int32_t num_blocks;
  int32_t flags;
};

// Sums over rows, inclusive.
struct Plan {
  int32_t items[kMaxRows];
  int32_t slots[kMaxRows];  // partial results of a query head: (split, token)
  int32_t whole_rows;       // no room for partial results: an item has all splits
};

struct Args {
  PagedAttentionArgs attention;
  float* partials;  // [num_slots * num_heads][head_dim]
  float2* stats;    // [num_slots * num_heads]: max (base 2) and sum
  int64_t num_slots;
  uint32_t* counters;  // [0]: items taken; then one for each (row, tile, kv head)
};

template <int kHeadDim>
struct Layout {
  static constexpr int kBlockElements = kPagedBlock * kHeadDim;
  static constexpr uint32_t kBlockBytes = kBlockElements * sizeof(Bf16);
  static constexpr int kStageBytes = 2 * kStageBlocks * static_cast<int>(kBlockBytes);
  static constexpr int kQueryStride = kHeadDim + 8;  // + 16 bytes: rows in different banks
  static constexpr int kMergeStride = kHeadDim + 4;
  struct Fixed {
    alignas(16) float merge[kWarps][kTileQueries][kMergeStride];
    alignas(16) Bf16 query[2][kTileQueries][kQueryStride];  // high and low halves
    float max[kWarps][kTileQueries];
    float sum[kWarps][kTileQueries];
    int32_t last;
    Plan plan;
    Stage stage[16];
    uint64_t full[16];
    uint64_t empty[16];
  };
  static constexpr int kStages =
      (kSharedBytes - static_cast<int>(sizeof(Fixed)) - 128) / kStageBytes;
  static_assert(kStages >= 3 && kStages <= 16);
  static constexpr int kBytes = kStages * kStageBytes + static_cast<int>(sizeof(Fixed)) + 128;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ inline float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// c += a . b, bf16, rows of a: lane / 4 and lane / 4 + 8.
__device__ inline void Multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What is read once leaves the second-level cache first.
__device__ inline uint64_t CachePolicy(bool read_once) {
  uint64_t once, normal;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(normal));
  return read_once ? once : normal;
}

// num_bytes, a multiple of 16, both sides aligned to 16 bytes; they count on `barrier`.
__device__ inline void CopyBulk(void* to_shared, const void* from, uint32_t num_bytes,
                                uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(hopper::SharedAddress(to_shared)),
      "l"(from), "r"(num_bytes), "r"(hopper::SharedAddress(barrier)), "l"(policy)
      : "memory");
}

// Two values as the high and the low halves of their bf16 pairs.
__device__ inline void SplitPair(float x, float y, uint32_t* high, uint32_t* low) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(x, y);
  const __nv_bfloat162 l = __floats2bfloat162_rn(x - __low2float(h), y - __high2float(h));
  *high = *reinterpret_cast<const uint32_t*>(&h);
  *low = *reinterpret_cast<const uint32_t*>(&l);
}

struct Item {
  int32_t row, head, tile, first_block, end_block;
};

__device__ inline int NumQueries(const PagedAttentionArgs& args, const StepRow& row) {
  return row.num_tokens * (args.num_heads / args.num_kv_heads);
}
__device__ inline int NumTiles(const PagedAttentionArgs& args, const StepRow& row) {
  return (NumQueries(args, row) + kTileQueries - 1) / kTileQueries;
}
__device__ inline int NumBlocks(const StepRow& row) {
  return static_cast<int>((row.position + row.num_tokens + kPagedBlock - 1) / kPagedBlock);
}
__device__ inline int NumSplits(const StepRow& row) {
  return (NumBlocks(row) + kSplitBlocks - 1) / kSplitBlocks;
}

// By one warp. Every block makes the same plan.
__device__ void MakePlan(const Args& args, Plan& plan) {
  const PagedAttentionArgs& attention = args.attention;
  const int lane = threadIdx.x % kWarp;
  int whole_rows = 0;
  for (int pass = 0; pass < 2; ++pass) {
    int items = 0, slots = 0;
    for (int first = 0; first < attention.num_decode_rows; first += kWarp) {
      int my_items = 0, my_slots = 0;
      if (first + lane < attention.num_decode_rows) {
        const StepRow& row = attention.rows[first + lane];
        if (row.num_tokens > 0) {
          const int splits = NumSplits(row);
          my_items = NumTiles(attention, row) * attention.num_kv_heads * (whole_rows ? 1 : splits);
          my_slots = splits * row.num_tokens;
        }
      }
      for (int offset = 1; offset < kWarp; offset *= 2) {
        const int other_items = __shfl_up_sync(0xffffffffu, my_items, offset);
        const int other_slots = __shfl_up_sync(0xffffffffu, my_slots, offset);
        if (lane >= offset) my_items += other_items;
        if (lane >= offset) my_slots += other_slots;
      }
      if (first + lane < attention.num_decode_rows) {
        plan.items[first + lane] = items + my_items;
        plan.slots[first + lane] = slots + my_slots;
      }
      items += __shfl_sync(0xffffffffu, my_items, kWarp - 1);
      slots += __shfl_sync(0xffffffffu, my_slots, kWarp - 1);
    }
    if (whole_rows || slots <= args.num_slots) break;
    whole_rows = 1;
  }
  if (lane == 0) plan.whole_rows = whole_rows;
}

__device__ Item FindItem(const PagedAttentionArgs& args, const Plan& plan, int index) {
  int low = 0, high = args.num_decode_rows - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (index < plan.items[middle]) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  Item item;
  item.row = low;
  const StepRow& row = args.rows[low];
  const int tiles = NumTiles(args, row);
  int rest = index - (low > 0 ? plan.items[low - 1] : 0);
  item.tile = rest % tiles;
  rest /= tiles;
  item.head = rest % args.num_kv_heads;
  const int split = rest / args.num_kv_heads;
  item.first_block = split * kSplitBlocks;
  item.end_block =
      plan.whole_rows ? NumBlocks(row) : min(item.first_block + kSplitBlocks, NumBlocks(row));
  return item;
}

// The fetching warp.
template <int kHeadDim>
__device__ void Fetch(const Args& args, typename Layout<kHeadDim>::Fixed& shared, char* ring) {
  using L = Layout<kHeadDim>;
  const PagedAttentionArgs& attention = args.attention;
  const int lane = threadIdx.x % kWarp;
  const int part = lane % 2, block_of_stage = lane / 2;
  const int num_items =
      attention.num_decode_rows > 0 ? shared.plan.items[attention.num_decode_rows - 1] : 0;
  int stage = 0;
  uint32_t parity = 1;
  auto advance = [&] {
    if (++stage == L::kStages) stage = 0, parity ^= 1;
  };
  for (int index = blockIdx.x; index < num_items;) {
    uint32_t taken = 0;
    if (lane == 0) taken = atomicAdd(&args.counters[0], 1u);
    const Item item = FindItem(attention, shared.plan, index);
    const StepRow& row = attention.rows[item.row];
    const int32_t* table = attention.block_tables + row.block_table;
    const uint64_t policy = CachePolicy(NumTiles(attention, row) == 1);
    const int first_step_block = static_cast<int>(row.position / kPagedBlock);
    const int64_t offset = (part * int64_t{attention.num_kv_heads} + item.head) * L::kBlockElements;
    int entry = 0;
    for (int block = item.first_block; block < item.end_block; block += kStageBlocks) {
      const int in_item = block - item.first_block;
      if (in_item % kWarp == 0)
        entry = block + lane < item.end_block ? __ldg(table + block + lane) : 0;
      const int num_blocks = min(kStageBlocks, item.end_block - block);
      hopper::BarrierWait(&shared.empty[stage], parity);
      if (lane == 0) {
        int32_t flags = in_item == 0 ? kItemBegin : 0;
        if (block + kStageBlocks >= item.end_block) flags |= kItemEnd | kSplitEnd;
        if ((block + kStageBlocks) % kSplitBlocks == 0) flags |= kSplitEnd;
        if (block + num_blocks > first_step_block) flags |= kStepKeys;
        shared.stage[stage] = {item.row, item.head, item.tile, block, num_blocks, flags};
        hopper::BarrierArriveExpect(&shared.full[stage],
                                    static_cast<uint32_t>(2 * num_blocks) * L::kBlockBytes);
      }
      __syncwarp();
      const int physical = __shfl_sync(0xffffffffu, entry, (in_item + block_of_stage) % kWarp);
      if (lane < 2 * num_blocks) {
        CopyBulk(ring + stage * L::kStageBytes + lane * static_cast<int>(L::kBlockBytes),
                 Row<const Bf16>(attention.blocks, physical) + offset, L::kBlockBytes,
                 &shared.full[stage], policy);
      }
      advance();
    }
    taken = __shfl_sync(0xffffffffu, taken, 0);
    // Each block fails once: this is the last of all, and leaves the counter as it found it.
    if (lane == 0 && taken == static_cast<uint32_t>(num_items) - 1) args.counters[0] = 0;
    index = static_cast<int>(gridDim.x + taken);
  }
  DependencyTrigger();
  hopper::BarrierWait(&shared.empty[stage], parity);
  if (lane == 0) {
    shared.stage[stage].row = -1;
    hopper::BarrierArrive(&shared.full[stage]);
  }
}

// The step's own keys and values in a fetched block, whose first position is `first`; values after
// the end of the row become 0, because a weight of 0 does not silence a NaN.
template <int kHeadDim>
__device__ void PutStepKeys(const PagedAttentionArgs& args, const StepRow& row, int head,
                            int64_t first, Bf16* block, bool write_cache) {
  const int lane = threadIdx.x % kWarp;
  const int64_t end = row.position + row.num_tokens;
  for (int r = 0; r < kPagedBlock; ++r) {
    const int64_t position = first + r;
    if (position < row.position) continue;
    Bf16* key = block + r * kHeadDim;
    Bf16* value = key + kPagedBlock * kHeadDim;
    if (position >= end) {
      for (int d = lane; d < kHeadDim; d += kWarp) Store(value + d, 0.0f);
      continue;
    }
    const int64_t token = row.first_token + position - row.position;
    Bf16* cached_key = CacheRow<Bf16>(args, row, position, 0, head);
    Bf16* cached_value = CacheRow<Bf16>(args, row, position, 1, head);
#pragma unroll
    for (int d = lane; d < kHeadDim; d += kWarp) {
      Store(key + d, Rotated<Bf16>(args, args.k, token, head, d));
      value[d] = Row<const Bf16>(args.v, token)[head * kHeadDim + d];
      if (!write_cache) continue;
      cached_key[d] = key[d];
      cached_value[d] = value[d];
    }
  }
  __syncwarp();
  hopper::FenceAsyncShared();
}

// A running softmax: sum of exp2(score - max) values and of the weights.
struct Running {
  float max = -INFINITY;
  float sum = 0;
};
// The factors of what was and of what is added.
__device__ inline float2 Merge(Running& running, float max, float sum) {
  const float new_max = fmaxf(running.max, max);
  const float safe = new_max == -INFINITY ? 0 : new_max;
  const float keep = Exp2(running.max - safe), add = Exp2(max - safe);
  running.max = new_max;
  running.sum = __fmaf_rn(sum, add, __fmul_rn(running.sum, keep));
  return {keep, add};
}
__device__ inline float MergeValue(float2 factors, float value, float added) {
  return __fmaf_rn(added, factors.y, __fmul_rn(value, factors.x));
}

// A computing warp.
template <int kHeadDim>
class Consumer {
  using L = Layout<kHeadDim>;
  using Fixed = typename L::Fixed;
  static constexpr int kChunks = kHeadDim / 32;  // 16-byte loads of a key by a lane
  static constexpr int kHalves = kHeadDim / 64;  // 16-byte loads of a value row by a lane
  static constexpr int kOwned =
      kTileQueries * kHeadDim / kThreads;  // elements of a tile's output by a thread

 public:
  __device__ Consumer(const Args& args, Fixed& shared)
      : args_(args), attention_(args.attention), shared_(shared) {}

  __device__ void Run(char* ring) {
    int stage_index = 0;
    uint32_t parity = 0;
    while (true) {
      hopper::BarrierWait(&shared_.full[stage_index], parity);
      const Stage stage = shared_.stage[stage_index];
      if (stage.row < 0) return;
      if (stage.flags & kItemBegin) BeginItem(stage);
      const bool my_turn = stage.first_block / kStageBlocks % kStagesInTurn == warp_ / kStageBlocks;
      if (my_turn && warp_ % kStageBlocks < stage.num_blocks) {
        const int block = warp_ % kStageBlocks;
        Bf16* keys = reinterpret_cast<Bf16*>(ring + stage_index * L::kStageBytes) +
                     block * 2 * L::kBlockElements;
        const int first = (stage.first_block + block) * kPagedBlock;
        if (stage.flags & kStepKeys) {
          PutStepKeys<kHeadDim>(attention_, attention_.rows[stage.row], stage.head, first, keys,
                                stage.tile == 0);
        }
        Attend(keys, first);
      }
      __syncwarp();
      if (lane_ == 0) hopper::BarrierArrive(&shared_.empty[stage_index]);
      if (stage.flags & kSplitEnd) EndSplit(stage);
      if (++stage_index == L::kStages) stage_index = 0, parity ^= 1;
    }
  }

 private:
  // Query `index` of the tile.
  __device__ int TokenOf(int index) const { return (first_query_ + index) / heads_of_group_; }
  __device__ int HeadOf(int head, int index) const {
    return head * heads_of_group_ + (first_query_ + index) % heads_of_group_;
  }

  __device__ void BeginItem(const Stage& stage) {
    const StepRow& row = attention_.rows[stage.row];
    first_query_ = stage.tile * kTileQueries;
    num_queries_ = min(kTileQueries, NumQueries(attention_, row) - first_query_);
    for (int chunk = thread_; chunk < kTileQueries * kHeadDim / 8; chunk += kThreads) {
      const int query = chunk / (kHeadDim / 8), d = chunk % (kHeadDim / 8) * 8;
      uint32_t high[4] = {}, low[4] = {};
      if (query < num_queries_) {
        const int64_t token = row.first_token + TokenOf(query);
        const int head = HeadOf(stage.head, query);
        const float scale = attention_.scale * kLog2E;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          SplitPair(Rotated<Bf16>(attention_, attention_.q, token, head, d + 2 * i) * scale,
                    Rotated<Bf16>(attention_, attention_.q, token, head, d + 2 * i + 1) * scale,
                    &high[i], &low[i]);
        }
      }
      *reinterpret_cast<uint4*>(&shared_.query[0][query][d]) = {high[0], high[1], high[2], high[3]};
      *reinterpret_cast<uint4*>(&shared_.query[1][query][d]) = {low[0], low[1], low[2], low[3]};
    }
    hopper::NamedBarrierSync(kConsumers, kThreads);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const uint4 high =
          *reinterpret_cast<const uint4*>(&shared_.query[0][group_][(4 * i + quad_) * 8]);
      const uint4 low =
          *reinterpret_cast<const uint4*>(&shared_.query[1][group_][(4 * i + quad_) * 8]);
      query_[i][0][0] = high.x, query_[i][0][1] = low.x, query_[i][0][2] = high.y,
      query_[i][0][3] = low.y;
      query_[i][1][0] = high.z, query_[i][1][1] = low.z, query_[i][1][2] = high.w,
      query_[i][1][3] = low.w;
    }
    last_key_ = group_ < num_queries_ ? static_cast<int>(row.position) + TokenOf(group_) : -1;
#pragma unroll
    for (int k = 0; k < kOwned; ++k) running_[k] = {}, total_o_[k] = 0;
    ResetSplit();
  }

  __device__ void ResetSplit() {
    split_ = {};
#pragma unroll
    for (int n = 0; n < kHalves * 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) o_[n][c] = 0;
    }
  }

  // 16 keys, of which the first has position `first`.
  __device__ void Attend(const Bf16* block, int first) {
    float product[2][2][4] = {};  // by parity of the load: shorter chains
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint4 key = *reinterpret_cast<const uint4*>(block + (n * 8 + group_) * kHeadDim +
                                                          (4 * i + quad_) * 8);
        Multiply(product[i % 2][n], query_[i][0], key.x, key.y);
        Multiply(product[i % 2][n], query_[i][1], key.z, key.w);
      }
    }
    float score[4], max = split_.max;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int key = first + c / 2 * 8 + 2 * quad_ + c % 2;
      const float(&even)[4] = product[0][c / 2], (&odd)[4] = product[1][c / 2];
      const float dot = (even[c % 2] + odd[c % 2]) + (even[c % 2 + 2] + odd[c % 2 + 2]);
      score[c] = key <= last_key_ ? dot : -INFINITY;
      max = fmaxf(max, score[c]);
    }
    max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
    max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2));
    // Without a key so far, as in the rows of no query, nothing is to be scaled.
    const float safe = max == -INFINITY ? 0 : max;
    const float keep = max == -INFINITY ? 1 : Exp2(split_.max - max);
    split_.max = max;
#pragma unroll
    for (int c = 0; c < 4; ++c) score[c] = Exp2(score[c] - safe);
    split_.sum = split_.sum * keep + ((score[0] + score[1]) + (score[2] + score[3]));
    if (__any_sync(0xffffffffu, keep != 1)) {  // a factor of 1 changes nothing
#pragma unroll
      for (int n = 0; n < kHalves * 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) o_[n][c] *= keep;
      }
    }
    uint32_t weight[4];
    SplitPair(score[0], score[1], &weight[0], &weight[1]);
    SplitPair(score[2], score[3], &weight[2], &weight[3]);
    AddValues(block + L::kBlockElements, weight);
  }

  // A lane loads 8 columns of the 4 keys whose weights it holds; column t of them goes to product
  // t.
  __device__ void AddValues(const Bf16* values, const uint32_t (&weight)[4]) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      uint32_t v[4][4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int key = r / 2 * 8 + 2 * quad_ + r % 2;
        const uint4 x =
            *reinterpret_cast<const uint4*>(values + key * kHeadDim + (8 * half + group_) * 8);
        v[r][0] = x.x, v[r][1] = x.y, v[r][2] = x.z, v[r][3] = x.w;
      }
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        const uint32_t select = t % 2 == 0 ? 0x5410 : 0x7632;
        Multiply(o_[half * 8 + t], weight, __byte_perm(v[0][t / 2], v[1][t / 2], select),
                 __byte_perm(v[2][t / 2], v[3][t / 2], select));
      }
    }
  }

  // Adds the warps' parts of the split, and the split to the total; the last of an item writes
  // the output.
  __device__ void EndSplit(const Stage& stage) {
    const StepRow& row = attention_.rows[stage.row];
    float sum = split_.sum;
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (quad_ == 0) shared_.max[warp_][group_] = split_.max, shared_.sum[warp_][group_] = sum;
    hopper::NamedBarrierSync(kConsumers, kThreads);
    const float factor = Exp2(split_.max - SafeMax(group_));
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int t = 0; t < 16; t += 4) {
        const int c = t / 8, n = half * 8 + t % 8;
        const float4 x = {
            (o_[n][c] + o_[n][c + 2]) * factor, (o_[n + 1][c] + o_[n + 1][c + 2]) * factor,
            (o_[n + 2][c] + o_[n + 2][c + 2]) * factor, (o_[n + 3][c] + o_[n + 3][c + 2]) * factor};
        *reinterpret_cast<float4*>(&shared_.merge[warp_][group_][64 * half + 16 * quad_ + t]) = x;
      }
    }
    hopper::NamedBarrierSync(kConsumers, kThreads);
    if (shared_.plan.whole_rows || NumSplits(row) == 1) {
      AddSplit();
      if (stage.flags & kItemEnd) WriteOutput(stage, row);
    } else {
      WritePartial(stage, row);
      if (IsLast(stage, row)) {
        MergePartials(stage, row);
        WriteOutput(stage, row);
      }
    }
    hopper::NamedBarrierSync(kConsumers, kThreads);  // what they share may be written again
    ResetSplit();
  }

  __device__ float MaxOfSplit(int query) const {
    float max = shared_.max[0][query];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) max = fmaxf(max, shared_.max[warp][query]);
    return max;
  }
  __device__ float SafeMax(int query) const {
    const float max = MaxOfSplit(query);
    return max == -INFINITY ? 0 : max;
  }
  __device__ float SumOfSplit(int query) const {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      sum =
          __fmaf_rn(shared_.sum[warp][query], Exp2(shared_.max[warp][query] - SafeMax(query)), sum);
    }
    return sum;
  }
  __device__ float ValueOfSplit(int query, int d) const {
    float value = shared_.merge[0][query][d];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) value += shared_.merge[warp][query][d];
    return value;
  }

  // The k-th output element of this thread.
  __device__ int QueryOf(int k) const { return (thread_ + k * kThreads) / kHeadDim; }
  __device__ int ColumnOf(int k) const { return (thread_ + k * kThreads) % kHeadDim; }

  __device__ void AddSplit() {
    // All elements of a query see the same running sum; it is kept once an element, in registers.
#pragma unroll
    for (int k = 0; k < kOwned; ++k) {
      const int query = QueryOf(k);
      if (query >= num_queries_) break;
      const float2 factors = Merge(running_[k], MaxOfSplit(query), SumOfSplit(query));
      total_o_[k] = MergeValue(factors, total_o_[k], ValueOfSplit(query, ColumnOf(k)));
    }
  }

  // Where the partial result of the split and query lies.
  __device__ int64_t SlotOf(const Stage& stage, const StepRow& row, int split, int query) const {
    const int begin = stage.row > 0 ? shared_.plan.slots[stage.row - 1] : 0;
    return (begin + int64_t{split} * row.num_tokens + TokenOf(query)) * attention_.num_heads +
           HeadOf(stage.head, query);
  }

  __device__ void WritePartial(const Stage& stage, const StepRow& row) {
    const int split = stage.first_block / kSplitBlocks;
#pragma unroll
    for (int k = 0; k < kOwned; ++k) {
      const int query = QueryOf(k), d = ColumnOf(k);
      if (query >= num_queries_) break;
      const int64_t slot = SlotOf(stage, row, split, query);
      __stcg(&args_.partials[slot * kHeadDim + d], ValueOfSplit(query, d));
      if (d == 0) __stcg(&args_.stats[slot], float2{MaxOfSplit(query), SumOfSplit(query)});
    }
  }

  // Whether all splits of the tile are there, after this one.
  __device__ bool IsLast(const Stage& stage, const StepRow& row) {
    __threadfence();
    hopper::NamedBarrierSync(kConsumers, kThreads);
    if (thread_ == 0) {
      // Floors of the queries before the row, plus one a row, leave room for the ceiling of each
      // row.
      const int64_t queries_before = int64_t{row.first_token} * heads_of_group_;
      const int64_t tile = queries_before / kTileQueries + stage.row + first_query_ / kTileQueries;
      uint32_t* counter = args_.counters + 1 + tile * attention_.num_kv_heads + stage.head;
      const bool last = atomicAdd(counter, 1u) == static_cast<uint32_t>(NumSplits(row)) - 1;
      if (last) *counter = 0;
      shared_.last = last;
      __threadfence();
    }
    hopper::NamedBarrierSync(kConsumers, kThreads);
    return shared_.last != 0;
  }

  __device__ void MergePartials(const Stage& stage, const StepRow& row) {
    const int num_splits = NumSplits(row);
#pragma unroll
    for (int k = 0; k < kOwned; ++k) {
      const int query = QueryOf(k), d = ColumnOf(k);
      if (query >= num_queries_) break;
      const int64_t first = SlotOf(stage, row, 0, query);
      const int64_t stride = int64_t{row.num_tokens} * attention_.num_heads;
      Running running;
      float o = 0;
#pragma unroll 8
      for (int split = 0; split < num_splits; ++split) {
        const int64_t slot = first + split * stride;
        const float2 stats = __ldcg(&args_.stats[slot]);
        o = MergeValue(Merge(running, stats.x, stats.y), o,
                       __ldcg(&args_.partials[slot * kHeadDim + d]));
      }
      running_[k] = running;
      total_o_[k] = o;
    }
  }

  __device__ void WriteOutput(const Stage& stage, const StepRow& row) {
#pragma unroll
    for (int k = 0; k < kOwned; ++k) {
      const int query = QueryOf(k);
      if (query >= num_queries_) break;
      StoreAny(attention_.o, row.first_token + TokenOf(query),
               HeadOf(stage.head, query) * kHeadDim + ColumnOf(k), total_o_[k] / running_[k].sum);
    }
  }

  const Args& args_;
  const PagedAttentionArgs& attention_;
  Fixed& shared_;
  const int lane_ = threadIdx.x % kWarp;
  const int quad_ = lane_ % 4;   // which columns of a product's row
  const int group_ = lane_ / 4;  // which row: the query, or the key
  const int thread_ = threadIdx.x;
  const int warp_ = thread_ / kWarp;
  const int heads_of_group_ = attention_.num_heads / attention_.num_kv_heads;
  int first_query_ = 0;  // of the row, this tile's first
  int num_queries_ = 0;
  int last_key_ = -1;  // of query group_
  uint32_t query_[kChunks][2][4];
  Running split_;  // of query group_, this warp's blocks; the sum is this lane's keys'
  float o_[kHalves * 8][4];
  Running running_[kOwned];  // over the splits, of the elements that this thread writes
  float total_o_[kOwned];
};
#endif

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads + kWarp, 1)
    PagedDecodeKernel(const __grid_constant__ Args args) {
#if __CUDA_ARCH__ >= 900
  using L = Layout<kHeadDim>;
  extern __shared__ __align__(128) char ring[];
  auto& shared = *reinterpret_cast<typename L::Fixed*>(ring + L::kStages * L::kStageBytes);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < L::kStages; ++stage) {
      hopper::BarrierInit(&shared.full[stage], 1);
      hopper::BarrierInit(&shared.empty[stage], kWarps);
    }
    hopper::BarrierInitFence();
  }
  DependencyWait();
  const int warp = threadIdx.x / kWarp;
  if (warp == 0) MakePlan(args, shared.plan);
  __syncthreads();
  if (warp == kWarps) {
    Fetch<kHeadDim>(args, shared, ring);
  } else {
    Consumer<kHeadDim>(args, shared).Run(ring);
  }
#endif
}

// A slot holds a query head's partial result of one (split, token).
int64_t SlotBytes(int64_t num_heads, int64_t head_dim) {
  return num_heads *
         (head_dim * static_cast<int64_t>(sizeof(float)) + static_cast<int64_t>(sizeof(float2)));
}
int64_t NumSlots(int64_t num_blocks, int64_t num_rows, int64_t num_heads, int64_t head_dim) {
  const int64_t most = (num_blocks / kSplitBlocks + num_rows) * kWindow;
  return std::min(most, kMaxPartialBytes / SlotBytes(num_heads, head_dim));
}

template <int kHeadDim>
cudaError_t LaunchKernel(const Args& args, const Context& context) {
  using L = Layout<kHeadDim>;
  const auto kernel = PagedDecodeKernel<kHeadDim>;
  static const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes);
  if (allowed != cudaSuccess) return allowed;
  return LaunchDependent(kernel, static_cast<unsigned>(context.num_multiprocessors),
                         kThreads + kWarp, L::kBytes, context.stream, args);
}

int64_t NumCounters(const PagedAttentionArgs& args) {
  const int64_t heads_of_group = args.num_heads / args.num_kv_heads;
  return 1 + (args.num_decode_tokens * heads_of_group / kTileQueries + args.num_decode_rows) *
                 args.num_kv_heads;
}

bool Supports(const PagedAttentionArgs& args, const Context& context) {
  const bool aligned =
      reinterpret_cast<uintptr_t>(args.blocks.data) % 16 == 0 && args.blocks.row_stride % 8 == 0;
  // Indices of items are 32 bits wide.
  const int64_t splits = (args.blocks.rows() / kSplitBlocks + 1) * args.num_decode_rows;
  return context.compute_capability >= 90 && args.q.dtype == DType::kBF16 && aligned &&
         (args.head_dim == 64 || args.head_dim == 128) && args.num_decode_rows <= kMaxRows &&
         NumCounters(args) <= kNumCounters && splits * kWindow * args.num_heads <= INT32_MAX;
}

}  // namespace

cudaError_t LaunchPagedDecode(const PagedAttentionArgs& attention, Context& context) {
  if (attention.num_decode_rows == 0 || attention.num_decode_tokens == 0) return cudaSuccess;
  if (!Supports(attention, context)) {
    return LaunchPagedPlain(attention, 0, attention.num_decode_rows, 0, attention.num_decode_tokens,
                            context.stream);
  }
  Args args = {.attention = attention, .counters = context.counters};
  args.num_slots = NumSlots(attention.blocks.rows(), attention.num_decode_rows, attention.num_heads,
                            attention.head_dim);
  void* scratch = nullptr;
  const cudaError_t error = context.scratch.Reserve(
      args.num_slots * SlotBytes(attention.num_heads, attention.head_dim), &scratch);
  if (error != cudaSuccess) return error;
  args.stats = static_cast<float2*>(scratch);
  args.partials = static_cast<float*>(scratch) + 2 * args.num_slots * attention.num_heads;
  return attention.head_dim == 64 ? LaunchKernel<64>(args, context)
                                  : LaunchKernel<128>(args, context);
}

int64_t PagedDecodeScratchBytes(const BackendLimits& limits) {
  if (limits.num_heads == 0) return 0;
  return NumSlots(limits.num_blocks, limits.max_rows, limits.num_heads, limits.head_dim) *
         SlotBytes(limits.num_heads, limits.head_dim);
}

}  // namespace godwit::cuda
