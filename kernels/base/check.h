#pragma once
// CHECK: our own bugs only. What a caller or the world can cause is an absl::Status.

#include <cstdio>
#include <cstdlib>

#define GODWIT_CHECK(condition)                                                                   \
  do {                                                                                            \
    if (!(condition)) [[unlikely]] {                                                              \
      std::fprintf(stderr, "%s:%d: CHECK failed: %s\n", __FILE__, __LINE__, #condition);          \
      std::abort();                                                                               \
    }                                                                                             \
  } while (false)
