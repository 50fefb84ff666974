// Many copies in one launch: the state of a sequence is two ranges a layer, and a copy by the driver
// costs 5 to 7 us each, whatever its size.
//
// The ranges are the kernel's argument, at most kMaxRanges a launch. blockIdx.y names the range, the
// blocks of a row share it, a thread moves 16 bytes at a time where both ends are aligned for that.
// 2 bytes moved a byte copied, no flop: bound by memory.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/launch.h"

namespace godwit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxRanges = 128;  // 3 KiB of the 4 KiB that arguments may have
constexpr int64_t kBytesPerBlock = kThreads * 16 * 8;
constexpr int64_t kMaxBlocks = 64;  // of a range

struct Ranges {
  CopyRange ranges[kMaxRanges];
};

__global__ void __launch_bounds__(kThreads) CopyRangesKernel(const __grid_constant__ Ranges all) {
  const CopyRange range = all.ranges[blockIdx.y];
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  const bool aligned =
      ((reinterpret_cast<uintptr_t>(range.to) | reinterpret_cast<uintptr_t>(range.from)) & 15) == 0;
  const int64_t num_pieces = aligned ? range.num_bytes / 16 : 0;
  const int4* from = static_cast<const int4*>(range.from);
  int4* to = static_cast<int4*>(range.to);
  for (int64_t piece = first; piece < num_pieces; piece += stride) to[piece] = from[piece];
  for (int64_t byte = num_pieces * 16 + first; byte < range.num_bytes; byte += stride) {
    static_cast<char*>(range.to)[byte] = static_cast<const char*>(range.from)[byte];
  }
}

}  // namespace

cudaError_t LaunchCopyRanges(const CopyRange* ranges, int64_t num_ranges, cudaStream_t stream) {
  for (int64_t begin = 0; begin < num_ranges; begin += kMaxRanges) {
    const int64_t count = std::min(num_ranges - begin, kMaxRanges);
    Ranges all;
    int64_t most = 0;
    for (int64_t range = 0; range < count; ++range) {
      all.ranges[range] = ranges[begin + range];
      most = std::max(most, all.ranges[range].num_bytes);
    }
    if (most == 0) continue;
    const dim3 grid(static_cast<unsigned>(std::min(DivideUp(most, kBytesPerBlock), kMaxBlocks)),
                    static_cast<unsigned>(count));
    CopyRangesKernel<<<grid, kThreads, 0, stream>>>(all);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace godwit::cuda
