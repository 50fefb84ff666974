// `godwit bench kernels`: every op at the shapes of a 7B model, through the back end, as a share of
// what the device can do. Calls run inside one replay where the back end records, over data that
// together exceed every cache. What the ops compute is checked elsewhere, by
// tests/kernels/conformance_test: the reference is never linked into this executable.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <iostream>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/bench_device.h"
#include "cli/bench_report.h"
#include "cli/command.h"
#include "cli/model_flags.h"
#include "engine/device_buffer.h"
#include "engine/models/lightning_decay.h"
#include "kernels/base/bf16.h"
#include "kernels/base/random_rows.h"
#include "kernels/base/status.h"

namespace godwit::cli {
namespace {

struct BenchKernelsFlags {
  ModelFlags model;
  std::string size = "7b", filter;
  bool json = false;
  std::string output;
};

// Widths of the model, and by what the token counts and batches below are divided.
struct Scale {
  int heads = 32, head_dim = 128;
  int64_t d_ff = 11008, vocab_size = 64000;
  int64_t fewer_tokens = 1, fewer_rows = 1;

  int64_t width() const { return int64_t{heads} * head_dim; }
  int64_t tokens(int64_t count) const { return std::max<int64_t>(count / fewer_tokens, 64); }
  int64_t rows(int64_t count) const { return std::max<int64_t>(count / fewer_rows, 1); }
  // What is beyond every cache: distinct data of a replay, and what is copied between two.
  int64_t rotation_bytes() const { return (int64_t{256} << 20) / (fewer_tokens * fewer_tokens); }
  int64_t flush_bytes() const { return rotation_bytes() / 4; }
};
constexpr Scale k7B;
constexpr Scale kTiny = {.heads = 4,
                         .head_dim = 16,
                         .d_ff = 96,
                         .vocab_size = 320,
                         .fewer_tokens = 256,
                         .fewer_rows = 32};

constexpr int64_t kPatternElements = (1 << 20) + 24;  // no power of two: rows differ
constexpr double kSecondsPerCase = 0.25;
constexpr int kFewestRepeats = 5, kMostRepeats = 100, kWarmupRepeats = 3;
constexpr double kShareOfFree = 0.9;  // for the copies of a case; the rest is for what they share
constexpr int kStepLayers = 30, kStepRepeats = 96;  // 6 folds of every row at one token a step

// One op at one shape.
struct Case {
  std::string op, shape;
  double bytes = 0, flops = 0;  // of one call: what it must move and compute at least
  int num_calls = 1;            // of a replay, each on data of its own
  int num_repeats = 0;          // 0: as many as fit in kSecondsPerCase
  std::function<absl::Status(int call)> run;
  std::function<absl::Status(int repeat)> prepare;  // before each replay, not timed; may be empty
};

// Device memory of a case, filled with values at unit scale.
class Arena {
 public:
  explicit Arena(Backend& backend) : backend_(backend) {
    for (int64_t i = 0; i < kPatternElements; ++i) {
      const float value = RandomEntry(1, static_cast<uint64_t>(i), 1);
      f32_.push_back(value);
      bf16_.push_back(ToBF16(value));
    }
  }
  ~Arena() { Clear(); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  Backend& backend() { return backend_; }

  // The first failure; views made after it are absent.
  const absl::Status& status() const { return status_; }

  void Clear() {
    for (void* data : blocks_) backend_.Free(data);
    for (void* data : hosts_) backend_.FreeHost(data);
    blocks_.clear();
    hosts_.clear();
    status_ = absl::OkStatus();
  }

  // How many of `wanted` copies of so many bytes the device has room for; at least one.
  int FittingCopies(int wanted, double bytes) const {
    const double room = kShareOfFree * static_cast<double>(backend_.Info().free_bytes);
    return static_cast<int>(std::clamp<double>(room / bytes, 1, wanted));
  }

  TensorView Zeros(DType dtype, int64_t n0, int64_t n1, int64_t n2 = 1, int64_t n3 = 1) {
    void* const data = Allocate(n0 * n1 * n2 * n3 * DTypeBytes(dtype));
    return MakeView(data, dtype, n0, n1, n2, n3);
  }
  TensorView Random(DType dtype, int64_t n0, int64_t n1, int64_t n2 = 1, int64_t n3 = 1) {
    const TensorView view = Zeros(dtype, n0, n1, n2, n3);
    if (status_.ok()) status_ = Fill(static_cast<char*>(view.data), dtype, view.elements());
    return view;
  }
  MatrixView Matrix(DType dtype, int64_t num_rows, int64_t num_columns) {
    MatrixView matrix;
    if (!status_.ok()) return matrix;
    status_ = ToStatus(backend_.AllocateMatrix(num_rows, num_columns, dtype, &matrix));
    if (status_.ok()) {
      blocks_.push_back(matrix.data);
      const double scale = 1 / std::sqrt(static_cast<double>(num_columns));
      status_ = ToStatus(backend_.FillRandom(matrix, ++seed_, static_cast<float>(scale)));
    }
    return matrix;
  }
  template <typename T>
  T* Upload(const std::vector<T>& values) {
    const auto num_bytes = static_cast<int64_t>(values.size() * sizeof(T));
    void* const data = Allocate(num_bytes);
    if (status_.ok()) status_ = ToStatus(backend_.CopyFromHost(data, values.data(), num_bytes));
    if (status_.ok()) status_ = ToStatus(backend_.Synchronize());  // `values` may go
    return static_cast<T*>(data);
  }
  template <typename T>
  T* Host(int64_t count) {
    void* data = nullptr;
    if (status_.ok()) {
      status_ = ToStatus(backend_.AllocateHost(count * static_cast<int64_t>(sizeof(T)), &data));
    }
    if (data != nullptr) hosts_.push_back(data);
    return static_cast<T*>(data);
  }

 private:
  void* Allocate(int64_t num_bytes) {
    void* data = nullptr;
    if (status_.ok()) status_ = ToStatus(backend_.Allocate(num_bytes, &data));
    if (status_.ok()) blocks_.push_back(data);
    return data;
  }

  // The pattern once from the host, then doubled on the device.
  absl::Status Fill(char* data, DType dtype, int64_t num_elements) {
    const int64_t num_bytes = num_elements * DTypeBytes(dtype);
    int64_t filled = std::min(kPatternElements, num_elements) * DTypeBytes(dtype);
    const void* const pattern =
        dtype == DType::kF32 ? static_cast<const void*>(f32_.data()) : bf16_.data();
    RETURN_IF_ERROR(backend_.CopyFromHost(data, pattern, filled));
    for (int64_t count = 0; filled < num_bytes; filled += count) {
      count = std::min(filled, num_bytes - filled);
      RETURN_IF_ERROR(backend_.CopyOnDevice(data + filled, data, count));
    }
    return absl::OkStatus();
  }

  Backend& backend_;
  std::vector<float> f32_;
  std::vector<BF16> bf16_;
  std::vector<void*> blocks_, hosts_;
  uint64_t seed_ = 0;
  absl::Status status_;
};

// What an arena makes has four dimensions; most arguments are matrices.
TensorView Matrix2(const TensorView& x) {
  return MakeView(x.data, x.dtype, x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]);
}

int CopiesBeyondCaches(const Scale& scale, double bytes) {
  return static_cast<int>(std::ceil(static_cast<double>(scale.rotation_bytes()) / bytes));
}

LightningDecay MiddleLayerDecay(Arena& arena, const Scale& scale) {
  const DecayTables tables = MakeDecayTables(
      DecayRates(DecayRule::kAlibiLayer, scale.heads, kStepLayers / 2, kStepLayers));
  return {
      .decay = MakeView(arena.Upload(tables.decay), DType::kF32, scale.heads, kPrefillBlock + 1),
      .fold_epsilon = MakeView(arena.Upload(tables.fold_epsilon), DType::kF32, scale.heads, 2)};
}

// Of `num_rows` sequences; q, k and v are tensors of their own.
LightningAttentionArgs LightningArgs(Arena& arena, const Scale& scale, const LightningDecay& decay,
                                     int64_t num_rows, int64_t num_tokens, DType output) {
  const int64_t width = scale.width(), window_rows = WindowRows(2, kMaxDraftTokens);
  LightningAttentionArgs args;
  args.q = arena.Random(DType::kBF16, num_tokens, width);
  args.k = arena.Random(DType::kBF16, num_tokens, width);
  args.v = arena.Random(DType::kBF16, num_tokens, width);
  args.decay = decay;
  args.num_heads = scale.heads;
  args.head_dim = scale.head_dim;
  args.state = arena.Random(DType::kF32, num_rows, scale.heads, scale.head_dim, scale.head_dim);
  args.window = arena.Random(DType::kBF16, num_rows, window_rows, 2 * width);
  args.num_rows = static_cast<int32_t>(num_rows);
  args.o = arena.Zeros(output, num_tokens, width);
  for (TensorView* view : {&args.q, &args.k, &args.v, &args.o}) *view = Matrix2(*view);
  args.window = MakeView(args.window.data, DType::kBF16, num_rows, window_rows, 2 * width);
  return args;
}

// Without an activation as other kernels compute it; with SiLU as TransNormerLLM's layers do.
Case LightningPrefill(Arena& arena, const Scale& scale, int64_t batch, int64_t length,
                      Activation qk_activation) {
  const int64_t tokens = scale.tokens(length);
  std::vector<StepRow> rows;
  for (int64_t row = 0; row < batch; ++row) {
    rows.push_back({.first_token = static_cast<int32_t>(row * tokens),
                    .num_tokens = static_cast<int32_t>(tokens),
                    .slot = static_cast<int32_t>(row),
                    .is_prefill = 1,
                    .base_after = tokens / kWindow * kWindow,
                    .p_end = tokens / kPrefillBlock * kPrefillBlock});
  }
  LightningAttentionArgs args = LightningArgs(arena, scale, MiddleLayerDecay(arena, scale), batch,
                                              batch * tokens, DType::kBF16);
  args.qk_activation = qk_activation;
  args.rows = arena.Upload(rows);
  return {
      .op = "lightning_prefill",
      .shape = absl::StrFormat("B%dx%s%s", batch, FormatLength(tokens),
                               qk_activation == Activation::kSilu ? " silu" : ""),
      .bytes = 4.0 * static_cast<double>(batch * tokens * scale.width()) * 2,
      .run = [&arena, args](int) { return ToStatus(arena.backend().LightningAttention(args)); }};
}

// Steps of `num_tokens` tokens a sequence, all layers of which share the rows. Bases follow one
// step behind, as under a scheduler that has confirmed all tokens before the step.
Case LightningStep(Arena& arena, const Scale& scale, int64_t batch, int num_tokens,
                   bool staggered) {
  const int64_t num_rows = scale.rows(batch);
  const double state_bytes =
      static_cast<double>(num_rows * scale.width()) * scale.head_dim * DTypeBytes(DType::kF32);
  const double io_bytes = static_cast<double>(num_rows * num_tokens * scale.width()) * (3 * 2 + 4);
  const LightningDecay decay = MiddleLayerDecay(arena, scale);
  StepRow* const rows = arena.Upload(std::vector<StepRow>(static_cast<size_t>(num_rows)));
  StepRow* const host = arena.Host<StepRow>(num_rows);
  auto layers = std::make_shared<std::vector<LightningAttentionArgs>>();
  const double window_bytes = static_cast<double>(num_rows * WindowRows(2, kMaxDraftTokens)) * 2 *
                              static_cast<double>(scale.width()) * 2;
  const int wanted = std::max(kStepLayers, CopiesBeyondCaches(scale, state_bytes));
  const int num_layers = arena.FittingCopies(wanted, state_bytes + window_bytes + io_bytes);
  const std::string fewer =
      num_layers < wanted ? absl::StrCat(", ", num_layers, " layers fit") : "";
  for (int layer = 0; layer < num_layers; ++layer) {
    LightningAttentionArgs args =
        LightningArgs(arena, scale, decay, num_rows, num_rows * num_tokens, DType::kF32);
    args.rows = rows;
    args.num_decode_rows = args.num_rows;
    args.num_decode_tokens = num_rows * num_tokens;
    layers->push_back(args);
  }
  const auto prepare = [=, &arena](int repeat) {
    for (int64_t row = 0; row < num_rows; ++row) {
      const int64_t phase = staggered ? row % kWindow : 0;
      const int64_t position = 64 * kWindow + phase + int64_t{repeat + kWarmupRepeats} * num_tokens;
      host[row] = {.first_token = static_cast<int32_t>(row * num_tokens),
                   .num_tokens = num_tokens,
                   .slot = static_cast<int32_t>(row),
                   .position = position,
                   .base = (position - num_tokens) / kWindow * kWindow,
                   .base_after = position / kWindow * kWindow};
    }
    const auto num_bytes = num_rows * static_cast<int64_t>(sizeof(StepRow));
    return ToStatus(arena.backend().CopyFromHost(rows, host, num_bytes));
  };
  return {.op = "lightning_step",
          .shape = absl::StrFormat("B%d T%d %s%s", num_rows, num_tokens,
                                   staggered ? "staggered" : "aligned", fewer),
          .bytes = state_bytes * (1 + static_cast<double>(num_tokens) / kWindow) + io_bytes,
          .num_calls = num_layers,
          .num_repeats = kStepRepeats,
          .run =
              [layers, &arena](int call) {
                return ToStatus(
                    arena.backend().LightningAttention((*layers)[static_cast<size_t>(call)]));
              },
          .prepare = prepare};
}

// Blocks in random order, each layer with keys and values of its own.
std::shared_ptr<std::vector<PagedAttentionArgs>> PagedLayers(Arena& arena, const Scale& scale,
                                                             const std::vector<StepRow>& rows,
                                                             int64_t num_blocks, int kv_heads,
                                                             int num_layers) {
  std::vector<int32_t> table(static_cast<size_t>(num_blocks));
  std::iota(table.begin(), table.end(), 0);
  std::shuffle(table.begin(), table.end(), std::minstd_rand(1));
  const int64_t num_tokens = rows.back().first_token + rows.back().num_tokens;
  const int64_t kv_width = int64_t{kv_heads} * scale.head_dim, half = scale.head_dim / 2;
  PagedAttentionArgs args;
  args.num_heads = scale.heads;
  args.num_kv_heads = kv_heads;
  args.head_dim = scale.head_dim;
  args.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(scale.head_dim)));
  args.block_tables = arena.Upload(table);
  args.rows = arena.Upload(rows);
  args.num_rows = static_cast<int32_t>(rows.size());
  args.cos = Matrix2(arena.Random(DType::kF32, num_tokens, half));
  args.sin = Matrix2(arena.Random(DType::kF32, num_tokens, half));
  const TensorView qkv =
      Matrix2(arena.Random(DType::kBF16, num_tokens, scale.width() + 2 * kv_width));
  args.q = ColumnRange(qkv, 0, scale.width());
  args.k = ColumnRange(qkv, scale.width(), kv_width);
  args.v = ColumnRange(qkv, scale.width() + kv_width, kv_width);
  args.o = Matrix2(arena.Zeros(DType::kF32, num_tokens, scale.width()));
  if (rows[0].is_prefill == 0) {
    args.num_decode_rows = args.num_rows;
    args.num_decode_tokens = num_tokens;
  }
  auto layers = std::make_shared<std::vector<PagedAttentionArgs>>();
  for (int layer = 0; layer < num_layers; ++layer) {
    args.blocks =
        arena.Random(DType::kBF16, num_blocks, 2, kv_heads, int64_t{kPagedBlock} * scale.head_dim);
    layers->push_back(args);
  }
  return layers;
}

std::function<absl::Status(int)> RunPaged(Arena& arena,
                                          std::shared_ptr<std::vector<PagedAttentionArgs>> layers) {
  return [layers = std::move(layers), &arena](int call) {
    return ToStatus(arena.backend().PagedAttention((*layers)[static_cast<size_t>(call)]));
  };
}

int KvHeads(const Scale& scale, bool grouped) { return grouped ? scale.heads / 4 : scale.heads; }

Case PagedDecode(Arena& arena, const Scale& scale, int64_t batch, int64_t context, bool grouped) {
  const int kv_heads = KvHeads(scale, grouped);
  const int64_t num_rows = scale.rows(batch), length = scale.tokens(context);
  const double bytes = static_cast<double>(num_rows * length) * 2 * kv_heads * scale.head_dim * 2;
  std::vector<StepRow> rows;
  for (int64_t row = 0; row < num_rows; ++row) {
    rows.push_back({.first_token = static_cast<int32_t>(row),
                    .num_tokens = 1,
                    .position = length - 1,
                    .block_table = row * (length / kPagedBlock)});
  }
  const int num_layers = CopiesBeyondCaches(scale, bytes);
  return {.op = "paged_decode",
          .shape = absl::StrFormat("B%dx%s %d/%d heads", num_rows, FormatLength(length),
                                   scale.heads, kv_heads),
          .bytes = bytes,
          .num_calls = num_layers,
          .run = RunPaged(arena, PagedLayers(arena, scale, rows, num_rows * length / kPagedBlock,
                                             kv_heads, num_layers))};
}

Case PagedPrefill(Arena& arena, const Scale& scale, int64_t context, bool grouped) {
  const int kv_heads = KvHeads(scale, grouped);
  const int64_t length = scale.tokens(context);
  const std::vector<StepRow> rows = {{.num_tokens = static_cast<int32_t>(length), .is_prefill = 1}};
  return {
      .op = "paged_prefill",
      .shape = absl::StrFormat("B1x%s %d/%d heads", FormatLength(length), scale.heads, kv_heads),
      // Two products over the lower triangle.
      .flops = 2.0 * static_cast<double>(length) * static_cast<double>(length) *
               static_cast<double>(scale.width()),
      .run = RunPaged(arena, PagedLayers(arena, scale, rows, length / kPagedBlock, kv_heads, 1))};
}

// The five products of a layer and the head, with the norms and gates in front of them.
enum class Product { kQkvu, kOut, kGated, kDown, kHead };
struct ProductShape {
  const char* name;
  int64_t n, k;
};
ProductShape ShapeOf(Product product, const Scale& scale) {
  const int64_t d = scale.width();
  switch (product) {
    case Product::kQkvu:
      return {"norm_qkvu", 4 * d, d};
    case Product::kOut:
      return {"norm_gate_out_add", d, d};
    case Product::kGated:
      return {"norm_gated", scale.d_ff, d};
    case Product::kDown:
      return {"down_add", d, scale.d_ff};
    case Product::kHead:
      return {"norm_head", scale.vocab_size, d};
  }
  return {};
}

Case ProductCase(Arena& arena, const Scale& scale, Product product, int64_t batch) {
  const ProductShape shape = ShapeOf(product, scale);
  const int64_t m = scale.rows(batch), matrices = product == Product::kGated ? 2 : 1;
  const NormSpec norm = {.kind = NormKind::kRms, .epsilon = 1e-6f};
  const bool adds = product == Product::kOut || product == Product::kDown;
  const DType in = product == Product::kDown ? DType::kBF16 : DType::kF32;
  const DType out = adds || product == Product::kHead ? DType::kF32 : DType::kBF16;
  RowInput input = {.x = Matrix2(arena.Random(in, m, shape.k))};
  if (product != Product::kDown) input.norm = norm;
  if (product == Product::kOut) input.gate = Matrix2(arena.Random(DType::kBF16, m, shape.k));
  const TensorView y = Matrix2(arena.Zeros(out, m, shape.n));
  const double weight_bytes = static_cast<double>(matrices * shape.n * shape.k) * 2;
  const int num_calls = std::max(2, CopiesBeyondCaches(scale, weight_bytes));
  auto weights = std::make_shared<std::vector<MatrixView>>();
  for (int64_t index = 0; index < num_calls * matrices; ++index) {
    weights->push_back(arena.Matrix(DType::kBF16, shape.n, shape.k));
  }
  const int64_t num_decode_tokens = batch <= 256 ? m : 0;
  const auto run = [=, &arena](int call) {
    const auto first = static_cast<size_t>(call * matrices);
    if (product == Product::kGated) {
      return ToStatus(arena.backend().GatedLinear({.input = input,
                                                   .gate = (*weights)[first],
                                                   .up = (*weights)[first + 1],
                                                   .y = y,
                                                   .num_decode_tokens = num_decode_tokens}));
    }
    return ToStatus(arena.backend().Linear({.input = input,
                                            .w = (*weights)[first],
                                            .epilogue = adds ? Epilogue::kAdd : Epilogue::kStore,
                                            .y = y,
                                            .num_decode_tokens = num_decode_tokens}));
  };
  const auto rows = static_cast<double>(m);
  return {.op = shape.name,
          .shape = absl::StrFormat("M%d N%d K%d", m, shape.n * matrices, shape.k),
          .bytes = weight_bytes + rows * static_cast<double>(shape.k * DTypeBytes(in)) +
                   rows * static_cast<double>(shape.n * DTypeBytes(out) * (adds ? 2 : 1)),
          .flops = rows * weight_bytes,  // 2 of 2-byte weights
          .num_calls = num_calls,
          .run = run};
}

struct SampleKind {
  const char* name;
  float temperature, top_p;
  int32_t top_k;
};
constexpr SampleKind kSampleKinds[] = {{"greedy", 0, 1, 0},
                                       {"temperature", 0.8f, 1, 0},
                                       {"top-k 50", 0.8f, 1, 50},
                                       {"top-p 0.9", 0.8f, 0.9f, 0}};

Case SampleCase(Arena& arena, const Scale& scale, int64_t batch, const SampleKind& kind) {
  const int64_t num_rows = scale.rows(batch), vocab = scale.vocab_size;
  std::vector<SampleRow> rows;
  for (int64_t row = 0; row < num_rows; ++row) {
    rows.push_back({.logit_row = static_cast<int32_t>(row),
                    .slot = static_cast<int32_t>(row),
                    .position = 100 + row,
                    .seed = static_cast<uint64_t>(row),
                    .temperature = kind.temperature,
                    .top_p = kind.top_p,
                    .top_k = kind.top_k});
  }
  const double bytes = static_cast<double>(num_rows * vocab) * 4;
  SampleArgs args;
  args.rows = arena.Upload(rows);
  args.num_rows = static_cast<int32_t>(num_rows);
  args.counts = Matrix2(arena.Zeros(DType::kU32, num_rows, vocab));
  args.tokens = MakeView(arena.Zeros(DType::kI32, num_rows, 1).data, DType::kI32, num_rows);
  args.logprobs = MakeView(arena.Zeros(DType::kF32, num_rows, 1).data, DType::kF32, num_rows);
  args.top_ids = Matrix2(arena.Zeros(DType::kI32, num_rows, kMaxTopLogprobs));
  args.top_logprobs = Matrix2(arena.Zeros(DType::kF32, num_rows, kMaxTopLogprobs));
  auto copies = std::make_shared<std::vector<SampleArgs>>();
  const int num_calls = CopiesBeyondCaches(scale, bytes);
  for (int copy = 0; copy < num_calls; ++copy) {
    args.logits = Matrix2(arena.Random(DType::kF32, num_rows, vocab));
    copies->push_back(args);
  }
  return {.op = "sample",
          .shape = absl::StrFormat("%dx%d %s", num_rows, vocab, kind.name),
          .bytes = bytes,
          .num_calls = num_calls,
          .run = [copies, &arena](int call) {
            return ToStatus(arena.backend().Sample((*copies)[static_cast<size_t>(call)]));
          }};
}

// Drafts of sequences without a seed, all of which stand: a draft that its model gave no chance is
// always accepted, so that every position is looked at.
Case VerifyCase(Arena& arena, const Scale& scale, int64_t batch, int32_t num_drafts) {
  const int64_t num_sequences = scale.rows(batch), vocab = scale.vocab_size;
  const int64_t num_rows = num_sequences * (num_drafts + 1),
                all_drafts = num_sequences * num_drafts;
  std::vector<SampleRow> rows;
  std::vector<VerifyRow> verify_rows;
  std::vector<int32_t> drafts;
  std::vector<uint32_t> counts(static_cast<size_t>(num_sequences * vocab));
  for (int64_t sequence = 0; sequence < num_sequences; ++sequence) {
    verify_rows.push_back({.first_row = static_cast<int32_t>(rows.size()),
                           .num_drafts = num_drafts,
                           .first_draft = static_cast<int32_t>(drafts.size()),
                           .rule = AcceptRule::kStandard});
    for (int32_t index = 0; index <= num_drafts; ++index) {
      rows.push_back({.logit_row = static_cast<int32_t>(rows.size()),
                      .slot = static_cast<int32_t>(sequence),
                      .position = 100 + index,
                      .seed = static_cast<uint64_t>(sequence),
                      .temperature = 0.8f});
      if (index == num_drafts) break;
      drafts.push_back(static_cast<int32_t>((sequence + 7 * index) % vocab));
      ++counts[static_cast<size_t>(sequence * vocab + drafts.back())];
    }
  }
  VerifyTokensArgs args;
  args.rows = arena.Upload(rows);
  args.num_rows = static_cast<int32_t>(num_rows);
  args.verify_rows = arena.Upload(verify_rows);
  args.num_verify_rows = static_cast<int32_t>(num_sequences);
  args.counts = MakeView(arena.Upload(counts), DType::kU32, num_sequences, vocab);
  args.drafts = MakeView(arena.Upload(drafts), DType::kI32, all_drafts);
  args.probabilities = Matrix2(arena.Zeros(DType::kF32, all_drafts, vocab));
  args.num_tokens =
      MakeView(arena.Zeros(DType::kI32, num_sequences, 1).data, DType::kI32, num_sequences);
  args.tokens = MakeView(arena.Zeros(DType::kI32, num_rows, 1).data, DType::kI32, num_rows);
  args.logprobs = MakeView(arena.Zeros(DType::kF32, num_rows, 1).data, DType::kF32, num_rows);
  args.top_ids = Matrix2(arena.Zeros(DType::kI32, num_rows, kMaxTopLogprobs));
  args.top_logprobs = Matrix2(arena.Zeros(DType::kF32, num_rows, kMaxTopLogprobs));
  const double bytes = static_cast<double>(num_rows * vocab) * 4;
  auto copies = std::make_shared<std::vector<VerifyTokensArgs>>();
  const int num_calls = CopiesBeyondCaches(scale, bytes);
  for (int copy = 0; copy < num_calls; ++copy) {
    args.logits = Matrix2(arena.Random(DType::kF32, num_rows, vocab));
    copies->push_back(args);
  }
  return {.op = "verify",
          .shape = absl::StrFormat("%dx%dx%d standard", num_sequences, num_drafts + 1, vocab),
          .bytes = bytes,
          .num_calls = num_calls,
          .run = [copies, &arena](int call) {
            return ToStatus(arena.backend().VerifyTokens((*copies)[static_cast<size_t>(call)]));
          }};
}

// An MLP of 64 beside a draft model of width 512, as a pass calls it: what it says, and the margin,
// go to the host.
Case AcceptanceHeadCase(Arena& arena, const Scale& scale, int64_t batch) {
  constexpr int64_t kWidth = 64, kHidden = 512;
  const int64_t num_rows = scale.rows(batch);
  std::vector<SampleRow> rows;
  for (int64_t row = 0; row < num_rows; ++row) {
    rows.push_back({.logit_row = static_cast<int32_t>(row), .slot = static_cast<int32_t>(row)});
  }
  const auto vector = [](const TensorView& x) { return MakeView(x.data, x.dtype, x.elements()); };
  AcceptanceHeadArgs args;
  args.norm = {.kind = NormKind::kRms, .epsilon = 1e-5f};
  args.bias = vector(arena.Random(DType::kF32, kWidth, 1));
  args.feature_weights = Matrix2(arena.Random(DType::kF32, kNumHeadFeatures, kWidth));
  args.readout = vector(arena.Random(DType::kF32, kWidth, 1));
  args.rows = arena.Upload(rows);
  args.num_rows = static_cast<int32_t>(num_rows);
  args.margins = vector(arena.Zeros(DType::kF32, num_rows, 1));
  args.certainties = Matrix2(arena.Zeros(DType::kF32, num_rows, 2));
  args.logits = MakeView(arena.Host<float>(num_rows), DType::kF32, num_rows);
  args.shown_margins = MakeView(arena.Host<float>(num_rows), DType::kF32, num_rows);
  args.x = Matrix2(arena.Random(DType::kF32, num_rows, kHidden));
  args.weight = Matrix2(arena.Random(DType::kF32, kWidth, kHidden));
  return {.op = "acceptance_head",
          .shape = absl::StrFormat("%dx%dx%d mlp", num_rows, kWidth, kHidden),
          .bytes = static_cast<double>((kWidth + num_rows) * kHidden) * 4,
          .num_calls = 16,  // on the same data: a round finds the weight in the cache
          .run = [args, &arena](int) { return ToStatus(arena.backend().AcceptanceHead(args)); }};
}

using MakeCase = std::function<Case(Arena& arena, const Scale& scale)>;

// By op: what the flag --filter chooses from before any memory is taken.
std::vector<std::pair<std::string, MakeCase>> AllCases() {
  std::vector<std::pair<std::string, MakeCase>> cases;
  const auto add = [&](const char* op, MakeCase make) { cases.emplace_back(op, std::move(make)); };
  for (const auto& [batch, length] : std::vector<std::pair<int64_t, int64_t>>{
           {4, 2 << 10}, {4, 32 << 10}, {1, 8 << 10}, {1, 128 << 10}, {1, 512 << 10}}) {
    for (const Activation qk_activation : {Activation::kNone, Activation::kSilu}) {
      add("lightning_prefill", [=](Arena& arena, const Scale& scale) {
        return LightningPrefill(arena, scale, batch, length, qk_activation);
      });
    }
  }
  for (const int num_tokens : {1, 4, 16}) {
    for (const int64_t batch : {1, 32, 256}) {
      for (const bool staggered : {true, false}) {
        add("lightning_step", [=](Arena& arena, const Scale& scale) {
          return LightningStep(arena, scale, batch, num_tokens, staggered);
        });
      }
    }
  }
  for (const bool grouped : {false, true}) {
    for (const auto& [batch, context] :
         std::vector<std::pair<int64_t, int64_t>>{{16, 32 << 10}, {64, 4 << 10}, {1, 32 << 10}}) {
      add("paged_decode", [=](Arena& arena, const Scale& scale) {
        return PagedDecode(arena, scale, batch, context, grouped);
      });
    }
    for (const int64_t context : {8 << 10, 16 << 10, 32 << 10}) {
      add("paged_prefill", [=](Arena& arena, const Scale& scale) {
        return PagedPrefill(arena, scale, context, grouped);
      });
    }
  }
  for (const Product product :
       {Product::kQkvu, Product::kOut, Product::kGated, Product::kDown, Product::kHead}) {
    for (const int64_t batch : {1, 8, 32, 64, 256, 4096, 8192}) {
      if (product == Product::kHead && batch > 256) continue;  // no step has so many logits
      add("product", [=](Arena& arena, const Scale& scale) {
        return ProductCase(arena, scale, product, batch);
      });
    }
  }
  for (const SampleKind& kind : kSampleKinds) {
    add("sample",
        [=](Arena& arena, const Scale& scale) { return SampleCase(arena, scale, 256, kind); });
  }
  for (const int64_t batch : {1, 32, 128}) {
    add("acceptance_head",
        [=](Arena& arena, const Scale& scale) { return AcceptanceHeadCase(arena, scale, batch); });
  }
  for (const int64_t batch : {1, 32, 128}) {
    add("verify",
        [=](Arena& arena, const Scale& scale) { return VerifyCase(arena, scale, batch, 4); });
  }
  return cases;
}

struct Line {
  std::string op, shape;
  double median_us = 0, p99_us = 0;  // of a call
  double gb_per_s = 0, tflop_per_s = 0, percent = 0;
};

class Bench {
 public:
  Bench(Backend& backend, const DeviceCeilings& ceilings, int64_t flush_bytes)
      : backend_(backend), ceilings_(ceilings), flush_bytes_(flush_bytes) {}

  absl::StatusOr<Line> Measure(const Case& measured) {
    if (!flush_.bytes()) {
      ASSIGN_OR_RETURN(flush_, DeviceBuffer::Allocate(backend_, 2 * flush_bytes_));
    }
    ++key_;
    std::vector<double> us;
    int num_repeats = std::max(measured.num_repeats, 1);
    for (int repeat = -kWarmupRepeats; repeat < num_repeats; ++repeat) {
      ASSIGN_OR_RETURN(const double seconds, Replay(measured, repeat));
      if (repeat >= 0) us.push_back(seconds / measured.num_calls * 1e6);
      if (repeat == -1 && measured.num_repeats == 0) {
        num_repeats = static_cast<int>(
            std::clamp<double>(kSecondsPerCase / seconds, kFewestRepeats, kMostRepeats));
      }
    }
    const nlohmann::ordered_json percentiles = Percentiles(us);
    Line line = {.op = measured.op, .shape = measured.shape};
    line.median_us = percentiles["p50"].get<double>();
    line.p99_us = percentiles["p99"].get<double>();
    const double seconds = line.median_us * 1e-6;
    line.gb_per_s = measured.bytes / seconds / 1e9;
    line.tflop_per_s = measured.flops / seconds / 1e12;
    const double floor = std::max(measured.bytes / ceilings_.copy_bytes_per_s,
                                  measured.flops / ceilings_.flops_per_s);
    line.percent = 100 * floor / seconds;
    return line;
  }

 private:
  // Seconds of one replay. The copy in front clears the caches and lets the host run ahead, so that
  // no launch is waited for.
  absl::StatusOr<double> Replay(const Case& measured, int repeat) {
    if (measured.prepare) RETURN_IF_ERROR(measured.prepare(repeat));
    RETURN_IF_ERROR(
        backend_.CopyOnDevice(flush_.bytes(), flush_.bytes() + flush_bytes_, flush_bytes_));
    RETURN_IF_ERROR(backend_.SetMark(0));
    bool replayed = false;
    absl::Status status = ToStatus(backend_.BeginReplay(key_, &replayed));
    for (int call = 0; call < measured.num_calls && status.ok() && !replayed; ++call) {
      status = measured.run(call);
    }
    const absl::Status ended = ToStatus(backend_.EndReplay());
    RETURN_IF_ERROR(status);
    RETURN_IF_ERROR(ended);
    RETURN_IF_ERROR(backend_.SetMark(1));
    RETURN_IF_ERROR(backend_.WaitMark(1));
    double seconds = 0;
    RETURN_IF_ERROR(backend_.SecondsBetween(0, 1, &seconds));
    return seconds;
  }

  Backend& backend_;
  const DeviceCeilings ceilings_;
  const int64_t flush_bytes_;
  DeviceBuffer flush_;
  uint64_t key_ = 0;
};

void PrintLine(const Line& line) {
  std::cout << absl::StrFormat("%-18s%-26s bf16 %11.1f %11.1f %9.1f %9.2f %8.1f\n", line.op,
                               line.shape, line.median_us, line.p99_us, line.gb_per_s,
                               line.tflop_per_s, line.percent)
            << std::flush;
}

nlohmann::ordered_json ToJson(const Line& line) {
  return {{"op", line.op},
          {"shape", line.shape},
          {"dtype", "bf16"},
          {"median_us", line.median_us},
          {"p99_us", line.p99_us},
          {"gb_per_s", line.gb_per_s},
          {"tflop_per_s", line.tflop_per_s},
          {"percent_of_ceiling", line.percent}};
}

absl::Status Run(const BenchKernelsFlags& flags, Backend& backend) {
  ASSIGN_OR_RETURN(const DeviceCeilings ceilings, MeasureCeilings(backend, DType::kBF16));
  const DeviceInfo device = backend.Info();
  if (!flags.json) {
    std::cout << Describe(device, ceilings, DType::kBF16)
              << "\nop                shape                      dtype  median us      p99 us"
                 "      GB/s   TFLOP/s %ceiling\n";
  }
  const Scale scale = flags.size == "tiny" ? kTiny : k7B;
  Bench bench(backend, ceilings, scale.flush_bytes());
  Arena arena(backend);
  nlohmann::ordered_json lines = nlohmann::ordered_json::array();
  for (const auto& [op, make] : AllCases()) {
    if (!absl::StrContains(op, flags.filter)) continue;
    const Case measured = make(arena, scale);
    RETURN_IF_ERROR(arena.status());
    ASSIGN_OR_RETURN(const Line line, bench.Measure(measured));
    if (!flags.json) PrintLine(line);
    lines.push_back(ToJson(line));
    arena.Clear();
  }
  const nlohmann::ordered_json config = {{"size", flags.size},
                                         {"device", device.description},
                                         {"backend", device.name},
                                         {"copy_gb_per_s", ceilings.copy_bytes_per_s / 1e9},
                                         {"product_tflop_per_s", ceilings.flops_per_s / 1e12}};
  if (WriteReport("kernels", config, {{"lines", std::move(lines)}}, flags.json, flags.output)) {
    return absl::OkStatus();
  }
  return absl::UnavailableError("--output: cannot write " + flags.output);
}

int RunBenchKernels(const BenchKernelsFlags& flags) {
  auto backend = OpenBackend(flags.model);
  if (!backend.ok()) return Report(backend.status(), kCannotLoad);
  const absl::Status status = Run(flags, **backend);
  return status.ok() ? kDone : Report(status, kFailed);
}

}  // namespace

void AddBenchKernelsCommand(CLI::App& bench, int& exit_code) {
  auto flags = std::make_shared<BenchKernelsFlags>();
  CLI::App* command = bench.add_subcommand(
      "kernels", "Every op at the shapes of a 7B model, as a share of what the device can do");
  AddBackendFlags(*command, flags->model);
  command->add_option("--size", flags->size, "tiny: for a CPU, to see that it runs")
      ->check(CLI::IsMember({"7b", "tiny"}));
  command->add_option("--filter", flags->filter,
                      "part of lightning_prefill, lightning_step, paged_decode, paged_prefill, "
                      "product, sample, acceptance_head or verify");
  command->add_flag("--json", flags->json, "stdout is one JSON object");
  command->add_option("--output", flags->output, "also write the JSON there")->type_name("FILE");
  command->callback([flags, &exit_code] { exit_code = RunBenchKernels(*flags); });
}

}  // namespace godwit::cli
