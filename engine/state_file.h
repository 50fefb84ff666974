#pragma once
// Snapshot files: a stored state (StateImage) with what it is a state of, as safetensors. One
// tensor a component and kind ("layers.0.lightning.base", ".rows", ".blocks"; a draft model's are
// named "draft."), and a manifest in __metadata__: SHA-256 of the whole file with its own digits as
// zeros (over the SHA-256 of each 4 MiB of it, 32 bytes each), model, type, rotation, position,
// token after the state, the draft's bookkeeping. Penalty counts are a component like the others.
// A file goes from one kind of device to another: an image's layout is no device's own.
// Any thread.

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "engine/state_image.h"

namespace godwit {

// How the states of an engine lie in an image, and of what they are states.
struct StateLayout {
  std::vector<StateComponent> components;
  int64_t window_rows = 0;
  int64_t vocab_size = 0;
  std::string dtype;         // "bf16", "f32"
  std::string model;         // fingerprint of the weights
  std::string draft;         // of the draft model's; "": none
  int64_t max_position = 0;  // the context
};
StateLayout MakeStateLayout(const ModelCard& card, std::string model, std::string draft);

// Of a checkpoint: SHA-256 over config.json and, of each weights file, its name, size, header and
// 64 KiB at each of 16 places. The status of a file that cannot be read.
absl::StatusOr<std::string> FingerprintModel(const std::string& folder);
std::string FingerprintText(const std::string& text);  // of a model without files

// What the owner of the state needs besides. The rotation is that of RopeOfRequest(rope, length).
struct StateNotes {
  std::string rope_digest;  // RopeRegime
  std::string rope;         // JSON of a request's own; "": the model's
  int64_t rope_length = 0;  // positions that it was chosen for
};

// Called at "create", "header", "data", "sync", "rename", "folder", each before it happens.
using FileFault = std::function<void(const char* phase)>;

// Written to a temporary name beside `path`, synced, renamed over it, and the folder synced:
// whoever is stopped at any moment leaves the old file or the new one. The status names the path.
absl::Status WriteStateFile(const std::string& path, const StateLayout& layout,
                            const StateImage& image, const StateNotes& notes,
                            const FileFault& fault = {});

struct StateFile {
  std::shared_ptr<const StateImage> image;
  StateNotes notes;
};
struct ReadStateOptions {
  int64_t max_bytes = int64_t{1} << 40;
  bool check_values = false;  // a NaN or infinity is DATA_LOSS; for files from elsewhere
};
// DATA_LOSS: not a snapshot, cut short, changed or with impossible contents; FAILED_PRECONDITION:
// of another model, type or version of the format; RESOURCE_EXHAUSTED: more than max_bytes;
// NOT_FOUND. A state of another draft model, or of none, is read without that part.
absl::StatusOr<StateFile> ReadStateFile(const std::string& path, const StateLayout& layout,
                                        const ReadStateOptions& options = {});

}  // namespace godwit
