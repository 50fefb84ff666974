#include "cli/bench_device.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "engine/device_buffer.h"
#include "kernels/base/status.h"

namespace godwit::cli {
namespace {

constexpr int64_t kDeviceCopyBytes = int64_t{1} << 30, kHostCopyBytes = int64_t{128} << 20;
constexpr int64_t kSmallestProduct = 512, kLargestProduct = 8192;
constexpr double kLongEnough = 1.5e-3;  // seconds; a product that takes this is the ceiling's
constexpr int kRepeats = 7;
constexpr int64_t kMaxLength = int64_t{1} << 30;

// Median seconds of a call, which runs alone between two marks; of calls that together take
// `sustained` seconds, those of the second half.
template <typename Call>
absl::StatusOr<double> Seconds(Backend& backend, const Call& call, double sustained = 0) {
  std::vector<double> samples;
  double total = 0;
  for (int repeat = -2; repeat < kRepeats || total < sustained; ++repeat) {
    RETURN_IF_ERROR(backend.SetMark(0));
    RETURN_IF_ERROR(call());
    RETURN_IF_ERROR(backend.SetMark(1));
    RETURN_IF_ERROR(backend.WaitMark(1));
    double seconds = 0;
    RETURN_IF_ERROR(backend.SecondsBetween(0, 1, &seconds));
    total += seconds;
    if (repeat >= 0) samples.push_back(seconds);
  }
  if (sustained > 0) samples.erase(samples.begin(), samples.begin() + std::ssize(samples) / 2);
  return Median(samples);
}

absl::StatusOr<double> CopyRate(Backend& backend) {
  const int64_t num_bytes = backend.Info().owns_memory ? kDeviceCopyBytes : kHostCopyBytes;
  ASSIGN_OR_RETURN(const DeviceBuffer from, DeviceBuffer::Allocate(backend, num_bytes));
  ASSIGN_OR_RETURN(const DeviceBuffer to, DeviceBuffer::Allocate(backend, num_bytes));
  ASSIGN_OR_RETURN(const double seconds, Seconds(backend, [&] {
                     return backend.CopyOnDevice(to.bytes(), from.bytes(), num_bytes);
                   }));
  return 2 * static_cast<double>(num_bytes) / seconds;
}

absl::StatusOr<double> TimeProduct(Backend& backend, const MatrixView& w, double sustained) {
  const int64_t n = w.num_rows, num_bytes = n * n * DTypeBytes(w.dtype);
  ASSIGN_OR_RETURN(const DeviceBuffer x, DeviceBuffer::Allocate(backend, num_bytes));
  ASSIGN_OR_RETURN(const DeviceBuffer y, DeviceBuffer::Allocate(backend, num_bytes));
  // A GPU's clock depends on the bits it multiplies: zeros would flatter it.
  RETURN_IF_ERROR(backend.FillRandom(w, 1, 1));
  RETURN_IF_ERROR(backend.CopyOnDevice(x.bytes(), w.data, num_bytes));
  return Seconds(
      backend,
      [&] {
        return backend.Linear({.input = {.x = MakeView(x.bytes(), w.dtype, n, n)},
                               .w = w,
                               .y = MakeView(y.bytes(), w.dtype, n, n)});
      },
      sustained);
}

absl::StatusOr<double> ProductSeconds(Backend& backend, DType dtype, int64_t n,
                                      double sustained = 0) {
  MatrixView w;
  RETURN_IF_ERROR(backend.AllocateMatrix(n, n, dtype, &w));
  absl::StatusOr<double> seconds = TimeProduct(backend, w, sustained);
  backend.Free(w.data);
  return seconds;
}

absl::StatusOr<double> ProductRate(Backend& backend, DType dtype) {
  for (int64_t n = kSmallestProduct;; n *= 2) {
    ASSIGN_OR_RETURN(double seconds, ProductSeconds(backend, dtype, n));
    if (seconds < kLongEnough && n < kLargestProduct) continue;
    const double sustained = SustainedSeconds(backend.Info());
    if (sustained > 0) {
      ASSIGN_OR_RETURN(seconds, ProductSeconds(backend, dtype, n, sustained));
    }
    return 2 * std::pow(static_cast<double>(n), 3) / seconds;
  }
}

}  // namespace

double SustainedSeconds(const DeviceInfo& device) { return device.owns_memory ? 1.0 : 0.0; }

absl::StatusOr<DeviceCeilings> MeasureCeilings(Backend& backend, DType dtype) {
  DeviceCeilings ceilings;
  ASSIGN_OR_RETURN(ceilings.copy_bytes_per_s, CopyRate(backend));
  ASSIGN_OR_RETURN(ceilings.flops_per_s, ProductRate(backend, dtype));
  return ceilings;
}

std::string Describe(const DeviceInfo& device, const DeviceCeilings& ceilings, DType dtype) {
  return absl::StrFormat("%s: %s; copy %.1f GB/s, %s product %.2f TFLOP/s", device.name,
                         device.description, ceilings.copy_bytes_per_s / 1e9,
                         dtype == DType::kF32 ? "f32" : "bf16", ceilings.flops_per_s / 1e12);
}

absl::StatusOr<std::vector<int64_t>> ParseLengths(const std::string& text) {
  std::vector<int64_t> lengths;
  for (absl::string_view part : absl::StrSplit(text, ',')) {
    absl::string_view digits = part;
    int64_t unit = 1, length = 0;
    if (!digits.empty() && digits.back() == 'k') unit = 1 << 10;
    if (!digits.empty() && digits.back() == 'M') unit = 1 << 20;
    if (unit > 1) digits.remove_suffix(1);
    if (!absl::SimpleAtoi(digits, &length) || length < 1 || length > kMaxLength / unit) {
      return absl::InvalidArgumentError(
          absl::StrCat("'", part, "' is not a length such as 512, 4k or 1M, at most ", kMaxLength));
    }
    lengths.push_back(length * unit);
  }
  return lengths;
}

std::string FormatLength(int64_t length) {
  if (length % (1 << 20) == 0) return absl::StrCat(length >> 20, "M");
  if (length % (1 << 10) == 0) return absl::StrCat(length >> 10, "k");
  return absl::StrCat(length);
}

double Median(std::vector<double> samples) {
  if (samples.empty()) return 0;
  const auto middle = samples.begin() + static_cast<int64_t>(samples.size() / 2);
  std::nth_element(samples.begin(), middle, samples.end());
  return *middle;
}

}  // namespace godwit::cli
