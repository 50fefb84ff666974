// Embedding, products and row copies.

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

void RefGatherRows(const GatherRowsArgs& args) {
  for (int64_t r = 0; r < args.rows.rows(); ++r) {
    const int32_t from = *args.rows.row<const int32_t>(r);
    for (int64_t i = 0; i < args.x.row_elements(); ++i) Set(args.y, r, i, Get(args.x, from, i));
  }
}

}  // namespace godwit
