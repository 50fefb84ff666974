#pragma once
// The version of the build, from CMakeLists.txt (project VERSION).

namespace godwit {

inline constexpr char kVersion[] = GODWIT_VERSION;

}  // namespace godwit
