#include "kernels/ref/ref_backend.h"

#include <chrono>
#include <cstdlib>
#include <cstring>

#include "kernels/base/random_rows.h"
#include "kernels/ref/elements.h"
#include "kernels/validate.h"

namespace godwit {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kMemoryBytes = int64_t{1} << 40;  // it has no memory of its own to count

class RefBackend final : public Backend {
 public:
  virtual ~RefBackend() = default;

  DeviceInfo Info() const override {
    return {"ref", "double accumulators", kMemoryBytes, kMemoryBytes};
  }

  OpStatus Allocate(int64_t num_bytes, void** data) override {
    if (num_bytes < 0) return {OpCode::kInvalidArgument, "Allocate: a negative size"};
    const int64_t size = (num_bytes / kAlignment + 1) * kAlignment;
    void* const result = std::aligned_alloc(kAlignment, static_cast<size_t>(size));
    if (result == nullptr) return {OpCode::kResourceExhausted, "Allocate: no memory"};
    std::memset(result, 0, static_cast<size_t>(size));
    *data = result;
    return {};
  }
  void Free(void* data) override { std::free(data); }

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
                          const TensorView& source) override;
  OpStatus FillRandom(const MatrixView& matrix, uint64_t seed, float scale) override {
    return FillRandomRows(*this, matrix, seed, scale);
  }

  OpStatus EmbedTokens(const EmbedTokensArgs& args) override { return Call(RefEmbedTokens, args); }
  OpStatus Linear(const LinearArgs& args) override { return Call(RefLinear, args); }
  OpStatus GatedLinear(const GatedLinearArgs& args) override { return Call(RefGatedLinear, args); }
  OpStatus GatherRows(const GatherRowsArgs& args) override { return Call(RefGatherRows, args); }
  OpStatus LightningAttention(const LightningAttentionArgs& args) override {
    return Call(RefLightningAttention, args);
  }
  OpStatus Rope(const RopeArgs& args) override { return Call(RefRope, args); }
  OpStatus PagedAttention(const PagedAttentionArgs& args) override {
    return Call(RefPagedAttention, args);
  }
  OpStatus TurnKeys(const TurnKeysArgs& args) override { return Call(RefTurnKeys, args); }
  OpStatus CountTokens(const CountTokensArgs& args) override { return Call(RefCountTokens, args); }
  OpStatus Sample(const SampleArgs& args) override { return Call(RefSample, args); }
  OpStatus AcceptanceHead(const AcceptanceHeadArgs& args) override {
    return Call(RefAcceptanceHead, args);
  }
  OpStatus VerifyTokens(const VerifyTokensArgs& args) override {
    return Call(RefVerifyTokens, args);
  }
  OpStatus ScoreTokens(const ScoreTokensArgs& args) override { return Call(RefScoreTokens, args); }

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
  OpStatus Synchronize() override { return {}; }
  void Destroy() override { delete this; }

 private:
  template <typename Args>
  OpStatus Call(void (*op)(const Args&), const Args& args) {
    const OpStatus status = Validate(args);
    if (status.ok()) op(args);
    return status;
  }

  std::chrono::steady_clock::time_point marks_[kNumMarks];
};

OpStatus RefBackend::AllocateMatrix(int64_t num_rows, int64_t num_columns, DType dtype,
                                    MatrixView* matrix) {
  if (num_rows < 1 || num_columns < 1 || (dtype != DType::kF32 && dtype != DType::kBF16)) {
    return {OpCode::kInvalidArgument, "AllocateMatrix: sizes >= 1 and f32 or bf16 expected"};
  }
  MatrixView result{nullptr, dtype, num_rows, num_columns};
  const int64_t num_bytes = num_rows * num_columns * DTypeBytes(DType::kF32);
  if (const OpStatus status = Allocate(num_bytes, &result.data); !status.ok()) return status;
  *matrix = result;
  return {};
}

OpStatus RefBackend::PackMatrixRows(const MatrixView& matrix, int64_t first_row,
                                    const TensorView& source) {
  if (source.rank != 2 || source.shape[1] != matrix.num_columns || first_row < 0 ||
      first_row + source.rows() > matrix.num_rows ||
      (source.dtype != DType::kF32 && source.dtype != DType::kBF16)) {
    return {OpCode::kInvalidArgument, "PackMatrixRows: source does not fit the matrix"};
  }
  for (int64_t r = 0; r < source.rows(); ++r) {
    float* const to = static_cast<float*>(matrix.data) + (first_row + r) * matrix.num_columns;
    for (int64_t i = 0; i < matrix.num_columns; ++i) {
      to[i] = static_cast<float>(RoundTo(matrix.dtype, Get(source, r, i)));
    }
  }
  return {};
}

}  // namespace

std::unique_ptr<Backend, BackendDeleter> CreateRefBackend() {
  return std::unique_ptr<Backend, BackendDeleter>(new RefBackend);
}

}  // namespace godwit
