#include "kernels/cpu/cpu_backend.h"

#include <sched.h>

#include <chrono>
#include <cstring>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/bf16.h"
#include "kernels/base/check.h"
#include "kernels/base/random_rows.h"
#include "kernels/base/status.h"
#include "kernels/cpu/acceptance_head.h"
#include "kernels/cpu/count_tokens.h"
#include "kernels/cpu/cpu_context.h"
#include "kernels/cpu/embed_tokens.h"
#include "kernels/cpu/gather_rows.h"
#include "kernels/cpu/lightning_attention.h"
#include "kernels/cpu/linear.h"
#include "kernels/cpu/memory.h"
#include "kernels/cpu/packed_matrix.h"
#include "kernels/cpu/paged_attention.h"
#include "kernels/cpu/rope.h"
#include "kernels/cpu/sample.h"
#include "kernels/cpu/score_tokens.h"
#include "kernels/cpu/select_isa.h"
#include "kernels/cpu/turn_keys.h"
#include "kernels/cpu/verify_tokens.h"
#include "kernels/validate.h"

namespace godwit {
namespace {

constexpr int kMaxThreads = 1024;
// Of a matrix side: keeps the product of two sides and an element's bytes far from overflow.
constexpr int64_t kMaxMatrixSide = int64_t{1} << 28;

class CpuBackend final : public Backend {
 public:
  CpuBackend(int num_threads, const IsaTable& isa)
      : pool_(num_threads),
        context_{pool_, isa, scratch_, ""},
        description_(
            absl::StrCat(isa.name, ", ", num_threads, num_threads == 1 ? " thread" : " threads")) {}
  ~CpuBackend() {
    for (const auto& [data, num_bytes] : allocations_) ReleaseMemory(data, num_bytes);
  }

  DeviceInfo Info() const override {
    const MemoryInfo memory = ReadMemoryInfo();
    return {"cpu", description_.c_str(), memory.total_bytes, memory.free_bytes, memory.used_bytes};
  }

  OpStatus Allocate(int64_t num_bytes, void** data) override;
  void Free(void* data) override;

  OpStatus AllocateHost(int64_t num_bytes, void** data) override {
    return Allocate(num_bytes, data);
  }
  void FreeHost(void* data) override { Free(data); }
  OpStatus Reserve(const BackendLimits&) override { return {}; }

  OpStatus CopyFromHost(void* to, const void* from, int64_t num_bytes) override {
    return CopyOnDevice(to, from, num_bytes);
  }
  OpStatus CopyToHost(void* to, const void* from, int64_t num_bytes) override {
    return CopyOnDevice(to, from, num_bytes);
  }
  OpStatus CopyOnDevice(void* to, const void* from, int64_t num_bytes) override {
    if (num_bytes > 0) std::memmove(to, from, static_cast<size_t>(num_bytes));
    return {};
  }
  OpStatus CopyRanges(const CopyRange* ranges, int64_t num_ranges) override {
    for (int64_t range = 0; range < num_ranges; ++range) {
      CopyOnDevice(ranges[range].to, ranges[range].from, ranges[range].num_bytes);
    }
    return {};
  }
  OpStatus FillZero(const ByteRange* ranges, int64_t num_ranges) override {
    for (const ByteRange* range = ranges; range != ranges + num_ranges; ++range) {
      if (range->num_bytes > 0) {
        std::memset(range->data, 0, static_cast<size_t>(range->num_bytes));
      }
    }
    return {};
  }

  OpStatus AllocateMatrix(int64_t num_rows, int64_t num_columns, DType dtype,
                          MatrixView* matrix) override;
  OpStatus PackMatrixRows(const MatrixView& matrix, int64_t first_row,
                          const TensorView& source) override {
    return CpuPackMatrixRows(context_, matrix, first_row, source);
  }
  OpStatus FillRandom(const MatrixView& matrix, uint64_t seed, float scale) override {
    return FillRandomRows(*this, matrix, seed, scale);
  }

  OpStatus EmbedTokens(const EmbedTokensArgs& args) override { return Call(CpuEmbedTokens, args); }
  OpStatus Linear(const LinearArgs& args) override { return Call(CpuLinear, args); }
  OpStatus GatedLinear(const GatedLinearArgs& args) override { return Call(CpuGatedLinear, args); }
  OpStatus GatherRows(const GatherRowsArgs& args) override { return Call(CpuGatherRows, args); }
  OpStatus LightningAttention(const LightningAttentionArgs& args) override {
    return CallAttention(CpuLightningAttention, args);
  }
  OpStatus Rope(const RopeArgs& args) override { return Call(CpuRope, args); }
  OpStatus PagedAttention(const PagedAttentionArgs& args) override {
    return CallAttention(CpuPagedAttention, args);
  }
  OpStatus TurnKeys(const TurnKeysArgs& args) override { return Call(CpuTurnKeys, args); }
  OpStatus CountTokens(const CountTokensArgs& args) override { return Call(CpuCountTokens, args); }
  OpStatus Sample(const SampleArgs& args) override { return Call(CpuSample, args); }
  OpStatus AcceptanceHead(const AcceptanceHeadArgs& args) override {
    return Call(CpuAcceptanceHead, args);
  }
  OpStatus VerifyTokens(const VerifyTokensArgs& args) override {
    return Call(CpuVerifyTokens, args);
  }
  OpStatus ScoreTokens(const ScoreTokensArgs& args) override { return Call(CpuScoreTokens, args); }

  // One rank: the sum over ranks is x itself.
  OpStatus AllReduce(const TensorView&) override { return {}; }
  OpStatus BeginReplay(uint64_t, bool* replayed) override {
    *replayed = false;
    return {};
  }
  OpStatus EndReplay() override { return {}; }
  OpStatus SetMark(int mark) override {
    marks_[mark] = std::chrono::steady_clock::now();
    return {};
  }
  OpStatus WaitMark(int) override { return {}; }
  OpStatus SecondsBetween(int from, int to, double* seconds) override {
    *seconds = std::chrono::duration<double>(marks_[to] - marks_[from]).count();
    return {};
  }
  // Ops compute when called.
  OpStatus Synchronize() override { return {}; }
  void Destroy() override { delete this; }

 private:
  template <typename Args>
  OpStatus Call(OpStatus (*op)(CpuContext&, const Args&), const Args& args) {
    if (OpStatus status = Validate(args); !status.ok()) return status;
    return op(context_, args);
  }

  // Attention computes f32 outputs; bf16 ones, which no model asks for here, are rounded from them.
  template <typename Args>
  OpStatus CallAttention(OpStatus (*op)(CpuContext&, const Args&), const Args& args) {
    if (args.o.dtype == DType::kF32) return Call(op, args);
    if (OpStatus status = Validate(args); !status.ok()) return status;
    const int64_t width = args.o.row_elements();
    std::vector<float> rows(static_cast<size_t>(args.o.elements()));
    Args wide = args;
    wide.o = MakeView(rows.data(), DType::kF32, args.o.rows(), width);
    const OpStatus status = op(context_, wide);
    for (int64_t row = 0; row < args.o.rows(); ++row) {
      const float* const from = wide.o.template row<const float>(row);
      BF16* const to = args.o.template row<BF16>(row);
      for (int64_t i = 0; i < width; ++i) to[i] = ToBF16(from[i]);
    }
    return status;
  }

  ThreadPool pool_;
  Scratch scratch_;
  CpuContext context_;
  std::string description_;
  std::unordered_map<void*, int64_t> allocations_;
  std::chrono::steady_clock::time_point marks_[kNumMarks];
};

OpStatus CpuBackend::Allocate(int64_t num_bytes, void** data) {
  if (num_bytes < 0) {
    return context_.Fail(OpCode::kInvalidArgument,
                         absl::StrCat("allocation of ", num_bytes, " bytes"));
  }
  const int64_t size = num_bytes == 0 ? 1 : num_bytes;
  // The system promises more than it has; what it cannot keep it kills the process for, later.
  const MemoryInfo memory = ReadMemoryInfo();
  void* const result = size <= memory.free_bytes ? AcquireMemory(size) : nullptr;
  if (result == nullptr) {
    return context_.Fail(
        OpCode::kResourceExhausted,
        absl::StrCat("allocation of ", num_bytes, " bytes: ", memory.free_bytes, " are free"));
  }
  allocations_.emplace(result, size);
  *data = result;
  return {};
}

void CpuBackend::Free(void* data) {
  if (data == nullptr) return;
  const auto found = allocations_.find(data);
  GODWIT_CHECK(found != allocations_.end());
  ReleaseMemory(data, found->second);
  allocations_.erase(found);
}

OpStatus CpuBackend::AllocateMatrix(int64_t num_rows, int64_t num_columns, DType dtype,
                                    MatrixView* matrix) {
  if (num_rows < 1 || num_columns < 1 || (dtype != DType::kF32 && dtype != DType::kBF16)) {
    return context_.Fail(
        OpCode::kInvalidArgument,
        absl::StrCat("matrix [", num_rows, ", ", num_columns, "] of dtype ",
                     static_cast<int>(dtype), ": sizes >= 1 and f32 or bf16 expected"));
  }
  if (num_rows > kMaxMatrixSide || num_columns > kMaxMatrixSide) {
    return context_.Fail(
        OpCode::kResourceExhausted,
        absl::StrCat("matrix [", num_rows, ", ", num_columns, "]: a side above ", kMaxMatrixSide));
  }
  MatrixView result{nullptr, dtype, num_rows, num_columns};
  if (OpStatus status = Allocate(PackedBytes(result), &result.data); !status.ok()) return status;
  *matrix = result;
  return {};
}

int CoresOfThisProcess() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return CPU_COUNT(&set);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend, BackendDeleter>> CreateCpuBackend(
    const CpuOptions& options) {
  if (options.num_threads < 0 || options.num_threads > kMaxThreads) {
    return absl::InvalidArgumentError(
        absl::StrCat("threads ", options.num_threads, " not in [1, ", kMaxThreads, "]"));
  }
  ASSIGN_OR_RETURN(const IsaTable* isa, SelectIsa(options.isa));
  const int num_threads = options.num_threads == 0 ? CoresOfThisProcess() : options.num_threads;
  return std::unique_ptr<Backend, BackendDeleter>(new CpuBackend(num_threads, *isa));
}

}  // namespace godwit
