#pragma once
// What this machine can do at most, measured: the figures that a benchmark line is a share of.

#include <cstdint>

#include "kernels/cpu/cpu_context.h"

namespace godwit {

// Bytes per second that all threads together read from memory (a buffer far larger than any cache),
// best of several passes.
double MeasureReadBandwidth(ThreadPool& pool);

// Operations per second of the product kernel on operands that stay in the first-level cache, all
// threads together.
double MeasureProductPeak(ThreadPool& pool, const IsaTable& isa, bool f32);

}  // namespace godwit
