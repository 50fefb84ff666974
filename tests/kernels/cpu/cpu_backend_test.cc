#include "kernels/cpu/cpu_backend.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace godwit {
namespace {

TEST(CpuBackendTest, RefusesOptionsItDoesNotKnow) {
  EXPECT_EQ(CreateCpuBackend({.num_threads = -1}).status().message(),
            "threads -1 not in [1, 1024]");
  EXPECT_EQ(CreateCpuBackend({.num_threads = 1025}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(CreateCpuBackend({.num_threads = 1, .isa = "sse9"}).status().message(),
            "instruction set 'sse9' is none of portable, avx2, avx512bf16, amx");
}

TEST(CpuBackendTest, EveryMachineRunsPortable) {
  auto backend = CreateCpuBackend({.num_threads = 2, .isa = "portable"});
  ASSERT_TRUE(backend.ok());
  const DeviceInfo info = (*backend)->Info();
  EXPECT_STREQ(info.name, "cpu");
  EXPECT_STREQ(info.description, "portable, 2 threads");
  EXPECT_GT(info.memory_bytes, 0);
  EXPECT_GT(info.free_bytes, 0);
  EXPECT_LE(info.free_bytes, info.memory_bytes);
}

TEST(CpuBackendTest, AllocationsAreZeroAlignedAndReusable) {
  auto backend = *CreateCpuBackend({.num_threads = 1});
  for (int64_t num_bytes : {int64_t{0}, int64_t{1}, int64_t{4097}, int64_t{5} << 20}) {
    void* data = nullptr;
    ASSERT_TRUE(backend->Allocate(num_bytes, &data).ok());
    EXPECT_EQ(reinterpret_cast<intptr_t>(data) % 64, 0);
    const char* const bytes = static_cast<const char*>(data);
    for (int64_t i = 0; i < num_bytes; ++i) ASSERT_EQ(bytes[i], 0);
    if (num_bytes > 0) std::memset(data, 1, static_cast<size_t>(num_bytes));
    backend->Free(data);
  }
  backend->Free(nullptr);
}

TEST(CpuBackendTest, RefusesWhatTheMachineDoesNotHave) {
  auto backend = *CreateCpuBackend({.num_threads = 1});
  void* data = &backend;
  for (int64_t num_bytes :
       {backend->Info().memory_bytes + 1, std::numeric_limits<int64_t>::max()}) {
    const OpStatus status = backend->Allocate(num_bytes, &data);
    EXPECT_EQ(status.code, OpCode::kResourceExhausted);
    EXPECT_NE(status.text, nullptr);
    EXPECT_EQ(data, &backend);
  }
  EXPECT_EQ(backend->Allocate(-1, &data).code, OpCode::kInvalidArgument);
  MatrixView matrix;
  EXPECT_EQ(backend->AllocateMatrix(0, 4, DType::kBF16, &matrix).code, OpCode::kInvalidArgument);
  EXPECT_EQ(backend->AllocateMatrix(4, 4, DType::kI32, &matrix).code, OpCode::kInvalidArgument);
  EXPECT_FALSE(matrix);
}

TEST(CpuBackendTest, RefusesMatricesWhoseSizeOverflows) {
  auto backend = *CreateCpuBackend({.num_threads = 1});
  MatrixView matrix;
  EXPECT_EQ(backend->AllocateMatrix(int64_t{1} << 40, int64_t{1} << 40, DType::kF32, &matrix).code,
            OpCode::kResourceExhausted);
}

TEST(CpuBackendTest, CopiesAndZeroes) {
  auto backend = *CreateCpuBackend({.num_threads = 1});
  void* data = nullptr;
  ASSERT_TRUE(backend->Allocate(16, &data).ok());
  const std::vector<int32_t> in = {1, 2, 3, 4};
  std::vector<int32_t> out(4);
  ASSERT_TRUE(backend->CopyFromHost(data, in.data(), 16).ok());
  ASSERT_TRUE(
      backend->CopyOnDevice(data, static_cast<int32_t*>(data) + 1, 12).ok());  // overlapping
  ASSERT_TRUE(backend->CopyToHost(out.data(), data, 16).ok());
  EXPECT_EQ(out, (std::vector<int32_t>{2, 3, 4, 4}));
  const ByteRange ranges[] = {{data, 4}, {nullptr, 0}, {static_cast<int32_t*>(data) + 1, 4}};
  ASSERT_TRUE(backend->FillZero(ranges, 3).ok());
  ASSERT_TRUE(backend->CopyToHost(out.data(), data, 16).ok());
  EXPECT_EQ(out, (std::vector<int32_t>{0, 0, 4, 4}));
  ASSERT_TRUE(backend->CopyFromHost(nullptr, nullptr, 0).ok());
  ASSERT_TRUE(backend->Synchronize().ok());
}

TEST(CpuBackendTest, GathersRowsAndReducesOverOneRank) {
  auto backend = *CreateCpuBackend({.num_threads = 2});
  std::vector<float> x = {0, 1, 10, 11, 20, 21};
  std::vector<int32_t> rows = {2, 0, 2};
  std::vector<float> y(6);
  ASSERT_TRUE(backend
                  ->GatherRows({.x = MakeView(x.data(), DType::kF32, 3, 2),
                                .rows = MakeView(rows.data(), DType::kI32, 3),
                                .y = MakeView(y.data(), DType::kF32, 3, 2)})
                  .ok());
  EXPECT_EQ(y, (std::vector<float>{20, 21, 0, 1, 20, 21}));
  ASSERT_TRUE(backend->AllReduce(MakeView(y.data(), DType::kF32, 3, 2)).ok());
  EXPECT_EQ(y[0], 20);
}

}  // namespace
}  // namespace godwit
