// One instruction set: see isa.h. The order of the includes is their dependency.
// clang-format off
#include "kernels/cpu/simd_portable-inl.h"
#include "kernels/cpu/simd_math-inl.h"
#include "kernels/cpu/vector_ops-inl.h"
#include "kernels/cpu/form_rows-inl.h"
#include "kernels/cpu/finish-inl.h"
#include "kernels/cpu/product-inl.h"

namespace godwit {
namespace {
constexpr BF16Product kBF16Product = {4, kPlainRows, FormRows<RowFormat::kBF16Widened>, PlainProduct<true>};
}  // namespace
}  // namespace godwit

#include "kernels/cpu/isa_table-inl.h"
// clang-format on

namespace godwit {

const IsaTable& PortableIsa() {
  static constexpr IsaTable kTable = MakeIsaTable("portable");
  return kTable;
}

}  // namespace godwit
