#pragma once
// Programmatic dependent launch: a kernel of the step may begin while the one before it in the
// stream still runs, so that its ramp-up (launch, first loads of weights) overlaps that one's tail.
// Works under capture: the edges of the graph become programmatic.
//
// The rule. A kernel that LaunchDependent launches
//   1. reads before DependencyWait() only what no kernel of a step writes: weights, norm weights,
//   decay tables, its arguments, and arrays
//      of a step that copies alone bring (a copy ends before the first kernel after it begins);
//      and writes nothing but registers and shared memory;
//   2. calls DependencyWait() in every block, by every thread that touches other memory afterwards,
//   and before the block ends
//      whatever the block does (also a block without work). Then this kernel ends after the one
//      before it, that one after its own predecessor, and so on: a wait for the last kernel is a
//      wait for all;
//   3. may call DependencyTrigger() at any time, also as its first statement: it only lets the
//   blocks of the next kernel be
//      placed. What those may touch is decided by their own wait, which ends when this kernel has
//      ended and its writes are visible. A kernel that never triggers is correct; the next one then
//      begins at its end.
// A kernel launched as usual needs nothing of this: it begins when everything before it has ended.
// It may stand in between. What writes weights (loading, FillRandom) synchronises the stream before
// the first step.

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

namespace godwit::cuda {

__device__ __forceinline__ void DependencyWait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void DependencyTrigger() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Launches `kernel`, which keeps the rule above. On devices before Hopper the attribute has no
// effect.
template <unsigned kClusterBlocks = 1, typename... Parameters, typename... Arguments>
cudaError_t LaunchDependent(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                            size_t shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {kClusterBlocks, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = kClusterBlocks > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace godwit::cuda
