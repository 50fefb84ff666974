#pragma once
// A device: memory, the ops of ops.h, and one in-order queue. The abstract class is the plugin
// boundary: its virtuals take and return only plain data of kernels/base (no absl, std::string,
// exceptions or RTTI cross it).

#include <cstdint>

#include "kernels/base/op_status.h"
#include "kernels/base/tensor.h"
#include "kernels/ops.h"

namespace godwit {

struct DeviceInfo {
  const char* name = "";         // "cpu", "cuda"
  const char* description = "";  // instruction set or GPU, threads; one line
  int64_t memory_bytes = 0;      // total
  int64_t free_bytes = 0;        // what a plan may use now
  int64_t used_bytes = 0;  // now: of the whole device where it serves this process alone, else of
                           // this process
  bool owns_memory =
      false;             // the memory serves this process alone: a plan may take nearly all of it
  bool replays = false;  // BeginReplay records: steps of one shape are worth padding to
};

// What the ops will be called with at most, so that a back end plans its own memory once and
// allocates nothing on the step path.
struct BackendLimits {
  int64_t max_tokens = 0;         // T of a step
  int64_t max_rows = 0;           // rows of a step
  int64_t max_input_columns = 0;  // widest input of a product
  int64_t max_gated_columns = 0;  // widest output of a gated product
  int64_t max_key_columns = 0;    // widest H * d_k of lightning attention, 0 without
  int64_t num_heads = 0;          // of softmax attention, 0 without
  int64_t head_dim = 0;           // of softmax attention
  int64_t num_blocks = 0;         // KV blocks
  int64_t max_draws = 0;          // rows of a Sample, sequences of a VerifyTokens
  int64_t vocab_size = 0;
  bool deterministic = false;  // bits of a decode row independent of the batch, of a prefill row of
                               // the cuts at multiples of P
};

inline constexpr int kNumMarks = 12;

// Of device memory.
struct ByteRange {
  void* data = nullptr;
  int64_t num_bytes = 0;
};

// Not thread-safe: one owner thread calls it. Ops are queued in order and may still be running when
// the call returns; arguments structs are read before it returns, device data they point to when
// the op runs. Host and device memory are the same on the CPU.
// One part of a copy between device memories.
struct CopyRange {
  void* to = nullptr;
  const void* from = nullptr;
  int64_t num_bytes = 0;
};

class Backend {
 public:
  virtual DeviceInfo Info() const = 0;

  // Zeroed, aligned to 64 bytes or more. Freed by Free; kResourceExhausted leaves everything as it
  // was.
  virtual OpStatus Allocate(int64_t num_bytes, void** data) = 0;
  virtual void Free(void* data) = 0;

  // Host memory from which and to which copies are queued without a wait (pinned). Zeroed, aligned
  // to 64 bytes or more. Ops too reach it, at the same address, over the bus: for what they write
  // and the host reads, which it may once WaitMark or Synchronize has passed the op.
  virtual OpStatus AllocateHost(int64_t num_bytes, void** data) = 0;
  virtual void FreeHost(void* data) = 0;

  // Once, before the first op of a model; until then, and beyond the limits, ops grow their scratch
  // when they need it.
  virtual OpStatus Reserve(const BackendLimits& limits) = 0;

  // Queued like an op. CopyFromHost reads memory of AllocateHost when the copy runs, other memory
  // before it returns; CopyToHost writes when the copy runs.
  virtual OpStatus CopyFromHost(void* device_to, const void* host_from, int64_t num_bytes) = 0;
  virtual OpStatus CopyToHost(void* host_to, const void* device_from, int64_t num_bytes) = 0;
  virtual OpStatus CopyOnDevice(void* to, const void* from, int64_t num_bytes) = 0;
  // Copies that do not overlap, in one launch where launches cost more than the bytes.
  virtual OpStatus CopyRanges(const CopyRange* ranges, int64_t num_ranges) = 0;
  // Any number of ranges, all at once.
  virtual OpStatus FillZero(const ByteRange* ranges, int64_t num_ranges) = 0;

  // Weights, in the back end's one layout. PackMatrixRows stores `source` (host, [n, num_columns],
  // f32 or bf16, any 2-byte alignment) as rows [first_row, first_row + n) of `matrix`, converting
  // to its dtype. Free(matrix.data) releases it.
  virtual OpStatus AllocateMatrix(int64_t num_rows, int64_t num_columns, DType dtype,
                                  MatrixView* matrix) = 0;
  virtual OpStatus PackMatrixRows(const MatrixView& matrix, int64_t first_row,
                                  const TensorView& source) = 0;
  // Pseudo-random entries, mean 0, standard deviation `scale`: the shape of a model without its
  // weights. The same entries for the same seed on one back end.
  virtual OpStatus FillRandom(const MatrixView& matrix, uint64_t seed, float scale) = 0;

  virtual OpStatus EmbedTokens(const EmbedTokensArgs& args) = 0;
  virtual OpStatus Linear(const LinearArgs& args) = 0;
  virtual OpStatus GatedLinear(const GatedLinearArgs& args) = 0;
  virtual OpStatus GatherRows(const GatherRowsArgs& args) = 0;
  virtual OpStatus LightningAttention(const LightningAttentionArgs& args) = 0;
  virtual OpStatus Rope(const RopeArgs& args) = 0;
  virtual OpStatus PagedAttention(const PagedAttentionArgs& args) = 0;
  virtual OpStatus TurnKeys(const TurnKeysArgs& args) = 0;
  virtual OpStatus CountTokens(const CountTokensArgs& args) = 0;
  virtual OpStatus Sample(const SampleArgs& args) = 0;
  virtual OpStatus AcceptanceHead(const AcceptanceHeadArgs& args) = 0;
  virtual OpStatus VerifyTokens(const VerifyTokensArgs& args) = 0;
  virtual OpStatus ScoreTokens(const ScoreTokensArgs& args) = 0;

  // Sum over the ranks of a sharded model; world = 1 today, so every back end returns x unchanged.
  virtual OpStatus AllReduce(const TensorView& x) = 0;

  // Replay: between BeginReplay and EndReplay come the ops of a step whose arguments (pointers,
  // shapes, scalars) are a function of `key`; all else is device data. When *replayed is true the
  // back end has queued the ops recorded under that key, and the caller leaves them out. Ops that
  // allocate or wait do not belong there. A back end without recording always says false. An error
  // in between: the caller still calls EndReplay, which drops what was recorded.
  virtual OpStatus BeginReplay(uint64_t key, bool* replayed) = 0;
  virtual OpStatus EndReplay() = 0;

  // Marks [0, kNumMarks) in the queue. SetMark queues one; WaitMark waits until the queue has
  // passed the last one set; SecondsBetween two passed marks is device time.
  virtual OpStatus SetMark(int mark) = 0;
  virtual OpStatus WaitMark(int mark) = 0;
  virtual OpStatus SecondsBetween(int from, int to, double* seconds) = 0;

  // Waits for everything queued. kUnavailable: the device is lost.
  virtual OpStatus Synchronize() = 0;

  // Ends the object, in the heap that made it.
  virtual void Destroy() = 0;

 protected:
  ~Backend() = default;
};

struct BackendDeleter {
  void operator()(Backend* backend) const { backend->Destroy(); }
};

}  // namespace godwit
