#include "server/session_files.h"

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "server/status_mapping.h"

namespace godwit {
namespace {

namespace fs = std::filesystem;

constexpr absl::string_view kExtension = ".safetensors";
constexpr size_t kMaxNameBytes = 64;

absl::Status NoSuchSnapshot(const std::string& name) {
  return WithResource(absl::NotFoundError(absl::StrCat("there is no snapshot ", name)), "snapshot",
                      name);
}

absl::Status NoFolder() {
  return WithErrorInfo(
      absl::FailedPreconditionError("this server keeps no snapshots: it has no --session-dir"),
      "NO_SESSION_FOLDER");
}

int64_t SizeOf(const std::string& path) {
  std::error_code error;
  const auto size = fs::file_size(path, error);
  return error ? 0 : static_cast<int64_t>(size);
}

// What a client is told of a file: not where it lies.
absl::Status WithoutPath(const absl::Status& status, const std::string& path,
                         const std::string& name) {
  std::string text(status.message());
  if (const size_t at = text.find(path); at != std::string::npos)
    text.replace(at, path.size(), name);
  return absl::Status(status.code(), text);
}

}  // namespace

SessionFiles::SessionFiles(std::string folder, int64_t max_bytes, StateLayout layout)
    : folder_(std::move(folder)), max_bytes_(max_bytes), layout_(std::move(layout)) {}

absl::Status SessionFiles::Start() {
  if (!enabled()) return absl::OkStatus();
  std::error_code error;
  const fs::path folder(folder_);
  fs::create_directories(folder, error);
  if (!error) fs::permissions(folder, fs::perms::owner_all, error);
  for (const char* name : {"idle", "import"}) {
    if (!error) fs::remove_all(folder / name, error);
    if (!error) fs::create_directory(folder / name, error);
  }
  if (!error) fs::create_directories(folder / "snapshots", error);
  if (error) {
    return absl::InvalidArgumentError(
        absl::StrCat("session folder ", folder_, ": ", error.message()));
  }
  for (fs::recursive_directory_iterator it(folder / "snapshots", error), end; !error && it != end;
       it.increment(error)) {
    if (!it->is_regular_file()) continue;
    if (it->path().extension() == ".tmp") {
      fs::remove(it->path(), error);
    } else {
      used_bytes_ += SizeOf(it->path().string());
    }
  }
  return absl::OkStatus();
}

// --- Snapshots

absl::Status SessionFiles::CheckName(const std::string& name) {
  const bool valid = !name.empty() && name.size() <= kMaxNameBytes &&
                     std::all_of(name.begin(), name.end(), [](unsigned char c) {
                       return absl::ascii_isalnum(c) || c == '.' || c == '_' || c == '-';
                     });
  if (valid) return absl::OkStatus();
  return InvalidFields({{"name", "is not of the form [A-Za-z0-9._-]{1,64}"}});
}

absl::Status SessionFiles::Check(const std::string& name) const {
  RETURN_IF_ERROR(CheckName(name));
  return enabled() ? absl::OkStatus() : NoFolder();
}

std::string SessionFiles::TenantFolder(const std::string& tenant) const {
  return absl::StrCat(folder_, "/snapshots/", FingerprintText(tenant));
}

std::string SessionFiles::PathOf(const std::string& tenant, const std::string& name) const {
  return absl::StrCat(TenantFolder(tenant), "/", name, kExtension);
}

absl::StatusOr<std::string> SessionFiles::Path(const std::string& tenant,
                                               const std::string& name) const {
  RETURN_IF_ERROR(Check(name));
  std::string path = PathOf(tenant, name);
  std::error_code error;
  if (!fs::is_regular_file(path, error)) return NoSuchSnapshot(name);
  return path;
}

absl::StatusOr<SessionFiles::Snapshot> SessionFiles::Write(const std::string& tenant,
                                                           const std::string& name,
                                                           const StateImage& image,
                                                           const StateNotes& notes) {
  RETURN_IF_ERROR(Check(name));
  const std::string path = PathOf(tenant, name);
  std::lock_guard<std::mutex> placing(placing_);
  std::error_code error;
  fs::create_directories(TenantFolder(tenant), error);
  const absl::StatusOr<int64_t> num_bytes = WriteFile(path, image, notes);
  if (!num_bytes.ok()) return WithoutPath(num_bytes.status(), path, name);
  return Snapshot{.name = name, .num_bytes = *num_bytes, .position = image.position};
}

absl::StatusOr<StateFile> SessionFiles::Read(const std::string& tenant,
                                             const std::string& name) const {
  ASSIGN_OR_RETURN(const std::string path, Path(tenant, name));
  absl::StatusOr<StateFile> file = ReadStateFile(path, layout_);
  if (!file.ok()) return WithoutPath(file.status(), path, name);
  return file;
}

absl::StatusOr<std::vector<SessionFiles::Snapshot>> SessionFiles::List(
    const std::string& tenant) const {
  if (!enabled()) return NoFolder();
  std::vector<Snapshot> snapshots;
  std::error_code error;
  for (const auto& file : fs::directory_iterator(TenantFolder(tenant), error)) {
    if (file.path().extension().string() != kExtension) continue;
    snapshots.push_back(
        {.name = file.path().stem().string(), .num_bytes = SizeOf(file.path().string())});
  }
  std::sort(snapshots.begin(), snapshots.end(),
            [](const Snapshot& a, const Snapshot& b) { return a.name < b.name; });
  return snapshots;
}

absl::Status SessionFiles::Delete(const std::string& tenant, const std::string& name) {
  std::lock_guard<std::mutex> placing(placing_);
  ASSIGN_OR_RETURN(const std::string path, Path(tenant, name));
  const int64_t num_bytes = SizeOf(path);
  if (unlink(path.c_str()) != 0) return NoSuchSnapshot(name);
  std::lock_guard<std::mutex> lock(mutex_);
  used_bytes_ -= num_bytes;
  return absl::OkStatus();
}

absl::StatusOr<std::string> SessionFiles::ImportPath() {
  if (!enabled()) return NoFolder();
  std::lock_guard<std::mutex> lock(mutex_);
  return absl::StrCat(folder_, "/import/", next_import_++, ".part");
}

absl::StatusOr<StateFile> SessionFiles::ReadImport(const std::string& path,
                                                   const std::string& name) const {
  absl::StatusOr<StateFile> file = ReadStateFile(path, layout_, {.check_values = true});
  if (!file.ok()) return WithoutPath(file.status(), path, name);
  return file;
}

// --- Idle sessions

absl::StatusOr<SessionFiles::IdleFile> SessionFiles::WriteIdle(int64_t key, const StateImage& image,
                                                               const StateNotes& notes) {
  if (!enabled()) return NoFolder();
  IdleFile file = {.path = absl::StrCat(folder_, "/idle/", key, kExtension)};
  ASSIGN_OR_RETURN(file.num_bytes, WriteFile(file.path, image, notes));
  return file;
}

absl::StatusOr<StateFile> SessionFiles::ReadIdle(const std::string& path,
                                                 const std::string& session_id) const {
  absl::StatusOr<StateFile> file = ReadStateFile(path, layout_);
  if (!file.ok()) return WithoutPath(file.status(), path, absl::StrCat("session ", session_id));
  return file;
}

void SessionFiles::Remove(const IdleFile& file) {
  if (file.path.empty()) return;
  unlink(file.path.c_str());
  std::lock_guard<std::mutex> lock(mutex_);
  used_bytes_ -= file.num_bytes;
}

// --- The budget

absl::StatusOr<int64_t> SessionFiles::WriteFile(const std::string& path, const StateImage& image,
                                                const StateNotes& notes) {
  const int64_t replaced = SizeOf(path);
  if (image.num_bytes > free_bytes() + replaced) {
    CountError();
    return absl::ResourceExhaustedError(
        absl::StrCat(image.num_bytes, " bytes, ", free_bytes(), " of ", max_bytes_, " are free"));
  }
  if (absl::Status written = WriteStateFile(path, layout_, image, notes); !written.ok()) {
    CountError();
    return written;
  }
  const int64_t num_bytes = SizeOf(path);
  std::lock_guard<std::mutex> lock(mutex_);
  used_bytes_ += num_bytes - replaced;
  return num_bytes;
}

void SessionFiles::CountError() {
  std::lock_guard<std::mutex> lock(mutex_);
  ++num_errors_;
}

int64_t SessionFiles::used_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return used_bytes_;
}

int64_t SessionFiles::free_bytes() const { return std::max<int64_t>(max_bytes_ - used_bytes(), 0); }

int64_t SessionFiles::num_errors() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return num_errors_;
}

}  // namespace godwit
