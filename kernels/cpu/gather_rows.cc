#include "kernels/cpu/gather_rows.h"

#include <cstdint>
#include <cstring>

#include "kernels/base/check.h"

namespace godwit {

OpStatus CpuGatherRows(CpuContext&, const GatherRowsArgs& args) {
  const size_t row_bytes = static_cast<size_t>(args.x.row_elements()) * sizeof(float);
  for (int64_t index = 0; index < args.rows.rows(); ++index) {
    const int64_t row = *args.rows.row<const int32_t>(index);
    GODWIT_CHECK(row >= 0 && row < args.x.rows());
    std::memcpy(args.y.row<float>(index), args.x.row<const float>(row), row_bytes);
  }
  return {};
}

}  // namespace godwit
