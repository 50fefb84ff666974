// One instruction set: see isa.h. The order of the includes is their dependency.
// clang-format off
#include "kernels/cpu/simd_avx512-inl.h"
#include "kernels/cpu/simd_math-inl.h"
#include "kernels/cpu/vector_ops-inl.h"
#include "kernels/cpu/form_rows-inl.h"
#include "kernels/cpu/finish-inl.h"
#include "kernels/cpu/product-inl.h"
#include "kernels/cpu/product_avx512bf16-inl.h"

namespace godwit {
namespace {
constexpr BF16Product kBF16Product = {2, kDotRows, FormRows<RowFormat::kBF16>, ProductBF16};
}  // namespace
}  // namespace godwit

#include "kernels/cpu/isa_table-inl.h"
// clang-format on

namespace godwit {

const IsaTable& Avx512Bf16Isa() {
  static constexpr IsaTable kTable = MakeIsaTable("avx512bf16");
  return kTable;
}

}  // namespace godwit
