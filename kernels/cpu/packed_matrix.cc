#include "kernels/cpu/packed_matrix.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/base/bf16.h"

namespace godwit {
namespace {

constexpr int64_t kTileColumns =
    64;  // columns packed at a time: 32 rows of them stay in the first-level cache

// Where element (row, column) stands, in elements from the start of the matrix.
int64_t PackedIndex(const MatrixView& matrix, int64_t row, int64_t column) {
  const int64_t padded = PaddedColumns(matrix.num_columns);
  const int64_t panel = row / kPanelRows * kPanelRows * padded;
  const int64_t lane = row % kPanelRows;
  if (matrix.dtype == DType::kF32) return panel + column * kPanelRows + lane;
  return panel + column / 2 * (2 * kPanelRows) + lane * 2 + column % 2;
}

// Source elements may lie at odd multiples of 2 bytes in a mapped file.
float ReadElement(const char* row, int64_t column, const float*) {
  float value;
  std::memcpy(&value, row + column * 4, sizeof(value));
  return value;
}
BF16 ReadElement(const char* row, int64_t column, const BF16*) {
  BF16 value;
  std::memcpy(&value, row + column * 2, sizeof(value));
  return value;
}
void Convert(BF16 from, BF16& to) { to = from; }
void Convert(BF16 from, float& to) { to = ToF32(from); }
void Convert(float from, BF16& to) { to = ToBF16(from); }
void Convert(float from, float& to) { to = from; }

// Rows [begin, end) of the source, all of one panel.
template <typename To, typename From>
void PackPanelRows(const MatrixView& matrix, int64_t first_row, const TensorView& source,
                   int64_t begin, int64_t end) {
  To* const packed = static_cast<To*>(matrix.data);
  for (int64_t tile = 0; tile < matrix.num_columns; tile += kTileColumns) {
    const int64_t tile_end = std::min(tile + kTileColumns, matrix.num_columns);
    for (int64_t row = begin; row < end; ++row) {
      const char* const from = static_cast<const char*>(source.data) +
                               row * source.row_stride * static_cast<int64_t>(sizeof(From));
      for (int64_t column = tile; column < tile_end; ++column) {
        Convert(ReadElement(from, column, static_cast<const From*>(nullptr)),
                packed[PackedIndex(matrix, first_row + row, column)]);
      }
    }
  }
}

template <typename To, typename From>
void PackRows(CpuContext& context, const MatrixView& matrix, int64_t first_row,
              const TensorView& source) {
  const int64_t first_panel = first_row / kPanelRows;
  const int64_t num_panels =
      (first_row + source.rows() + kPanelRows - 1) / kPanelRows - first_panel;
  context.pool.ForEach(num_panels, [&](int64_t task) {
    const int64_t panel_begin = (first_panel + task) * kPanelRows - first_row;
    PackPanelRows<To, From>(matrix, first_row, source, std::max<int64_t>(panel_begin, 0),
                            std::min(panel_begin + kPanelRows, source.rows()));
  });
}

}  // namespace

OpStatus CpuPackMatrixRows(CpuContext& context, const MatrixView& matrix, int64_t first_row,
                           const TensorView& source) {
  const bool source_ok = source.data != nullptr && source.rank == 2 &&
                         source.shape[1] == matrix.num_columns &&
                         (source.dtype == DType::kF32 || source.dtype == DType::kBF16);
  if (!matrix || !source_ok || first_row < 0 || source.rows() > matrix.num_rows - first_row) {
    return context.Fail(
        OpCode::kInvalidArgument,
        absl::StrCat("PackMatrixRows: source [", source.shape[0], ", ", source.shape[1],
                     "] of dtype ", static_cast<int>(source.dtype), " at row ", first_row,
                     " of a matrix [", matrix.num_rows, ", ", matrix.num_columns, "]"));
  }
  const bool from_f32 = source.dtype == DType::kF32;
  if (matrix.dtype == DType::kF32) {
    from_f32 ? PackRows<float, float>(context, matrix, first_row, source)
             : PackRows<float, BF16>(context, matrix, first_row, source);
  } else {
    from_f32 ? PackRows<BF16, float>(context, matrix, first_row, source)
             : PackRows<BF16, BF16>(context, matrix, first_row, source);
  }
  return {};
}

void UnpackMatrixRow(const MatrixView& matrix, int64_t row, float scale, float* out) {
  const int64_t first = PackedIndex(matrix, row, 0);
  if (matrix.dtype == DType::kF32) {
    const float* const from = static_cast<const float*>(matrix.data) + first;
    for (int64_t column = 0; column < matrix.num_columns; ++column)
      out[column] = scale * from[column * kPanelRows];
    return;
  }
  const BF16* const from = static_cast<const BF16*>(matrix.data) + first;
  for (int64_t column = 0; column < matrix.num_columns; ++column) {
    out[column] = scale * ToF32(from[column / 2 * (2 * kPanelRows) + column % 2]);
  }
}

}  // namespace godwit
