#pragma once
// With whom a request shares computed prompts.

#include <string>
#include <string_view>

#include "engine/rope_regime.h"

namespace godwit {

// A SHA-256 over the parts, each with its length before it so that no two lists of parts make the
// same bytes, and under a label of its own so that it is no digest of anything else. `tenant`:
// whose token the call had; `salt`: the request's own, "" for none.
std::string PrefixDomain(std::string_view model, const RopeRegime& regime, std::string_view tenant,
                         std::string_view salt);

}  // namespace godwit
