#pragma once
// A back end around another: records and replays steps as a GPU does, fails when a test says so,
// and makes the mistakes that a test plants.

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/backend.h"

namespace godwit {

struct WrapOptions {
  // Steps are recorded: the ops of a key run as they come, are only noted down the second time and
  // run at EndReplay, and from then on run with the arguments of that second time.
  bool replays = false;
  bool owns_memory = false;
  // Asked before each op, and each allocation, by name ("Linear", "Allocate", "AllocateHost",
  // "AllocateMatrix"); what is not ok is the result. May be empty.
  std::function<OpStatus(const char* op)> fault;
  // Run in place of the op of the back end around which this is. May be empty.
  std::function<OpStatus(Backend& inner, const SampleArgs& args)> sample;
  std::function<OpStatus(Backend& inner, const VerifyTokensArgs& args)> verify;
  // The seconds that a mark notes down, so that times can be a function of what ran. May be empty:
  // those of the device.
  std::function<double()> clock;
};

class WrappedBackend final : public Backend {
 public:
  WrappedBackend(std::unique_ptr<Backend, BackendDeleter> inner, WrapOptions options)
      : inner_(std::move(inner)), options_(std::move(options)) {}

  int64_t num_replays() const { return num_replays_; }
  int64_t num_unrecorded_ops() const { return num_unrecorded_ops_; }  // since the beginning
  int64_t num_recordings() const { return static_cast<int64_t>(recordings_.size()); }
  int64_t num_allocations() const { return num_allocations_; }
  int64_t num_host_copies() const { return num_host_copies_; }  // in either direction

  DeviceInfo Info() const override {
    DeviceInfo info = inner_->Info();
    info.replays = options_.replays;
    info.owns_memory = options_.owns_memory;
    return info;
  }
  OpStatus Allocate(int64_t num_bytes, void** data) override {
    const OpStatus status = CountAllocation("Allocate");
    return status.ok() ? inner_->Allocate(num_bytes, data) : status;
  }
  void Free(void* data) override { inner_->Free(data); }
  OpStatus AllocateHost(int64_t num_bytes, void** data) override {
    const OpStatus status = CountAllocation("AllocateHost");
    return status.ok() ? inner_->AllocateHost(num_bytes, data) : status;
  }
  void FreeHost(void* data) override { inner_->FreeHost(data); }
  OpStatus Reserve(const BackendLimits& limits) override { return inner_->Reserve(limits); }
  OpStatus CopyFromHost(void* to, const void* from, int64_t num_bytes) override {
    ++num_host_copies_;
    return inner_->CopyFromHost(to, from, num_bytes);
  }
  OpStatus CopyToHost(void* to, const void* from, int64_t num_bytes) override {
    ++num_host_copies_;
    return inner_->CopyToHost(to, from, num_bytes);
  }
  OpStatus CopyOnDevice(void* to, const void* from, int64_t num_bytes) override {
    return inner_->CopyOnDevice(to, from, num_bytes);
  }
  OpStatus CopyRanges(const CopyRange* ranges, int64_t num_ranges) override {
    return inner_->CopyRanges(ranges, num_ranges);
  }
  OpStatus FillZero(const ByteRange* ranges, int64_t num_ranges) override {
    return inner_->FillZero(ranges, num_ranges);
  }
  OpStatus AllocateMatrix(int64_t num_rows, int64_t num_columns, DType dtype,
                          MatrixView* matrix) override {
    const OpStatus status = CountAllocation("AllocateMatrix");
    return status.ok() ? inner_->AllocateMatrix(num_rows, num_columns, dtype, matrix) : status;
  }
  OpStatus PackMatrixRows(const MatrixView& matrix, int64_t first_row,
                          const TensorView& source) override {
    return inner_->PackMatrixRows(matrix, first_row, source);
  }
  OpStatus FillRandom(const MatrixView& matrix, uint64_t seed, float scale) override {
    return inner_->FillRandom(matrix, seed, scale);
  }

  OpStatus EmbedTokens(const EmbedTokensArgs& args) override {
    return Op("EmbedTokens", &Backend::EmbedTokens, args);
  }
  OpStatus Linear(const LinearArgs& args) override { return Op("Linear", &Backend::Linear, args); }
  OpStatus GatedLinear(const GatedLinearArgs& args) override {
    return Op("GatedLinear", &Backend::GatedLinear, args);
  }
  OpStatus GatherRows(const GatherRowsArgs& args) override {
    return Op("GatherRows", &Backend::GatherRows, args);
  }
  OpStatus LightningAttention(const LightningAttentionArgs& args) override {
    return Op("LightningAttention", &Backend::LightningAttention, args);
  }
  OpStatus TurnKeys(const TurnKeysArgs& args) override {
    return Op("TurnKeys", &Backend::TurnKeys, args);
  }
  OpStatus Rope(const RopeArgs& args) override { return Op("Rope", &Backend::Rope, args); }
  OpStatus PagedAttention(const PagedAttentionArgs& args) override {
    return Op("PagedAttention", &Backend::PagedAttention, args);
  }
  OpStatus CountTokens(const CountTokensArgs& args) override {
    return Op("CountTokens", &Backend::CountTokens, args);
  }
  OpStatus Sample(const SampleArgs& args) override {
    return Op("Sample", &Backend::Sample, args, &options_.sample);
  }
  OpStatus AcceptanceHead(const AcceptanceHeadArgs& args) override {
    return Op("AcceptanceHead", &Backend::AcceptanceHead, args);
  }
  OpStatus VerifyTokens(const VerifyTokensArgs& args) override {
    return Op("VerifyTokens", &Backend::VerifyTokens, args, &options_.verify);
  }
  OpStatus ScoreTokens(const ScoreTokensArgs& args) override {
    return Op("ScoreTokens", &Backend::ScoreTokens, args);
  }
  OpStatus AllReduce(const TensorView& x) override { return inner_->AllReduce(x); }

  OpStatus BeginReplay(uint64_t key, bool* replayed) override {
    *replayed = false;
    if (!options_.replays) return {};
    open_ = &recordings_[key];
    if (!open_->ops.empty()) {
      *replayed = true;
      ++num_replays_;
      return RunRecorded(*open_);
    }
    recording_ = open_->ran;
    open_->ran = true;
    return {};
  }
  OpStatus EndReplay() override {
    Recording* const open = std::exchange(open_, nullptr);
    return std::exchange(recording_, false) ? RunRecorded(*open) : OpStatus();
  }

  OpStatus SetMark(int mark) override {
    if (options_.clock) marks_[mark] = options_.clock();
    return inner_->SetMark(mark);
  }
  OpStatus WaitMark(int mark) override { return inner_->WaitMark(mark); }
  OpStatus SecondsBetween(int from, int to, double* seconds) override {
    if (!options_.clock) return inner_->SecondsBetween(from, to, seconds);
    *seconds = marks_[to] - marks_[from];
    return {};
  }
  OpStatus Synchronize() override { return inner_->Synchronize(); }
  void Destroy() override { delete this; }

 private:
  struct Recording {
    bool ran = false;
    std::vector<std::function<OpStatus()>> ops;
  };

  ~WrappedBackend() = default;

  OpStatus CountAllocation(const char* name) {
    ++num_allocations_;
    return options_.fault ? options_.fault(name) : OpStatus();
  }

  template <typename Args>
  OpStatus Op(const char* name, OpStatus (Backend::*op)(const Args&), const Args& args,
              const std::function<OpStatus(Backend&, const Args&)>* instead = nullptr) {
    const auto run = [this, name, op, args, instead] {
      const OpStatus status = options_.fault ? options_.fault(name) : OpStatus();
      if (!status.ok()) return status;
      return instead != nullptr && *instead ? (*instead)(*inner_, args) : (inner_.get()->*op)(args);
    };
    if (!recording_) {
      num_unrecorded_ops_ += open_ == nullptr;
      return run();
    }
    open_->ops.push_back(run);
    return {};
  }

  static OpStatus RunRecorded(const Recording& recording) {
    for (const auto& op : recording.ops) {
      if (const OpStatus status = op(); !status.ok()) return status;
    }
    return {};
  }

  std::unique_ptr<Backend, BackendDeleter> inner_;
  const WrapOptions options_;
  std::map<uint64_t, Recording> recordings_;
  Recording* open_ = nullptr;  // between BeginReplay and EndReplay
  bool recording_ = false;
  double marks_[kNumMarks] = {};  // of the test's clock
  int64_t num_unrecorded_ops_ = 0, num_replays_ = 0, num_host_copies_ = 0, num_allocations_ = 0;
};

}  // namespace godwit
