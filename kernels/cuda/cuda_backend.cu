// The CUDA back end: one device, one stream, recorded steps, and the function by which the
// executable finds it.

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <unordered_map>
#include <utility>

#include "kernels/backend_abi.h"
#include "kernels/base/bf16.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear.h"
#include "kernels/validate.h"

namespace godwit::cuda {

cudaError_t Scratch::Reserve(int64_t num_bytes, void** data) {
  if (num_bytes > num_bytes_) {
    cudaFree(data_);  // waits for what still uses it
    data_ = nullptr;
    num_bytes_ = 0;
    if (const cudaError_t error = cudaMalloc(&data_, static_cast<size_t>(num_bytes));
        error != cudaSuccess) {
      return error;
    }
    num_bytes_ = num_bytes;
    ++num_growths_;
  }
  *data = data_;
  return cudaSuccess;
}

namespace {

constexpr int kMinComputeCapability = 80;
constexpr size_t kHopperSharedBytes = 227 << 10;  // of a block: what kernels of 90 take
// Left out of every plan: recorded graphs, modules that load late, scratch that grows with the plan
// itself.
constexpr int64_t kMarginBytes = int64_t{768} << 20;
constexpr size_t kMaxRecordings =
    2048;  // beyond it all are dropped: keys are few, or the caller's are not keys

// The ops of one key. They run once as they come, so that every lazy step of CUDA and cuBLASLt is
// taken and scratch has its size, are captured the second time, and replayed from then on.
struct Recording {
  cudaGraphExec_t graph = nullptr;
  bool ran = false;
};

// Its attributes say for which architecture the code that this device runs was compiled.
__global__ void __launch_bounds__(1) CodeKernel() {}

// Of the kernels to launch (Context); 0 if the plugin holds no code that the device runs. PTX of an
// older architecture is translated, but the kernels of newer ones have no body in it.
int CodeComputeCapability(const cudaDeviceProp& device) {
  cudaFuncAttributes code;
  if (cudaFuncGetAttributes(&code, CodeKernel) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  if (device.sharedMemPerBlockOptin < kHopperSharedBytes) return kMinComputeCapability;
  return std::min(device.major * 10 + device.minor, code.ptxVersion);
}

class CudaBackend final : public Backend {
 public:
  // Null with a reason in `error` when there is no usable device.
  static CudaBackend* Create(char* error, size_t error_bytes);

  DeviceInfo Info() const override {
    size_t free_bytes = 0, total_bytes = 0;
    cudaMemGetInfo(&free_bytes, &total_bytes);
    return {.name = "cuda",
            .description = description_,
            .memory_bytes = static_cast<int64_t>(total_bytes),
            .free_bytes = std::max<int64_t>(static_cast<int64_t>(free_bytes) - kMarginBytes, 0),
            .used_bytes = static_cast<int64_t>(total_bytes - free_bytes),
            .owns_memory = true,
            .replays = true};
  }

  OpStatus Allocate(int64_t num_bytes, void** data) override {
    const cudaError_t error = cudaMalloc(data, static_cast<size_t>(num_bytes > 0 ? num_bytes : 1));
    if (error == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // not sticky
      std::snprintf(text_, sizeof(text_), "out of device memory: %lld bytes wanted",
                    static_cast<long long>(num_bytes));
      return {OpCode::kResourceExhausted, text_};
    }
    if (error != cudaSuccess) return Result("Allocate", error);
    return Result("Allocate", cudaMemsetAsync(*data, 0, static_cast<size_t>(num_bytes), stream_));
  }
  void Free(void* data) override { cudaFree(data); }

  OpStatus AllocateHost(int64_t num_bytes, void** data) override {
    const auto size = static_cast<size_t>(num_bytes > 0 ? num_bytes : 1);
    const cudaError_t error = cudaMallocHost(data, size);
    if (error == cudaSuccess) std::memset(*data, 0, size);
    return Result("AllocateHost", error);
  }
  void FreeHost(void* data) override { cudaFreeHost(data); }
  OpStatus Reserve(const BackendLimits& limits) override;

  OpStatus CopyFromHost(void* device_to, const void* host_from, int64_t num_bytes) override {
    // Pageable memory is staged before the call returns, so the source may be reused.
    return Result("CopyFromHost",
                  cudaMemcpyAsync(device_to, host_from, static_cast<size_t>(num_bytes),
                                  cudaMemcpyHostToDevice, stream_));
  }
  OpStatus CopyToHost(void* host_to, const void* device_from, int64_t num_bytes) override {
    return Result("CopyToHost",
                  cudaMemcpyAsync(host_to, device_from, static_cast<size_t>(num_bytes),
                                  cudaMemcpyDeviceToHost, stream_));
  }
  OpStatus CopyOnDevice(void* to, const void* from, int64_t num_bytes) override {
    return Result("CopyOnDevice", cudaMemcpyAsync(to, from, static_cast<size_t>(num_bytes),
                                                  cudaMemcpyDeviceToDevice, stream_));
  }
  OpStatus CopyRanges(const CopyRange* ranges, int64_t num_ranges) override {
    return Result("CopyRanges", LaunchCopyRanges(ranges, num_ranges, stream_));
  }
  OpStatus FillZero(const ByteRange* ranges, int64_t num_ranges) override {
    return Result("FillZero", LaunchFillZero(ranges, num_ranges, stream_));
  }

  // The layout is row-major [num_rows, num_columns].
  OpStatus AllocateMatrix(int64_t num_rows, int64_t num_columns, DType dtype,
                          MatrixView* matrix) override {
    void* data = nullptr;
    const OpStatus status = Allocate(num_rows * num_columns * DTypeBytes(dtype), &data);
    if (status.ok()) *matrix = {data, dtype, num_rows, num_columns};
    return status;
  }
  OpStatus PackMatrixRows(const MatrixView& matrix, int64_t first_row,
                          const TensorView& source) override;
  OpStatus FillRandom(const MatrixView& matrix, uint64_t seed, float scale) override {
    const OpStatus status = Result("FillRandom", LaunchFillRandom(matrix, seed, scale, stream_));
    return status.ok() ? Synchronize() : status;  // weights are complete before an op: pdl.cuh
  }

  OpStatus EmbedTokens(const EmbedTokensArgs& args) override {
    return Run("EmbedTokens", args, [&] { return LaunchEmbedTokens(args, stream_); });
  }
  OpStatus Linear(const LinearArgs& args) override {
    return Run("Linear", args, [&] { return LaunchLinear(args, context_); });
  }
  OpStatus GatedLinear(const GatedLinearArgs& args) override {
    return Run("GatedLinear", args, [&] { return LaunchGatedLinear(args, context_); });
  }
  OpStatus GatherRows(const GatherRowsArgs& args) override {
    return Run("GatherRows", args, [&] { return LaunchGatherRows(args, stream_); });
  }
  OpStatus LightningAttention(const LightningAttentionArgs& args) override {
    return Run("LightningAttention", args, [&] {
      const cudaError_t error = LaunchLightningStep(args, context_);
      return error == cudaSuccess ? LaunchLightningPrefill(args, context_) : error;
    });
  }
  OpStatus Rope(const RopeArgs& args) override {
    return Run("Rope", args, [&] { return LaunchRope(args, stream_); });
  }
  OpStatus PagedAttention(const PagedAttentionArgs& args) override {
    return Run("PagedAttention", args, [&] {
      const cudaError_t error = LaunchPagedDecode(args, context_);
      return error == cudaSuccess ? LaunchPagedPrefill(args, context_) : error;
    });
  }
  OpStatus TurnKeys(const TurnKeysArgs& args) override {
    return Run("TurnKeys", args, [&] { return LaunchTurnKeys(args, stream_); });
  }
  OpStatus CountTokens(const CountTokensArgs& args) override {
    return Run("CountTokens", args, [&] { return LaunchCountTokens(args, stream_); });
  }
  OpStatus Sample(const SampleArgs& args) override {
    return Run("Sample", args, [&] { return LaunchSample(args, context_); });
  }
  OpStatus AcceptanceHead(const AcceptanceHeadArgs& args) override {
    return Run("AcceptanceHead", args, [&] { return LaunchAcceptanceHead(args, stream_); });
  }
  OpStatus VerifyTokens(const VerifyTokensArgs& args) override {
    return Run("VerifyTokens", args, [&] { return LaunchVerifyTokens(args, context_); });
  }
  OpStatus ScoreTokens(const ScoreTokensArgs& args) override {
    return Run("ScoreTokens", args, [&] { return LaunchScoreTokens(args, context_); });
  }

  OpStatus AllReduce(const TensorView&) override { return {}; }  // world = 1
  OpStatus BeginReplay(uint64_t key, bool* replayed) override;
  OpStatus EndReplay() override;
  OpStatus SetMark(int mark) override {
    return Result("SetMark", cudaEventRecord(marks_[mark], stream_));
  }
  OpStatus WaitMark(int mark) override {
    return Result("WaitMark", cudaEventSynchronize(marks_[mark]));
  }
  OpStatus SecondsBetween(int from, int to, double* seconds) override {
    float milliseconds = 0;
    const cudaError_t error = cudaEventElapsedTime(&milliseconds, marks_[from], marks_[to]);
    *seconds = static_cast<double>(milliseconds) * 1e-3;
    return Result("SecondsBetween", error);
  }
  OpStatus Synchronize() override { return Result("Synchronize", cudaStreamSynchronize(stream_)); }
  void Destroy() override { delete this; }

 private:
  CudaBackend() = default;
  ~CudaBackend() {
    DropRecordings();
    for (cudaEvent_t mark : marks_) {
      if (mark != nullptr) cudaEventDestroy(mark);
    }
    cudaFree(context_.counters);
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  void DropRecordings();

  OpStatus Result(const char* op, cudaError_t error) {
    if (error == cudaSuccess) return {};
    std::snprintf(text_, sizeof(text_), "%s: CUDA: %s", op, cudaGetErrorString(error));
    // Memory that cannot be had leaves the device usable. Nothing else is worth another try: most
    // errors of CUDA stay, and a launch that is refused would be refused in the next step too.
    if (error != cudaErrorMemoryAllocation) return {OpCode::kUnavailable, text_};
    cudaGetLastError();
    return {OpCode::kResourceExhausted, text_};
  }

  // An op of a step. What it cannot allocate it lacks in every step, so that is no better than a
  // lost device; the limits of Reserve are there to prevent it.
  template <typename Args, typename Launch>
  OpStatus Run(const char* op, const Args& args, const Launch& launch) {
    OpStatus status = Validate(args);
    if (status.ok()) status = Result(op, launch());
    if (status.code == OpCode::kResourceExhausted) status.code = OpCode::kUnavailable;
    open_failed_ |= !status.ok();
    return status;
  }

  cudaStream_t stream_ = nullptr;
  Scratch scratch_;
  Gemm gemm_;
  Context context_{.scratch = scratch_, .gemm = &gemm_};
  cudaEvent_t marks_[kNumMarks] = {};
  std::unordered_map<uint64_t, Recording> recordings_;
  int64_t recorded_growths_ = 0;  // of scratch_ when they were made: they hold its address
  Recording* open_ = nullptr;     // between BeginReplay and EndReplay
  uint64_t open_key_ = 0;
  bool open_failed_ = false;  // an op between them did
  bool capturing_ = false;
  char description_[320] = "";
  char text_[256] = "";
};

OpStatus CudaBackend::Reserve(const BackendLimits& limits) {
  context_.deterministic = limits.deterministic;
  const int64_t num_bytes = std::max({LinearScratchBytes(limits), LightningScratchBytes(limits),
                                      PagedScratchBytes(limits),
                                      SampleScratchBytes(limits, context_.compute_capability)});
  void* scratch = nullptr;
  return Result("Reserve", scratch_.Reserve(num_bytes, &scratch));
}

OpStatus CudaBackend::BeginReplay(uint64_t key, bool* replayed) {
  *replayed = false;
  if (scratch_.num_growths() != recorded_growths_ || recordings_.size() >= kMaxRecordings) {
    DropRecordings();
    recorded_growths_ = scratch_.num_growths();
  }
  open_ = &recordings_[key];
  open_key_ = key;
  open_failed_ = false;
  if (open_->graph != nullptr) {
    *replayed = true;
    return Result("BeginReplay", cudaGraphLaunch(open_->graph, stream_));
  }
  if (!open_->ran) return {};
  const cudaError_t error = cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal);
  capturing_ = error == cudaSuccess;
  return Result("BeginReplay", error);
}

OpStatus CudaBackend::EndReplay() {
  Recording* recording = std::exchange(open_, nullptr);
  cudaGraph_t graph = nullptr;
  cudaError_t error = cudaSuccess;
  const bool captured = std::exchange(capturing_, false);
  if (captured) error = cudaStreamEndCapture(stream_, &graph);
  if (open_failed_) {
    if (graph != nullptr) cudaGraphDestroy(graph);
    recordings_.erase(open_key_);
    return {};
  }
  if (!captured) {
    if (recording != nullptr) recording->ran = true;
    return {};
  }
  if (error == cudaSuccess) error = cudaGraphInstantiate(&recording->graph, graph, 0);
  if (graph != nullptr) cudaGraphDestroy(graph);
  if (error == cudaSuccess) error = cudaGraphLaunch(recording->graph, stream_);
  return Result("EndReplay", error);
}

void CudaBackend::DropRecordings() {
  for (auto& [key, recording] : recordings_) {
    if (recording.graph != nullptr) cudaGraphExecDestroy(recording.graph);
  }
  recordings_.clear();
}

OpStatus CudaBackend::PackMatrixRows(const MatrixView& matrix, int64_t first_row,
                                     const TensorView& source) {
  // Row by row through a host buffer: sources have any alignment, and loading is bound by the disk.
  const int64_t columns = matrix.num_columns, size = DTypeBytes(matrix.dtype);
  const std::unique_ptr<char[]> buffer(
      new (std::nothrow) char[static_cast<size_t>(source.rows() * columns * size)]);
  if (buffer == nullptr) return {OpCode::kResourceExhausted, "PackMatrixRows: out of host memory"};
  for (int64_t row = 0; row < source.rows(); ++row) {
    const char* from =
        static_cast<const char*>(source.data) + row * source.row_stride * DTypeBytes(source.dtype);
    char* to = buffer.get() + row * columns * size;
    for (int64_t i = 0; i < columns; ++i) {
      float value = 0;
      BF16 half;
      if (source.dtype == DType::kBF16) {
        __builtin_memcpy(&half, from + i * 2, sizeof(half));
        value = ToF32(half);
      } else {
        __builtin_memcpy(&value, from + i * 4, sizeof(value));
        half = ToBF16(value);
      }
      if (matrix.dtype == DType::kBF16) {
        __builtin_memcpy(to + i * size, &half, sizeof(half));
      } else {
        __builtin_memcpy(to + i * size, &value, sizeof(value));
      }
    }
  }
  const int64_t num_bytes = source.rows() * columns * size;
  void* to = static_cast<char*>(matrix.data) + first_row * columns * size;
  const OpStatus status = CopyFromHost(to, buffer.get(), num_bytes);
  return status.ok() ? Synchronize() : status;
}

CudaBackend* CudaBackend::Create(char* error, size_t error_bytes) {
  // Without this probe the runtime says "driver version is insufficient", which misleads.
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (driver == nullptr) {
    std::snprintf(error, error_bytes, "there is no NVIDIA driver here (%s)", dlerror());
    return nullptr;
  }
  int num_devices = 0;
  cudaDeviceProp properties;
  cudaError_t status = cudaGetDeviceCount(&num_devices);
  if (status == cudaSuccess && num_devices == 0) status = cudaErrorNoDevice;
  if (status == cudaSuccess) status = cudaGetDeviceProperties(&properties, 0);
  if (status != cudaSuccess) {
    std::snprintf(error, error_bytes, "no usable GPU: %s", cudaGetErrorString(status));
    return nullptr;
  }
  if (properties.major * 10 + properties.minor < kMinComputeCapability) {
    std::snprintf(error, error_bytes, "GPU %s has compute capability %d.%d, at least 8.0 is needed",
                  properties.name, properties.major, properties.minor);
    return nullptr;
  }
  const int compute_capability = CodeComputeCapability(properties);
  if (compute_capability == 0) {
    std::snprintf(error, error_bytes,
                  "GPU %s: the plugin was built without code for compute "
                  "capability %d.%d (CMAKE_CUDA_ARCHITECTURES)",
                  properties.name, properties.major, properties.minor);
    return nullptr;
  }
  auto* backend = new (std::nothrow) CudaBackend;
  if (backend == nullptr) return nullptr;
  std::snprintf(backend->description_, sizeof(backend->description_), "%s, %d multiprocessors",
                properties.name, properties.multiProcessorCount);
  status = cudaSetDevice(0);
  if (status == cudaSuccess)
    status = cudaStreamCreateWithFlags(&backend->stream_, cudaStreamNonBlocking);
  for (cudaEvent_t& mark : backend->marks_) {
    if (status == cudaSuccess) status = cudaEventCreate(&mark);
  }
  const size_t counter_bytes = kNumCounters * sizeof(uint32_t);
  if (status == cudaSuccess) status = cudaMalloc(&backend->context_.counters, counter_bytes);
  if (status == cudaSuccess) {
    status = cudaMemsetAsync(backend->context_.counters, 0, counter_bytes, backend->stream_);
  }
  backend->context_.stream = backend->stream_;
  backend->context_.num_multiprocessors = properties.multiProcessorCount;
  backend->context_.compute_capability = compute_capability;
  if (status == cudaSuccess) return backend;
  std::snprintf(error, error_bytes, "GPU %s: %s", properties.name, cudaGetErrorString(status));
  backend->Destroy();
  return nullptr;
}

}  // namespace
}  // namespace godwit::cuda

extern "C" __attribute__((visibility("default"))) godwit::Backend* godwit_backend_v1(
    uint64_t abi, char* error, size_t error_bytes) {
  if (abi != godwit::kBackendAbi) {
    std::snprintf(error, error_bytes,
                  "the plugin was built from other headers than the executable");
    return nullptr;
  }
  return godwit::cuda::CudaBackend::Create(error, error_bytes);
}
