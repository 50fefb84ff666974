#include "kernels/cpu/matmul.h"

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/cpu/packed_matrix.h"
#include "kernels/cpu/product_args.h"

namespace godwit {
namespace {

// Rows that one pass over the weights serves. A slice of them (one block of k deep, 128 KiB) and a
// block of results (kResultBytes) share a second-level cache of 1 MiB with the panels.
constexpr int64_t kRowChunk = 256;
constexpr int64_t kResultBytes = 256 << 10;
// Up to this many rows a panel goes by once, whole; with more, by blocks of k of so many lines: 128
// lines of 4 panels are 32 KiB of a first-level cache of 48.
constexpr int64_t kBlockLines = 128;
// Panels per call of a product: a multiple of what every set reads side by side (8, 6 and 4).
constexpr int64_t kStreamPanels = 24;
constexpr int64_t kBlockPanels = 8;
constexpr int64_t kPanelGroup = 4;
// Panels that a thread takes at a time when few rows stream the weights: so that a thread that is
// held up (a virtual processor that the host took away) does not hold up the others. 8 is what one
// and two rows read side by side. Small matrices are shared out evenly instead.
constexpr int64_t kClaimPanels = 8;
constexpr int64_t kClaimsPerThread = 4;
// From here on rows are formed, and column blocks handed out, one by one.
constexpr int64_t kDynamicRows = 32;
constexpr int64_t kBlocksPerThread = 4;
// Every thread forms all rows itself up to this many elements: cheaper than a barrier (about 0.5
// us).
constexpr int64_t kRedundantElements = 8192;
constexpr int64_t kFormedRowsPerTask = 8;
// Up to this many multiplications one thread computes: cheaper than waking another.
constexpr int64_t kSerialProducts = 16384;
// Keeps formed rows of a power of two from falling into one set of the cache.
constexpr int64_t kRowSkewBytes = 64;

int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// One product over at most kRowChunk rows.
class Product {
 public:
  Product(CpuContext& context, const MatmulArgs& args) : context_(context), args_(args) {
    const IsaTable& isa = context.isa;
    const bool f32 = args.w.dtype == DType::kF32;
    form_ = f32 ? isa.form_rows_f32 : isa.form_rows_bf16;
    product_ = f32 ? isa.product_f32 : isa.product_bf16;
    num_rows_ = args.input.x.rows();
    k_padded_ = PaddedColumns(args.w.num_columns);
    num_panels_ = NumPanels(args.w);
    panel_bytes_ = PanelBytes(args.w);
    activation_bytes_ = f32 ? 4 : isa.activation_bytes;
    row_bytes_ = k_padded_ * activation_bytes_ + kRowSkewBytes;
    ChooseBlocks();
  }

  OpStatus Run();

 private:
  void ChooseBlocks();
  void FormRows(int64_t begin, int64_t end, char* rows) const;
  void ComputePanels(int64_t begin, int64_t end, const char* rows, float* c) const;
  void RunStream(char* memory);
  void RunDynamic(char* memory);
  char* RowsOf(char* memory, int thread) const {
    return memory + (redundant_ ? thread * rows_bytes_ : 0);
  }
  float* ResultsOf(char* memory, int thread) const {
    const int64_t copies = redundant_ ? context_.pool.num_threads() : 1;
    return reinterpret_cast<float*>(memory + copies * rows_bytes_ + thread * results_bytes_);
  }

  CpuContext& context_;
  const MatmulArgs& args_;
  void (*form_)(const FormRowsArgs&);
  void (*product_)(const PackedProductArgs&);
  int64_t num_rows_;
  int64_t k_padded_;
  int64_t num_panels_;
  int64_t panel_bytes_;
  int64_t activation_bytes_;
  int64_t row_bytes_;
  // Chosen by ChooseBlocks:
  bool dynamic_;
  bool redundant_;
  int64_t block_panels_;
  int64_t block_columns_;
  int64_t rows_bytes_;
  int64_t results_bytes_;
};

void Product::ChooseBlocks() {
  const int64_t num_threads = context_.pool.num_threads();
  const int64_t tile_rows = RoundUp(num_rows_, kRowPadding);
  const int64_t products = args_.up ? 2 : 1;
  dynamic_ = num_rows_ >= kDynamicRows && num_threads > 1;
  redundant_ =
      !dynamic_ && (num_rows_ == 1 || num_rows_ * args_.w.num_columns <= kRedundantElements);
  if (num_rows_ <= context_.isa.stream_rows) {
    block_panels_ = kStreamPanels;
    block_columns_ = k_padded_;
  } else {
    const int64_t panels_that_fit = kResultBytes / (tile_rows * kPanelRows * 4 * products);
    const int64_t panels_per_share = num_panels_ / (num_threads * kBlocksPerThread);
    const int64_t panels = std::min({panels_that_fit, panels_per_share, kBlockPanels});
    block_panels_ = std::max(panels / kPanelGroup * kPanelGroup, kPanelGroup);
    block_columns_ = std::min(kBlockLines * 4 / DTypeBytes(args_.w.dtype), k_padded_);
  }
  rows_bytes_ = RoundUp(tile_rows * row_bytes_, 4096);
  results_bytes_ = RoundUp(tile_rows * block_panels_ * kPanelRows * 4 * products, 4096);
}

void Product::FormRows(int64_t begin, int64_t end, char* rows) const {
  const RowInput& input = args_.input;
  const TensorView x = RowRange(input.x, begin, end - begin);
  const TensorView gate = input.gate ? RowRange(input.gate, begin, end - begin) : input.gate;
  form_({.x = x.data,
         .x_stride = x.row_stride,
         .x_is_f32 = x.dtype == DType::kF32,
         .gate = gate.data,
         .gate_stride = gate.row_stride,
         .gate_is_f32 = gate.dtype == DType::kF32,
         .norm = input.norm.kind,
         .norm_weight = static_cast<const float*>(input.norm.weight.data),
         .epsilon = input.norm.epsilon,
         .weight_offset = input.norm.weight_offset,
         .num_rows = end - begin,
         .k = args_.w.num_columns,
         .k_padded = k_padded_,
         .out = rows + begin * row_bytes_,
         .out_stride_bytes = row_bytes_});
}

// Panels [begin, end), at most block_panels_, of all rows.
void Product::ComputePanels(int64_t begin, int64_t end, const char* rows, float* c) const {
  const int64_t c_stride = block_panels_ * kPanelRows;
  float* const up = args_.up ? c + RoundUp(num_rows_, kRowPadding) * c_stride : nullptr;
  PackedProductArgs part = {.a_stride_bytes = row_bytes_,
                            .num_rows = num_rows_,
                            .b_panel_bytes = panel_bytes_,
                            .num_panels = end - begin,
                            .c_stride = c_stride};
  const int64_t column_bytes = kPanelRows * DTypeBytes(args_.w.dtype);
  const char* const w = static_cast<const char*>(args_.w.data) + begin * panel_bytes_;
  const char* const w_up = static_cast<const char*>(args_.up.data) + begin * panel_bytes_;
  for (int64_t k = 0; k < k_padded_; k += block_columns_) {
    const int64_t k_next = k + block_columns_;
    part.k = std::min(block_columns_, k_padded_ - k);
    part.accumulate = k > 0;
    part.a = rows + k * activation_bytes_;
    part.b = w + k * column_bytes;
    part.c = c;
    // After the last block of k come the next panels, which this thread may or may not be given.
    const char* const next =
        k_next < k_padded_ ? w + k_next * column_bytes : w + (end - begin) * panel_bytes_;
    part.next_b = up == nullptr ? next : w_up + k * column_bytes;
    product_(part);
    if (up == nullptr) continue;
    part.b = w_up + k * column_bytes;
    part.c = up;
    part.next_b = next;
    product_(part);
  }
  const int64_t column = begin * kPanelRows;
  const TensorView& y = args_.y;
  context_.isa.finish({.c = c,
                       .up = up,
                       .c_stride = c_stride,
                       .activation = args_.activation,
                       .add = args_.epilogue == Epilogue::kAdd,
                       .y = static_cast<char*>(y.data) + column * DTypeBytes(y.dtype),
                       .y_is_f32 = y.dtype == DType::kF32,
                       .y_stride = y.row_stride,
                       .num_rows = num_rows_,
                       .num_columns = std::min(end * kPanelRows, args_.w.num_rows) - column});
}

// Few rows: one pass over the weights, in ascending order.
void Product::RunStream(char* memory) {
  ThreadPool& pool = context_.pool;
  const int64_t num_threads = pool.num_threads();
  const auto compute = [&](int64_t begin, int64_t end, int thread) {
    for (int64_t panel = begin; panel < end; panel += block_panels_) {
      ComputePanels(panel, std::min(panel + block_panels_, end), RowsOf(memory, thread),
                    ResultsOf(memory, thread));
    }
  };
  if (num_rows_ * args_.w.num_columns * args_.w.num_rows <= kSerialProducts) {
    FormRows(0, num_rows_, memory);
    compute(0, num_panels_, 0);
    return;
  }
  const bool large = num_panels_ >= kClaimPanels * kClaimsPerThread * num_threads;
  const int64_t least = num_rows_ <= 2 ? kClaimPanels : kStreamPanels;
  const int64_t claim = large ? least : (num_panels_ + num_threads - 1) / num_threads;
  std::atomic<int64_t> next_panel{0};
  pool.Run([&](int thread) {
    if (redundant_) {
      FormRows(0, num_rows_, RowsOf(memory, thread));
    } else {
      FormRows(num_rows_ * thread / num_threads, num_rows_ * (thread + 1) / num_threads, memory);
      pool.Barrier();
    }
    for (int64_t panel = next_panel.fetch_add(claim, std::memory_order_relaxed);
         panel < num_panels_; panel = next_panel.fetch_add(claim, std::memory_order_relaxed)) {
      compute(panel, std::min(panel + claim, num_panels_), thread);
    }
  });
}

void Product::RunDynamic(char* memory) {
  ThreadPool& pool = context_.pool;
  pool.ForEach((num_rows_ + kFormedRowsPerTask - 1) / kFormedRowsPerTask, [&](int64_t task) {
    const int64_t begin = task * kFormedRowsPerTask;
    FormRows(begin, std::min(begin + kFormedRowsPerTask, num_rows_), memory);
  });
  pool.ForEach((num_panels_ + block_panels_ - 1) / block_panels_, [&](int64_t task, int thread) {
    const int64_t begin = task * block_panels_;
    ComputePanels(begin, std::min(begin + block_panels_, num_panels_), memory,
                  ResultsOf(memory, thread));
  });
}

OpStatus Product::Run() {
  const int64_t num_threads = context_.pool.num_threads();
  const int64_t num_bytes =
      (redundant_ ? num_threads : 1) * rows_bytes_ + num_threads * results_bytes_;
  char* const memory = static_cast<char*>(context_.scratch.Get(num_bytes));
  if (memory == nullptr) {
    return context_.Fail(OpCode::kResourceExhausted, absl::StrCat("matrix product: no memory for ",
                                                                  num_bytes, " bytes of scratch"));
  }
  dynamic_ ? RunDynamic(memory) : RunStream(memory);
  return {};
}

}  // namespace

OpStatus Matmul(CpuContext& context, const MatmulArgs& args) {
  const int64_t num_rows = args.input.x.rows();
  const int64_t num_chunks = (num_rows + kRowChunk - 1) / kRowChunk;
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    const int64_t begin = num_rows * chunk / num_chunks;
    const int64_t count = num_rows * (chunk + 1) / num_chunks - begin;
    MatmulArgs part = args;
    part.input.x = RowRange(args.input.x, begin, count);
    if (args.input.gate) part.input.gate = RowRange(args.input.gate, begin, count);
    part.y = RowRange(args.y, begin, count);
    if (OpStatus status = Product(context, part).Run(); !status.ok()) return status;
  }
  return {};
}

}  // namespace godwit
