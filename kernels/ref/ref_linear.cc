// Embedding, products and row copies.

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/ref/elements.h"
#include "kernels/ref/ref_backend.h"

namespace godwit {
namespace {

double Silu(double x) { return x / (1 + std::exp(-x)); }

// round_act( gate * norm(x) ); act is the dtype of the weights: f32 models keep f32.
std::vector<double> FormRow(const RowInput& input, int64_t token, DType act) {
  const int64_t width = input.x.row_elements();
  std::vector<double> row(static_cast<size_t>(width));
  double sum_of_squares = 0;
  for (int64_t i = 0; i < width; ++i) {
    const double x = Get(input.x, token, i);
    row[static_cast<size_t>(i)] = x;
    sum_of_squares += x * x;
  }
  double scale = 1;
  if (input.norm.kind == NormKind::kRms) {
    scale = 1 / std::sqrt(sum_of_squares / static_cast<double>(width) +
                          static_cast<double>(input.norm.epsilon));
  }
  for (int64_t i = 0; i < width; ++i) {
    double x = row[static_cast<size_t>(i)] * scale;
    if (input.norm.weight) {
      x *= static_cast<double>(input.norm.weight_offset) + Get(input.norm.weight, i, 0);
    }
    if (input.gate) x *= Get(input.gate, token, i);
    row[static_cast<size_t>(i)] = RoundTo(act, x);
  }
  return row;
}

double Dot(const std::vector<double>& x, const float* w) {
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) sum += x[i] * static_cast<double>(w[i]);
  return sum;
}

}  // namespace

void RefEmbedTokens(const EmbedTokensArgs& args) {
  for (int64_t token = 0; token < args.token_ids.rows(); ++token) {
    int32_t id = *args.token_ids.row<const int32_t>(token);
    if (id < 0) id = std::max(*args.drawn.row<const int32_t>(~id), 0);
    const float* const row = MatrixRow(args.table, id);
    for (int64_t i = 0; i < args.table.num_columns; ++i) {
      Set(args.y, token, i, static_cast<double>(args.scale) * static_cast<double>(row[i]));
    }
  }
}

void RefLinear(const LinearArgs& args) {
  for (int64_t token = 0; token < args.input.x.rows(); ++token) {
    const std::vector<double> input = FormRow(args.input, token, args.w.dtype);
    for (int64_t n = 0; n < args.w.num_rows; ++n) {
      const double before = args.epilogue == Epilogue::kAdd ? Get(args.y, token, n) : 0;
      Set(args.y, token, n, before + Dot(input, MatrixRow(args.w, n)));
    }
  }
}

void RefGatedLinear(const GatedLinearArgs& args) {
  for (int64_t token = 0; token < args.input.x.rows(); ++token) {
    const std::vector<double> input = FormRow(args.input, token, args.gate.dtype);
    for (int64_t n = 0; n < args.gate.num_rows; ++n) {
      const double gate = Dot(input, MatrixRow(args.gate, n));
      const double up = Dot(input, MatrixRow(args.up, n));
      Set(args.y, token, n, (args.activation == Activation::kSilu ? Silu(gate) : gate) * up);
    }
  }
}

void RefAcceptanceHead(const AcceptanceHeadArgs& args) {
  for (int32_t r = 0; r < args.num_rows; ++r) {
    const SampleRow& row = args.rows[r];
    if (row.slot < 0) continue;
    const int64_t n = args.weight ? args.weight.rows() : (args.z ? args.z : args.x).row_elements();
    std::vector<double> features(kNumHeadFeatures);
    if (args.margins && args.certainties) {
      features = {std::log1p(Get(args.margins, r, 0)), Get(args.certainties, r, 0),
                  Get(args.certainties, r, 1), std::min(static_cast<double>(row.temperature), 2.0),
                  static_cast<double>(args.place)};
    }
    std::vector<double> x(static_cast<size_t>(n)), y(static_cast<size_t>(n));
    if (args.x) x = FormRow({.x = args.x, .norm = args.norm}, row.logit_row, DType::kF32);
    if (!args.weight) y = x;
    double logit = static_cast<double>(args.readout_bias);
    for (int64_t i = 0; i < n; ++i) {
      double& value = y[static_cast<size_t>(i)];
      double inner = args.z ? Get(args.z, row.logit_row, i) : 0;
      for (int64_t k = 0; args.weight && k < args.x.row_elements(); ++k) {
        inner += Get(args.weight, i, k) * x[static_cast<size_t>(k)];
      }
      if (args.bias) inner += Get(args.bias, i, 0);
      for (int64_t f = 0; args.feature_weights && f < kNumHeadFeatures; ++f) {
        inner += features[static_cast<size_t>(f)] * Get(args.feature_weights, f, i);
      }
      if (args.z || args.weight) value += Silu(inner);
      if (args.y) Set(args.y, row.logit_row, i, value);
      if (args.readout) logit += Get(args.readout, i, 0) * value;
    }
    if (!args.readout) continue;
    for (int64_t f = 0; args.readout_features && f < kNumHeadFeatures; ++f) {
      logit += features[static_cast<size_t>(f)] * Get(args.readout_features, f, 0);
    }
    Set(args.logits, r, 0, logit);
    if (args.shown_margins) Set(args.shown_margins, r, 0, Get(args.margins, r, 0));
  }
}

void RefGatherRows(const GatherRowsArgs& args) {
  for (int64_t r = 0; r < args.rows.rows(); ++r) {
    const int32_t from = *args.rows.row<const int32_t>(r);
    for (int64_t i = 0; i < args.x.row_elements(); ++i) Set(args.y, r, i, Get(args.x, from, i));
  }
}

}  // namespace godwit
