// Softmax attention of decode and verify rows over a paged bf16 cache, head_dim 64 or 128, on
// Hopper and later. Bound by the bytes of the cache: 512 a key and kv head at head_dim 128.
//
// One launch. Each multiprocessor holds one block, which takes items (row, kv head, range of keys,
// query tile) from a counter until none is left: the grid does not know the contexts, so a recorded
// launch serves growing ones. In a block, warps of four kinds hand the ranges on, so that no step
// waits for another's latency (one kind of warp that did all of it in turn lost half its time at
// the ends of ranges, to loads of queries, fences and merges):
//   the fetching warp takes items and copies blocks of 16 keys with their values, one TMA box each,
//   into a ring of 192 KiB. It begins before the kernel before this one has ended: no kernel of a
//   step writes rows, tables or older keys;
//   the asking warp rotates the queries of a range, and writes the step's keys into the cache;
//   eight warps compute, each every eighth block of a range, from its own slots of the ring;
//   two finishing warps, each for every second query, add their parts, write the partial result of
//   the range, and merge all of a row and head, if it was the last.
// Where there are many rows, most are items of their own: nothing of them is written and merged
// (NumWholeRows). The sums are the same.
//
// Query tile: 8 queries (token, head of the group), each held as two bf16 rows, its high and low
// half, of an m16n8k16 product; likewise the weights. So a query and a weight keep 16 bits of
// mantissa, the result is that of f32 arithmetic to 4e-6, and one fetch of a key serves all query
// heads of its group. The contraction runs in the order of the lanes' 16-byte loads.
//
// Order of a sum, whatever the batch: within a range warp w adds blocks w, w + 8, ... in ascending
// order; then the 8 warps in order; then the ranges in ascending order.
//
// The step's own keys and values are rotated, rounded and put into the fetched block in shared
// memory by every block that needs them.

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
constexpr int kWarps = 8;  // that compute; then one of each other kind
constexpr int kFetchWarp = kWarps, kQueryWarp = kWarps + 1, kFinishWarp = kWarps + 2;
constexpr int kFinishWarps = 2;
constexpr int kQueriesOfFinisher = kTileQueries / kFinishWarps;
constexpr int kFinishBarrier = 1;
constexpr int kThreads = (kFinishWarp + kFinishWarps) * kWarp;
constexpr int kQueue = 8;  // ranges known to the warps at once
constexpr int kMaxSlots = 48;
constexpr int kMaxRows = 1024;                            // decode rows of a step
constexpr int kSharedBytes = 227 * 1024;                  // of a block
constexpr int64_t kMaxPartialBytes = int64_t{128} << 20;  // beyond it a block takes whole rows
constexpr float kLog2E = 1.4426950408889634f;

// Ranges of keys: kFineRanges short ones, so that a short context has work for every
// multiprocessor, then long ones, so that a long one has few partial results.
constexpr int kFineBlocks = kAttentionSplit / 2 / kPagedBlock;
constexpr int kFineRanges = 8;
constexpr int kCoarseBlocks = kAttentionSplit / kPagedBlock;
__host__ __device__ constexpr int FirstBlock(int range) {
  return range <= kFineRanges ? range * kFineBlocks
                              : kFineRanges * kFineBlocks + (range - kFineRanges) * kCoarseBlocks;
}
__host__ __device__ constexpr int64_t NumRanges(int64_t num_blocks) {
  const int64_t fine = kFineRanges * kFineBlocks;
  return num_blocks <= fine ? (num_blocks + kFineBlocks - 1) / kFineBlocks
                            : kFineRanges + (num_blocks - fine + kCoarseBlocks - 1) / kCoarseBlocks;
}

// A range of the keys of a row, for a kv head and a tile of the row's queries.
struct alignas(16) Range {
  int32_t row;  // -1: no more
  int32_t head;
  int32_t tile;
  int32_t num_queries;  // of the tile
  int32_t number;       // of num_ranges
  int32_t num_ranges;
  int32_t first_block;
  int32_t num_blocks;
  uint32_t first_slot;  // of the ring, counted from the start of the kernel: a multiple of kWarps
  // Of the row.
  int32_t first_token;
  int32_t num_tokens;
  int32_t position;
  int64_t block_table;

  // Each warp takes a block a round; in the last one those of some may be missing.
  __device__ int num_rounds() const { return (num_blocks + kWarps - 1) / kWarps; }
  // Where the parts of the warps lie in the end: the slots of the last round.
  __device__ uint32_t parts_slot() const { return first_slot + (num_rounds() - 1) * kWarps; }
};

// Sums over rows, inclusive.
struct Plan {
  int32_t items[kMaxRows];
  int32_t slots[kMaxRows];  // partial results of a query head: (range, token)
  int32_t num_items;
  int32_t num_whole_rows;  // the first ones: an item has all ranges of a row, kv head and tile
};

struct Args {
  PagedAttentionArgs attention;
  CUtensorMap cache;  // 64 columns, lines of a block, keys and values, blocks
  float* partials;    // [num_slots * num_heads][head_dim]
  float2* stats;      // [num_slots * num_heads]: max (base 2) and sum
  int64_t num_slots;
  uint32_t* counters;  // [0]: items taken; [2], [4], ...: one of 64 bits for each (row, tile, kv
                       // head), 16 bits for each finishing warp's ranges
};

template <int kHeadDim>
struct Layout {
  static constexpr int kBlockElements = kPagedBlock * kHeadDim;
  static constexpr uint32_t kBlockBytes = kBlockElements * sizeof(Bf16);
  static constexpr int kSlotBytes = 2 * static_cast<int>(kBlockBytes);  // keys, values
  static constexpr int kLinesOfRow = kHeadDim / 64;                     // lines of 128 bytes
  static constexpr int kQueryStride = kHeadDim + 8;  // + 16 bytes: rows in different banks
  static constexpr int kColumns = kHeadDim / kWarp;  // of a row, by a lane
  // Where 16-byte piece `piece` of row `row` lies in a block of keys or of values: pieces of a line
  // are swizzled. Linear over xor.
  __host__ __device__ static constexpr uint32_t Offset(uint32_t row, uint32_t piece) {
    const uint32_t line = row * kLinesOfRow + piece / 8;
    return line * 128 + ((piece % 8 ^ line % 8) << 4);
  }
  // The key of column n of a product. Of its lane's quarter of a warp, 2 keys of 4 pieces each (or
  // 4 keys of 2 pieces, as values) then lie in 8 different banks of 16 bytes.
  static constexpr int kPairFlip = kHeadDim == 128 ? 2 : 4;
  __device__ static int FirstKeyOfPair(int pair) {
    return kHeadDim == 128 ? pair + pair / 2 * 4 : 2 * pair + pair / 2;
  }
  __device__ static int KeyOf(int n) { return FirstKeyOfPair(n / 2) ^ n % 2 * kPairFlip; }
  struct Queries {
    alignas(16) Bf16 half[2][kTileQueries][kQueryStride];  // high and low
    int32_t last_key[kTileQueries];
  };
  // Of a range, by a warp. Overwrites the warp's last block.
  struct Part {
    alignas(16) float o[kTileQueries][kHeadDim + 4];
    float max[kTileQueries];
    float sum[kTileQueries];
  };
  static_assert(sizeof(Part) <= kSlotBytes);
  struct Fixed {
    Queries queries[2];
    Range queue[kQueue];
    int32_t blocks[2][kCoarseBlocks];  // of a range and the next: the block table
    Plan plan;
    // Pairs of "may be read" and "may be written". Where the lanes of a warp write what others read
    // (queries, parts), each lane arrives for itself.
    uint64_t slot_full[kMaxSlots], slot_empty[kMaxSlots];
    uint64_t range_full[kQueue], range_empty[kQueue];
    uint64_t queries_full[2], queries_empty[2];
    uint64_t parts_full[kQueue];
  };
  static constexpr int kRoom = (kSharedBytes - static_cast<int>(sizeof(Fixed))) / kSlotBytes;
  // A slot is one warp's alone, so that the parity of its phase is never ambiguous to who waits.
  static constexpr int kSlots = (kRoom < kMaxSlots ? kRoom : kMaxSlots) / kWarps * kWarps;
  static_assert(kSlots >= 2 * kWarps);
  static constexpr int kBytes = kSlots * kSlotBytes + static_cast<int>(sizeof(Fixed));
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

// The keys and the values of a block of a kv head; they count on `barrier`.
template <int kHeadDim>
__device__ inline void CopyBlock(void* to, const CUtensorMap* cache, int head, int block,
                                 uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_"
      "hint [%0], [%1, {0, %2, 0, %3}], [%4], %5;" ::"r"(hopper::SharedAddress(to)),
      "l"(cache), "r"(head * kPagedBlock * Layout<kHeadDim>::kLinesOfRow), "r"(block),
      "r"(hopper::SharedAddress(barrier)), "l"(policy)
      : "memory");
}

// Adds; what this thread (and those it has heard of) wrote is seen by whoever adds later and then
// calls AcquireFence().
__device__ inline uint64_t AddRelease(uint64_t* counter, uint64_t value) {
  uint64_t before;
  asm volatile("atom.release.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(counter), "l"(value)
               : "memory");
  return before;
}

// Empties the first-level cache, so it is for those who read, not for all who add.
__device__ inline void AcquireFence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Four bytes into shared memory, there after WaitForCopies() of the thread.
__device__ inline void CopyWord(int32_t* to, const int32_t* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(hopper::SharedAddress(to)),
               "l"(from)
               : "memory");
}
__device__ inline void WaitForCopies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Two values as the high and the low halves of their bf16 pairs.
__device__ inline void SplitPair(float x, float y, uint32_t* high, uint32_t* low) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(x, y);
  const __nv_bfloat162 l = __floats2bfloat162_rn(x - __low2float(h), y - __high2float(h));
  *high = *reinterpret_cast<const uint32_t*>(&h);
  *low = *reinterpret_cast<const uint32_t*>(&l);
}

__device__ inline int HeadsOfGroup(const PagedAttentionArgs& args) {
  return args.num_heads / args.num_kv_heads;
}
__device__ inline int NumTiles(const PagedAttentionArgs& args, int num_tokens) {
  return (num_tokens * HeadsOfGroup(args) + kTileQueries - 1) / kTileQueries;
}
template <typename RowOrRange>
__device__ inline int NumBlocks(const RowOrRange& row) {
  return static_cast<int>((row.position + row.num_tokens + kPagedBlock - 1) / kPagedBlock);
}
__device__ inline int NumRanges(const StepRow& row) {
  return static_cast<int>(NumRanges(NumBlocks(row)));
}

// Of a query of a tile: the token, and the query head.
__device__ inline int TokenOf(const PagedAttentionArgs& args, const Range& range, int query) {
  return (range.tile * kTileQueries + query) / HeadsOfGroup(args);
}
__device__ inline int HeadOf(const PagedAttentionArgs& args, const Range& range, int query) {
  return range.head * HeadsOfGroup(args) + (range.tile * kTileQueries + query) % HeadsOfGroup(args);
}

__device__ inline float WarpScan(float x) {
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const float other = __shfl_up_sync(0xffffffffu, x, offset);
    if (static_cast<int>(threadIdx.x) % kWarp >= offset) x += other;
  }
  return x;
}

// How many rows at the front are not split. A row that one block reads has no partial results to
// write, count and merge; what is split fills the blocks that end early. So there is as much split
// work for each block as the longest row is.
__device__ int NumWholeRows(const PagedAttentionArgs& attention) {
  const int num_rows = attention.num_decode_rows, lane = threadIdx.x % kWarp;
  if (num_rows == 1) return 0;
  const auto work_of = [&](int index) {
    if (index >= num_rows) return 0.0f;
    const StepRow& row = attention.rows[index];
    return row.num_tokens == 0 ? 0.0f
                               : NumTiles(attention, row.num_tokens) * attention.num_kv_heads *
                                     static_cast<float>(NumBlocks(row));
  };
  float work = 0, longest = 0;
  for (int index = lane; index < num_rows; index += kWarp) {
    work += work_of(index);
    longest = fmaxf(longest, static_cast<float>(NumBlocks(attention.rows[index])));
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    work += __shfl_xor_sync(0xffffffffu, work, offset);
    longest = fmaxf(longest, __shfl_xor_sync(0xffffffffu, longest, offset));
  }
  const float split = static_cast<float>(gridDim.x) * longest;
  float before = 0;
  int whole = 0;
  for (int first = 0; first < num_rows && work - before >= split; first += kWarp) {
    const int index = first + lane;
    const float until = before + WarpScan(work_of(index));
    whole += __popc(__ballot_sync(0xffffffffu, index < num_rows && work - until >= split));
    before = __shfl_sync(0xffffffffu, until, kWarp - 1);
  }
  return whole;
}

// By one warp. Every block makes the same plan.
__device__ void MakePlan(const Args& args, Plan& plan) {
  const PagedAttentionArgs& attention = args.attention;
  const int lane = threadIdx.x % kWarp;
  int num_whole_rows = NumWholeRows(attention);
  for (int pass = 0; pass < 2; ++pass) {
    int items = 0, slots = 0;
    for (int first = 0; first < attention.num_decode_rows; first += kWarp) {
      int my_items = 0, my_slots = 0;
      if (first + lane < attention.num_decode_rows) {
        const StepRow& row = attention.rows[first + lane];
        if (row.num_tokens > 0) {
          const bool whole = first + lane < num_whole_rows;
          const int ranges = NumRanges(row);
          my_items =
              NumTiles(attention, row.num_tokens) * attention.num_kv_heads * (whole ? 1 : ranges);
          my_slots = whole ? 0 : ranges * row.num_tokens;
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
    if (lane == 0) plan.num_items = items, plan.num_whole_rows = num_whole_rows;
    if (slots <= args.num_slots) break;
    num_whole_rows = attention.num_decode_rows;  // there is no room for partial results
  }
}

// Short ranges last: they end together.
__device__ Range FindItem(const PagedAttentionArgs& args, const Plan& plan, int index) {
  int low = 0, high = args.num_decode_rows - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (index < plan.items[middle]) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const StepRow& row = args.rows[low];
  const int tiles = NumTiles(args, row.num_tokens);
  int rest = index - (low > 0 ? plan.items[low - 1] : 0);
  Range range = {.row = low};
  range.tile = rest % tiles;
  rest /= tiles;
  range.head = rest % args.num_kv_heads;
  range.num_queries =
      min(kTileQueries, row.num_tokens * HeadsOfGroup(args) - range.tile * kTileQueries);
  range.num_ranges = NumRanges(row);
  range.number = low < plan.num_whole_rows ? 0 : range.num_ranges - 1 - rest / args.num_kv_heads;
  range.first_token = row.first_token;
  range.num_tokens = row.num_tokens;
  range.position = static_cast<int>(row.position);
  range.block_table = row.block_table;
  return range;
}

// The fetching warp. It takes, looks up and announces the next item while it asks for the last
// blocks of this one. The chain from the counter by the row to the queries takes some 10 us beside
// the traffic of the ring, as long as the keys of an item; thus no warp waits for it. An item is
// not taken earlier: towards the end a block should not hold what another could begin. Here nothing
// that is loaded goes to a register before it is used: the compiler would wait for it before the
// next loop.
template <int kHeadDim>
class Fetcher {
  using L = Layout<kHeadDim>;
  // So many blocks are left when the next item is taken, so many are asked for until it is there.
  static constexpr int kTakeAhead = 16, kTakeTime = 8;

 public:
  __device__ Fetcher(const Args& args, typename L::Fixed& shared, char* ring)
      : args_(args), attention_(args.attention), shared_(shared), ring_(ring) {}

  __device__ void Run() {
    Range range = {.row = -1};
    const int32_t* blocks = nullptr;
    int num_slots = 0, look_at = 0;
    if (static_cast<int>(blockIdx.x) < shared_.plan.num_items) {
      range = FindItem(attention_, shared_.plan, blockIdx.x);
      num_slots = look_at = FetchFirst(range);
    }
    DependencyWait();
    if (range.row >= 0 && !HasNextRange(range)) Take();
#pragma unroll 1
    while (true) {
      const Range next = Look(Next(range), range.first_slot + num_slots);
      Fetch(range, blocks, look_at, num_slots);
      if (next.row < 0) break;
      WaitForCopies();
      __syncwarp();
      range = next;
      blocks = shared_.blocks[(num_announced_ - 1) % 2];
      num_slots = range.num_rounds() * kWarps;
      const int take_at = max(num_slots - kTakeAhead, 0);
      look_at = min(take_at + kTakeTime, num_slots);
      Fetch(range, blocks, 0, take_at);
      if (!HasNextRange(range)) Take();
      Fetch(range, blocks, take_at, look_at);
    }
    DependencyTrigger();
  }

 private:
  // The first range, before the kernel before has ended; returns its slots. Code of its own: a
  // short context is over with it, and through the loop of the others it took 2 of 13 us longer.
  __device__ int FetchFirst(Range& range) {
    range.first_block = FirstBlock(range.number);
    range.num_blocks = min(FirstBlock(range.number + 1), NumBlocks(range)) - range.first_block;
    range.first_slot = 0;
    const int32_t* table = attention_.block_tables + range.block_table + range.first_block;
    int32_t blocks[kCoarseBlocks / kWarp];  // lane, lane + 32: of the range, in the cache
#pragma unroll
    for (int i = 0; i < kCoarseBlocks / kWarp; ++i) {
      const int block = lane_ + i * kWarp;
      blocks[i] = block < range.num_blocks ? __ldg(table + block) : 0;
    }
    const uint64_t policy = CachePolicy(NumTiles(attention_, range.num_tokens) == 1);
    Announce(range);
    const int num_slots = range.num_rounds() * kWarps;
    for (int block = 0; block < num_slots; ++block) {
      const int in_cache =
          __shfl_sync(0xffffffffu, block < kWarp ? blocks[0] : blocks[1], block % kWarp);
      hopper::BarrierWait(&shared_.slot_empty[slot_], parity_);
      if (lane_ == 0) {
        uint64_t* full = &shared_.slot_full[slot_];
        if (block < range.num_blocks) {
          hopper::BarrierArriveExpect(full, L::kSlotBytes);
          CopyBlock<kHeadDim>(ring_ + slot_ * L::kSlotBytes, &args_.cache, range.head, in_cache,
                              full, policy);
        } else {
          hopper::BarrierArrive(full);
        }
      }
      __syncwarp();
      if (++slot_ == L::kSlots) slot_ = 0, parity_ ^= 1;
    }
    return num_slots;
  }

  // A row's ranges may be one item.
  __device__ bool HasNextRange(const Range& range) const {
    return range.row < shared_.plan.num_whole_rows && range.number + 1 < range.num_ranges;
  }

  __device__ void Take() {
    // Each block fails once: the last of all leaves the counter as it found it. (The compiler turns
    // atomicAdd() into a sum over the warp, and waits for it at once.)
    if (lane_ == 0) taken_ = atomicInc(&args_.counters[0], shared_.plan.num_items - 1);
  }

  // After `range`, if any.
  __device__ Range Next(Range range) const {
    if (range.row >= 0 && HasNextRange(range)) {
      ++range.number;
      return range;
    }
    const int item = static_cast<int>(gridDim.x + __shfl_sync(0xffffffffu, taken_, 0));
    if (range.row < 0 || item >= shared_.plan.num_items) return {.row = -1};
    return FindItem(attention_, shared_.plan, item);
  }

  // Announces it, and asks for its part of the block table.
  __device__ Range Look(Range range, uint32_t first_slot) {
    if (range.row >= 0) {
      range.first_block = FirstBlock(range.number);
      range.num_blocks = min(FirstBlock(range.number + 1), NumBlocks(range)) - range.first_block;
      range.first_slot = first_slot;
      int32_t* blocks = shared_.blocks[num_announced_ % 2];
      const int32_t* table = attention_.block_tables + range.block_table + range.first_block;
#pragma unroll
      for (int first = 0; first < kCoarseBlocks; first += kWarp) {
        const int block = first + lane_;
        if (block < range.num_blocks) CopyWord(&blocks[block], table + block);
      }
    }
    Announce(range);
    return range;
  }

  // Blocks [begin, end) of the range, one a slot; slots after its last block stay empty.
  __device__ void Fetch(const Range& range, const int32_t* blocks, int begin, int end) {
    const uint64_t policy = CachePolicy(NumTiles(attention_, range.num_tokens) == 1);
    if (lane_ == 0) {
#pragma unroll 1
      for (int block = begin; block < end; ++block) {
        uint64_t* full = &shared_.slot_full[slot_];
        hopper::BarrierWait(&shared_.slot_empty[slot_], parity_);
        if (block < range.num_blocks) {
          hopper::BarrierArriveExpect(full, L::kSlotBytes);
          CopyBlock<kHeadDim>(ring_ + slot_ * L::kSlotBytes, &args_.cache, range.head,
                              blocks[block], full, policy);
        } else {
          hopper::BarrierArrive(full);
        }
        if (++slot_ == L::kSlots) slot_ = 0, parity_ ^= 1;
      }
    }
    __syncwarp();
  }

  __device__ void Announce(const Range& range) {
    const int place = num_announced_ % kQueue;
    hopper::BarrierWait(&shared_.range_empty[place], num_announced_ / kQueue % 2 ^ 1);
    if (lane_ == 0) {
      shared_.queue[place] = range;
      hopper::BarrierArrive(&shared_.range_full[place]);
    }
    ++num_announced_;
  }

  const Args& args_;
  const PagedAttentionArgs& attention_;
  typename L::Fixed& shared_;
  char* ring_;
  const int lane_ = threadIdx.x % kWarp;
  uint32_t taken_ = 0;  // by lane 0
  uint32_t num_announced_ = 0;
  int slot_ = 0;  // of the next block
  uint32_t parity_ = 1;
};

// Columns [lane * kColumns, (lane + 1) * kColumns) of a row.
template <typename T, int kColumns>
struct alignas(kColumns * sizeof(T)) Columns {
  T x[kColumns];
};

// The key and the value of a token of the step, as the cache holds them.
template <int kHeadDim>
struct StepEntry {
  static constexpr int kColumns = kHeadDim / kWarp;
  Columns<Bf16, kColumns> key = {}, value = {};

  __device__ StepEntry() {}
  __device__ StepEntry(const PagedAttentionArgs& args, const Range& range, int index) {
    const int64_t token = range.first_token + index;
    const int d = static_cast<int>(threadIdx.x) % kWarp * kColumns;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      value.x[c] = Row<const Bf16>(args.v, token)[range.head * kHeadDim + d + c];
    }
    float rotated[kColumns];
    LoadRotated<Bf16>(args, args.k, token, range.head, d, rotated);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) Store(&key.x[c], rotated[c]);
  }
};

// The warp of the queries: those of each range, rotated and scaled, for the warps that compute.
template <int kHeadDim>
class Asker {
  using L = Layout<kHeadDim>;

 public:
  __device__ Asker(const Args& args, typename L::Fixed& shared)
      : attention_(args.attention), shared_(shared) {}

  __device__ void Run() {
    DependencyWait();
    for (uint32_t n = 0;; ++n) {
      hopper::BarrierWait(&shared_.range_full[n % kQueue], n / kQueue % 2);
      hopper::BarrierWait(&shared_.queries_empty[n % 2], n / 2 % 2 ^ 1);
      const Range range = shared_.queue[n % kQueue];
      if (range.row >= 0) {
        if (range.num_queries == 1) {
          Put<1>(range, shared_.queries[n % 2]);
        } else {
          Put<4>(range, shared_.queries[n % 2]);
        }
      }
      hopper::BarrierArrive(&shared_.queries_full[n % 2]);
      if (range.row < 0) return;
      if (range.tile == 0) WriteCache(range);
    }
  }

 private:
  // The step's keys and values that lie in the range.
  __device__ void WriteCache(const Range& range) {
    const int end = min((range.first_block + range.num_blocks) * kPagedBlock - range.position,
                        range.num_tokens);
    for (int index = max(range.first_block * kPagedBlock - range.position, 0); index < end;
         ++index) {
      const StepEntry<kHeadDim> entry(attention_, range, index);
      Bf16* key = CacheRow<Bf16>(attention_, range, range.position + index, 0, range.head);
      Bf16* value = CacheRow<Bf16>(attention_, range, range.position + index, 1, range.head);
      reinterpret_cast<Columns<Bf16, L::kColumns>*>(key)[lane_] = entry.key;
      reinterpret_cast<Columns<Bf16, L::kColumns>*>(value)[lane_] = entry.value;
    }
  }

  // kAtOnce queries' loads are on their way together. Rows of no query keep what they had: they
  // attend to no key, and no other row depends on them.
  template <int kAtOnce>
  __device__ void Put(const Range& range, typename L::Queries& queries) {
    const float scale = attention_.scale * kLog2E;
#pragma unroll 1
    for (int first = 0; first < range.num_queries; first += kAtOnce) {
      float x[kAtOnce][L::kColumns];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int query = min(first + i, range.num_queries - 1);
        LoadRotated<Bf16>(attention_, attention_.q,
                          range.first_token + TokenOf(attention_, range, query),
                          HeadOf(attention_, range, query), lane_ * L::kColumns, x[i]);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float factor = first + i < range.num_queries ? scale : 0;
#pragma unroll
        for (int c = 0; c < L::kColumns; c += 2) {
          const int d = lane_ * L::kColumns + c;
          SplitPair(x[i][c] * factor, x[i][c + 1] * factor,
                    reinterpret_cast<uint32_t*>(&queries.half[0][first + i][d]),
                    reinterpret_cast<uint32_t*>(&queries.half[1][first + i][d]));
        }
      }
    }
    if (lane_ < kTileQueries) {
      queries.last_key[lane_] =
          lane_ < range.num_queries ? range.position + TokenOf(attention_, range, lane_) : -1;
    }
  }

  const PagedAttentionArgs& attention_;
  typename L::Fixed& shared_;
  const int lane_ = threadIdx.x % kWarp;
};

// The step's own keys and values in a fetched block, whose first position is `first`; what lies
// after the end of the row becomes 0, because a weight of 0 does not silence a NaN.
template <int kHeadDim>
__device__ void PutStepKeys(const PagedAttentionArgs& args, const Range& range, int first,
                            char* block) {
  using L = Layout<kHeadDim>;
  const int lane = threadIdx.x % kWarp, bytes = lane * L::kColumns * static_cast<int>(sizeof(Bf16));
  for (int r = max(range.position - first, 0); r < kPagedBlock; ++r) {
    const int index = first + r - range.position;  // in the step
    StepEntry<kHeadDim> entry;
    if (index < range.num_tokens) entry = StepEntry<kHeadDim>(args, range, index);
    char* to = block + L::Offset(r, bytes / 16) + bytes % 16;
    *reinterpret_cast<Columns<Bf16, L::kColumns>*>(to) = entry.key;
    *reinterpret_cast<Columns<Bf16, L::kColumns>*>(to + L::kBlockBytes) = entry.value;
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

 public:
  __device__ Consumer(const Args& args, Fixed& shared)
      : attention_(args.attention), shared_(shared) {}

  __device__ void Run(char* ring) {
    DependencyWait();
    for (uint32_t n = 0;; ++n) {
      hopper::BarrierWait(&shared_.queries_full[n % 2], n / 2 % 2);
      const Range range = shared_.queue[n % kQueue];
      if (range.row < 0) return;
      Begin(shared_.queries[n % 2]);
      hopper::BarrierArrive(&shared_.queries_empty[n % 2]);
      for (int round = 0; round < range.num_rounds(); ++round) {
        const int index = round * kWarps + warp_;
        const uint32_t sequence = range.first_slot + index, slot = sequence % L::kSlots;
        char* block = ring + slot * L::kSlotBytes;
        hopper::BarrierWait(&shared_.slot_full[slot], sequence / L::kSlots % 2);
        if (index < range.num_blocks) {
          const int first_key = (range.first_block + index) * kPagedBlock;
          if (first_key + kPagedBlock > range.position) {
            PutStepKeys<kHeadDim>(attention_, range, first_key, block);
          }
          Attend(block, first_key);
        }
        __syncwarp();
        if (round + 1 < range.num_rounds()) {
          if (lane_ == 0) hopper::BarrierArrive(&shared_.slot_empty[slot]);
        } else {
          End(range.num_queries, *reinterpret_cast<typename L::Part*>(block));
          hopper::FenceAsyncShared();
        }
      }
      hopper::BarrierArrive(&shared_.parts_full[n % kQueue]);
    }
  }

 private:
  __device__ void Begin(const typename L::Queries& queries) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const uint4 high =
          *reinterpret_cast<const uint4*>(&queries.half[0][group_][(4 * i + quad_) * 8]);
      const uint4 low =
          *reinterpret_cast<const uint4*>(&queries.half[1][group_][(4 * i + quad_) * 8]);
      query_[i][0][0] = high.x, query_[i][0][1] = low.x, query_[i][0][2] = high.y,
      query_[i][0][3] = low.y;
      query_[i][1][0] = high.z, query_[i][1][1] = low.z, query_[i][1][2] = high.w,
      query_[i][1][3] = low.w;
    }
    last_key_ = queries.last_key[group_];
    part_ = {};
#pragma unroll
    for (int n = 0; n < kHalves * 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) o_[n][c] = 0;
    }
  }

  // 16 keys, of which the first has position `first`.
  __device__ void Attend(const char* block, int first) {
    float product[2][2][4] = {};  // by parity of the load: shorter chains
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint4 key = *reinterpret_cast<const uint4*>(
            block + (key_offset_ ^ L::Offset(0, 4 * i)) + L::Offset(8 * n, 0));
        Multiply(product[i % 2][n], query_[i][0], key.x, key.y);
        Multiply(product[i % 2][n], query_[i][1], key.z, key.w);
      }
    }
    float score[4], max = part_.max;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int key = first + c / 2 * 8 + L::KeyOf(2 * quad_ + c % 2);
      const float(&even)[4] = product[0][c / 2], (&odd)[4] = product[1][c / 2];
      const float dot = (even[c % 2] + odd[c % 2]) + (even[c % 2 + 2] + odd[c % 2 + 2]);
      score[c] = key <= last_key_ ? dot : -INFINITY;
      max = fmaxf(max, score[c]);
    }
    max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
    max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2));
    // Without a key so far, as in the rows of no query, nothing is to be scaled.
    const float safe = max == -INFINITY ? 0 : max;
    const float keep = max == -INFINITY ? 1 : Exp2(part_.max - max);
    part_.max = max;
#pragma unroll
    for (int c = 0; c < 4; ++c) score[c] = Exp2(score[c] - safe);
    part_.sum = part_.sum * keep + ((score[0] + score[1]) + (score[2] + score[3]));
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
    AddValues(block + L::kBlockBytes, weight);
  }

  // A lane loads 8 columns of the 4 keys whose weights it holds; column t of them goes to product
  // t.
  __device__ void AddValues(const char* values, const uint32_t (&weight)[4]) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      uint32_t v[4][4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint4 x = *reinterpret_cast<const uint4*>(
            values + (value_offset_ ^ L::Offset(r % 2 * L::kPairFlip, 8 * half)) +
            L::Offset(r / 2 * 8, 0));
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

  // The part of the range, for the finishing warp.
  __device__ void End(int num_queries, typename L::Part& part) {
    float sum = part_.sum;
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (quad_ == 0) part.max[group_] = part_.max, part.sum[group_] = sum;
    if (group_ >= num_queries) return;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int t = 0; t < 16; t += 4) {
        const int c = t / 8, n = half * 8 + t % 8;
        const float4 x = {o_[n][c] + o_[n][c + 2], o_[n + 1][c] + o_[n + 1][c + 2],
                          o_[n + 2][c] + o_[n + 2][c + 2], o_[n + 3][c] + o_[n + 3][c + 2]};
        *reinterpret_cast<float4*>(&part.o[group_][64 * half + 16 * quad_ + t]) = x;
      }
    }
  }

  const PagedAttentionArgs& attention_;
  Fixed& shared_;
  const int lane_ = threadIdx.x % kWarp;
  const int quad_ = lane_ % 4;   // which columns of a product's row
  const int group_ = lane_ / 4;  // which row: the query, or the key
  const int warp_ = threadIdx.x / kWarp;
  const uint32_t key_offset_ = L::Offset(L::KeyOf(group_), quad_);
  const uint32_t value_offset_ = L::Offset(L::FirstKeyOfPair(quad_), group_);
  int last_key_ = -1;  // of query group_
  uint32_t query_[kChunks][2][4];
  Running part_;  // of query group_, this warp's blocks; the sum is this lane's keys'
  float o_[kHalves * 8][4];
};

// A finishing warp: adds the parts of a range, and the ranges, and writes the output, of queries
// member_, member_ + kFinishWarps, ... of a tile.
template <int kHeadDim>
class Finisher {
  using L = Layout<kHeadDim>;
  static constexpr int kColumns = L::kColumns;
  using Columns = cuda::Columns<float, kColumns>;

 public:
  __device__ Finisher(const Args& args, typename L::Fixed& shared, const char* ring)
      : args_(args), attention_(args.attention), shared_(shared), ring_(ring) {}

  __device__ void Run() {
    DependencyWait();
    for (uint32_t n = 0;; ++n) {
      const int place = n % kQueue;
      hopper::BarrierWait(&shared_.range_full[place], n / kQueue % 2);
      const Range range = shared_.queue[place];
      if (range.row < 0) return;
      hopper::BarrierWait(&shared_.parts_full[place], n / kQueue % 2);
      const uint32_t slot = range.parts_slot() % L::kSlots;
      Columns o[kQueriesOfFinisher];
      Running part;
      if (member_ < range.num_queries) {
        part = AddParts(reinterpret_cast<const typename L::Part*>(ring_ + slot * L::kSlotBytes),
                        range.num_queries, o);
      }
      hopper::NamedBarrierSync(kFinishBarrier, kFinishWarps * kWarp);
      if (member_ == 0) {
        if (lane_ < kWarps) hopper::BarrierArrive(&shared_.slot_empty[slot + lane_]);
        if (lane_ == 0) hopper::BarrierArrive(&shared_.range_empty[place]);
      }
      if (member_ >= range.num_queries) continue;
      if (range.row < shared_.plan.num_whole_rows || range.num_ranges == 1) {
        AddRange(range, part, o);
      } else {
        WritePartials(range, part, o);
        if (IsLast(range)) MergePartials(range);
      }
    }
  }

 private:
  __device__ int QueryOf(int i) const { return member_ + i * kFinishWarps; }

  // The range's max and sum of query lane % 8, and o of this warp's queries.
  __device__ Running AddParts(const typename L::Part* first, int num_queries,
                              Columns (&o)[kQueriesOfFinisher]) const {
    const auto part_of = [&](int w) -> const typename L::Part& {
      return *reinterpret_cast<const typename L::Part*>(reinterpret_cast<const char*>(first) +
                                                        w * L::kSlotBytes);
    };
    const int mine = lane_ % kTileQueries;
    float factor[kWarps], sum = 0, max = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) max = fmaxf(max, part_of(w).max[mine]);
    const float safe = max == -INFINITY ? 0 : max;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      factor[w] = Exp2(part_of(w).max[mine] - safe);
      sum = __fmaf_rn(part_of(w).sum[mine], factor[w], sum);
    }
#pragma unroll
    for (int i = 0; i < kQueriesOfFinisher; ++i) {
      const int query = QueryOf(i);
      if (query >= num_queries) break;
      o[i] = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float f = __shfl_sync(0xffffffffu, factor[w], query);
        const Columns part =
            *reinterpret_cast<const Columns*>(&part_of(w).o[query][lane_ * kColumns]);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) o[i].x[c] = __fmaf_rn(part.x[c], f, o[i].x[c]);
      }
    }
    return {max, sum};
  }

  // To the row's total, which is this block's alone.
  __device__ void AddRange(const Range& range, const Running& part,
                           const Columns (&o)[kQueriesOfFinisher]) {
    if (range.number == 0) total_ = {};
    const float2 factors = Merge(total_, part.max, part.sum);
#pragma unroll
    for (int i = 0; i < kQueriesOfFinisher; ++i) {
      const int query = QueryOf(i);
      if (query >= range.num_queries) break;
      if (range.number == 0) total_o_[i] = {};
      const float2 f = {__shfl_sync(0xffffffffu, factors.x, query),
                        __shfl_sync(0xffffffffu, factors.y, query)};
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        total_o_[i].x[c] = MergeValue(f, total_o_[i].x[c], o[i].x[c]);
      }
      if (range.number == range.num_ranges - 1) {
        WriteOutput(range, query, lane_ * kColumns, total_o_[i],
                    __shfl_sync(0xffffffffu, total_.sum, query));
      }
    }
  }

  // Where the partial result of a query lies in the first range, and how far on in the next.
  __device__ int64_t FirstSlot(const Range& range, int query) const {
    const int begin = range.row > 0 ? shared_.plan.slots[range.row - 1] : 0;
    return (begin + int64_t{TokenOf(attention_, range, query)}) * attention_.num_heads +
           HeadOf(attention_, range, query);
  }
  __device__ int64_t SlotStride(const Range& range) const {
    return int64_t{range.num_tokens} * attention_.num_heads;
  }

  __device__ void WritePartials(const Range& range, const Running& part,
                                const Columns (&o)[kQueriesOfFinisher]) {
    const int64_t offset = range.number * SlotStride(range);
#pragma unroll
    for (int i = 0; i < kQueriesOfFinisher; ++i) {
      const int query = QueryOf(i);
      if (query >= range.num_queries) break;
      const int64_t slot = FirstSlot(range, query) + offset;
      StoreColumns(&args_.partials[slot * kHeadDim + lane_ * kColumns], o[i]);
      if (lane_ == query) __stcg(&args_.stats[slot], float2{part.max, part.sum});
    }
  }

  // Whether this warp's queries of all ranges of the tile are there, after this one.
  __device__ bool IsLast(const Range& range) {
    const auto others = static_cast<uint32_t>(range.num_ranges) - 1;
    uint32_t before = 0;
    __syncwarp();
    if (lane_ == 0) {
      // Floors of the queries before the row, plus one a row, leave room for the ceiling of each
      // row.
      const int64_t queries_before = int64_t{range.first_token} * HeadsOfGroup(attention_);
      const int64_t tile = queries_before / kTileQueries + range.row + range.tile;
      auto* counter = reinterpret_cast<uint64_t*>(args_.counters) + 1 +
                      tile * attention_.num_kv_heads + range.head;
      const int shift = 16 * member_;
      before = AddRelease(counter, uint64_t{1} << shift) >> shift & 0xffff;
      if (before == others) {
        AcquireFence();
        atomicAdd(reinterpret_cast<unsigned long long*>(counter),
                  -(static_cast<unsigned long long>(range.num_ranges) << shift));
      }
    }
    return __shfl_sync(0xffffffffu, before, 0) == others;
  }

  // The running sums of AddRange. Each half of the warp merges a query; its lanes form the factors
  // of as many ranges.
  __device__ void MergePartials(const Range& range) {
    constexpr int kAtOnce = 9;  // ranges; the loads of both queries are on their way together
    constexpr int kHalf = kWarp / 2;
    constexpr int kPieces = kHeadDim / (4 * kHalf);  // of 4 columns, by a lane
    const int lane = lane_ % kHalf;
    const int64_t stride = SlotStride(range);
#pragma unroll 1
    for (int pair = member_; pair < range.num_queries; pair += 2 * kFinishWarps) {
      const int query = pair + lane_ / kHalf * kFinishWarps;
      const bool present = query < range.num_queries;
      const int64_t slot = FirstSlot(range, present ? query : pair);
      const float2* stats_from = args_.stats + slot + lane * stride;
      const float* from = args_.partials + slot * kHeadDim + lane * 4;
      float max = -INFINITY, sum = 0;
      cuda::Columns<float, 4> o[kPieces] = {};
#pragma unroll 1
      for (int begin = 0; begin < range.num_ranges; begin += kAtOnce) {
        const int num = min(kAtOnce, range.num_ranges - begin);
        const float2 stats = present && lane < num ? __ldcg(stats_from) : float2{-INFINITY, 0};
        stats_from += kAtOnce * stride;
        float4 part[kAtOnce][kPieces];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
          for (int piece = 0; piece < kPieces; ++piece) {
            if (present && i < num) {
              part[i][piece] = __ldcg(reinterpret_cast<const float4*>(from + piece * 4 * kHalf));
            }
          }
          from += stride * kHeadDim;
        }
        Running running = {RunningMax<kHalf>(stats.x, &max), 0};
        const float2 factors = Merge(running, stats.x, 0);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (i >= num) break;
          const float2 f = {__shfl_sync(0xffffffffu, factors.x, i, kHalf),
                            __shfl_sync(0xffffffffu, factors.y, i, kHalf)};
          sum = MergeValue(f, sum, __shfl_sync(0xffffffffu, stats.y, i, kHalf));
#pragma unroll
          for (int piece = 0; piece < kPieces; ++piece) {
            const float4 x = part[i][piece];
            auto& to = o[piece].x;
            to[0] = MergeValue(f, to[0], x.x), to[1] = MergeValue(f, to[1], x.y);
            to[2] = MergeValue(f, to[2], x.z), to[3] = MergeValue(f, to[3], x.w);
          }
        }
      }
      if (!present) continue;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        WriteOutput(range, query, (piece * kHalf + lane) * 4, o[piece], sum);
      }
    }
    // Unused where ranges are merged here: the loads have had their registers.
    total_ = {};
#pragma unroll
    for (int i = 0; i < kQueriesOfFinisher; ++i) total_o_[i] = {};
  }

  // Among kLanes lanes: the maximum of *max and of the lanes before; *max becomes that of all.
  template <int kLanes>
  __device__ float RunningMax(float mine, float* max) const {
    const int lane = lane_ % kLanes;
    float after = mine;
    for (int offset = 1; offset < kLanes; offset *= 2) {
      const float other = __shfl_up_sync(0xffffffffu, after, offset, kLanes);
      if (lane >= offset) after = fmaxf(after, other);
    }
    after = fmaxf(after, *max);
    const float before = __shfl_up_sync(0xffffffffu, after, 1, kLanes), first = *max;
    *max = __shfl_sync(0xffffffffu, after, kLanes - 1, kLanes);
    return lane == 0 ? first : before;
  }

  // Columns of the head of a query from `first` on.
  template <int kNum>
  __device__ void WriteOutput(const Range& range, int query, int first,
                              const cuda::Columns<float, kNum>& o, float sum) {
    const int64_t token = range.first_token + TokenOf(attention_, range, query);
    const int64_t column = HeadOf(attention_, range, query) * kHeadDim + first;
#pragma unroll
    for (int c = 0; c < kNum; ++c) StoreAny(attention_.o, token, column + c, o.x[c] / sum);
  }

  __device__ static void StoreColumns(float* to, const Columns& x) {
    if constexpr (kColumns == 4) {
      __stcg(reinterpret_cast<float4*>(to), float4{x.x[0], x.x[1], x.x[2], x.x[3]});
    } else {
      __stcg(reinterpret_cast<float2*>(to), float2{x.x[0], x.x[1]});
    }
  }

  const Args& args_;
  const PagedAttentionArgs& attention_;
  typename L::Fixed& shared_;
  const char* ring_;
  const int lane_ = threadIdx.x % kWarp;
  const int member_ = static_cast<int>(threadIdx.x) / kWarp - kFinishWarp;  // of the warps
  Running total_;                                                           // of query lane % 8
  Columns total_o_[kQueriesOfFinisher];
};

template <int kHeadDim>
__device__ void InitBarriers(typename Layout<kHeadDim>::Fixed& shared) {
  for (int slot = 0; slot < Layout<kHeadDim>::kSlots; ++slot) {
    hopper::BarrierInit(&shared.slot_full[slot], 1);
    hopper::BarrierInit(&shared.slot_empty[slot], 1);
  }
  for (int place = 0; place < kQueue; ++place) {
    hopper::BarrierInit(&shared.range_full[place], 1);
    hopper::BarrierInit(&shared.range_empty[place], 1);
    hopper::BarrierInit(&shared.parts_full[place], kWarps * kWarp);
  }
  for (int place = 0; place < 2; ++place) {
    hopper::BarrierInit(&shared.queries_full[place], kWarp);
    hopper::BarrierInit(&shared.queries_empty[place], kWarps * kWarp);
  }
  hopper::BarrierInitFence();
}
#endif

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    PagedDecodeKernel(const __grid_constant__ Args args) {
#if __CUDA_ARCH__ >= 900
  using L = Layout<kHeadDim>;
  extern __shared__ __align__(1024) char ring[];
  auto& shared = *reinterpret_cast<typename L::Fixed*>(ring + L::kSlots * L::kSlotBytes);
  if (threadIdx.x == 0) InitBarriers<kHeadDim>(shared);
  const int warp = threadIdx.x / kWarp;
  if (warp == 0) MakePlan(args, shared.plan);
  __syncthreads();
  if (warp == kFetchWarp) {
    Fetcher<kHeadDim>(args, shared, ring).Run();
  } else if (warp == kQueryWarp) {
    Asker<kHeadDim>(args, shared).Run();
  } else if (warp >= kFinishWarp) {
    Finisher<kHeadDim>(args, shared, ring).Run();
  } else {
    Consumer<kHeadDim>(args, shared).Run(ring);
  }
#endif
}

// A slot holds a query head's partial result of one (range, token).
int64_t SlotBytes(int64_t num_heads, int64_t head_dim) {
  return num_heads *
         (head_dim * static_cast<int64_t>(sizeof(float)) + static_cast<int64_t>(sizeof(float2)));
}
int64_t NumSlots(int64_t num_blocks, int64_t num_rows, int64_t num_heads, int64_t head_dim) {
  const int64_t most = (num_blocks / kFineBlocks + num_rows) * kWindow;
  return std::min(most, kMaxPartialBytes / SlotBytes(num_heads, head_dim) / 2 * 2);
}

template <int kHeadDim>
cudaError_t LaunchKernel(const Args& args, const Context& context) {
  using L = Layout<kHeadDim>;
  const auto kernel = PagedDecodeKernel<kHeadDim>;
  static const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes);
  if (allowed != cudaSuccess) return allowed;
  return LaunchDependent(kernel, static_cast<unsigned>(context.num_multiprocessors), kThreads,
                         L::kBytes, context.stream, args);
}

int64_t NumCounters(const PagedAttentionArgs& args) {
  const int64_t heads_of_group = args.num_heads / args.num_kv_heads;
  return 2 + 2 * (args.num_decode_tokens * heads_of_group / kTileQueries + args.num_decode_rows) *
                 args.num_kv_heads;
}

bool Supports(const PagedAttentionArgs& args, const Context& context) {
  const bool aligned =
      reinterpret_cast<uintptr_t>(args.blocks.data) % 16 == 0 && args.blocks.row_stride % 8 == 0;
  // Indices of items are 32 bits wide.
  const int64_t ranges = (args.blocks.rows() / kFineBlocks + 1) * args.num_decode_rows;
  const int64_t most_of_row = NumRanges(args.blocks.rows());
  return context.compute_capability >= 90 && args.q.dtype == DType::kBF16 && aligned &&
         (args.head_dim == 64 || args.head_dim == 128) && args.num_decode_rows <= kMaxRows &&
         NumCounters(args) <= kNumCounters && most_of_row <= UINT16_MAX &&
         ranges * kWindow * args.num_heads <= INT32_MAX;
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
  const auto size = [](int64_t x) { return static_cast<cuuint64_t>(x); };
  const int64_t lines = kPagedBlock * attention.head_dim / 64;
  const cudaError_t mapped = hopper::MakeTensorMap<4>(
      attention.blocks.data,
      {64, size(lines * attention.num_kv_heads), 2, size(attention.blocks.rows())},
      {64, size(64 * lines * attention.num_kv_heads), size(attention.blocks.row_stride)},
      {64, static_cast<cuuint32_t>(lines), 2, 1}, CU_TENSOR_MAP_SWIZZLE_128B, &args.cache);
  if (mapped != cudaSuccess) return mapped;
  return attention.head_dim == 64 ? LaunchKernel<64>(args, context)
                                  : LaunchKernel<128>(args, context);
}

int64_t PagedDecodeScratchBytes(const BackendLimits& limits) {
  if (limits.num_heads == 0) return 0;
  return NumSlots(limits.num_blocks, limits.max_rows, limits.num_heads, limits.head_dim) *
         SlotBytes(limits.num_heads, limits.head_dim);
}

}  // namespace godwit::cuda
