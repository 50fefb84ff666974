#pragma once
// What an op of the CPU back end works with. One per back end; used by its owner thread and, inside
// ThreadPool::Run, by the pool.

#include <cstdint>
#include <string>
#include <utility>

#include "kernels/base/op_status.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/thread_pool.h"

namespace godwit {

struct CpuContext {
  ThreadPool& pool;
  const IsaTable& isa;
  Scratch& scratch;
  std::string error;  // the text of the last failure, which OpStatus points to

  OpStatus Fail(OpCode code, std::string text) {
    error = std::move(text);
    return {code, error.c_str()};
  }
};

}  // namespace godwit
