#pragma once
// Which instruction set this process uses.

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/cpu/isa.h"

namespace godwit {

// "": the best that this machine has. Asks the kernel for the AMX tile state on first need.
// INVALID_ARGUMENT: unknown name; FAILED_PRECONDITION: this machine lacks it.
absl::StatusOr<const IsaTable*> SelectIsa(absl::string_view name);

}  // namespace godwit
