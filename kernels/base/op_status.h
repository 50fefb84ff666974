#pragma once
// The status that crosses the back end boundary (a plugin may be another shared object, so: plain data only).

#include <cstdint>

namespace godwit {

// Values equal absl::StatusCode, so that the host wraps one without a table.
enum class OpCode : int32_t {
  kOk = 0,
  kInvalidArgument = 3,
  kResourceExhausted = 8,
  kFailedPrecondition = 9,
  kUnimplemented = 12,
  kInternal = 13,
  kUnavailable = 14,  // the device is lost
};

struct OpStatus {
  OpCode code = OpCode::kOk;
  // Names what, where, value and limit. Owned by the producer: valid on this thread until its next call into the
  // same back end. Null when ok.
  const char* text = nullptr;

  bool ok() const { return code == OpCode::kOk; }
};

}  // namespace godwit
