#pragma once
// absl::Status helpers, and the wrapping of a back end's OpStatus. Host side only (never in a plugin).

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/base/op_status.h"

namespace godwit {

inline absl::Status ToStatus(const OpStatus& status) {
  if (status.ok()) return absl::OkStatus();
  return absl::Status(static_cast<absl::StatusCode>(status.code),
                      status.text == nullptr ? absl::string_view("back end error") : absl::string_view(status.text));
}
inline absl::Status ToStatus(absl::Status status) { return status; }

}  // namespace godwit

#define GODWIT_CONCAT_INNER(a, b) a##b
#define GODWIT_CONCAT(a, b) GODWIT_CONCAT_INNER(a, b)

// Takes an absl::Status or an OpStatus.
#define RETURN_IF_ERROR(expression)                                              \
  do {                                                                           \
    if (absl::Status status_ = ::godwit::ToStatus(expression); !status_.ok()) { \
      return status_;                                                            \
    }                                                                            \
  } while (false)

#define ASSIGN_OR_RETURN(declaration, expression) \
  ASSIGN_OR_RETURN_IMPL(GODWIT_CONCAT(statusor_, __LINE__), declaration, expression)
#define ASSIGN_OR_RETURN_IMPL(temporary, declaration, expression) \
  auto temporary = (expression);                                  \
  if (!temporary.ok()) return temporary.status();                 \
  declaration = *std::move(temporary)
