// Stands in for libgodwit_cuda.so. FAKE_MODE 0: there is no device; 1: works (on the reference back
// end); 2: works until kDrawsBeforeLoss steps have drawn, then the device is lost.

#include <cstdio>

#include "kernels/backend_abi.h"
#include "kernels/ref/ref_backend.h"
#include "tests/engine/wrapped_backend.h"

namespace {

constexpr int kDrawsBeforeLoss = 20;

godwit::OpStatus LoseDevice(const char* op) {
  static int num_draws = 0;
  if (op[0] == 'S' && ++num_draws > kDrawsBeforeLoss) {
    return {godwit::OpCode::kUnavailable, "planted: the device fell off the bus"};
  }
  return {};
}

}  // namespace

extern "C" __attribute__((visibility("default"))) godwit::Backend* godwit_backend_v1(
    uint64_t abi, char* error, size_t error_bytes) {
  if (abi != godwit::kBackendAbi) {
    std::snprintf(error, error_bytes, "made for another executable");
    return nullptr;
  }
  if (FAKE_MODE == 0) {
    std::snprintf(error, error_bytes, "no device:\nasked %s", "twice");
    return nullptr;
  }
  if (FAKE_MODE == 2) {
    return new godwit::WrappedBackend(godwit::CreateRefBackend(), {.fault = LoseDevice});
  }
  return godwit::CreateRefBackend().release();
}
