// The table of this set: included last by isa_<set>.cc, which says in kBF16Product how it
// multiplies BF16.

#include "kernels/cpu/isa.h"

namespace godwit {
namespace {

constexpr IsaTable MakeIsaTable(const char* name) {
  return {
      .name = name,
      .activation_bytes = kBF16Product.activation_bytes,
      .stream_rows = kBF16Product.stream_rows,
      .form_rows_bf16 = kBF16Product.form_rows,
      .form_rows_f32 = FormRows<RowFormat::kF32>,
      .product_bf16 = kBF16Product.product,
      .product_f32 = PlainProduct<false>,
      .finish = Finish,
      .tile_product = TileProduct,
      .fold_state = FoldState,
      .dot_rows = DotRows,
      .form_head = FormHead,
      .sin_cos = SinCos,
      .widen_rows = WidenRows,
      .scale_rows = ScaleRows,
      .scale_triangle = ScaleTriangle,
      .transpose = Transpose,
      .softmax_range = SoftmaxRange,
      .scan_logits = ScanLogits,
      .sum_exp = SumExp,
      .count_at_least = CountAtLeast,
      .keep_at_least = KeepAtLeast,
      .temper = Temper,
      .gumbel_argmax = GumbelArgmax,
  };
}

}  // namespace
}  // namespace godwit
