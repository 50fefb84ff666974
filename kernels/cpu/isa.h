#pragma once
// The kernels of one instruction set, chosen once at start. Each kernel is written once, in a
// *-inl.h over the vector type of simd_<set>-inl.h, and compiled once per set by isa_<set>.cc. A
// kernel is a free function on plain pointers.
//
// To add one: its argument struct beside its op, one line in IsaTable, its name in isa_table-inl.h,
// and its *-inl.h in each isa_<set>.cc. Those files are compiled with instructions this machine may
// not have, so everything in a *-inl.h stands in an unnamed namespace and uses no inline function
// of another header (std::vector, absl, ToF32): the linker would keep one copy of it for the whole
// program.

#include <cstdint>

namespace godwit {

struct FormRowsArgs;
struct PackedProductArgs;
struct FinishArgs;
struct TileProductArgs;
struct FoldStateArgs;
struct DotRowsArgs;
struct FormHeadArgs;
struct SinCosArgs;
struct WidenRowsArgs;
struct ScaleRowsArgs;
struct ScaleTriangleArgs;
struct CountAtLeastArgs;
struct KeepAtLeastArgs;
struct TemperArgs;
struct TransposeArgs;
struct SoftmaxRangeArgs;
struct ScanLogitsArgs;
struct SumExpArgs;
struct GumbelArgmaxArgs;

struct IsaTable {
  const char* name;

  // product_args.h
  int64_t activation_bytes;  // of an element of a formed input row under bf16 weights: 2, or 4
                             // where they are widened once
  int64_t stream_rows;       // up to so many rows product_bf16 reads each panel once, front to back
  void (*form_rows_bf16)(const FormRowsArgs& args);
  void (*form_rows_f32)(const FormRowsArgs& args);
  void (*product_bf16)(const PackedProductArgs& args);
  void (*product_f32)(const PackedProductArgs& args);
  void (*finish)(const FinishArgs& args);

  // vector_ops.h
  void (*tile_product)(const TileProductArgs& args);
  void (*fold_state)(const FoldStateArgs& args);
  void (*dot_rows)(const DotRowsArgs& args);
  void (*form_head)(const FormHeadArgs& args);
  void (*sin_cos)(const SinCosArgs& args);
  void (*widen_rows)(const WidenRowsArgs& args);
  void (*scale_rows)(const ScaleRowsArgs& args);
  void (*scale_triangle)(const ScaleTriangleArgs& args);
  void (*transpose)(const TransposeArgs& args);
  void (*softmax_range)(SoftmaxRangeArgs& args);
  void (*scan_logits)(ScanLogitsArgs& args);
  void (*sum_exp)(SumExpArgs& args);
  void (*count_at_least)(CountAtLeastArgs& args);
  void (*keep_at_least)(const KeepAtLeastArgs& args);
  void (*temper)(const TemperArgs& args);
  void (*gumbel_argmax)(GumbelArgmaxArgs& args);
};

const IsaTable& PortableIsa();
const IsaTable& Avx2Isa();
const IsaTable& Avx512Bf16Isa();
const IsaTable& AmxIsa();

}  // namespace godwit
