#pragma once
// The shapes of known models, as the text of their config.json: what a measurement without their
// weights is made from.

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace godwit {

// INVALID_ARGUMENT naming the known ones.
absl::StatusOr<std::string> ConfigOfShape(absl::string_view name);

std::vector<std::string> ShapeNames();

}  // namespace godwit
