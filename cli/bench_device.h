#pragma once
// What the benchmarks of a device share: its ceilings, measured in the same run as what is compared
// with them, and lengths as people write them.

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace godwit::cli {

struct DeviceCeilings {
  double copy_bytes_per_s = 0;  // read and written, of a copy far larger than any cache
  double flops_per_s = 0;       // of a square product in `dtype`, through the back end's Linear
};

// How long matrix work runs before it is measured: a GPU lowers its clock when it draws more power
// than it may, within the first second. 0 on a processor.
double SustainedSeconds(const DeviceInfo& device);

// On a back end without a model or while its engine has no step in flight; the marks are used.
absl::StatusOr<DeviceCeilings> MeasureCeilings(Backend& backend, DType dtype);

// "NVIDIA H100 ...; copy 3.02 TB/s, bf16 product 694 TFLOP/s"
std::string Describe(const DeviceInfo& device, const DeviceCeilings& ceilings, DType dtype);

// "512,4k,1M" -> {512, 4096, 1048576}: k is 1024, M 1024 k. INVALID_ARGUMENT names the first part
// that is no such length in [1, 2^30].
absl::StatusOr<std::vector<int64_t>> ParseLengths(const std::string& text);

std::string FormatLength(int64_t length);  // 4096 -> "4k", 1000 -> "1000"

double Median(std::vector<double> samples);  // 0 of none

}  // namespace godwit::cli
