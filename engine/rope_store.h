#pragma once
// The tables that the sequences of a step rotate with, in device memory at fixed addresses.

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/device_buffer.h"
#include "engine/rope_table.h"
#include "kernels/backend.h"

namespace godwit {

// Table 0 is the model's own. Table 1 + slot is that of the sequence in the slot, where its request
// rotates with another; it is uploaded in order with the steps when the slot holds a different one,
// which after admission is never. So there are no more regimes than slots, and no step uploads
// tables. Not thread-safe.
class RopeStore {
 public:
  // The back end must outlive the store.
  static absl::StatusOr<RopeStore> Create(Backend& backend, const RopeTable& own,
                                          int64_t num_slots);
  static int64_t DeviceBytes(int64_t rotary_dim, int64_t num_slots);

  static int32_t TableOf(int32_t slot) { return 1 + slot; }

  // The slot's sequence rotates with `table` from the next step on. As many frequencies as the
  // model's own.
  absl::Status Assign(int32_t slot, const RopeTable& table);

  const double* tables() const { return device_.as<double>(); }  // RopeArgs.tables
  int32_t num_tables() const { return static_cast<int32_t>(regimes_.size()); }

 private:
  RopeStore(Backend& backend, int64_t num_freqs) : backend_(&backend), num_freqs_(num_freqs) {}
  absl::Status Upload(int32_t index, const RopeTable& table);

  Backend* backend_;
  int64_t num_freqs_;
  DeviceBuffer device_;
  std::vector<RopeRegime> regimes_;  // by table, as the queue will have left them
};

}  // namespace godwit
