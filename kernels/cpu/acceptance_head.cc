// One row after the other on the caller's thread: a row is a few thousand operations, less than it
// costs to wake another thread. The products of a large head are Linear's.

#include "kernels/cpu/acceptance_head.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "kernels/base/check.h"

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

void RunRow(const AcceptanceHeadArgs& args, int32_t index) {
  const int64_t row = args.rows[index].logit_row;
  const TensorView& shape = args.z ? args.z : args.x;
  GODWIT_CHECK(row >= 0 && row < shape.rows());
  const int64_t n = shape.row_elements();
  const Features features = FeaturesOf(args, index);
  const float* const x = args.x ? args.x.row<const float>(row) : nullptr;
  const float* const z = args.z ? args.z.row<const float>(row) : nullptr;
  const float* const norm_weight = args.norm.weight ? DataOf(args.norm.weight) : nullptr;
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
}

}  // namespace

OpStatus CpuAcceptanceHead(CpuContext&, const AcceptanceHeadArgs& args) {
  for (int32_t index = 0; index < args.num_rows; ++index) {
    if (args.rows[index].slot >= 0) RunRow(args, index);
  }
  return {};
}

}  // namespace godwit
