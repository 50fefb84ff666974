// A layer of an acceptance head.
//
// Without a product of its own: one block of 128 threads a row, thread i at elements i, i + 128,
// ...; two reductions in a fixed order. A row is a few kilobytes: the launch is what it costs.
//
// With one (an MLP): one block of 512 threads a row. Warp w makes outputs w, w + 16, ..., lane l of
// it sums columns 4 l ... 4 l + 3 of every 128. A weight of up to 64 x 512 lies in the block's
// registers, 128 KB in 64 of each thread, before the kernel waits for what draws: a multiprocessor
// takes it from the L2 cache in 128 KB / 64 B = 2,048 cycles, 1.2 us, in which Sample still runs.
// What is left after the wait is one row of x (2 KB), 80 products a lane and three reductions:
// about 1 us. A cluster of blocks would shorten only the part that is hidden. Rows run side by
// side: 128 of them read 16 MB from L2, 3 us. Larger weights pass through the same registers, piece
// by piece.

#include <cmath>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/pdl.cuh"

namespace godwit::cuda {
namespace {

constexpr int kThreads = 128;

struct Features {
  float of[kNumHeadFeatures] = {};
};

__device__ Features FeaturesOf(const AcceptanceHeadArgs& args, const SampleRow& row,
                               int64_t index) {
  if (args.margins.data == nullptr || args.certainties.data == nullptr) return {};
  const float* certainty = Row<const float>(args.certainties, index);
  return {{log1pf(*Row<const float>(args.margins, index)), certainty[0], certainty[1],
           fminf(row.temperature, 2.0f), args.place}};
}

__device__ float Dot(const Features& features, const TensorView& weights, int64_t column) {
  float sum = 0;
  for (int f = 0; f < kNumHeadFeatures; ++f)
    sum = fmaf(features.of[f], Row<const float>(weights, f)[column], sum);
  return sum;
}

// By one thread of the row. Last: the host may read both, over the bus.
__device__ void WriteLogit(const AcceptanceHeadArgs& args, const Features& features, float logit,
                           int64_t index) {
  if (args.readout_features.data != nullptr) {
    const auto* weights = static_cast<const float*>(args.readout_features.data);
    for (int f = 0; f < kNumHeadFeatures; ++f) logit = fmaf(features.of[f], weights[f], logit);
  }
  *Row<float>(args.logits, index) = logit + args.readout_bias;
  if (args.shown_margins.data != nullptr) {
    *Row<float>(args.shown_margins, index) = *Row<const float>(args.margins, index);
  }
}

// --- Without a product

__global__ void __launch_bounds__(kThreads)
    AcceptanceHeadKernel(const __grid_constant__ AcceptanceHeadArgs args) {
  __shared__ float shared[kThreads / kWarp];
  DependencyTrigger();
  DependencyWait();
  const int64_t index = blockIdx.x;
  const SampleRow& row = args.rows[index];
  if (row.slot < 0) return;
  const int64_t n = args.z.data != nullptr ? args.z.shape[1] : args.x.shape[1];
  const Features features = FeaturesOf(args, row, index);
  const float* x = args.x.data != nullptr ? Row<const float>(args.x, row.logit_row) : nullptr;
  const float* z = args.z.data != nullptr ? Row<const float>(args.z, row.logit_row) : nullptr;
  float* y = args.y.data != nullptr ? Row<float>(args.y, row.logit_row) : nullptr;
  const auto* bias = static_cast<const float*>(args.bias.data);
  const auto* readout = static_cast<const float*>(args.readout.data);
  const auto* norm_weight = static_cast<const float*>(args.norm.weight.data);
  float scale = 1;
  if (x != nullptr && args.norm.kind == NormKind::kRms) {
    float squares = 0;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) squares = fmaf(x[i], x[i], squares);
    squares = BlockSum<kThreads>(squares, shared);
    scale = 1.0f / sqrtf(squares / static_cast<float>(n) + args.norm.epsilon);
  }
  float logit = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    float value = x != nullptr ? x[i] * scale : 0;
    if (norm_weight != nullptr) value *= args.norm.weight_offset + norm_weight[i];
    if (z != nullptr) {
      float inner = z[i] + (bias != nullptr ? bias[i] : 0);
      if (args.feature_weights.data != nullptr) inner += Dot(features, args.feature_weights, i);
      value += Silu(inner);
    }
    if (y != nullptr) y[i] = value;
    if (readout != nullptr) logit = fmaf(readout[i], value, logit);
  }
  if (readout == nullptr) return;
  logit = BlockSum<kThreads>(logit, shared);
  if (threadIdx.x == 0) WriteLogit(args, features, logit, index);
}

// --- With a product

constexpr int kMlpThreads = 512, kMlpWarps = kMlpThreads / kWarp;
constexpr int kOutputs = 4, kPieces = 4;  // of a tile: outputs of a warp, pieces of a lane in each
constexpr int kPiece = 4;                 // columns
constexpr int64_t kTileOutputs = kMlpWarps * kOutputs;
constexpr int64_t kTileColumns = kWarp * kPieces * kPiece;

// Columns from `column` on; beyond the end of the row: zeros.
template <bool kAligned>
__device__ float4 LoadPiece(const float* row, int64_t column, int64_t num_columns) {
  if (column >= num_columns) return {};
  if constexpr (kAligned) {
    return *reinterpret_cast<const float4*>(row + column);
  } else {
    float values[kPiece];
    for (int i = 0; i < kPiece; ++i) {
      values[i] = column + i < num_columns ? row[column + i] : 0;
    }
    return {values[0], values[1], values[2], values[3]};
  }
}

__device__ float4 Scaled(const float4& x, const float4& by, float offset) {
  return {x.x * (by.x + offset), x.y * (by.y + offset), x.z * (by.z + offset),
          x.w * (by.w + offset)};
}

__device__ float AddDot(const float4& a, const float4& b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

__device__ int64_t ColumnOf(int64_t first_column, int piece) {
  return first_column + kPiece * (threadIdx.x % kWarp + kWarp * piece);
}
__device__ int64_t OutputOf(int64_t first_output, int output) {
  return first_output + threadIdx.x / kWarp + kMlpWarps * output;
}

// A lane's part of the weight, times the norm's.
struct Tile {
  float4 of[kOutputs][kPieces];
};

template <bool kAligned>
__device__ void LoadTile(const AcceptanceHeadArgs& args, int64_t first_output, int64_t first_column,
                         Tile& tile) {
  const int64_t n = args.weight.shape[0], num_columns = args.weight.shape[1];
#pragma unroll
  for (int output = 0; output < kOutputs; ++output) {
    const int64_t row = OutputOf(first_output, output);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      tile.of[output][piece] = row < n
                                   ? LoadPiece<kAligned>(Row<const float>(args.weight, row),
                                                         ColumnOf(first_column, piece), num_columns)
                                   : float4{};
    }
  }
  const auto* norm_weight = static_cast<const float*>(args.norm.weight.data);
  if (norm_weight == nullptr) return;
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const float4 norm =
        LoadPiece<kAligned>(norm_weight, ColumnOf(first_column, piece), num_columns);
#pragma unroll
    for (int output = 0; output < kOutputs; ++output) {
      tile.of[output][piece] = Scaled(tile.of[output][piece], norm, args.norm.weight_offset);
    }
  }
}

// What an output takes besides its product; lane i < kOutputs has that of output i of its warp.
struct Unit {
  bool exists = false;
  float bias = 0, readout = 0;
  float features[kNumHeadFeatures] = {};
};

__device__ Unit LoadUnit(const AcceptanceHeadArgs& args, int64_t first_output) {
  Unit unit;
  const int lane = threadIdx.x % kWarp;
  const int64_t output = OutputOf(first_output, lane);
  unit.exists = lane < kOutputs && output < args.weight.shape[0];
  if (!unit.exists) return unit;
  if (args.bias.data != nullptr) unit.bias = static_cast<const float*>(args.bias.data)[output];
  if (args.readout.data != nullptr) {
    unit.readout = static_cast<const float*>(args.readout.data)[output];
  }
  if (args.feature_weights.data == nullptr) return unit;
#pragma unroll
  for (int f = 0; f < kNumHeadFeatures; ++f) {
    unit.features[f] = Row<const float>(args.feature_weights, f)[output];
  }
  return unit;
}

// norm(x) . weight^T of the outputs of a tile, that of output i in lane i of its warp. The first
// piece of each is in `tile`.
template <bool kAligned>
__device__ float Products(const AcceptanceHeadArgs& args, const float* x, int64_t first_output,
                          Tile& tile) {
  const int64_t num_columns = args.weight.shape[1];
  float sums[kOutputs] = {}, squares = 0;
  for (int64_t first_column = 0; first_column < num_columns; first_column += kTileColumns) {
    if (first_column > 0) LoadTile<kAligned>(args, first_output, first_column, tile);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const float4 values = LoadPiece<kAligned>(x, ColumnOf(first_column, piece), num_columns);
      squares = AddDot(values, values, squares);
#pragma unroll
      for (int output = 0; output < kOutputs; ++output) {
        sums[output] = AddDot(tile.of[output][piece], values, sums[output]);
      }
    }
  }
  float scale = 1;
  if (args.norm.kind == NormKind::kRms) {
    scale = 1.0f / sqrtf(WarpSum(squares) / static_cast<float>(num_columns) + args.norm.epsilon);
  }
  float mine = 0;
#pragma unroll
  for (int output = 0; output < kOutputs; ++output) {
    const float sum = WarpSum(sums[output]);
    if (threadIdx.x % kWarp == output) mine = sum;
  }
  return mine * scale;
}

template <bool kAligned>
__global__ void __launch_bounds__(kMlpThreads, 1)
    MlpKernel(const __grid_constant__ AcceptanceHeadArgs args) {
  __shared__ float shared[kMlpWarps];
  DependencyTrigger();
  const int64_t index = blockIdx.x;
  const SampleRow& row = args.rows[index];  // which no kernel writes
  const bool is_padding = row.slot < 0;
  Tile tile;
  Unit unit;
  if (!is_padding) {
    LoadTile<kAligned>(args, 0, 0, tile);
    unit = LoadUnit(args, 0);
  }
  DependencyWait();
  if (is_padding) return;
  const float* x = Row<const float>(args.x, row.logit_row);
  const Features features = FeaturesOf(args, row, index);
  float logit = 0;
  for (int64_t first = 0; first < args.weight.shape[0]; first += kTileOutputs) {
    if (first > 0) {
      LoadTile<kAligned>(args, first, 0, tile);
      unit = LoadUnit(args, first);
    }
    float inner = Products<kAligned>(args, x, first, tile) + unit.bias;
#pragma unroll
    for (int f = 0; f < kNumHeadFeatures; ++f) {
      inner = fmaf(features.of[f], unit.features[f], inner);
    }
    if (!unit.exists) continue;
    const float value = Silu(inner);
    if (args.y.data != nullptr) {
      Row<float>(args.y, row.logit_row)[OutputOf(first, threadIdx.x % kWarp)] = value;
    }
    logit = fmaf(unit.readout, value, logit);
  }
  if (args.readout.data == nullptr) return;
  logit = BlockSum<kMlpThreads>(logit, shared);
  if (threadIdx.x == 0) WriteLogit(args, features, logit, index);
}

cudaError_t LaunchMlp(const AcceptanceHeadArgs& args, cudaStream_t stream) {
  const bool aligned = args.x.shape[1] % kPiece == 0 && Aligned(args.x) && Aligned(args.weight) &&
                       reinterpret_cast<uintptr_t>(args.norm.weight.data) % 16 == 0;
  return LaunchDependent(aligned ? MlpKernel<true> : MlpKernel<false>,
                         dim3(static_cast<unsigned>(args.num_rows)), dim3(kMlpThreads), 0, stream,
                         args);
}

}  // namespace

cudaError_t LaunchAcceptanceHead(const AcceptanceHeadArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;
  if (args.weight.data != nullptr) return LaunchMlp(args, stream);
  return LaunchDependent(AcceptanceHeadKernel, dim3(static_cast<unsigned>(args.num_rows)),
                         dim3(kThreads), 0, stream, args);
}

}  // namespace godwit::cuda
