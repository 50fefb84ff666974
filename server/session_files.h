#pragma once
// The folder of a server's sessions: snapshots by tenant and name, states of idle sessions, files
// that are being received; and what all of them may take of the disk. Names are ids and never
// paths; a status says the name that a client knows, not where the file lies. Methods that read or
// write wait for the disk: they belong on a worker. Thread-safe.

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/state_file.h"

namespace godwit {

class SessionFiles {
 public:
  // folder "": there are none, and what needs one is FAILED_PRECONDITION. max_bytes of all files.
  SessionFiles(std::string folder, int64_t max_bytes, StateLayout layout);

  // Makes the folder, and removes idle sessions of an earlier process, which are nobody's, and what
  // it was killed in writing. INVALID_ARGUMENT: the folder cannot be used. Before any other call.
  absl::Status Start();
  bool enabled() const { return !folder_.empty(); }

  // --- Snapshots of a tenant

  struct Snapshot {
    std::string name;
    int64_t num_bytes = 0, position = 0;  // position: 0 in lists
  };
  static absl::Status CheckName(const std::string& name);
  // That there is a folder, and the name is one.
  absl::Status Check(const std::string& name) const;
  // In the place of one of that name. RESOURCE_EXHAUSTED: the budget, or the disk, is full; what
  // was there then stands.
  absl::StatusOr<Snapshot> Write(const std::string& tenant, const std::string& name,
                                 const StateImage& image, const StateNotes& notes);
  absl::StatusOr<StateFile> Read(const std::string& tenant, const std::string& name) const;
  absl::StatusOr<std::vector<Snapshot>> List(const std::string& tenant) const;
  absl::Status Delete(const std::string& tenant, const std::string& name);
  // The file of a snapshot that is there. NOT_FOUND.
  absl::StatusOr<std::string> Path(const std::string& tenant, const std::string& name) const;

  // A place for a file that is being received as a snapshot of some name, and what came there.
  absl::StatusOr<std::string> ImportPath();
  absl::StatusOr<StateFile> ReadImport(const std::string& path, const std::string& name) const;

  // --- Idle sessions

  struct IdleFile {
    std::string path;  // "": none
    int64_t num_bytes = 0;
  };
  // `key`: of the state, given once.
  absl::StatusOr<IdleFile> WriteIdle(int64_t key, const StateImage& image, const StateNotes& notes);
  absl::StatusOr<StateFile> ReadIdle(const std::string& path, const std::string& session_id) const;
  void Remove(const IdleFile& file);

  int64_t used_bytes() const;
  int64_t free_bytes() const;
  int64_t num_errors() const;  // files that could not be written; what was to be in them stands

 private:
  std::string TenantFolder(const std::string& tenant) const;
  std::string PathOf(const std::string& tenant, const std::string& name) const;
  // Returns the bytes of the file that is there now; what it replaced is no longer counted.
  absl::StatusOr<int64_t> WriteFile(const std::string& path, const StateImage& image,
                                    const StateNotes& notes);
  void CountError();

  const std::string folder_;
  const int64_t max_bytes_;
  const StateLayout layout_;

  std::mutex placing_;        // held while a snapshot's file is put in place or removed
  mutable std::mutex mutex_;  // guards the rest; no other is taken under it
  int64_t next_import_ = 0;
  int64_t used_bytes_ = 0;
  int64_t num_errors_ = 0;
};

}  // namespace godwit
