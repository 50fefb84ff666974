#pragma once
// A device: memory, the ops of ops.h, and one in-order queue. The abstract class is the plugin boundary: its virtuals take
// and return only plain data of kernels/base (no absl, std::string, exceptions or RTTI cross it).

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
};

// Not thread-safe: one owner thread calls it. Ops are queued in order and may still be running when the call returns;
// arguments structs are read before it returns, device data they point to when the op runs. Host and device memory are
// the same on the CPU.
class Backend {
 public:
  virtual DeviceInfo Info() const = 0;

  // Zeroed, aligned to 64 bytes or more. Freed by Free; kResourceExhausted leaves everything as it was.
  virtual OpStatus Allocate(int64_t num_bytes, void** data) = 0;
  virtual void Free(void* data) = 0;

  // Queued like an op; `from` / `to` on the host may be reused when CopyFromHost returns / after Synchronize.
  virtual OpStatus CopyFromHost(void* device_to, const void* host_from, int64_t num_bytes) = 0;
  virtual OpStatus CopyToHost(void* host_to, const void* device_from, int64_t num_bytes) = 0;
  virtual OpStatus CopyOnDevice(void* to, const void* from, int64_t num_bytes) = 0;
  virtual OpStatus FillZero(void* data, int64_t num_bytes) = 0;

  // Weights, in the back end's one layout. PackMatrixRows stores `source` (host, [n, num_columns], f32 or bf16, any 2-byte
  // alignment) as rows [first_row, first_row + n) of `matrix`, converting to its dtype. Free(matrix.data) releases it.
  virtual OpStatus AllocateMatrix(int64_t num_rows, int64_t num_columns, DType dtype, MatrixView* matrix) = 0;
  virtual OpStatus PackMatrixRows(const MatrixView& matrix, int64_t first_row, const TensorView& source) = 0;

  virtual OpStatus EmbedTokens(const EmbedTokensArgs& args) = 0;
  virtual OpStatus Linear(const LinearArgs& args) = 0;
  virtual OpStatus GatedLinear(const GatedLinearArgs& args) = 0;
  virtual OpStatus GatherRows(const GatherRowsArgs& args) = 0;
  virtual OpStatus LightningAttention(const LightningAttentionArgs& args) = 0;
  virtual OpStatus Rope(const RopeArgs& args) = 0;
  virtual OpStatus PagedAttention(const PagedAttentionArgs& args) = 0;
  virtual OpStatus CountTokens(const CountTokensArgs& args) = 0;
  virtual OpStatus Sample(const SampleArgs& args) = 0;
  virtual OpStatus ScoreTokens(const ScoreTokensArgs& args) = 0;

  // Sum over the ranks of a sharded model; world = 1 today, so every back end returns x unchanged.
  virtual OpStatus AllReduce(const TensorView& x) = 0;

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
