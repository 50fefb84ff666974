// Stands in for libgodwit_cuda.so. FAKE_MODE 0: there is no device; 1: works (on the reference back
// end).

#include <cstdio>

#include "kernels/backend_abi.h"
#include "kernels/ref/ref_backend.h"

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
  return godwit::CreateRefBackend().release();
}
