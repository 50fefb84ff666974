#include "engine/rope_store.h"

#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace godwit {
namespace {

int64_t TableBytes(int64_t num_freqs) {
  return (num_freqs + 1) * static_cast<int64_t>(sizeof(double));
}

}  // namespace

int64_t RopeStore::DeviceBytes(int64_t rotary_dim, int64_t num_slots) {
  return (1 + num_slots) * TableBytes(rotary_dim / 2);
}

absl::StatusOr<RopeStore> RopeStore::Create(Backend& backend, const RopeTable& own,
                                            int64_t num_slots) {
  RopeStore store(backend, std::ssize(own.inv_freq));
  ASSIGN_OR_RETURN(store.device_,
                   DeviceBuffer::Allocate(backend, DeviceBytes(2 * store.num_freqs_, num_slots)));
  store.regimes_.resize(static_cast<size_t>(1 + num_slots));
  RETURN_IF_ERROR(store.Upload(0, own));
  return store;
}

absl::Status RopeStore::Assign(int32_t slot, const RopeTable& table) {
  const int32_t index = TableOf(slot);
  GODWIT_CHECK(index > 0 && index < num_tables());
  if (regimes_[static_cast<size_t>(index)] == table.regime) return absl::OkStatus();
  return Upload(index, table);
}

absl::Status RopeStore::Upload(int32_t index, const RopeTable& table) {
  GODWIT_CHECK(std::ssize(table.inv_freq) == num_freqs_);
  std::vector<double> entry = table.inv_freq;
  entry.push_back(table.attention_factor);
  RETURN_IF_ERROR(backend_->CopyFromHost(device_.bytes() + index * TableBytes(num_freqs_),
                                         entry.data(), TableBytes(num_freqs_)));
  regimes_[static_cast<size_t>(index)] = table.regime;
  return absl::OkStatus();
}

}  // namespace godwit
