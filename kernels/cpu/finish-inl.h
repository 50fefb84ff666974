// What follows a product: store, add to the residual stream, or gate; c is in the first- or
// second-level cache.

#include <cstdint>

#include "kernels/cpu/product_args.h"

namespace godwit {
namespace {

template <typename Y>
inline void FinishRow(const FinishArgs& args, const float* c, const float* up, Y* y) {
  for (int64_t i = 0; i < args.num_columns; i += kLanes) {
    const int64_t count = args.num_columns - i;
    VecF value = Load(c + i);  // c is whole panels
    if (up != nullptr) {
      value = args.activation == Activation::kSilu ? Silu(value) : value;
      value = Mul(value, Load(up + i));
    }
    if (count >= kLanes) {
      StoreAct(y + i, args.add ? Add(LoadAct(y + i), value) : value);
    } else {
      StoreActPartial(y + i, args.add ? Add(LoadActPartial(y + i, count), value) : value, count);
    }
  }
}

void Finish(const FinishArgs& args) {
  for (int64_t row = 0; row < args.num_rows; ++row) {
    const float* const c = args.c + row * args.c_stride;
    const float* const up = args.up == nullptr ? nullptr : args.up + row * args.c_stride;
    if (args.y_is_f32) {
      FinishRow(args, c, up, static_cast<float*>(args.y) + row * args.y_stride);
    } else {
      FinishRow(args, c, up, static_cast<uint16_t*>(args.y) + row * args.y_stride);
    }
  }
}

}  // namespace
}  // namespace godwit
