#pragma once
// The one layout of a weight matrix [n, k] in memory, for decode and prefill and every instruction
// set:
//
//   bf16: [ceil(n / 16)][k_padded / 2][16][2]   f32: [ceil(n / 16)][k_padded][16]   k_padded = 32
//   ceil(k / 32)
//
// A panel is 16 output features; in it k advances, and at each k (pair of k in bf16) the 16
// features lie side by side: one cache line, one operand of vdpbf16ps as it stands, and 16 such
// lines are a B tile of AMX. A panel is one contiguous stream; a product reads up to 8 of them side
// by side, because one stream does not keep the memory busy (measured in docs/performance.md), and
// takes the part of a few panels that belongs to a range of k into the first-level cache when it
// has many rows. Padding is zero.
// Example, bf16, n = 2, k = 3: (w00 w01)(w10 w11)(0 0) x 14, (w02 0)(w12 0)(0 0) x 14, zeros to k
// = 32.

#include <cstdint>

#include "kernels/base/op_status.h"
#include "kernels/base/tensor.h"
#include "kernels/cpu/cpu_context.h"

namespace godwit {

inline constexpr int64_t kPanelRows = 16;
inline constexpr int64_t kPackedColumns =
    32;  // k is padded to a multiple: the depth of an AMX tile in bf16

inline int64_t NumPanels(const MatrixView& matrix) {
  return (matrix.num_rows + kPanelRows - 1) / kPanelRows;
}
inline int64_t PaddedColumns(int64_t num_columns) {
  return (num_columns + kPackedColumns - 1) / kPackedColumns * kPackedColumns;
}
inline int64_t PanelBytes(const MatrixView& matrix) {
  return kPanelRows * PaddedColumns(matrix.num_columns) * DTypeBytes(matrix.dtype);
}
inline int64_t PackedBytes(const MatrixView& matrix) {
  return NumPanels(matrix) * PanelBytes(matrix);
}

// Backend::PackMatrixRows.
OpStatus CpuPackMatrixRows(CpuContext& context, const MatrixView& matrix, int64_t first_row,
                           const TensorView& source);

// Elements [0, num_columns) of a row, times scale, in f32.
void UnpackMatrixRow(const MatrixView& matrix, int64_t row, float scale, float* out);

}  // namespace godwit
