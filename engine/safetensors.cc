// Format: 8 bytes little-endian N; N bytes of JSON {"name": {"dtype", "shape", "data_offsets":
// [begin, end]}}; the data, which the tensors cover without hole or overlap.
// https://huggingface.co/docs/safetensors
#include "engine/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <limits>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/json_object.h"
#include "kernels/base/bf16.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"
#include "nlohmann/json.hpp"

namespace godwit {
namespace {

static_assert(std::endian::native == std::endian::little, "tensors are read where they lie");

constexpr int64_t kLengthBytes = 8;
constexpr int64_t kMaxHeaderBytes = 100'000'000;  // the limit of the format's own library
constexpr size_t kMaxDimensions = 8;
constexpr size_t kMaxTensors = 1'000'000;
constexpr size_t kMaxShards = 10'000;

struct DTypeName {
  absl::string_view name;
  int64_t bytes;
};
constexpr DTypeName kDTypes[] = {{"BOOL", 1},    {"U8", 1},  {"I8", 1},  {"F8_E5M2", 1},
                                 {"F8_E4M3", 1}, {"I16", 2}, {"U16", 2}, {"F16", 2},
                                 {"BF16", 2},    {"I32", 4}, {"U32", 4}, {"F32", 4},
                                 {"F64", 8},     {"I64", 8}, {"U64", 8}};

int64_t BytesOf(absl::string_view dtype) {  // 0: unknown
  for (const DTypeName& known : kDTypes) {
    if (known.name == dtype) return known.bytes;
  }
  return 0;
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

struct HeaderEntry {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  std::vector<int64_t> offsets;  // begin, end
};

// Accepts exactly the grammar of a header; everything else (depth, types, keys given twice) ends
// the parse with `fault()`.
class HeaderReader final : public nlohmann::json_sax<nlohmann::json> {
 public:
  const std::string& fault() const { return fault_; }
  std::vector<HeaderEntry>& entries() { return entries_; }

  bool start_object(std::size_t) override {
    if (place_ == Place::kStart) return Go(Place::kTop);
    if (place_ != Place::kTop || !in_value_) return Unexpected("an object");
    in_value_ = false;
    fields_.clear();
    if (key_ == "__metadata__") return Go(Place::kMetadata);
    entries_.push_back({.name = key_});
    return Go(Place::kTensor);
  }
  bool end_object() override {
    if (place_ == Place::kTensor && fields_.size() != 3) {
      return Fault(absl::StrCat("tensor '", Shown(entries_.back().name),
                                "' lacks dtype, shape or data_offsets"));
    }
    return Go(place_ == Place::kTop ? Place::kEnd : Place::kTop);
  }
  bool key(std::string& name) override {
    in_value_ = true;
    key_ = name;
    if (place_ == Place::kTop) {
      if (entries_.size() >= kMaxTensors)
        return Fault(absl::StrCat("more than ", kMaxTensors, " tensors"));
      return names_.insert(name).second ||
             Fault(absl::StrCat("'", Shown(name), "' is given twice"));
    }
    const bool known =
        place_ == Place::kMetadata || name == "dtype" || name == "shape" || name == "data_offsets";
    if (!known)
      return Fault(absl::StrCat("tensor '", Shown(entries_.back().name), "': unknown field '",
                                Shown(name), "'"));
    return fields_.insert(name).second || Fault(absl::StrCat("'", Shown(name), "' is given twice"));
  }
  bool start_array(std::size_t) override {
    if (place_ != Place::kTensor || !in_value_ || key_ == "dtype") return Unexpected("a list");
    return Go(Place::kNumbers);
  }
  bool end_array() override {
    in_value_ = false;
    if (key_ == "data_offsets" && entries_.back().offsets.size() != 2)
      return Unexpected("other than two data_offsets");
    return Go(Place::kTensor);
  }
  bool string(std::string& text) override {
    if (!in_value_) return Unexpected("a string");
    in_value_ = false;
    if (place_ == Place::kMetadata) return true;
    if (place_ != Place::kTensor || key_ != "dtype") return Unexpected("a string");
    entries_.back().dtype = text;
    return true;
  }
  bool number_unsigned(std::uint64_t value) override {
    if (place_ != Place::kNumbers) return Unexpected("a number");
    auto& numbers = key_ == "shape" ? entries_.back().shape : entries_.back().offsets;
    if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))
      return Unexpected("a number over 2^63 - 1");
    if (numbers.size() >= kMaxDimensions)
      return Unexpected(absl::StrCat("more than ", kMaxDimensions, " numbers"));
    numbers.push_back(static_cast<int64_t>(value));
    return true;
  }
  bool number_integer(std::int64_t) override { return Unexpected("a negative number"); }
  bool number_float(double, const std::string&) override {
    return Unexpected("a number that is not whole, or over 2^64");
  }
  bool null() override { return Unexpected("null"); }
  bool boolean(bool) override { return Unexpected("a truth value"); }
  bool binary(binary_t&) override { return Unexpected("binary data"); }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception&) override {
    return Fault(absl::StrCat("not JSON at byte ", position));
  }

 private:
  enum class Place { kStart, kTop, kTensor, kMetadata, kNumbers, kEnd };

  bool Go(Place place) {
    place_ = place;
    return true;
  }
  bool Fault(std::string text) {
    if (fault_.empty()) fault_ = std::move(text);
    return false;
  }
  bool Unexpected(absl::string_view what) {
    return Fault(absl::StrCat("unexpected ", what, " after key '", Shown(key_), "'"));
  }

  Place place_ = Place::kStart;
  bool in_value_ = false;  // a key was read and its value is next
  std::string key_;
  std::set<std::string> names_;   // top-level keys
  std::set<std::string> fields_;  // keys of the open entry
  std::vector<HeaderEntry> entries_;
  std::string fault_;
};

// Product of the shape times the bytes of a value; -1 when it does not fit.
int64_t ByteCount(const HeaderEntry& entry) {
  int64_t bytes = BytesOf(entry.dtype);
  for (const int64_t dimension : entry.shape) {
    if (__builtin_mul_overflow(bytes, dimension, &bytes)) return -1;
  }
  return bytes;
}

// dtype, shape and offsets of one tensor against each other and against the size of the data.
absl::Status CheckEntry(const HeaderEntry& entry, int64_t data_bytes, const std::string& where) {
  const auto fault = [&](const auto&... parts) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": tensor '", Shown(entry.name), "': ", parts...));
  };
  if (BytesOf(entry.dtype) == 0) return fault("unknown dtype '", Shown(entry.dtype), "'");
  const int64_t begin = entry.offsets[0], end = entry.offsets[1];
  if (begin > end || end > data_bytes) {
    return absl::DataLossError(absl::StrCat(where, ": tensor '", Shown(entry.name),
                                            "': data_offsets [", begin, ", ", end,
                                            "] are outside of the ", data_bytes, " bytes of data"));
  }
  const int64_t expected = ByteCount(entry);
  if (expected < 0) return fault("shape ", ShapeText(entry.shape), " has more than 2^63 - 1 bytes");
  if (expected != end - begin) {
    return fault("shape ", ShapeText(entry.shape), " of ", entry.dtype, " has ", expected,
                 " bytes, data_offsets say ", end - begin);
  }
  return absl::OkStatus();
}

// The data is covered exactly: no hole, no overlap, no rest.
absl::Status CheckCoverage(const std::vector<HeaderEntry>& entries, int64_t data_bytes,
                           const std::string& where) {
  std::vector<const HeaderEntry*> order;
  for (const HeaderEntry& entry : entries) order.push_back(&entry);
  std::sort(order.begin(), order.end(),
            [](const HeaderEntry* a, const HeaderEntry* b) { return a->offsets < b->offsets; });
  int64_t covered = 0;
  for (const HeaderEntry* entry : order) {
    if (entry->offsets[0] != covered) {
      return absl::InvalidArgumentError(absl::StrCat(
          where, ": tensor '", Shown(entry->name), "': data begins at ", entry->offsets[0],
          entry->offsets[0] < covered ? ", inside of the tensor before it, which ends at "
                                      : ", but that before it ends at ",
          covered));
    }
    covered = entry->offsets[1];
  }
  if (covered != data_bytes) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": ", data_bytes - covered,
                                                   " bytes after the last tensor belong to none"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<HeaderEntry>> ReadHeader(const char* file, int64_t file_bytes,
                                                    const std::string& where) {
  if (file_bytes < kLengthBytes) {
    return absl::DataLossError(
        absl::StrCat(where, ": ", file_bytes, " bytes, no room for a safetensors header"));
  }
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, file, kLengthBytes);
  if (header_bytes > static_cast<uint64_t>(kMaxHeaderBytes)) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": header of ", header_bytes,
                                                   " bytes, the limit is ", kMaxHeaderBytes));
  }
  if (static_cast<int64_t>(header_bytes) > file_bytes - kLengthBytes) {
    return absl::DataLossError(absl::StrCat(where, ": header of ", header_bytes,
                                            " bytes, but only ", file_bytes - kLengthBytes,
                                            " follow its length"));
  }
  const char* text = file + kLengthBytes;
  HeaderReader reader;
  if (!nlohmann::json::sax_parse(text, text + header_bytes, &reader)) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": header: ", reader.fault()));
  }
  const int64_t data_bytes = file_bytes - kLengthBytes - static_cast<int64_t>(header_bytes);
  for (const HeaderEntry& entry : reader.entries())
    RETURN_IF_ERROR(CheckEntry(entry, data_bytes, where));
  RETURN_IF_ERROR(CheckCoverage(reader.entries(), data_bytes, where));
  return std::move(reader.entries());
}

float HalfToF32(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu, mantissa = bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float value = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  const uint32_t wide = exponent == 31 ? 255u : exponent + (127 - 15);
  return std::bit_cast<float>(sign | (wide << 23) | (mantissa << 13));
}

bool IsFile(const std::string& path) {
  struct stat info = {};
  return stat(path.c_str(), &info) == 0;
}

}  // namespace

// A file mapped for reading. (Whoever truncates it while it is read kills the process: so does any
// mapping.)
struct SafetensorsReader::Mapping {
  void* data = nullptr;
  int64_t num_bytes = 0;

  ~Mapping() {
    if (data != nullptr) munmap(data, static_cast<size_t>(num_bytes));
  }

  static absl::StatusOr<std::unique_ptr<Mapping>> Open(const std::string& path) {
    const int file = open(
        path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // never waits for the writer of a pipe
    if (file < 0) {
      const std::string text = absl::StrCat(path, ": ", std::strerror(errno));
      return errno == ENOENT ? absl::NotFoundError(text) : absl::InvalidArgumentError(text);
    }
    auto mapping = std::make_unique<Mapping>();
    absl::Status status;
    struct stat info = {};
    if (fstat(file, &info) != 0 || !S_ISREG(info.st_mode)) {
      status = absl::InvalidArgumentError(absl::StrCat(path, ": not a regular file"));
    } else if (info.st_size == 0) {
      status = absl::DataLossError(absl::StrCat(path, ": empty file"));
    } else {
      void* data =
          mmap(nullptr, static_cast<size_t>(info.st_size), PROT_READ, MAP_PRIVATE, file, 0);
      if (data == MAP_FAILED) {
        status = absl::ResourceExhaustedError(absl::StrCat(path, ": mmap: ", std::strerror(errno)));
      } else {
        mapping->data = data;
        mapping->num_bytes = info.st_size;
      }
    }
    close(file);
    RETURN_IF_ERROR(status);
    return mapping;
  }
};

SafetensorsReader::SafetensorsReader() = default;
SafetensorsReader::~SafetensorsReader() = default;

absl::StatusOr<std::unique_ptr<SafetensorsReader>> SafetensorsReader::OpenFile(
    const std::string& path) {
  std::unique_ptr<SafetensorsReader> reader(new SafetensorsReader());
  RETURN_IF_ERROR(reader->AddFile(path));
  return reader;
}

absl::StatusOr<std::unique_ptr<SafetensorsReader>> SafetensorsReader::OpenFolder(
    const std::string& folder) {
  const std::string single = absl::StrCat(folder, "/model.safetensors");
  const std::string index = absl::StrCat(folder, "/model.safetensors.index.json");
  if (IsFile(single)) return OpenFile(single);
  if (!IsFile(index)) {
    const bool has_pickle = IsFile(absl::StrCat(folder, "/pytorch_model.bin")) ||
                            IsFile(absl::StrCat(folder, "/pytorch_model.bin.index.json"));
    return absl::NotFoundError(absl::StrCat(
        folder, ": expected model.safetensors or model.safetensors.index.json, found neither",
        has_pickle ? "; pytorch_model.bin is not read: convert it to safetensors" : ""));
  }
  std::unique_ptr<SafetensorsReader> reader(new SafetensorsReader());
  RETURN_IF_ERROR(reader->AddShards(folder, index));
  return reader;
}

absl::Status SafetensorsReader::AddFile(const std::string& path) {
  ASSIGN_OR_RETURN(std::unique_ptr<Mapping> mapping, Mapping::Open(path));
  const char* file = static_cast<const char*>(mapping->data);
  ASSIGN_OR_RETURN(std::vector<HeaderEntry> entries, ReadHeader(file, mapping->num_bytes, path));
  // Offsets count from the end of the header, and the tensors cover the data to the end of the
  // file.
  int64_t data_bytes = 0;
  for (const HeaderEntry& entry : entries) data_bytes = std::max(data_bytes, entry.offsets[1]);
  const char* data = file + (mapping->num_bytes - data_bytes);
  for (HeaderEntry& entry : entries) {
    StoredTensor tensor = {.dtype = std::move(entry.dtype),
                           .shape = std::move(entry.shape),
                           .data = data + entry.offsets[0],
                           .num_bytes = entry.offsets[1] - entry.offsets[0],
                           .file = path};
    const auto [it, added] = tensors_.emplace(std::move(entry.name), std::move(tensor));
    if (!added) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": tensor '", Shown(it->first), "' is also in ", it->second.file));
    }
  }
  mappings_.push_back(std::move(mapping));
  return absl::OkStatus();
}

absl::Status SafetensorsReader::AddShards(const std::string& folder,
                                          const std::string& index_path) {
  ASSIGN_OR_RETURN(const std::string text, ReadTextFile(index_path, kMaxHeaderBytes));
  ASSIGN_OR_RETURN(JsonObject index, JsonObject::Parse(text, index_path));
  std::optional<JsonObject> map = index.Object("weight_map");
  RETURN_IF_ERROR(index.status());
  if (!map)
    return absl::InvalidArgumentError(
        absl::StrCat(index_path, ": weight_map: required field is missing"));
  const auto weights = map->StringFields();
  RETURN_IF_ERROR(map->status());

  std::set<std::string> shards;
  for (const auto& [tensor, shard] : weights) {
    // A plain name: an index must not reach outside of its folder.
    if (absl::StrContains(shard, '/') || shard.find('\0') != std::string::npos ||
        !absl::EndsWith(shard, ".safetensors")) {
      return absl::InvalidArgumentError(
          absl::StrCat(index_path, ": tensor '", Shown(tensor),
                       "': expected the name of a .safetensors file of this folder, found '",
                       Shown(shard), "'"));
    }
    shards.insert(shard);
  }
  if (shards.size() > kMaxShards) {
    return absl::InvalidArgumentError(
        absl::StrCat(index_path, ": ", shards.size(), " shards, the limit is ", kMaxShards));
  }
  for (const std::string& shard : shards)
    RETURN_IF_ERROR(AddFile(absl::StrCat(folder, "/", shard)));

  for (const auto& [tensor, shard] : weights) {
    const StoredTensor* found = Find(tensor);
    if (found == nullptr || found->file != absl::StrCat(folder, "/", shard)) {
      return absl::InvalidArgumentError(absl::StrCat(
          index_path, ": tensor '", Shown(tensor), "': expected in ", shard, ", found ",
          found == nullptr ? "in no shard" : absl::StrCat("in ", found->file)));
    }
  }
  if (weights.size() == tensors_.size()) return absl::OkStatus();
  std::set<std::string> listed;
  for (const auto& [tensor, shard] : weights) listed.insert(tensor);
  for (const auto& [name, tensor] : tensors_) {
    if (listed.count(name) == 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(tensor.file, ": tensor '", Shown(name), "' is not listed in ", index_path));
    }
  }
  return absl::OkStatus();
}

const StoredTensor* SafetensorsReader::Find(const std::string& name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

absl::StatusOr<const StoredTensor*> SafetensorsReader::Expect(
    const std::string& name, const std::vector<int64_t>& shape) const {
  const StoredTensor* tensor = Find(name);
  if (tensor == nullptr) {
    const std::string file = tensors_.empty() ? "the model" : tensors_.begin()->second.file;
    return absl::NotFoundError(
        absl::StrCat(file, mappings_.size() > 1 ? " and its other shards" : "", ": tensor '", name,
                     "' is missing, expected shape ", ShapeText(shape)));
  }
  if (tensor->shape != shape) {
    return absl::InvalidArgumentError(absl::StrCat(tensor->file, ": tensor '", name,
                                                   "': expected shape ", ShapeText(shape),
                                                   ", found ", ShapeText(tensor->shape)));
  }
  if (tensor->dtype != "F32" && tensor->dtype != "F16" && tensor->dtype != "BF16") {
    return absl::InvalidArgumentError(absl::StrCat(tensor->file, ": tensor '", name,
                                                   "': expected dtype F32, F16 or BF16, found ",
                                                   tensor->dtype));
  }
  return tensor;
}

absl::StatusOr<TensorView> SafetensorsReader::Matrix(const std::string& name,
                                                     const std::vector<int64_t>& shape,
                                                     std::vector<float>& storage) const {
  ASSIGN_OR_RETURN(const StoredTensor* tensor, Expect(name, shape));
  const int64_t rows = shape.empty() ? 1 : shape[0];
  int64_t columns = 1;
  for (size_t axis = 1; axis < shape.size(); ++axis) columns *= shape[axis];
  const bool is_bf16 = tensor->dtype == "BF16";
  const auto address = reinterpret_cast<uintptr_t>(tensor->data);
  if (tensor->dtype != "F16" && address % (is_bf16 ? alignof(BF16) : alignof(float)) == 0) {
    return MakeView(const_cast<void*>(tensor->data), is_bf16 ? DType::kBF16 : DType::kF32, rows,
                    columns);
  }
  storage.resize(static_cast<size_t>(rows * columns));
  ToF32(*tensor, 0, rows * columns, storage.data());
  return MakeView(storage.data(), DType::kF32, rows, columns);
}

void SafetensorsReader::ReleasePages(const StoredTensor& tensor) const {
  // Whole pages inside of the tensor; those at its edges hold parts of its neighbours, which may be
  // in use.
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<uintptr_t>(tensor.data) + page - 1) / page * page;
  const auto end =
      (reinterpret_cast<uintptr_t>(tensor.data) + static_cast<uintptr_t>(tensor.num_bytes)) / page *
      page;
  if (begin < end)
    madvise(reinterpret_cast<void*>(begin), end - begin,
            MADV_DONTNEED);  // advice: failure costs memory only
}

void ToF32(const StoredTensor& tensor, int64_t index, int64_t count, float* to) {
  const char* from = static_cast<const char*>(tensor.data) + index * BytesOf(tensor.dtype);
  if (tensor.dtype == "F32") {
    if (count > 0) std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  GODWIT_CHECK(tensor.dtype == "F16" || tensor.dtype == "BF16");
  const bool is_half = tensor.dtype == "F16";
  for (int64_t value = 0; value < count; ++value) {
    uint16_t bits = 0;
    std::memcpy(&bits, from + value * 2, sizeof(bits));
    to[value] = is_half ? HalfToF32(bits) : ToF32(BF16{bits});
  }
}

absl::Status WriteSafetensors(const std::string& path, const std::vector<NamedTensor>& tensors) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  int64_t offset = 0;
  for (const NamedTensor& tensor : tensors) {
    int64_t bytes = BytesOf(tensor.dtype);
    GODWIT_CHECK(bytes > 0);
    for (const int64_t dimension : tensor.shape) bytes *= dimension;
    GODWIT_CHECK(!header.contains(tensor.name));
    header[tensor.name] = {{"dtype", tensor.dtype},
                           {"shape", tensor.shape},
                           {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
  }
  std::string text = header.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
  text.resize((text.size() + 7) / 8 * 8, ' ');  // the data starts aligned to 8 bytes
  const uint64_t header_bytes = text.size();

  const std::string temporary = absl::StrCat(path, ".tmp", getpid());
  FILE* file = std::fopen(temporary.c_str(), "wb");
  if (file == nullptr)
    return absl::InvalidArgumentError(absl::StrCat(temporary, ": ", std::strerror(errno)));
  bool written = std::fwrite(&header_bytes, 1, sizeof(header_bytes), file) == sizeof(header_bytes);
  written = written && std::fwrite(text.data(), 1, text.size(), file) == text.size();
  for (const NamedTensor& tensor : tensors) {
    const auto& range = header[tensor.name]["data_offsets"];
    const auto bytes = range[1].get<size_t>() - range[0].get<size_t>();
    written = written && (bytes == 0 || std::fwrite(tensor.data, 1, bytes, file) == bytes);
  }
  written = std::fclose(file) == 0 && written;
  if (written && std::rename(temporary.c_str(), path.c_str()) == 0) return absl::OkStatus();
  const std::string cause = std::strerror(errno);
  std::remove(temporary.c_str());
  return absl::UnknownError(absl::StrCat(path, ": cannot be written: ", cause));
}

}  // namespace godwit
