#pragma once
// The one layout of a weight matrix [n, k] in memory, for decode and prefill and every instruction
// set:
//
//   bf16: [ceil(n / 32)][k_padded / 2][32][2]      f32: [ceil(n / 32)][k_padded][32]      k_padded
//   = 32 ceil(k / 32)
//
// A panel is 32 output features; in it k advances, and at each k (pair of k in bf16) the 32
// features lie side by side. So: one thread's features are one contiguous stream (matvec at memory
// bandwidth); the two halves of a bf16 row of 128 bytes are operands of vdpbf16ps as they stand; 16
// such rows are two B tiles of AMX; and the part of a panel that belongs to a range of k is
// contiguous, 32 KiB for 512 k, which is what the blocked product keeps in the first-level cache.
// Padding is zero. Example, bf16, n = 2, k = 3: (w00 w01)(w10 w11)(0 0) x 30, (w02 0)(w12 0)(0 0) x
// 30, zeros to k = 32.

#include <cstdint>

#include "kernels/base/op_status.h"
#include "kernels/base/tensor.h"
#include "kernels/cpu/cpu_context.h"

namespace godwit {

inline constexpr int64_t kPanelRows = 32;
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
