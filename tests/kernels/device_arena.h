#pragma once
// Tensors of a test in the memory of the back end under test: uploaded from floats, downloaded to
// floats, freed at the end.

#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/backend.h"
#include "kernels/base/bf16.h"
#include "kernels/cpu/cpu_backend.h"

namespace godwit {

using BackendPtr = std::unique_ptr<Backend, BackendDeleter>;

// Null with a reason where this machine lacks the instruction set.
inline BackendPtr MakeCpuBackend(const std::string& isa, int num_threads, std::string* reason) {
  auto backend = CreateCpuBackend({.num_threads = num_threads, .isa = isa});
  if (!backend.ok()) {
    *reason = std::string(backend.status().message());
    return nullptr;
  }
  return *std::move(backend);
}

inline const char* const kCpuIsaNames[] = {"portable", "avx2", "avx512bf16", "amx"};

inline float RoundToAct(DType act, float x) { return act == DType::kBF16 ? ToF32(ToBF16(x)) : x; }

// n normal variates, each a value of `act`.
inline std::vector<float> RandomValues(uint32_t seed, int64_t n, DType act = DType::kF32,
                                       float scale = 1) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = RoundToAct(act, scale * normal(generator));
  return values;
}

class DeviceArena {
 public:
  explicit DeviceArena(Backend& backend) : backend_(backend) {}
  ~DeviceArena() {
    for (void* data : owned_) backend_.Free(data);
  }
  DeviceArena(const DeviceArena&) = delete;
  DeviceArena& operator=(const DeviceArena&) = delete;

  Backend& backend() { return backend_; }

  void* UploadBytes(const void* from, size_t num_bytes) {
    void* data = nullptr;
    EXPECT_TRUE(backend_.Allocate(static_cast<int64_t>(num_bytes), &data).ok());
    owned_.push_back(data);
    EXPECT_TRUE(backend_.CopyFromHost(data, from, static_cast<int64_t>(num_bytes)).ok());
    return data;
  }
  template <typename T>
  T* UploadArray(const std::vector<T>& values) {
    return static_cast<T*>(UploadBytes(values.data(), values.size() * sizeof(T)));
  }

  // Values of f32, bf16, i32, u32 or i64 tensors given as T.
  template <typename T>
  TensorView Upload(DType dtype, std::vector<int64_t> shape, const std::vector<T>& values) {
    TensorView view;
    view.dtype = dtype;
    view.rank = static_cast<int32_t>(shape.size());
    for (size_t d = 0; d < shape.size(); ++d) view.shape[d] = shape[d];
    view.row_stride = view.row_elements();
    EXPECT_EQ(view.elements(), static_cast<int64_t>(values.size()));
    std::vector<char> bytes(values.size() * static_cast<size_t>(DTypeBytes(dtype)));
    for (size_t i = 0; i < values.size(); ++i) {
      if (dtype == DType::kBF16) {
        const BF16 rounded = ToBF16(static_cast<float>(values[i]));
        std::memcpy(&bytes[2 * i], &rounded, 2);
      } else {
        std::memcpy(&bytes[i * sizeof(T)], &values[i], sizeof(T));
      }
    }
    view.data = UploadBytes(bytes.data(), bytes.size());
    return view;
  }
  TensorView Floats(DType dtype, std::vector<int64_t> shape, const std::vector<float>& values) {
    return Upload<float>(dtype, std::move(shape), values);
  }
  // Filled with a value that no test expects, so that an element nobody wrote shows.
  TensorView Output(DType dtype, std::vector<int64_t> shape) {
    int64_t n = 1;
    for (const int64_t size : shape) n *= size;
    return Floats(dtype, std::move(shape), std::vector<float>(static_cast<size_t>(n), 12345.0f));
  }
  MatrixView Matrix(DType dtype, int64_t num_rows, int64_t num_columns,
                    const std::vector<float>& values) {
    MatrixView matrix;
    EXPECT_TRUE(backend_.AllocateMatrix(num_rows, num_columns, dtype, &matrix).ok());
    owned_.push_back(matrix.data);
    std::vector<float> copy = values;
    const TensorView source = MakeView(copy.data(), DType::kF32, num_rows, num_columns);
    EXPECT_TRUE(backend_.PackMatrixRows(matrix, 0, source).ok());
    return matrix;
  }

  // Dense tensors only.
  std::vector<float> Download(const TensorView& x) {
    EXPECT_TRUE(backend_.Synchronize().ok());
    const size_t n = static_cast<size_t>(x.elements());
    const size_t width = static_cast<size_t>(DTypeBytes(x.dtype));
    std::vector<char> bytes(n * width);
    EXPECT_TRUE(backend_.CopyToHost(bytes.data(), x.data, static_cast<int64_t>(bytes.size())).ok());
    EXPECT_TRUE(backend_.Synchronize().ok());
    std::vector<float> values(n);
    for (size_t i = 0; i < n; ++i) {
      if (x.dtype == DType::kBF16) {
        BF16 value;
        std::memcpy(&value, &bytes[i * width], width);
        values[i] = ToF32(value);
      } else if (x.dtype == DType::kF32) {
        std::memcpy(&values[i], &bytes[i * width], width);
      } else {
        int32_t value;
        std::memcpy(&value, &bytes[i * width], width);
        values[i] = static_cast<float>(value);
      }
    }
    return values;
  }

 private:
  Backend& backend_;
  std::vector<void*> owned_;
};

// Equal as bits: 0 and -0 differ.
inline ::testing::AssertionResult SameBits(const std::vector<float>& a,
                                           const std::vector<float>& b) {
  if (a.size() != b.size()) return ::testing::AssertionFailure() << a.size() << " and " << b.size();
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::bit_cast<uint32_t>(a[i]) != std::bit_cast<uint32_t>(b[i])) {
      return ::testing::AssertionFailure() << "element " << i << ": " << a[i] << " and " << b[i];
    }
  }
  return ::testing::AssertionSuccess();
}

// |a - b| <= tolerance, element by element; a NaN fails.
inline ::testing::AssertionResult Within(const std::vector<float>& a, const std::vector<float>& b,
                                         const std::vector<double>& tolerance) {
  if (a.size() != b.size()) return ::testing::AssertionFailure() << a.size() << " and " << b.size();
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    if (!(difference <= tolerance[i] && -difference <= tolerance[i])) {
      return ::testing::AssertionFailure() << "element " << i << ": " << a[i] << " and " << b[i]
                                           << " differ by more than " << tolerance[i];
    }
  }
  return ::testing::AssertionSuccess();
}

}  // namespace godwit
