// One row after the other on the caller's thread: a row is a few thousand operations, less than it
// costs to wake another thread. Only rows with a product of their own are shared out; those of a
// large head are Linear's.

#include "kernels/cpu/acceptance_head.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "kernels/base/check.h"
#include "kernels/cpu/vector_ops.h"

namespace godwit {
namespace {

using Features = std::array<float, kNumHeadFeatures>;

Features FeaturesOf(const AcceptanceHeadArgs& args, int32_t index) {
  if (!args.margins || !args.certainties) return {};
  const float* const certainty = args.certainties.row<const float>(index);
  return {std::log1p(*args.margins.row<const float>(index)), certainty[0], certainty[1],
          std::min(args.rows[index].temperature, 2.0f), args.place};
}

const float* DataOf(const TensorView& x) { return static_cast<const float*>(x.data); }

// What multiplies x besides its weight.
float ScaleOf(const NormSpec& norm, const float* x, int64_t n) {
  if (norm.kind == NormKind::kNone) return 1;
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) {
    squares += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  }
  return static_cast<float>(
      1 / std::sqrt(squares / static_cast<double>(n) + static_cast<double>(norm.epsilon)));
}

// Element i of silu(z + bias + f . feature_weights).
float Activated(const AcceptanceHeadArgs& args, const Features& features, const float* z,
                int64_t i) {
  float inner = z[i];
  if (args.bias) inner += DataOf(args.bias)[i];
  if (args.feature_weights) {
    for (int64_t f = 0; f < kNumHeadFeatures; ++f) {
      inner += features[static_cast<size_t>(f)] * args.feature_weights.row<const float>(f)[i];
    }
  }
  return inner / (1 + std::exp(-inner));
}

// What the product of a row works in: the row times the weight of its norm, its scale once for each
// output, and the outputs.
struct ProductScratch {
  float *x, *scales, *z;

  static int64_t Elements(const AcceptanceHeadArgs& args) {
    return PadRow(args.weight.row_elements()) + 2 * PadRow(args.weight.rows());
  }
  ProductScratch(const AcceptanceHeadArgs& args, float* data)
      : x(data),
        scales(x + PadRow(args.weight.row_elements())),
        z(scales + PadRow(args.weight.rows())) {}
};

// norm(x) . weight^T; a tail of columns that no vector holds is added one by one.
const float* Product(const IsaTable& isa, const AcceptanceHeadArgs& args, const float* x,
                     const ProductScratch& scratch) {
  const int64_t n = args.weight.rows(), num_columns = args.weight.row_elements();
  const float scale = ScaleOf(args.norm, x, num_columns);
  const float* const norm_weight = args.norm.weight ? DataOf(args.norm.weight) : nullptr;
  for (int64_t k = 0; k < num_columns; ++k) {
    scratch.x[k] =
        norm_weight == nullptr ? x[k] : x[k] * (args.norm.weight_offset + norm_weight[k]);
  }
  std::fill_n(scratch.scales, n, scale);
  const int64_t length = num_columns / kRowPad * kRowPad;
  isa.dot_rows({.q = scratch.x,
                .k = DataOf(args.weight),
                .k_stride = args.weight.row_stride,
                .length = length,
                .num_keys = static_cast<int>(n),
                .weights = scratch.scales,
                .scores = scratch.z});
  for (int64_t i = 0; i < n && length < num_columns; ++i) {
    const float* const weight = args.weight.row<const float>(i);
    float tail = 0;
    for (int64_t k = length; k < num_columns; ++k) tail += weight[k] * scratch.x[k];
    scratch.z[i] += scale * tail;
  }
  return scratch.z;
}

// scratch: ProductScratch::Elements of a row with a weight.
void RunRow(const IsaTable& isa, const AcceptanceHeadArgs& args, int32_t index, float* scratch) {
  const int64_t row = args.rows[index].logit_row;
  const TensorView& shape = args.z ? args.z : args.x;
  GODWIT_CHECK(row >= 0 && row < shape.rows());
  const int64_t n = args.weight ? args.weight.rows() : shape.row_elements();
  const Features features = FeaturesOf(args, index);
  const float* x = args.x ? args.x.row<const float>(row) : nullptr;
  const float* z = args.z ? args.z.row<const float>(row) : nullptr;
  if (args.weight) {
    z = Product(isa, args, x, ProductScratch(args, scratch));
    x = nullptr;
  }
  const float* const norm_weight =
      x != nullptr && args.norm.weight ? DataOf(args.norm.weight) : nullptr;
  const float scale = x == nullptr ? 0 : ScaleOf(args.norm, x, n);
  double logit = static_cast<double>(args.readout_bias);
  for (int64_t i = 0; i < n; ++i) {
    float value = 0;
    if (x != nullptr) value = x[i] * scale;
    if (norm_weight != nullptr) value *= args.norm.weight_offset + norm_weight[i];
    if (z != nullptr) value += Activated(args, features, z, i);
    if (args.y) args.y.row<float>(row)[i] = value;
    if (args.readout) logit += static_cast<double>(DataOf(args.readout)[i] * value);
  }
  if (!args.readout) return;
  if (args.readout_features) {
    for (size_t f = 0; f < features.size(); ++f) {
      logit += static_cast<double>(features[f] * DataOf(args.readout_features)[f]);
    }
  }
  *args.logits.row<float>(index) = static_cast<float>(logit);
  if (args.shown_margins) {
    *args.shown_margins.row<float>(index) = *args.margins.row<const float>(index);
  }
}

}  // namespace

OpStatus CpuAcceptanceHead(CpuContext& context, const AcceptanceHeadArgs& args) {
  if (!args.weight) {
    for (int32_t index = 0; index < args.num_rows; ++index) {
      if (args.rows[index].slot >= 0) RunRow(context.isa, args, index, nullptr);
    }
    return {};
  }
  const int64_t elements = ProductScratch::Elements(args);
  float* const scratch = static_cast<float*>(context.scratch.Get(
      elements * context.pool.num_threads() * static_cast<int64_t>(sizeof(float))));
  if (scratch == nullptr) {
    return context.Fail(OpCode::kResourceExhausted, "AcceptanceHead: no memory for scratch");
  }
  context.pool.ForEach(args.num_rows, [&](int64_t index, int thread) {
    if (args.rows[index].slot < 0) return;
    RunRow(context.isa, args, static_cast<int32_t>(index), scratch + thread * elements);
  });
  return {};
}

}  // namespace godwit
