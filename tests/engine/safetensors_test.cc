#include "engine/safetensors.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "kernels/base/bf16.h"
#include "tests/engine/temp_folder.h"

namespace godwit {
namespace {

using absl::StatusCode;

// A file of this header and `data_bytes` of data; `header_bytes` < 0: the header's true length.
std::string FileBytes(const std::string& header, size_t data_bytes, int64_t header_bytes = -1) {
  const uint64_t length = header_bytes < 0 ? header.size() : static_cast<uint64_t>(header_bytes);
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  bytes += header;
  for (size_t index = 0; index < data_bytes; ++index) bytes += static_cast<char>(index);
  return bytes;
}

std::string Slurp(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// Reads everything that a reader offers, so that a sanitizer sees any view outside of the mapping.
int64_t Touch(const SafetensorsReader& reader) {
  int64_t sum = 0;
  for (const auto& [name, tensor] : reader.tensors()) {
    const auto* bytes = static_cast<const unsigned char*>(tensor.data);
    for (int64_t index = 0; index < tensor.num_bytes; ++index) sum += bytes[index];
    std::vector<float> storage;
    const auto view = reader.Matrix(name, tensor.shape, storage);
    if (view.ok() && view->elements() > 0 && view->dtype == DType::kF32)
      sum += std::isnan(view->row<float>(0)[0]);
    reader.ReleasePages(tensor);
  }
  return sum;
}

TEST(SafetensorsTest, WritesAndReadsBack) {
  const TempFolder folder;
  const std::vector<float> f32 = {1, 2, 3, 4, 5, 6};
  const std::vector<int32_t> i32 = {7, 8};
  const std::vector<BF16> bf16 = {ToBF16(0.5f), ToBF16(-3.0f)};
  const std::string path = folder.File("model.safetensors");
  ASSERT_TRUE(WriteSafetensors(path, {{"a", "F32", {2, 3}, f32.data()},
                                      {"tokens", "I32", {2}, i32.data()},
                                      {"b", "BF16", {1, 2}, bf16.data()},
                                      {"none", "F32", {0, 4}, nullptr}})
                  .ok());
  const auto reader = SafetensorsReader::OpenFolder(folder.path());
  ASSERT_TRUE(reader.ok()) << reader.status();
  EXPECT_EQ((*reader)->tensors().size(), 4u);
  EXPECT_EQ((*reader)->Find("missing"), nullptr);
  const StoredTensor* tokens = (*reader)->Find("tokens");
  ASSERT_NE(tokens, nullptr);
  EXPECT_EQ(tokens->dtype, "I32");
  EXPECT_EQ(std::memcmp(tokens->data, i32.data(), 8), 0);

  std::vector<float> storage;
  const auto a = (*reader)->Matrix("a", {2, 3}, storage);
  ASSERT_TRUE(a.ok()) << a.status();
  EXPECT_EQ(a->row<float>(1)[2], 6);
  EXPECT_TRUE(storage.empty()) << "f32 is read where it lies";
  const auto b = (*reader)->Matrix("b", {1, 2}, storage);
  ASSERT_TRUE(b.ok()) << b.status();
  EXPECT_EQ(b->dtype, DType::kBF16);
  (*reader)->ReleasePages(*(*reader)->Find("a"));
  EXPECT_EQ(a->row<float>(0)[1], 2) << "released pages come back from the file";
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1)
      << "no temporary is left";
}

TEST(SafetensorsTest, WritingToNowhereIsAStatus) {
  const float value = 1;
  EXPECT_FALSE(
      WriteSafetensors("/nonexistent-folder/x.safetensors", {{"a", "F32", {1}, &value}}).ok());
}

TEST(SafetensorsTest, HalvesConvertExactly) {
  const std::vector<uint16_t> halves = {0x0000, 0x8000, 0x3c00, 0xc000, 0x7bff, 0x0001,
                                        0x03ff, 0x0400, 0x7c00, 0xfc00, 0x7e00};
  const std::vector<float> expected = {
      0, -0.0f, 1, -2, 65504, 0x1p-24f, 0x1.ff8p-15f, 0x1p-14f, INFINITY, -INFINITY, NAN};
  const TempFolder folder;
  const std::string path = folder.File("h.safetensors");
  ASSERT_TRUE(WriteSafetensors(path, {{"h", "F16", {11}, halves.data()}}).ok());
  const auto reader = SafetensorsReader::OpenFile(path);
  ASSERT_TRUE(reader.ok()) << reader.status();
  std::vector<float> storage;
  const auto view = (*reader)->Matrix("h", {11}, storage);
  ASSERT_TRUE(view.ok()) << view.status();
  for (size_t index = 0; index + 1 < expected.size(); ++index) {
    EXPECT_EQ(std::bit_cast<uint32_t>(storage[index]), std::bit_cast<uint32_t>(expected[index]))
        << index;
  }
  EXPECT_TRUE(std::isnan(storage.back()));
}

TEST(SafetensorsTest, DataAtAnOddAddressIsCopied) {
  // One byte of a BOOL tensor, then an f32 and a bf16.
  std::string header = R"({"m":{"dtype":"BOOL","shape":[1],"data_offsets":[0,1]},)"
                       R"("f":{"dtype":"F32","shape":[2],"data_offsets":[1,9]},)"
                       R"("b":{"dtype":"BF16","shape":[1],"data_offsets":[9,11]}})";
  std::string bytes = FileBytes(header, 1);
  const float values[2] = {1.5f, -2.5f};
  bytes.append(reinterpret_cast<const char*>(values), sizeof(values));
  const BF16 b = ToBF16(8);
  bytes.append(reinterpret_cast<const char*>(&b), sizeof(b));
  const TempFolder folder;
  const auto reader = SafetensorsReader::OpenFile(folder.Write("odd.safetensors", bytes));
  ASSERT_TRUE(reader.ok()) << reader.status();
  std::vector<float> storage;
  const auto f = (*reader)->Matrix("f", {2}, storage);
  ASSERT_TRUE(f.ok()) << f.status();
  EXPECT_EQ(f->row<float>(1)[0], -2.5f);
  std::vector<float> other;
  const auto view = (*reader)->Matrix("b", {1}, other);
  ASSERT_TRUE(view.ok()) << view.status();
  EXPECT_EQ(view->dtype == DType::kF32 ? view->row<float>(0)[0] : ToF32(view->row<BF16>(0)[0]),
            8.0f);
}

TEST(SafetensorsTest, MatrixNamesFileTensorExpectedAndFound) {
  const TempFolder folder;
  const std::vector<float> values(6);
  const std::string path = folder.File("model.safetensors");
  ASSERT_TRUE(WriteSafetensors(
                  path, {{"a", "F32", {2, 3}, values.data()}, {"i", "I32", {6}, values.data()}})
                  .ok());
  const auto reader = SafetensorsReader::OpenFolder(folder.path());
  ASSERT_TRUE(reader.ok());
  std::vector<float> storage;
  const auto missing = (*reader)->Matrix("w", {4, 5}, storage).status();
  EXPECT_EQ(missing.code(), StatusCode::kNotFound);
  EXPECT_EQ(missing.message(), path + ": tensor 'w' is missing, expected shape [4, 5]");
  const auto misshapen = (*reader)->Matrix("a", {3, 2}, storage).status();
  EXPECT_EQ(misshapen.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(misshapen.message(), path + ": tensor 'a': expected shape [3, 2], found [2, 3]");
  const auto wrong_type = (*reader)->Matrix("i", {6}, storage).status();
  EXPECT_EQ(wrong_type.message(),
            path + ": tensor 'i': expected dtype F32, F16 or BF16, found I32");
}

// --- Files that lie. ---

struct Hostile {
  const char* name;
  std::string bytes;
  const char* message;  // part of it
};

const std::vector<Hostile>& HostileFiles() {
  const auto one = [](const std::string& fields) { return R"({"a":{)" + fields + "}}"; };
  const std::string good = R"("dtype":"F32","shape":[2],"data_offsets":[0,8])";
  static const std::vector<Hostile>* files = new std::vector<Hostile>{
      {"Empty", "", "empty file"},
      {"SevenBytes", "1234567", "7 bytes, no room"},
      {"HeaderBeyondFile", FileBytes(one(good), 8, 1000), "header of 1000 bytes, but only"},
      {"HeaderOver100MB", FileBytes(one(good), 8, 100'000'001), "the limit is 100000000"},
      {"HeaderLengthHuge", FileBytes(one(good), 8, INT64_MAX), "the limit is"},
      {"HeaderEmpty", FileBytes("", 8), "not JSON"},
      {"NotJson", FileBytes("hello there", 8), "not JSON"},
      {"JsonCut", FileBytes(R"({"a":{"dtype":"F32)", 8), "not JSON"},
      {"NotUtf8", FileBytes("{\"\xff\xfe\":{" + good + "}}", 8), "not JSON"},
      {"TopIsList", FileBytes("[1]", 8), "unexpected a list"},
      {"TopIsNumber", FileBytes("3", 8), "unexpected a number"},
      {"TopIsString", FileBytes("\"x\"", 8), "unexpected a string"},
      {"TensorIsNumber", FileBytes(R"({"a":3})", 8), "unexpected a number"},
      {"TensorIsNull", FileBytes(R"({"a":null})", 8), "unexpected null"},
      {"TensorIsList", FileBytes(R"({"a":[1]})", 8), "unexpected a list"},
      {"DeepLists", FileBytes(std::string(200'000, '['), 8), "unexpected a list"},
      {"DeepObjects",
       FileBytes(
           [] {
             std::string text;
             for (int depth = 0; depth < 50'000; ++depth) text += R"({"a":)";
             return text;
           }(),
           8),
       "unknown field 'a'"},
      {"DeepShape", FileBytes(one(R"("dtype":"F32","shape":[[2]],"data_offsets":[0,8])"), 8),
       "unexpected a list"},
      {"MetadataNested", FileBytes(R"({"__metadata__":{"a":{"b":"c"}}})", 0),
       "unexpected an object"},
      {"MetadataNumber", FileBytes(R"({"__metadata__":{"a":1}})", 0), "unexpected a number"},
      {"DuplicateTensor", FileBytes(R"({"a":{)" + good + R"(},"a":{)" + good + "}}", 8),
       "'a' is given twice"},
      {"DuplicateField", FileBytes(one(good + R"(,"dtype":"I32")"), 8), "'dtype' is given twice"},
      {"UnknownField", FileBytes(one(good + R"(,"stride":[1])"), 8), "unknown field 'stride'"},
      {"NoDtype", FileBytes(one(R"("shape":[2],"data_offsets":[0,8])"), 8),
       "lacks dtype, shape or data_offsets"},
      {"NoOffsets", FileBytes(one(R"("dtype":"F32","shape":[2])"), 8),
       "lacks dtype, shape or data_offsets"},
      {"DtypeUnknown", FileBytes(one(R"("dtype":"F4","shape":[2],"data_offsets":[0,8])"), 8),
       "unknown dtype 'F4'"},
      {"DtypeNumber", FileBytes(one(R"("dtype":4,"shape":[2],"data_offsets":[0,8])"), 8),
       "unexpected a number"},
      {"DtypeList", FileBytes(one(R"("dtype":["F32"],"shape":[2],"data_offsets":[0,8])"), 8),
       "unexpected a list"},
      {"DtypeWrong", FileBytes(one(R"("dtype":"BF16","shape":[2],"data_offsets":[0,8])"), 8),
       "has 4 bytes, data_offsets say 8"},
      {"ShapeString", FileBytes(one(R"("dtype":"F32","shape":"2","data_offsets":[0,8])"), 8),
       "unexpected a string"},
      {"ShapeNegative", FileBytes(one(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])"), 8),
       "unexpected a negative number"},
      {"ShapeFraction", FileBytes(one(R"("dtype":"F32","shape":[2.0],"data_offsets":[0,8])"), 8),
       "not whole"},
      {"ShapeOver64Bits",
       FileBytes(one(R"("dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,8])"), 8),
       "not whole, or over 2^64"},
      {"ShapeOver63Bits",
       FileBytes(one(R"("dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,8])"), 8),
       "over 2^63"},
      {"ShapeNineDimensions",
       FileBytes(one(R"("dtype":"F32","shape":[1,1,1,1,1,1,1,1,2],"data_offsets":[0,8])"), 8),
       "more than 8"},
      {"ShapeProductOverflows",
       FileBytes(one(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8])"), 8),
       "more than 2^63 - 1 bytes"},
      {"ShapeProductWrapsToEight",
       FileBytes(one(R"("dtype":"F32","shape":[4611686018427387906],"data_offsets":[0,8])"), 8),
       "more than 2^63 - 1 bytes"},
      {"OneOffset", FileBytes(one(R"("dtype":"F32","shape":[2],"data_offsets":[0])"), 8),
       "other than two data_offsets"},
      {"ThreeOffsets", FileBytes(one(R"("dtype":"F32","shape":[2],"data_offsets":[0,8,8])"), 8),
       "other than two data_offsets"},
      {"OffsetsReversed", FileBytes(one(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])"), 8),
       "are outside"},
      {"OffsetsBeyondData", FileBytes(one(R"("dtype":"F32","shape":[4],"data_offsets":[0,16])"), 8),
       "are outside of the 8 bytes"},
      {"OffsetsHuge",
       FileBytes(
           one(R"("dtype":"F32","shape":[2],"data_offsets":[9223372036854775800,9223372036854775807])"),
           8),
       "are outside"},
      {"DataTruncated", FileBytes(one(good), 7), "are outside of the 7 bytes"},
      {"DataLeftOver", FileBytes(one(good), 9), "1 bytes after the last tensor"},
      {"DataWithoutTensors", FileBytes("{}", 4), "4 bytes after the last tensor"},
      {"Hole",
       FileBytes(
           R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[4,6]}})",
           6),
       "begins at 4, but that before it ends at 2"},
      {"HoleAtStart", FileBytes(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[4,6]}})", 6),
       "begins at 4"},
      {"Overlap",
       FileBytes(
           R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}})",
           6),
       "inside of the tensor before it"},
      {"SameData",
       FileBytes(
           R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})",
           4),
       "inside of the tensor before it"},
  };
  return *files;
}

class HostileTest : public testing::TestWithParam<size_t> {};

TEST_P(HostileTest, IsRefusedNamingFileAndFault) {
  const Hostile& hostile = HostileFiles()[GetParam()];
  const TempFolder folder;
  const std::string path = folder.Write("model.safetensors", hostile.bytes);
  const absl::Status status = SafetensorsReader::OpenFile(path).status();
  EXPECT_TRUE(status.code() == StatusCode::kInvalidArgument ||
              status.code() == StatusCode::kDataLoss)
      << status;
  EXPECT_NE(status.message().find(path), std::string::npos) << status;
  EXPECT_NE(status.message().find(hostile.message), std::string::npos) << status;
  EXPECT_LT(status.message().size(), 600u);
}

INSTANTIATE_TEST_SUITE_P(Files, HostileTest, testing::Range(size_t{0}, HostileFiles().size()),
                         [](const auto& info) { return HostileFiles()[info.param].name; });

TEST(SafetensorsTest, AcceptsWhatTheFormatAllows) {
  const TempFolder folder;
  const std::string metadata =
      R"({"__metadata__":{"format":"pt"},"s":{"dtype":"F64","shape":[],"data_offsets":[0,8]},)"
      R"("z":{"dtype":"U8","shape":[0],"data_offsets":[8,8]}}      )";
  const auto reader =
      SafetensorsReader::OpenFile(folder.Write("a.safetensors", FileBytes(metadata, 8)));
  ASSERT_TRUE(reader.ok()) << reader.status();
  EXPECT_EQ((*reader)->tensors().size(), 2u);
  EXPECT_TRUE(SafetensorsReader::OpenFile(folder.Write("b.safetensors", FileBytes("{}", 0))).ok());
}

TEST(SafetensorsTest, FoldersAndMissingFilesAreRefused) {
  const TempFolder folder;
  std::filesystem::create_directory(folder.File("model.safetensors"));
  const auto is_folder = SafetensorsReader::OpenFolder(folder.path()).status();
  EXPECT_EQ(is_folder.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(is_folder.message().find("not a regular file"), std::string::npos) << is_folder;

  EXPECT_EQ(SafetensorsReader::OpenFile(folder.File("none")).status().code(),
            StatusCode::kNotFound);
  const TempFolder empty;
  const auto nothing = SafetensorsReader::OpenFolder(empty.path()).status();
  EXPECT_EQ(nothing.code(), StatusCode::kNotFound);
  EXPECT_NE(nothing.message().find("found neither"), std::string::npos) << nothing;
  empty.Write("pytorch_model.bin", "x");
  const auto pickle = SafetensorsReader::OpenFolder(empty.path()).status();
  EXPECT_NE(pickle.message().find("convert it to safetensors"), std::string::npos) << pickle;
}

// --- Sharded folders. ---

class ShardTest : public testing::Test {
 protected:
  ShardTest() {
    const float value = 1;
    EXPECT_TRUE(
        WriteSafetensors(folder_.File("one.safetensors"), {{"a", "F32", {1}, &value}}).ok());
    EXPECT_TRUE(
        WriteSafetensors(folder_.File("two.safetensors"), {{"b", "F32", {1}, &value}}).ok());
  }
  absl::Status Open(const std::string& index) {
    folder_.Write("model.safetensors.index.json", index);
    return SafetensorsReader::OpenFolder(folder_.path()).status();
  }
  void ExpectRefused(const std::string& index, const std::string& message) {
    const absl::Status status = Open(index);
    EXPECT_FALSE(status.ok()) << index;
    EXPECT_NE(status.message().find(message), std::string::npos) << status;
  }
  TempFolder folder_;
};

TEST_F(ShardTest, ReadsAllShards) {
  const auto status = Open(
      R"({"metadata":{"total_size":8},"weight_map":{"a":"one.safetensors","b":"two.safetensors"}})");
  EXPECT_TRUE(status.ok()) << status;
}

TEST_F(ShardTest, RefusesAnIndexThatLies) {
  ExpectRefused(R"({"weight_map":{"a":"../one.safetensors"}})",
                "expected the name of a .safetensors file of this folder");
  ExpectRefused(R"({"weight_map":{"a":"/etc/passwd"}})",
                "expected the name of a .safetensors file");
  ExpectRefused(R"({"weight_map":{"a":"sub/one.safetensors"}})",
                "expected the name of a .safetensors file");
  ExpectRefused(R"({"weight_map":{"a":"one.safetensors\u0000.safetensors"}})",
                "expected the name of a .safetensors file");
  ExpectRefused(R"({"weight_map":{"a":"config.json"}})",
                "expected the name of a .safetensors file");
  ExpectRefused(R"({"weight_map":{"a":"three.safetensors"}})", "three.safetensors");
  ExpectRefused(R"({"weight_map":{"a":"two.safetensors","b":"two.safetensors"}})",
                "tensor 'a': expected in two.safetensors, found in no shard");
  ExpectRefused(R"({"weight_map":{"a":"two.safetensors","b":"one.safetensors"}})",
                "expected in two.safetensors, found in ");
  ExpectRefused(
      R"({"weight_map":{"a":"one.safetensors","b":"two.safetensors","c":"two.safetensors"}})",
      "tensor 'c'");
  ExpectRefused(R"({"weight_map":{"a":7}})", "expected a string");
  ExpectRefused(R"({"weight_map":["a"]})", "expected an object");
  ExpectRefused(R"({"metadata":{}})", "weight_map: required field is missing");
  ExpectRefused(R"({"weight_map":{"a":"one.safetensors","a":"two.safetensors"}})", "given twice");
  ExpectRefused("nonsense", "not JSON");
  ExpectRefused("", "not JSON");
}

TEST_F(ShardTest, RefusesTensorsThatTheIndexHides) {
  const float values[2] = {1, 2};
  ASSERT_TRUE(WriteSafetensors(folder_.File("one.safetensors"),
                               {{"a", "F32", {1}, values}, {"x", "F32", {1}, values}})
                  .ok());
  ExpectRefused(R"({"weight_map":{"a":"one.safetensors","b":"two.safetensors"}})",
                "tensor 'x' is not listed in");
}

TEST_F(ShardTest, RefusesATensorInTwoShards) {
  const float value = 1;
  ASSERT_TRUE(WriteSafetensors(folder_.File("two.safetensors"), {{"a", "F32", {1}, &value}}).ok());
  ExpectRefused(R"({"weight_map":{"a":"one.safetensors","b":"two.safetensors"}})", "is also in");
}

// --- Mutations: a status or a good reader, never a crash (run with the address sanitizer). ---

TEST(SafetensorsTest, SurvivesMutations) {
  constexpr int kVariants = 2000;
  constexpr uint32_t kSeed = 20261122;
  const TempFolder folder;
  const std::vector<float> values(64, 1.0f);
  const std::string path = folder.File("m.safetensors");
  ASSERT_TRUE(WriteSafetensors(path, {{"model.embed_tokens.weight", "F32", {4, 8}, values.data()},
                                      {"h", "F16", {2, 2}, values.data()},
                                      {"b", "BF16", {3}, values.data()},
                                      {"t", "I32", {5}, values.data()}})
                  .ok());
  const std::string original = Slurp(path);
  std::mt19937 random(kSeed);
  const auto below = [&](size_t limit) {
    return std::uniform_int_distribution<size_t>(0, limit - 1)(random);
  };
  int num_accepted = 0;
  for (int variant = 0; variant < kVariants; ++variant) {
    std::string bytes = original;
    for (size_t edit = 0, count = 1 + below(3); edit < count && !bytes.empty(); ++edit) {
      // Three of four edits hit the header: a change of the data is no fault.
      const size_t at = below(below(4) == 0 ? bytes.size() : std::min<size_t>(bytes.size(), 320));
      switch (below(5)) {
        case 0:
          bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8)));
          break;
        case 1:
          bytes.insert(at, 1, static_cast<char>(below(256)));
          break;
        case 2:
          bytes.erase(at, 1 + below(8));
          break;
        case 3:
          bytes[at] = "0123456789[]{},:\""[below(17)];
          break;
        default:
          bytes.resize(at);
          break;
      }
    }
    folder.Write("m.safetensors", bytes);
    const auto reader = SafetensorsReader::OpenFile(path);
    if (reader.ok()) {
      ++num_accepted;
      EXPECT_GE(Touch(**reader), 0) << "seed " << kSeed << ", variant " << variant;
    } else {
      EXPECT_FALSE(reader.status().message().empty());
    }
  }
  EXPECT_LT(num_accepted, kVariants / 2) << "most mutations should be seen";
}

}  // namespace
}  // namespace godwit
