#pragma once
// What a sequence's keys were rotated with, as a value for cache keys and snapshot files.

#include <array>
#include <cstdint>
#include <string>
#include <utility>

namespace godwit {

// A digest of a table's contents (frequencies, attention factor, pair layout). Equal regimes rotate
// alike, whatever method and length they came from, so that state computed under one may continue
// under the other; unequal ones never share state. All zero: a model without rotation. Not a
// cryptographic hash: a key across tenants hashes it once more, with its salt.
struct RopeRegime {
  std::array<uint64_t, 2> digest = {};

  std::string ToString() const;  // 32 hexadecimal digits

  friend bool operator==(const RopeRegime&, const RopeRegime&) = default;
  template <typename H>
  friend H AbslHashValue(H state, const RopeRegime& regime) {
    return H::combine(std::move(state), regime.digest[0], regime.digest[1]);
  }
};

}  // namespace godwit
