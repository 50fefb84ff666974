#pragma once
// What a product asks of one instruction set (IsaTable).
//
// Order of the sum. Output (row, n) is one accumulator that takes k in ascending order (k pairs or
// k blocks of 32 in one instruction, as the set has it), starting from zero. Cutting k into blocks
// stores the accumulator as f32 and loads it again, which changes nothing. So its bits depend on
// the row and on w alone: not on the number of rows, the position of the row, the blocking or the
// number of threads. Path D and path P of architecture.md §5 are therefore the same sum and one
// product computes both.

#include <cstdint>

#include "kernels/ops.h"

namespace godwit {

// out[row] = round( gate * norm(x) ), zero from k to k_padded.
struct FormRowsArgs {
  const void* x = nullptr;
  int64_t x_stride = 0;  // elements
  bool x_is_f32 = true;
  const void* gate = nullptr;  // optional
  int64_t gate_stride = 0;
  bool gate_is_f32 = true;
  NormKind norm = NormKind::kNone;
  const float* norm_weight = nullptr;  // optional
  float epsilon = 0;
  float weight_offset = 0;
  int64_t num_rows = 0;
  int64_t k = 0;
  int64_t k_padded = 0;
  void* out = nullptr;
  int64_t out_stride_bytes = 0;
};

// c[num_rows, 16 num_panels] = (accumulate ? c : 0) + a . b^T over k.
struct PackedProductArgs {
  const void* a =
      nullptr;  // formed rows at the first k; readable to a multiple of kRowPadding rows
  int64_t a_stride_bytes = 0;
  int64_t num_rows = 0;
  const void* b = nullptr;  // the first panel at the first k
  int64_t b_panel_bytes = 0;
  int64_t num_panels = 0;
  int64_t k = 0;         // a multiple of 32
  float* c = nullptr;    // writable to a multiple of kRowPadding rows; what is beyond num_rows is
                         // unspecified
  int64_t c_stride = 0;  // floats; a multiple of 16
  bool accumulate = false;
  // What the caller multiplies next (panels as far apart as b's): fetched into the second-level
  // cache meanwhile, when there are rows enough for the arithmetic to leave the memory time. Need
  // not be mapped.
  const void* next_b = nullptr;
};
inline constexpr int64_t kTileRows = 16;  // of an AMX tile
inline constexpr int64_t kRowPadding =
    2 * kTileRows;  // an AMX product takes two tiles of rows at a time

// y = c, y += c, or y = activation(c) * up.
struct FinishArgs {
  const float* c = nullptr;
  const float* up = nullptr;  // same stride; absent: no gating
  int64_t c_stride = 0;
  Activation activation = Activation::kNone;
  bool add = false;
  void* y = nullptr;
  bool y_is_f32 = true;
  int64_t y_stride = 0;
  int64_t num_rows = 0;
  int64_t num_columns = 0;
};

}  // namespace godwit
