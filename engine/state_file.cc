#include "engine/state_file.h"

#include <errno.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <new>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "engine/json_object.h"
#include "engine/speculative_decoder.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"
#include "kernels/ops.h"

namespace godwit {
namespace {

constexpr absl::string_view kBeforeDigest = R"({"__metadata__":{"sha256":")";
constexpr size_t kDigestDigits = 64;
constexpr int64_t kMaxHeaderBytes = 16 << 20;
constexpr int64_t kPieceBytes = 4 << 20;  // hashed while it is in the cache
constexpr int64_t kMaxHashThreads = 8;
// 1 had the keys of KV blocks as its device kept them.
constexpr char kFormat[] = "godwit-state-2";
constexpr char kAnyFormat[] = "godwit-state-";
// A window that was never behind by more than one round of drafts.
constexpr int64_t kMaxBaseLag = kWindow - 1 + kMaxDraftTokens + 1;

class Sha256 {
 public:
  Sha256() : context_(EVP_MD_CTX_new()) {
    GODWIT_CHECK(context_ != nullptr);
    GODWIT_CHECK(EVP_DigestInit_ex(context_, EVP_sha256(), nullptr) == 1);
  }
  ~Sha256() { EVP_MD_CTX_free(context_); }
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;

  void Add(const void* data, size_t num_bytes) {
    GODWIT_CHECK(EVP_DigestUpdate(context_, data, num_bytes) == 1);
  }
  std::string Digest() {
    std::string digest(32, '\0');
    GODWIT_CHECK(EVP_DigestFinal_ex(context_, reinterpret_cast<unsigned char*>(digest.data()),
                                    nullptr) == 1);
    return digest;
  }
  std::string Hex() { return absl::BytesToHexString(Digest()); }

 private:
  EVP_MD_CTX* context_;
};

absl::Status FileError(const std::string& path, absl::string_view what) {
  const int error = errno;
  const std::string text = absl::StrCat(path, ": ", what, ": ", std::strerror(error));
  if (error == ENOENT) return absl::NotFoundError(text);
  if (error == ENOSPC || error == EDQUOT || error == EFBIG)
    return absl::ResourceExhaustedError(text);
  return absl::InternalError(text);
}

class File {
 public:
  File(const std::string& path, int flags) : fd_(open(path.c_str(), flags | O_CLOEXEC, 0600)) {}
  ~File() { Close(); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  bool ok() const { return fd_ >= 0; }
  int fd() const { return fd_; }
  bool Close() { return fd_ < 0 || close(std::exchange(fd_, -1)) == 0; }

  bool Write(const char* data, int64_t num_bytes) {
    while (num_bytes > 0) {
      const ssize_t count = write(fd_, data, static_cast<size_t>(num_bytes));
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) return false;
      data += count;
      num_bytes -= count;
    }
    return true;
  }
  // False: an error (errno), or the end of the file (errno 0).
  bool Read(char* data, int64_t num_bytes, int64_t offset) {
    while (num_bytes > 0) {
      const ssize_t count = pread(fd_, data, static_cast<size_t>(num_bytes), offset);
      if (count < 0 && errno == EINTR) continue;
      if (count == 0) errno = 0;
      if (count <= 0) return false;
      data += count;
      num_bytes -= count;
      offset += count;
    }
    return true;
  }

 private:
  int fd_;
};

// One tensor of the file: its place in an image, in the order of the image.
struct Part {
  std::string name;
  std::string dtype;
  int64_t num_bytes = 0;
  int64_t row_bytes = 0;  // of a ring
  bool is_draft = false;
};

int64_t RowsOf(int64_t position, int64_t window_rows) { return std::min(position, window_rows); }

std::vector<Part> PartsOf(const StateLayout& layout, int64_t position, int64_t window_rows) {
  const std::string dtype = layout.dtype == "f32" ? "F32" : "BF16";
  std::vector<Part> parts;
  for (const StateComponent& component : layout.components) {
    const bool is_draft = absl::StartsWith(component.name, "draft.");
    if (component.base_bytes > 0) {
      parts.push_back({absl::StrCat(component.name, ".base"),
                       component.name == "penalties" ? "U32" : "F32", component.base_bytes, 0,
                       is_draft});
    }
    const int64_t num_rows = RowsOf(position, window_rows);
    if (component.windowed()) {
      parts.push_back({absl::StrCat(component.name, ".rows"), dtype, num_rows * component.row_bytes,
                       component.row_bytes, is_draft});
    }
    if (component.paged()) {
      const int64_t num_blocks = (position + kPagedBlock - 1) / kPagedBlock;
      parts.push_back({absl::StrCat(component.name, ".blocks"), dtype,
                       num_blocks * kPagedBlock * component.row_bytes, 0, is_draft});
    }
  }
  return parts;
}

int64_t BytesOf(const std::string& dtype) { return dtype == "BF16" ? 2 : 4; }

std::string MakeHeader(const StateLayout& layout, const StateImage& image, const StateNotes& notes,
                       const std::vector<Part>& parts) {
  std::string header = absl::StrCat(
      kBeforeDigest, std::string(kDigestDigits, '0'), R"(","format":")", kFormat, R"(","model":")",
      layout.model, R"(","dtype":")", layout.dtype, R"(","rope_digest":")", notes.rope_digest,
      R"(","rope":")", absl::BytesToHexString(notes.rope), R"(","rope_length":")",
      notes.rope_length, R"(","position":")", image.position, R"(","base":")", image.base,
      R"(","next_token":")", image.last_token, R"(","window_rows":")", layout.window_rows, "\"");
  if (image.draft) {
    absl::StrAppend(&header, R"(,"draft":")", layout.draft, R"(","draft_position":")",
                    image.draft->position, R"(","draft_base":")", image.draft->base,
                    R"(","draft_unread":")", absl::StrJoin(image.draft->unread, ","), "\"");
  }
  header += "}";
  int64_t offset = 0;
  for (const Part& part : parts) {
    absl::StrAppend(&header, ",\"", part.name, R"(":{"dtype":")", part.dtype, R"(","shape":[)",
                    part.num_bytes / BytesOf(part.dtype), R"(],"data_offsets":[)", offset, ",",
                    offset + part.num_bytes, "]}");
    offset += part.num_bytes;
  }
  header += "}";
  header.append((8 - header.size() % 8) % 8, ' ');  // so that the data is aligned
  return header;
}

std::string LengthBytes(size_t num_bytes) {
  static_assert(std::endian::native == std::endian::little);
  const auto count = static_cast<uint64_t>(num_bytes);
  std::string bytes(sizeof(count), '\0');
  std::memcpy(bytes.data(), &count, sizeof(count));
  return bytes;
}

// Where `count` bytes of the data from `offset` on are; null: they could not be read. Any thread.
using DataAt = std::function<const char*(int64_t offset, int64_t count)>;

// Of a file that consists of `head` and of data: SHA-256 over the SHA-256 of each piece of it. One
// core hashes 2 GB/s at most, and a large state has to be back within a tenth of a second; so
// threads share the pieces. Nothing: not all of the data could be read.
std::optional<std::string> HashPieces(absl::string_view head, int64_t num_bytes,
                                      const DataAt& data_at) {
  const int64_t head_bytes = std::ssize(head), total = head_bytes + num_bytes;
  const int64_t num_pieces = (total + kPieceBytes - 1) / kPieceBytes;
  std::vector<std::string> digests(static_cast<size_t>(num_pieces));
  std::atomic<int64_t> next{0};
  std::atomic<bool> readable{true};
  const auto work = [&] {
    for (int64_t piece = next++; piece < num_pieces && readable; piece = next++) {
      const int64_t begin = piece * kPieceBytes, end = std::min(begin + kPieceBytes, total);
      const int64_t head_begin = std::min(begin, head_bytes), head_end = std::min(end, head_bytes);
      Sha256 digest;
      digest.Add(head.data() + head_begin, static_cast<size_t>(head_end - head_begin));
      const int64_t offset = std::max(begin, head_bytes) - head_bytes;
      const int64_t count = end - head_bytes - offset;
      if (count > 0) {
        const char* const data = data_at(offset, count);
        if (data == nullptr) readable = false;
        if (data != nullptr) digest.Add(data, static_cast<size_t>(count));
      }
      digests[static_cast<size_t>(piece)] = digest.Digest();
    }
  };
  const int64_t num_threads = std::min<int64_t>(
      {kMaxHashThreads, num_pieces, std::max<int64_t>(std::thread::hardware_concurrency(), 1)});
  std::vector<std::thread> threads;
  for (int64_t thread = 1; thread < num_threads; ++thread) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  if (!readable) return std::nullopt;
  return FingerprintText(absl::StrJoin(digests, ""));
}

absl::Status WriteAll(const std::string& path, const std::string& header, const StateImage& image,
                      const FileFault& fault) {
  fault("create");
  File file(path, O_WRONLY | O_CREAT | O_EXCL);
  if (!file.ok()) return FileError(path, "cannot create");
  fault("header");
  if (!file.Write(header.data(), std::ssize(header))) return FileError(path, "cannot write");
  fault("data");
  const int64_t half = image.num_bytes / 2;
  if (!file.Write(image.bytes.get(), half)) return FileError(path, "cannot write");
  fault("rest");
  if (!file.Write(image.bytes.get() + half, image.num_bytes - half)) {
    return FileError(path, "cannot write");
  }
  fault("sync");
  if (fsync(file.fd()) != 0 || !file.Close()) return FileError(path, "cannot sync");
  return absl::OkStatus();
}

absl::Status SyncFolder(const std::string& folder) {
  const File file(folder, O_RDONLY | O_DIRECTORY);
  if (!file.ok() || fsync(file.fd()) != 0) return FileError(folder, "cannot sync");
  return absl::OkStatus();
}

// --- Reading

// The whole of a file whose digest is right.
struct Content {
  std::string path;
  std::string header;
  std::shared_ptr<char[]> data;
  int64_t num_bytes = 0;
};

absl::Status Lost(const std::string& path, absl::string_view what) {
  return absl::DataLossError(absl::StrCat(path, ": ", what));
}

absl::StatusOr<Content> ReadContent(const std::string& path, int64_t max_bytes) {
  File file(path, O_RDONLY);
  struct stat info = {};
  if (!file.ok() || fstat(file.fd(), &info) != 0) return FileError(path, "cannot open");
  if (!S_ISREG(info.st_mode)) return Lost(path, "is no file");
  if (info.st_size > max_bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat(path, ": ", info.st_size, " bytes, at most ", max_bytes));
  }
  const auto size = static_cast<int64_t>(info.st_size);
  uint64_t header_bytes = 0;
  if (size < 8 || !file.Read(reinterpret_cast<char*>(&header_bytes), 8, 0)) {
    return Lost(path, "is cut short");
  }
  if (header_bytes > kMaxHeaderBytes || static_cast<int64_t>(header_bytes) > size - 8) {
    return Lost(path, absl::StrCat("header of ", header_bytes, " bytes in a file of ", size));
  }
  Content content = {.path = path, .header = std::string(header_bytes, '\0')};
  content.num_bytes = size - 8 - static_cast<int64_t>(header_bytes);
  content.data.reset(new (std::nothrow) char[static_cast<size_t>(content.num_bytes)]);
  if (content.data == nullptr) return absl::ResourceExhaustedError("no host memory for a state");
  if (!file.Read(content.header.data(), std::ssize(content.header), 8)) {
    return Lost(path, "is cut short");
  }
  if (!absl::StartsWith(content.header, kBeforeDigest) ||
      content.header.size() < kBeforeDigest.size() + kDigestDigits) {
    return Lost(path, "is no snapshot");
  }
  const std::string expected = content.header.substr(kBeforeDigest.size(), kDigestDigits);
  content.header.replace(kBeforeDigest.size(), kDigestDigits, kDigestDigits, '0');
  const std::string head = LengthBytes(content.header.size()) + content.header;
  const auto read = [&](int64_t offset, int64_t count) {
    char* const data = content.data.get() + offset;
    return file.Read(data, count, std::ssize(head) + offset) ? data : nullptr;
  };
  const std::optional<std::string> found = HashPieces(head, content.num_bytes, read);
  if (!found) return Lost(path, "is cut short");
  if (*found != expected) return Lost(path, "its SHA-256 is not the one it states");
  return content;
}

// The manifest's numbers, which are written as strings.
class Manifest {
 public:
  Manifest(const std::string& path, JsonObject object) : path_(path), object_(std::move(object)) {}

  bool Has(const char* name) const { return object_.Has(name); }
  std::string Text(const char* name) { return object_.String(name); }
  int64_t Int(const char* name, int64_t min, int64_t max) {
    int64_t value = 0;
    const std::string text = object_.String(name);
    if (absl::SimpleAtoi(text, &value) && value >= min && value <= max) return value;
    Fail(absl::StrCat(name, " '", absl::CHexEscape(text.substr(0, 40)), "' is no number in [", min,
                      ", ", max, "]"));
    return min;
  }
  std::vector<int32_t> Tokens(const char* name, int64_t vocab_size) {
    std::vector<int32_t> tokens;
    const std::string text = object_.String(name);
    for (const absl::string_view word : absl::StrSplit(text, ',', absl::SkipEmpty())) {
      int32_t token = -1;
      const bool fits = absl::SimpleAtoi(word, &token) && token >= 0 && token < vocab_size;
      if (!fits || std::ssize(tokens) > kMaxDraftLag) {
        Fail(absl::StrCat(name, " is no list of tokens"));
        return {};
      }
      tokens.push_back(token);
    }
    return tokens;
  }
  void Fail(std::string what) {
    if (fault_.empty()) fault_ = std::move(what);
  }
  absl::Status status() const {
    if (!fault_.empty()) return Lost(path_, fault_);
    if (!object_.status().ok()) return Lost(path_, object_.status().message());
    return absl::OkStatus();
  }

 private:
  std::string path_;
  JsonObject object_;
  std::string fault_;
};

struct Found {
  StateImage image;
  StateNotes notes;
  std::string model, dtype, draft;
  int64_t window_rows = 0;
};

void ReadDraft(Manifest& manifest, const StateLayout& layout, Found& found) {
  found.draft = manifest.Text("draft");
  DraftImage draft;
  draft.position = manifest.Int("draft_position", 0, found.image.position);
  draft.base = manifest.Int("draft_base", 0, draft.position);
  draft.unread = manifest.Tokens("draft_unread", layout.vocab_size);
  const int64_t end = found.image.position + (found.image.last_token >= 0 ? 1 : 0);
  if (draft.base % kWindow != 0 || draft.position - draft.base > kMaxBaseLag ||
      draft.position + std::ssize(draft.unread) != end) {
    manifest.Fail("the draft's position, base and unread tokens do not fit the state");
  }
  found.image.draft = std::move(draft);
}

absl::StatusOr<Found> ReadManifest(const Content& content, const StateLayout& layout,
                                   JsonObject& header) {
  std::optional<JsonObject> object = header.Object("__metadata__");
  if (!object) return Lost(content.path, "has no manifest");
  Manifest manifest(content.path, *std::move(object));
  const std::string format = manifest.Text("format");
  if (format != kFormat && absl::StartsWith(format, kAnyFormat)) {
    return absl::FailedPreconditionError(
        absl::StrCat(content.path, ": is of format ", Shown(format), ", expected ", kFormat));
  }
  if (format != kFormat) manifest.Fail("is of another format");
  Found found;
  found.model = manifest.Text("model");
  found.dtype = manifest.Text("dtype");
  found.notes.rope_digest = manifest.Text("rope_digest");
  const std::string rope = manifest.Text("rope");
  if (!std::all_of(rope.begin(), rope.end(), absl::ascii_isxdigit) || rope.size() % 2 != 0) {
    manifest.Fail("its rope is not hexadecimal");
  } else {
    found.notes.rope = absl::HexStringToBytes(rope);
  }
  found.notes.rope_length = manifest.Int("rope_length", 0, std::numeric_limits<int32_t>::max());
  found.image.position = manifest.Int("position", 1, std::numeric_limits<int32_t>::max());
  found.image.base = manifest.Int("base", 0, found.image.position);
  found.image.last_token =
      static_cast<int32_t>(manifest.Int("next_token", -1, std::numeric_limits<int32_t>::max()));
  found.window_rows =
      manifest.Int("window_rows", 1, WindowRows(kMaxStepsInFlight, kMaxDraftTokens));
  RETURN_IF_ERROR(manifest.status());
  // Of another model before anything is measured by this one's.
  if (found.model != layout.model || found.dtype != layout.dtype) {
    return absl::FailedPreconditionError(absl::StrCat(
        content.path, ": is a state of another model or type: ", found.dtype, " ",
        found.model.substr(0, 16), ", expected ", layout.dtype, " ", layout.model.substr(0, 16)));
  }
  if (found.image.position > layout.max_position) {
    return absl::FailedPreconditionError(absl::StrCat(content.path, ": has ", found.image.position,
                                                      " tokens, the context ",
                                                      layout.max_position));
  }
  if (found.image.base % kWindow != 0 || found.image.position - found.image.base > kMaxBaseLag) {
    manifest.Fail("its base does not fit its position");
  }
  if (found.image.last_token >= layout.vocab_size) manifest.Fail("its next token is none");
  if (manifest.Has("draft")) ReadDraft(manifest, layout, found);
  RETURN_IF_ERROR(manifest.status());
  return found;
}

// Where the tensor lies in the data, once it is the one that is expected.
absl::StatusOr<const char*> FindPart(const Content& content, JsonObject& header, const Part& part) {
  std::optional<JsonObject> tensor = header.Object(part.name.c_str());
  if (!tensor) return Lost(content.path, absl::StrCat("lacks tensor ", part.name));
  const std::vector<int64_t> shape =
      tensor->IntList("shape", 0, std::numeric_limits<int64_t>::max(), 1);
  const std::vector<int64_t> offsets = tensor->IntList("data_offsets", 0, content.num_bytes, 2);
  const bool fits = tensor->String("dtype") == part.dtype && tensor->status().ok() &&
                    shape.size() == 1 && shape[0] == part.num_bytes / BytesOf(part.dtype) &&
                    offsets.size() == 2 && offsets[1] - offsets[0] == part.num_bytes;
  if (!fits) {
    return Lost(content.path, absl::StrCat("tensor ", part.name, " is not ", part.num_bytes,
                                           " bytes of ", part.dtype));
  }
  return content.data.get() + offsets[0];
}

template <typename Word, Word kExponent>
bool AllFinite(const char* data, int64_t num_bytes) {
  bool finite = true;
  for (int64_t at = 0; at < num_bytes; at += int64_t{sizeof(Word)}) {
    Word word;
    std::memcpy(&word, data + at, sizeof(word));
    finite &= (word & kExponent) != kExponent;
  }
  return finite;
}

// A poisoned row of the ring that no token has is no fault: only rows of tokens are kept.
bool IsFinite(const Part& part, const char* data) {
  if (part.dtype == "F32") return AllFinite<uint32_t, 0x7f800000u>(data, part.num_bytes);
  if (part.dtype == "BF16") return AllFinite<uint16_t, uint16_t{0x7f80}>(data, part.num_bytes);
  return true;
}

// Rows of a ring of another size: token t lies in row t % window_rows.
void CopyRing(const Part& part, const char* from, int64_t from_rows, char* to, int64_t to_rows,
              int64_t position) {
  const int64_t count = std::min({position, from_rows, to_rows});
  for (int64_t token = position - count; token < position; ++token) {
    std::memcpy(to + token % to_rows * part.row_bytes, from + token % from_rows * part.row_bytes,
                static_cast<size_t>(part.row_bytes));
  }
}

// The data as an image of this layout has it; without a copy where the file has it so.
absl::Status MakeBytes(const Content& content, const StateLayout& layout, JsonObject& header,
                       bool check_values, Found& found) {
  StateImage& image = found.image;
  const std::vector<Part> from = PartsOf(layout, image.position, found.window_rows);
  const std::vector<Part> to = PartsOf(layout, image.position, layout.window_rows);
  std::vector<const char*> places(from.size(), nullptr);
  bool as_it_is = found.window_rows == layout.window_rows;
  int64_t offset = 0, total = 0;
  for (size_t index = 0; index < from.size(); ++index) {
    total += to[index].num_bytes;
    if (from[index].is_draft && !image.draft) {
      as_it_is = false;
      continue;
    }
    ASSIGN_OR_RETURN(places[index], FindPart(content, header, from[index]));
    if (check_values && !IsFinite(from[index], places[index])) {
      return Lost(content.path, absl::StrCat(from[index].name, " holds a NaN or infinity"));
    }
    as_it_is &= places[index] == content.data.get() + offset;
    offset += from[index].num_bytes;
  }
  image.num_bytes = total;
  if (as_it_is && offset == content.num_bytes) {
    image.bytes = content.data;
    return absl::OkStatus();
  }
  // Zeros where there is nothing: not for their value, but so that it is one.
  std::shared_ptr<char[]> bytes(new (std::nothrow) char[static_cast<size_t>(total)]());
  if (bytes == nullptr) return absl::ResourceExhaustedError("no host memory for a state");
  char* next = bytes.get();
  for (size_t index = 0; index < from.size(); ++index) {
    char* const at = std::exchange(next, next + to[index].num_bytes);
    if (places[index] == nullptr) continue;
    if (from[index].row_bytes > 0) {
      CopyRing(from[index], places[index], found.window_rows, at, layout.window_rows,
               image.position);
    } else {
      std::memcpy(at, places[index], static_cast<size_t>(from[index].num_bytes));
    }
  }
  image.bytes = std::move(bytes);
  return absl::OkStatus();
}

}  // namespace

StateLayout MakeStateLayout(const ModelCard& card, std::string model, std::string draft) {
  return {.components = card.geometry.components,
          .window_rows = card.geometry.window_rows,
          .vocab_size = card.config.vocab_size,
          .dtype = card.dtype,
          .model = std::move(model),
          .draft = std::move(draft),
          .max_position = card.context_length};
}

std::string FingerprintText(const std::string& text) {
  Sha256 digest;
  digest.Add(text.data(), text.size());
  return digest.Hex();
}

absl::StatusOr<std::string> FingerprintModel(const std::string& folder) {
  constexpr int64_t kSampleBytes = 64 << 10, kNumSamples = 16;
  std::vector<std::string> paths;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    if (name == "config.json" || entry.path().extension() == ".safetensors") {
      paths.push_back(entry.path().string());
    }
  }
  if (error) return absl::NotFoundError(absl::StrCat(folder, ": ", error.message()));
  std::sort(paths.begin(), paths.end());
  Sha256 digest;
  std::string piece(kSampleBytes, '\0');
  for (const std::string& path : paths) {
    File file(path, O_RDONLY);
    struct stat info = {};
    if (!file.ok() || fstat(file.fd(), &info) != 0) return FileError(path, "cannot open");
    const auto size = static_cast<int64_t>(info.st_size);
    const std::string line =
        absl::StrCat(std::filesystem::path(path).filename().string(), " ", size, "\n");
    digest.Add(line.data(), line.size());
    // The first piece of a file holds its header, or the beginning of it.
    for (int64_t sample = 0; sample < kNumSamples; ++sample) {
      const int64_t begin = std::max<int64_t>(size - kSampleBytes, 0) * sample / (kNumSamples - 1);
      const int64_t count = std::min(kSampleBytes, size - begin);
      if (!file.Read(piece.data(), count, begin)) return FileError(path, "cannot read");
      digest.Add(piece.data(), static_cast<size_t>(count));
    }
  }
  return digest.Hex();
}

absl::Status WriteStateFile(const std::string& path, const StateLayout& layout,
                            const StateImage& image, const StateNotes& notes,
                            const FileFault& fault) {
  static std::atomic<uint64_t> next{0};
  const FileFault at = fault ? fault : [](const char*) {};
  std::vector<Part> parts = PartsOf(layout, image.position, layout.window_rows);
  int64_t total = 0;
  for (const Part& part : parts) total += part.num_bytes;
  GODWIT_CHECK(total == image.num_bytes);
  std::string header = MakeHeader(layout, image, notes, parts);
  const std::optional<std::string> digest =
      HashPieces(LengthBytes(header.size()) + header, image.num_bytes,
                 [&](int64_t offset, int64_t) { return image.bytes.get() + offset; });
  header.replace(kBeforeDigest.size(), kDigestDigits, *digest);
  const std::string temporary = absl::StrCat(path, ".", getpid(), ".", next++, ".tmp");
  absl::Status status = WriteAll(temporary, LengthBytes(header.size()) + header, image, at);
  if (status.ok()) {
    at("rename");
    if (rename(temporary.c_str(), path.c_str()) != 0) status = FileError(path, "cannot rename to");
  }
  if (!status.ok()) {
    unlink(temporary.c_str());
    return status;
  }
  at("folder");
  return SyncFolder(std::filesystem::path(path).parent_path().string());
}

absl::StatusOr<StateFile> ReadStateFile(const std::string& path, const StateLayout& layout,
                                        const ReadStateOptions& options) {
  ASSIGN_OR_RETURN(const Content content, ReadContent(path, options.max_bytes));
  absl::StatusOr<JsonObject> header = JsonObject::Parse(content.header, path);
  if (!header.ok()) return absl::DataLossError(header.status().message());
  ASSIGN_OR_RETURN(Found found, ReadManifest(content, layout, *header));
  if (layout.draft.empty() || found.draft != layout.draft) found.image.draft.reset();
  RETURN_IF_ERROR(MakeBytes(content, layout, *header, options.check_values, found));
  return StateFile{.image = std::make_shared<const StateImage>(std::move(found.image)),
                   .notes = std::move(found.notes)};
}

}  // namespace godwit
