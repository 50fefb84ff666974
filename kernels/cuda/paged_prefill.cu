// Causal softmax attention of prefill rows over the paged cache, for Hopper; paged_attention.cu is
// the general path.
//
// Two launches. PrepareKernel, a block per token: rotates q into scratch, rotates and stores k,
// stores v, 16 bytes an access (bound by memory: q, k, v once in and once out), and lists the tiles
// of 128 queries, longest first. AttendKernel, one persistent block per multiprocessor, takes
// (tile, head) from a counter: four threads read the block table and copy tiles of 128 keys and
// values (a box a KV block: 4 KB at d 128), two warpgroups multiply 64 queries each; 512 d flops
// per key and tile. The scores of a tile are computed beside the values of the tile before, and one
// warpgroup's exponentials beside the other's products. P stays in registers, rounded to bf16.
//
// H100, H 32, d 128, causal, random data: 8,192 tokens 0.91 ms (608 TFLOP/s), 32,768 tokens 13.8 ms
// (637); 646 without any copies, 694 is what a large product reaches. One thread that issues all
// boxes: 486, and with boxes of 2 KB 426; turns between the warpgroups: 598; all heads at once
// instead of groups that fit L2: 367 for 4 x 8,192 tokens.
//
// Bits. A query's result is a function of its keys alone: key tiles stand at absolute multiples of
// 128 and are taken in ascending order; the rows of a product do not see each other; maximum, sum
// and rescaling are per row, and what is decided for a warp (leaving out a rescaling whose factors
// are all 1) or a tile (leaving out keys past its last query, which weigh 0) changes no bit. So
// neither the cuts of a prompt, nor the other sequences of a step, nor the order of the tiles show
// in the result.

#include <algorithm>
#include <cmath>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/paged.cuh"

namespace godwit::cuda {
namespace {

using namespace hopper;

constexpr int kQueries = 128;                  // of a tile: 64 per consumer warpgroup
constexpr int kKeys = 128;                     // of a tile
constexpr int kStages = 2;                     // tiles of keys in shared memory, and of values
constexpr int kBlockGroups = kPagedBlock / 8;  // of 8 tokens: what swizzling is about
constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;
constexpr int kProducers = 4;  // threads, one a warp
constexpr int kAttendThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kPrepareThreads = 256;
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;  // 128 * 56 + 256 * 224 <= 65536
constexpr int64_t kGroupBytes = int64_t{24}
                                << 20;  // keys and values of the heads in flight: half of L2

// 128 consecutive queries of a sequence, or what is left of it.
struct alignas(32) QueryTile {
  int64_t block_table;  // StepRow::block_table
  int64_t position;     // of the first query
  int32_t token;        // of the first query
  int32_t num_queries;
  int32_t num_blocks;  // of the sequence after the step
  int32_t num_key_tiles;
};
static_assert(sizeof(QueryTile) == 32);  // without padding, which nothing would write

struct Header {
  int32_t num_tiles;
  int32_t heads_per_group;  // query heads whose tiles come together
  int32_t next_item;        // the counter
};

// In scratch: Header, tiles, and q as the products take it.
struct Plan {
  Header* header;
  QueryTile* tiles;
  Bf16* q;  // [T of prefill, H * head_dim]; null: args.q serves
};

__host__ __device__ inline int64_t NumKeyTiles(int64_t position, int64_t num_queries) {
  return (position + num_queries - 1) / kKeys + 1;
}

// ---- PrepareKernel ----

__device__ int32_t NumTiles(const StepRow& row) {
  return (row.num_tokens + kQueries - 1) / kQueries;
}

// Tiles of a row with at most `work` key tiles: they come first in the row.
__device__ int32_t NumTilesUpTo(const StepRow& row, int64_t work) {
  if (NumKeyTiles(row.position, row.num_tokens) <= work) return NumTiles(row);
  // Tile j ends below key (position + 128 (j + 1)), and that must not exceed 128 work.
  const int64_t count = work - (row.position + kKeys - 1) / kKeys;
  return static_cast<int32_t>(max(int64_t{0}, count));
}

// Stores a tile at its rank: more key tiles first, then in order of rows. All threads.
__device__ void ListTile(const PagedAttentionArgs& args, const Plan& plan, int32_t index,
                         int32_t offset) {
  __shared__ int32_t shared[kPrepareThreads / kWarp];
  const StepRow& mine = args.rows[index];
  const int32_t num_queries = min(mine.num_tokens - offset, kQueries);
  const int64_t work = NumKeyTiles(mine.position + offset, num_queries);
  int32_t before = 0;
  for (int32_t i = args.num_decode_rows + threadIdx.x; i < args.num_rows; i += kPrepareThreads) {
    const StepRow& row = args.rows[i];
    if (row.num_tokens == 0) continue;
    const int32_t less = NumTilesUpTo(row, work - 1);
    if (i < index) before += NumTiles(row) - less;
    if (i == index) before += offset / kQueries - less;
    if (i >= index) before += NumTiles(row) - NumTilesUpTo(row, work);
  }
  before = BlockSum<kPrepareThreads>(before, shared);
  if (threadIdx.x != 0) return;
  plan.tiles[before] = {
      mine.block_table,
      mine.position + offset,
      mine.first_token + offset,
      num_queries,
      static_cast<int32_t>((mine.position + mine.num_tokens + kPagedBlock - 1) / kPagedBlock),
      static_cast<int32_t>(work)};
}

__device__ void MakeHeader(const PagedAttentionArgs& args, const Plan& plan) {
  __shared__ int64_t shared[kPrepareThreads / kWarp];
  int64_t num_tiles = 0, num_keys = 0;
  for (int32_t i = args.num_decode_rows + threadIdx.x; i < args.num_rows; i += kPrepareThreads) {
    const StepRow& row = args.rows[i];
    if (row.num_tokens == 0) continue;
    num_tiles += NumTiles(row);
    num_keys += row.position + row.num_tokens;
  }
  num_tiles = BlockSum<kPrepareThreads>(num_tiles, shared);
  num_keys = BlockSum<kPrepareThreads>(num_keys, shared);
  if (threadIdx.x != 0) return;
  const int64_t head_bytes = max(int64_t{1}, num_keys * args.head_dim * 2 * int64_t{sizeof(Bf16)});
  int32_t kv_heads = args.num_kv_heads;
  while (kv_heads > 1 && (kv_heads * head_bytes > kGroupBytes || args.num_kv_heads % kv_heads != 0))
    --kv_heads;
  *plan.header = {static_cast<int32_t>(num_tiles), kv_heads * (args.num_heads / args.num_kv_heads),
                  0};
}

// 16 elements of a head, of which a thread rotates 8 pairs. Unit u < pairs / 8 holds pairs [8 u, 8
// u + 8), the others pass.
struct Unit {
  int first, second;  // where its two runs of 8 elements begin
  bool rotated;
};
__device__ Unit MakeUnit(int u, int pairs, PairLayout layout) {
  const bool rotated = u < pairs / 8;
  if (rotated && layout == PairLayout::kHalfSplit) return {8 * u, pairs + 8 * u, true};
  return {16 * u, 16 * u + 8, rotated};
}

struct alignas(16) Run {
  __nv_bfloat162 pairs[4];
};

// (a, b) <- (a cos - b sin, b cos + a sin)
__device__ void RotateHalfSplit(Run& a, Run& b, const float (&cos)[8], const float (&sin)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = __bfloat1622float2(a.pairs[i]), y = __bfloat1622float2(b.pairs[i]);
    const float c0 = cos[2 * i], c1 = cos[2 * i + 1], s0 = sin[2 * i], s1 = sin[2 * i + 1];
    a.pairs[i] = __floats2bfloat162_rn(x.x * c0 - y.x * s0, x.y * c1 - y.y * s1);
    b.pairs[i] = __floats2bfloat162_rn(y.x * c0 + x.x * s0, y.y * c1 + x.y * s1);
  }
}
__device__ void RotateInterleaved(Run& run, const float* cos, const float* sin) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = __bfloat1622float2(run.pairs[i]);
    run.pairs[i] = __floats2bfloat162_rn(x.x * cos[i] - x.y * sin[i], x.y * cos[i] + x.x * sin[i]);
  }
}

// What a thread does to a head of q or k of a token: copies its unit, rotated.
class Rotation {
 public:
  __device__ Rotation(const PagedAttentionArgs& args, int64_t token, int u)
      : half_split_(args.pair_layout == PairLayout::kHalfSplit) {
    const int pairs = args.cos.data != nullptr ? static_cast<int>(args.cos.shape[1]) : 0;
    unit_ = MakeUnit(u, pairs, args.pair_layout);
    if (!unit_.rotated) return;
    const float* cosines = Row<const float>(args.cos, token) + 8 * u;
    const float* sines = Row<const float>(args.sin, token) + 8 * u;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      cos_[i] = cosines[i];
      sin_[i] = sines[i];
    }
  }
  __device__ void Copy(const Bf16* from, Bf16* to) const {
    Run a = *reinterpret_cast<const Run*>(from + unit_.first);
    Run b = *reinterpret_cast<const Run*>(from + unit_.second);
    if (unit_.rotated) {
      if (half_split_) {
        RotateHalfSplit(a, b, cos_, sin_);
      } else {
        RotateInterleaved(a, cos_, sin_);
        RotateInterleaved(b, cos_ + 4, sin_ + 4);
      }
    }
    *reinterpret_cast<Run*>(to + unit_.first) = a;
    *reinterpret_cast<Run*>(to + unit_.second) = b;
  }

 private:
  bool half_split_;
  Unit unit_;
  float cos_[8], sin_[8];
};

// Stores a token's keys and values; after its sequence's last token the rest of the block becomes
// zeros: its values are multiplied with weights of 0, so that they must be numbers.
template <int kHeadDim>
__device__ void WriteCache(const PagedAttentionArgs& args, const StepRow& row, int64_t token,
                           const Rotation& rotation) {
  constexpr int kUnits = kHeadDim / 16, kHeadsPerPass = kPrepareThreads / kUnits;
  const int u = threadIdx.x % kUnits;
  const int64_t position = row.position + token - row.first_token;
  const int64_t part = int64_t{args.num_kv_heads} * kPagedBlock * kHeadDim;
  Bf16* keys = CacheRow<Bf16>(args, row, position, 0, 0);
  for (int head = threadIdx.x / kUnits; head < args.num_kv_heads; head += kHeadsPerPass) {
    Bf16* key = keys + int64_t{head} * kPagedBlock * kHeadDim;
    rotation.Copy(Row<const Bf16>(args.k, token) + head * kHeadDim, key);
    const auto* from =
        reinterpret_cast<const Run*>(Row<const Bf16>(args.v, token) + head * kHeadDim) + 2 * u;
    auto* to = reinterpret_cast<Run*>(key + part) + 2 * u;
    const Run a = from[0], b = from[1];
    to[0] = a;
    to[1] = b;
  }
  if (token + 1 != row.first_token + int64_t{row.num_tokens}) return;
  const int runs = static_cast<int>(kPagedBlock - 1 - position % kPagedBlock) * kHeadDim / 8;
  for (int i = threadIdx.x; i < runs * args.num_kv_heads; i += kPrepareThreads) {
    Bf16* rest = keys + part + int64_t{i / runs} * kPagedBlock * kHeadDim + kHeadDim;
    reinterpret_cast<uint4*>(rest)[i % runs] = uint4{};
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kPrepareThreads)
    PrepareKernel(PagedAttentionArgs args, Plan plan) {
  constexpr int kUnits = kHeadDim / 16, kHeadsPerPass = kPrepareThreads / kUnits;
  __shared__ int32_t found;
  const int64_t token = args.num_decode_tokens + blockIdx.x;
  if (threadIdx.x == 0) found = -1;
  __syncthreads();
  for (int32_t i = args.num_decode_rows + threadIdx.x; i < args.num_rows; i += kPrepareThreads) {
    const int64_t offset = token - args.rows[i].first_token;
    if (args.rows[i].num_tokens > 0 && offset >= 0 && offset < args.rows[i].num_tokens) found = i;
  }
  const Rotation rotation(args, token, threadIdx.x % kUnits);
  if (plan.q != nullptr) {
    const Bf16* from = Row<const Bf16>(args.q, token);
    Bf16* to = plan.q + int64_t{blockIdx.x} * args.num_heads * kHeadDim;
#pragma unroll 2
    for (int head = threadIdx.x / kUnits; head < args.num_heads; head += kHeadsPerPass) {
      rotation.Copy(from + head * kHeadDim, to + head * kHeadDim);
    }
  }
  __syncthreads();
  if (blockIdx.x == 0) MakeHeader(args, plan);
  if (found < 0) return;  // padding
  const StepRow row = args.rows[found];
  WriteCache<kHeadDim>(args, row, token, rotation);
  const auto offset = static_cast<int32_t>(token - row.first_token);
  if (offset % kQueries == 0) ListTile(args, plan, found, offset);
}

// ---- AttendKernel ----

struct AttendArgs {
  Plan plan;
  const int32_t* block_tables;
  int32_t num_heads, num_kv_heads;
  int32_t num_cache_groups;  // of 8 tokens of a head: the first that is out of bounds
  int64_t first_token;       // of q in the tensor map
  float scale_log2;          // scale * log2(e)
  TensorView o;
};

// A tile and a head. No key tiles: no more items.
struct Item {
  QueryTile tile;
  int32_t head;
};

template <int kHeadDim>
struct Shared {
  static constexpr int kHalves = kHeadDim / 64;  // columns come in swizzled groups of 64: 128 bytes
  Bf16 q[kHalves][kQueries][64];
  Bf16 k[kStages][kKeys / 8][kHalves][8][64];
  Bf16 v[kStages][kKeys / 8][kHalves][8][64];
  Item items[2];
  uint64_t item_full[2], item_empty[2];
  uint64_t q_full, q_empty;
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};
constexpr int kAlignment = 1024;  // of swizzled tiles

// A place in a ring of stages.
struct Cursor {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void Advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

__device__ Item NextItem(const AttendArgs& args) {
  const int32_t index = atomicAdd(&args.plan.header->next_item, 1);
  const Header header = *args.plan.header;
  Item item = {};
  if (index >= header.num_tiles * args.num_heads) return item;
  // Group of heads, tile, head: the slowest index first.
  const int32_t group_items = header.num_tiles * header.heads_per_group;
  const int32_t group = index / group_items, rest = index % group_items;
  item.head = group * header.heads_per_group + rest % header.heads_per_group;
  item.tile = args.plan.tiles[rest / header.heads_per_group];
  return item;
}

// Items go around a ring of two: one producer takes them from the counter, all other threads of the
// roles read them.
template <int kHeadDim>
class ItemReader {
 public:
  __device__ explicit ItemReader(Shared<kHeadDim>& shared) : shared_(shared) {}
  __device__ __forceinline__ Item Next() {
    BarrierWait(&shared_.item_full[slot_], parity_);
    const Item item = shared_.items[slot_];
    BarrierArrive(&shared_.item_empty[slot_]);
    parity_ ^= slot_;
    slot_ ^= 1;
    return item;
  }

 private:
  Shared<kHeadDim>& shared_;
  uint32_t slot_ = 0, parity_ = 0;
};

// One of the threads that feed the consumers: two KV blocks of each tile are its own. The first one
// also takes the items and copies q.
template <int kHeadDim>
class Producer {
 public:
  __device__ Producer(const AttendArgs& args, const CUtensorMap* q_map,
                      const CUtensorMap* cache_map, Shared<kHeadDim>& shared, int index)
      : args_(args), q_map_(q_map), cache_map_(cache_map), shared_(shared), index_(index) {}

  __device__ void Run() {
    ItemReader<kHeadDim> reader(shared_);
    Item item = index_ == 0 ? TakeItem() : reader.Next(), next;
    for (; item.tile.num_key_tiles > 0; item = next) {
      if (index_ == 0) CopyQueries(item);
      const int32_t kv_head = item.head / (args_.num_heads / args_.num_kv_heads);
      FetchGroups(item, 0, kv_head);
      for (int32_t i = 0; i < item.tile.num_key_tiles; ++i) {
        int32_t groups[kBlocksPerProducer];
#pragma unroll
        for (int b = 0; b < kBlocksPerProducer; ++b) groups[b] = next_groups_[b];
        if (i + 1 < item.tile.num_key_tiles) FetchGroups(item, i + 1, kv_head);
        Copy(shared_.k, shared_.k_full, shared_.k_empty, k_, groups, 0);
        if (i > 0)
          Copy(shared_.v, shared_.v_full, shared_.v_empty, v_, value_groups_,
               args_.num_kv_heads * kBlockGroups);
#pragma unroll
        for (int b = 0; b < kBlocksPerProducer; ++b) value_groups_[b] = groups[b];
        if (i == 0 && index_ == 0) next = TakeItem();
      }
      Copy(shared_.v, shared_.v_full, shared_.v_empty, v_, value_groups_,
           args_.num_kv_heads * kBlockGroups);
      if (index_ > 0) next = reader.Next();
    }
  }

 private:
  static constexpr int kHalves = Shared<kHeadDim>::kHalves;
  static constexpr int kBlocksPerProducer = kKeys / kPagedBlock / kProducers;
  using Stage = Bf16[kKeys / 8][kHalves][8][64];

  __device__ Item TakeItem() {
    const Item item = NextItem(args_);
    BarrierWait(&shared_.item_empty[slot_], parity_ ^ 1);
    shared_.items[slot_] = item;
    BarrierArrive(&shared_.item_full[slot_]);
    parity_ ^= slot_;
    slot_ ^= 1;
    return item;
  }

  __device__ void CopyQueries(const Item& item) {
    BarrierWait(&shared_.q_empty, q_parity_ ^ 1);
    q_parity_ ^= 1;
    BarrierArriveExpect(&shared_.q_full, kQueries * kHeadDim * sizeof(Bf16));
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      LoadBox(shared_.q[half], q_map_, item.head * kHeadDim + half * 64,
              static_cast<int32_t>(item.tile.token - args_.first_token), &shared_.q_full);
    }
  }

  // Where the keys of this thread's blocks begin in the cache; past the sequence's end out of
  // bounds, which reads as zeros.
  __device__ void FetchGroups(const Item& item, int32_t key_tile, int32_t kv_head) {
    const int32_t first = key_tile * (kKeys / kPagedBlock) + index_ * kBlocksPerProducer;
#pragma unroll
    for (int b = 0; b < kBlocksPerProducer; ++b) {
      next_groups_[b] = args_.num_cache_groups;
      if (first + b < item.tile.num_blocks) {
        const int32_t block = args_.block_tables[item.tile.block_table + first + b];
        next_groups_[b] = (block * 2 * args_.num_kv_heads + kv_head) * kBlockGroups;
      }
    }
  }

  __device__ void Copy(Stage* stages, uint64_t* full, uint64_t* empty, Cursor& cursor,
                       const int32_t (&groups)[kBlocksPerProducer], int32_t offset) {
    constexpr uint32_t kBoxBytes = kPagedBlock * kHeadDim * sizeof(Bf16);
    BarrierWait(&empty[cursor.stage], cursor.parity ^ 1);
    BarrierArriveExpect(&full[cursor.stage], kBlocksPerProducer * kBoxBytes);
#pragma unroll
    for (int b = 0; b < kBlocksPerProducer; ++b) {
      LoadBox(stages[cursor.stage][(index_ * kBlocksPerProducer + b) * kBlockGroups], cache_map_,
              {0, 0, 0, groups[b] + offset}, &full[cursor.stage]);
    }
    cursor.Advance();
  }

  const AttendArgs& args_;
  const CUtensorMap *q_map_, *cache_map_;
  Shared<kHeadDim>& shared_;
  const int index_;
  Cursor k_, v_;
  uint32_t slot_ = 0, parity_ = 0, q_parity_ = 0;
  int32_t next_groups_[kBlocksPerProducer], value_groups_[kBlocksPerProducer];
};

__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float QuadSum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
// The running softmax of a thread's two rows, r and r + 8 of its warp's 16: of an accumulator of 64
// x n, element 4 j + 2 r + e is row r, column 8 j + 2 (lane % 4) + e.
struct Softmax {
  float max[2];
  float sum[2];   // of this thread's columns
  float keep[2];  // what the last tile scaled the past by

  // Scores -> weights. With kMask keys past `last` weigh nothing: it counts from the thread's first
  // column, for row 0.
  template <bool kFirst, bool kMask>
  __device__ __forceinline__ void Add(float (&s)[kKeys / 2], float scale_log2, int last) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float new_max = kFirst ? -INFINITY : max[r];
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * j + 2 * r + e];
          if (kMask && 8 * j + e > last + 8 * r) x = -INFINITY;
          new_max = fmaxf(new_max, x);
        }
      }
      new_max = QuadMax(new_max);
      keep[r] = kFirst ? 0 : Exp2((max[r] - new_max) * scale_log2);
      max[r] = new_max;
      const float offset = -new_max * scale_log2;
      float total = 0;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * j + 2 * r + e];
          x = Exp2(fmaf(x, scale_log2, offset));
          total += x;
        }
      }
      sum[r] = kFirst ? total : fmaf(sum[r], keep[r], total);
    }
  }
};

// Half of a tile's queries: a consumer warpgroup.
template <int kHeadDim>
class Consumer {
 public:
  __device__ __forceinline__ Consumer(const AttendArgs& args, Shared<kHeadDim>& shared)
      : args_(args), shared_(shared), warpgroup_(threadIdx.x / kWarpgroup - 1) {}

  __device__ __forceinline__ void Run() {
    ItemReader<kHeadDim> reader(shared_);
    for (uint32_t parity = 0;; parity ^= 1) {
      const Item item = reader.Next();
      __syncwarp();
      if (item.tile.num_key_tiles == 0) break;
      BarrierWait(&shared_.q_full, parity);
      Attend(item);
    }
  }

 private:
  using Box = hopper::Tile<128>;
  static constexpr uint32_t kGroupStride = Shared<kHeadDim>::kHalves * 1024;  // 8 keys
  static constexpr int kScores = kKeys / 2, kOutputs = kHeadDim / 2;  // accumulators of a thread

  __device__ __forceinline__ int Lane() const { return threadIdx.x % kWarp; }

  // One arrival a warp: its products have read the stage.
  __device__ __forceinline__ void Release(uint64_t& barrier) {
    if (Lane() == 0) BarrierArrive(&barrier);
  }

  // s = q . k^T
  __device__ __forceinline__ void Score(float (&s)[kScores], int stage) {
    const uint32_t q = SharedAddress(shared_.q) + warpgroup_ * 64 * 128,
                   k = SharedAddress(shared_.k[stage]);
    ProductsBegin();
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      Product<kKeys, Contract::kColumns, Contract::kColumns>(
          s, Box::ContractColumns(q + i / 4 * (kQueries * 128) + i % 4 * 32),
          Box::ContractColumns(k + i / 4 * 1024 + i % 4 * 32, kGroupStride), i > 0);
    }
    ProductsCommit();
  }
  // o += p . v
  __device__ __forceinline__ void Gather(float (&o)[kOutputs], const uint32_t (&p)[kKeys / 16][4],
                                         int stage) {
    const uint32_t v = SharedAddress(shared_.v[stage]);
    ProductsBegin();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      Product<kHeadDim, Contract::kRows>(
          o, p[i], Box::ContractRows(v + i * 2 * kGroupStride, 1024, kGroupStride), 1);
    }
    ProductsCommit();
  }
  __device__ __forceinline__ static void Round(const float (&s)[kScores],
                                               uint32_t (&p)[kKeys / 16][4]) {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) p[i / 4][i % 4] = PackBf16(s[2 * i], s[2 * i + 1]);
  }
  __device__ __forceinline__ static void Rescale(float (&o)[kOutputs], const float (&keep)[2]) {
    if (!__any_sync(0xffffffffu, keep[0] != 1 || keep[1] != 1)) return;
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) o[i] *= keep[i / 2 % 2];
  }

  // Scores of tile i beside the values of tile i - 1.
  template <bool kMask>
  __device__ __forceinline__ void Step(float (&o)[kOutputs], uint32_t (&p)[kKeys / 16][4],
                                       Softmax& softmax, int last) {
    float s[kScores];
    BarrierWait(&shared_.k_full[k_.stage], k_.parity);
    Score(s, k_.stage);
    BarrierWait(&shared_.v_full[v_.stage], v_.parity);
    Gather(o, p, v_.stage);
    ProductsWait<1>();
    Pin(s);
    Release(shared_.k_empty[k_.stage]);
    softmax.template Add<false, kMask>(s, args_.scale_log2, last);
    ProductsWait<0>();
    Pin(o);
    Release(shared_.v_empty[v_.stage]);
    Rescale(o, softmax.keep);
    Round(s, p);
    k_.Advance();
    v_.Advance();
  }

  __device__ __forceinline__ void Attend(const Item& item) {
    Softmax softmax;
    float o[kOutputs];
    uint32_t p[kKeys / 16][4];
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) o[i] = 0;
    const int row = warpgroup_ * 64 + threadIdx.x % kWarpgroup / kWarp * 16 + Lane() / 4;
    // Key tiles that all queries of the warpgroup see in full.
    const auto num_full = static_cast<int32_t>((item.tile.position + warpgroup_ * 64 + 1) / kKeys);
    // The last key of the thread's first row, counted from the thread's first column.
    const auto last = static_cast<int32_t>(item.tile.position + row - 2 * (Lane() % 4));
    {
      float s[kScores];
      BarrierWait(&shared_.k_full[k_.stage], k_.parity);
      Score(s, k_.stage);
      ProductsWait<0>();
      Pin(s);
      Release(shared_.k_empty[k_.stage]);
      k_.Advance();
      softmax.Add<true, true>(s, args_.scale_log2, last);
      Round(s, p);
    }
    int32_t i = 1;
    for (; i < min(num_full, item.tile.num_key_tiles); ++i) Step<false>(o, p, softmax, 0);
    for (; i < item.tile.num_key_tiles; ++i) Step<true>(o, p, softmax, last - i * kKeys);
    Release(shared_.q_empty);
    BarrierWait(&shared_.v_full[v_.stage], v_.parity);
    Gather(o, p, v_.stage);
    ProductsWait<0>();
    Pin(o);
    Release(shared_.v_empty[v_.stage]);
    v_.Advance();
    Store(item, row, softmax, o);
  }

  // o, divided by the sums of the weights, to memory.
  __device__ __forceinline__ void Store(const Item& item, int row, const Softmax& softmax,
                                        float (&o)[kOutputs]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float factor = 1 / QuadSum(softmax.sum[r]);
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        o[4 * j + 2 * r] *= factor;
        o[4 * j + 2 * r + 1] *= factor;
      }
      if (args_.o.dtype == DType::kF32) {
        StoreF32(item, row + 8 * r, r, o);
      } else {
        StoreBf16(item, row + 8 * r, r, o);
      }
    }
  }

  __device__ __forceinline__ void StoreF32(const Item& item, int row, int r,
                                           const float (&o)[kOutputs]) {
    if (row >= item.tile.num_queries) return;
    float* to = godwit::cuda::Row<float>(args_.o, item.tile.token + row) + item.head * kHeadDim +
                2 * (Lane() % 4);
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      *reinterpret_cast<float2*>(to + 8 * j) = {o[4 * j + 2 * r], o[4 * j + 2 * r + 1]};
    }
  }
  // The four lanes of a row transpose 4 x 4 words, so that each stores 8 columns at once.
  __device__ __forceinline__ void StoreBf16(const Item& item, int row, int r,
                                            const float (&o)[kOutputs]) {
    const bool odd = Lane() % 2 != 0, high = Lane() / 2 % 2 != 0;
    Bf16* to = godwit::cuda::Row<Bf16>(args_.o, item.tile.token + row) + item.head * kHeadDim +
               Lane() % 4 * 8;
#pragma unroll
    for (int b = 0; b < kHeadDim / 32; ++b) {
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        w[i] = PackBf16(o[4 * (4 * b + i) + 2 * r], o[4 * (4 * b + i) + 2 * r + 1]);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? w[i] : w[i + 1], 1);
        (odd ? w[i] : w[i + 1]) = got;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t got = __shfl_xor_sync(0xffffffffu, high ? w[i] : w[i + 2], 2);
        (high ? w[i] : w[i + 2]) = got;
      }
      if (row < item.tile.num_queries)
        *reinterpret_cast<uint4*>(to + 32 * b) = {w[0], w[1], w[2], w[3]};
    }
  }

  const AttendArgs& args_;
  Shared<kHeadDim>& shared_;
  const int warpgroup_;
  Cursor k_, v_;
};

template <int kHeadDim>
__global__ void __launch_bounds__(kAttendThreads, 1)
    AttendKernel(const AttendArgs args, const __grid_constant__ CUtensorMap q_map,
                 const __grid_constant__ CUtensorMap cache_map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char memory[];
  auto& shared =
      *reinterpret_cast<Shared<kHeadDim>*>(memory + (-SharedAddress(memory) & (kAlignment - 1)));
  if (threadIdx.x == 0) {
    PrefetchMap(&q_map);
    PrefetchMap(&cache_map);
    constexpr int kConsumerWarps = kConsumers * kWarpgroup / kWarp;
    for (int i = 0; i < 2; ++i) {
      BarrierInit(&shared.item_full[i], 1);
      BarrierInit(&shared.item_empty[i], kProducers - 1 + kConsumers * kWarpgroup);
    }
    BarrierInit(&shared.q_full, 1);
    BarrierInit(&shared.q_empty, kConsumerWarps);
    for (int i = 0; i < kStages; ++i) {
      BarrierInit(&shared.k_full[i], kProducers);
      BarrierInit(&shared.v_full[i], kProducers);
      BarrierInit(&shared.k_empty[i], kConsumerWarps);
      BarrierInit(&shared.v_empty[i], kConsumerWarps);
    }
    BarrierInitFence();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    GiveRegistersBack<kProducerRegisters>();
    if (threadIdx.x % kWarp == 0) {
      Producer<kHeadDim>(args, &q_map, &cache_map, shared, threadIdx.x / kWarp).Run();
    }
  } else {
    TakeRegisters<kConsumerRegisters>();
    Consumer<kHeadDim>(args, shared).Run();
  }
#endif
}

// ---- Launch ----

bool Aligned16(const TensorView& x) {
  const int64_t per_16_bytes = 16 / DTypeBytes(x.dtype);
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.row_stride % per_16_bytes == 0;
}

int64_t NumCacheGroups(const PagedAttentionArgs& args) {
  return args.blocks.rows() * 2 * args.num_kv_heads * kBlockGroups;
}

// By properties of the model alone, so that every step of it takes the same path.
bool Supports(const PagedAttentionArgs& args, const Context& context) {
  return context.compute_capability == 90 && args.q.dtype == DType::kBF16 &&
         (args.head_dim == 64 || args.head_dim == 128) && args.scale > 0 &&
         (!args.cos ||
          (args.cos.shape[1] % 8 == 0 && Aligned16(args.cos) && Aligned16(args.sin))) &&
         args.blocks.dense() && NumCacheGroups(args) < INT32_MAX && Aligned16(args.q) &&
         Aligned16(args.k) && Aligned16(args.v) && Aligned16(args.blocks) && Aligned16(args.o);
}

constexpr int64_t kHeaderBytes = 256;
int64_t MaxTiles(int64_t num_tokens, int64_t num_rows) { return num_tokens / kQueries + num_rows; }
int64_t TileBytes(int64_t num_tokens, int64_t num_rows) {
  return DivideUp(MaxTiles(num_tokens, num_rows) * int64_t{sizeof(QueryTile)}, kHeaderBytes) *
         kHeaderBytes;
}

cudaError_t MakePlan(const PagedAttentionArgs& args, Context& context, Plan* plan) {
  const int64_t num_tokens = args.q.rows() - args.num_decode_tokens;
  const int64_t tile_bytes = TileBytes(num_tokens, args.num_rows - args.num_decode_rows);
  const int64_t q_bytes = args.cos ? num_tokens * args.q.row_elements() * int64_t{sizeof(Bf16)} : 0;
  void* scratch = nullptr;
  const cudaError_t error = context.scratch.Reserve(kHeaderBytes + tile_bytes + q_bytes, &scratch);
  char* base = static_cast<char*>(scratch);
  plan->header = reinterpret_cast<Header*>(base);
  plan->tiles = reinterpret_cast<QueryTile*>(base + kHeaderBytes);
  plan->q = args.cos ? reinterpret_cast<Bf16*>(base + kHeaderBytes + tile_bytes) : nullptr;
  return error;
}

template <int kHeadDim>
cudaError_t LaunchPrepare(const PagedAttentionArgs& args, const Plan& plan,
                          const Context& context) {
  const auto num_tokens = static_cast<unsigned>(args.q.rows() - args.num_decode_tokens);
  PrepareKernel<kHeadDim><<<num_tokens, kPrepareThreads, 0, context.stream>>>(args, plan);
  return cudaGetLastError();
}

template <int kHeadDim>
cudaError_t LaunchAttend(const PagedAttentionArgs& args, const Plan& plan, const Context& context) {
  const int64_t num_tokens = args.q.rows() - args.num_decode_tokens, width = args.q.row_elements();
  const TensorView q = plan.q != nullptr ? MakeView(plan.q, DType::kBF16, num_tokens, width)
                                         : RowRange(args.q, args.num_decode_tokens, num_tokens);
  const AttendArgs attend{.plan = plan,
                          .block_tables = args.block_tables,
                          .num_heads = args.num_heads,
                          .num_kv_heads = args.num_kv_heads,
                          .num_cache_groups = static_cast<int32_t>(NumCacheGroups(args)),
                          .first_token = args.num_decode_tokens,
                          .scale_log2 = args.scale * 1.4426950408889634f,
                          .o = args.o};
  CUtensorMap q_map, cache_map;
  cudaError_t error = MakeTensorMap(q.data, num_tokens, width, q.row_stride, kQueries, 128, &q_map);
  if (error != cudaSuccess) return error;
  // Columns of a half, 8 tokens, halves, groups of 8 tokens. A box is a KV block of one head; as
  // its halves alternate every 8 tokens, the groups of a tile's consecutive boxes lie evenly.
  constexpr cuuint64_t kHalves = kHeadDim / 64;
  error = MakeTensorMap<4>(args.blocks.data,
                           {64, 8, kHalves, static_cast<cuuint64_t>(attend.num_cache_groups)},
                           {kHeadDim, 64, 8 * kHeadDim}, {64, 8, kHalves, kPagedBlock / 8},
                           CU_TENSOR_MAP_SWIZZLE_128B, &cache_map);
  if (error != cudaSuccess) return error;
  constexpr int kSharedBytes = sizeof(Shared<kHeadDim>) + kAlignment;
  static const cudaError_t allowed = cudaFuncSetAttribute(
      AttendKernel<kHeadDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (allowed != cudaSuccess) return allowed;
  const int64_t max_items =
      MaxTiles(num_tokens, args.num_rows - args.num_decode_rows) * args.num_heads;
  const auto num_blocks =
      static_cast<unsigned>(std::min<int64_t>(max_items, context.num_multiprocessors));
  AttendKernel<kHeadDim>
      <<<num_blocks, kAttendThreads, kSharedBytes, context.stream>>>(attend, q_map, cache_map);
  return cudaGetLastError();
}

template <int kHeadDim>
cudaError_t Launch(const PagedAttentionArgs& args, Context& context) {
  Plan plan;
  cudaError_t error = MakePlan(args, context, &plan);
  if (error == cudaSuccess) error = LaunchPrepare<kHeadDim>(args, plan, context);
  return error == cudaSuccess ? LaunchAttend<kHeadDim>(args, plan, context) : error;
}

}  // namespace

cudaError_t LaunchPagedPrefill(const PagedAttentionArgs& args, Context& context) {
  const int64_t num_tokens = args.q.rows() - args.num_decode_tokens;
  if (args.num_rows == args.num_decode_rows || num_tokens == 0) return cudaSuccess;
  if (!Supports(args, context)) {
    return LaunchPagedPlain(args, args.num_decode_rows, args.num_rows - args.num_decode_rows,
                            args.num_decode_tokens, num_tokens, context.stream);
  }
  return args.head_dim == 64 ? Launch<64>(args, context) : Launch<128>(args, context);
}

int64_t PagedPrefillScratchBytes(const BackendLimits& limits) {
  return kHeaderBytes + TileBytes(limits.max_tokens, limits.max_rows) +
         limits.max_tokens * limits.num_heads * limits.head_dim * int64_t{sizeof(Bf16)};
}

}  // namespace godwit::cuda
