# Language, warnings, optimisation, output folders and sanitizers of every target.

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
# Hidden visibility keeps the last protobuf symbols out of the dynamic symbol table (Grpc.cmake
# says why none may be there).
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE RelWithDebInfo CACHE STRING "" FORCE)
endif()
# Line tables only: enough for a backtrace, and files that include gRPC compile faster than with
# -g. The asan and tsan presets are Debug builds: asserts on, full debug information, -O1 because
# the model tests take minutes at -O0.
set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O2 -g1 -DNDEBUG")
set(CMAKE_CXX_FLAGS_DEBUG "-O1 -g")

# The executable, libgodwit_spm.so and libgodwit_cuda.so lie side by side, in the build folder as
# when installed.
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_BUILD_RPATH_USE_ORIGIN ON)
set(CMAKE_INSTALL_RPATH "$ORIGIN")

if(GODWIT_CCACHE)
  find_program(GODWIT_CCACHE_PROGRAM ccache)
  mark_as_advanced(GODWIT_CCACHE_PROGRAM)
  if(GODWIT_CCACHE_PROGRAM)
    set(CMAKE_CXX_COMPILER_LAUNCHER ${GODWIT_CCACHE_PROGRAM})
    set(CMAKE_CUDA_COMPILER_LAUNCHER ${GODWIT_CCACHE_PROGRAM})
  endif()
endif()

# Options of our own code; generated protobuf code takes only the options above.
add_library(godwit_options INTERFACE)
target_include_directories(godwit_options INTERFACE ${PROJECT_SOURCE_DIR})
target_compile_options(godwit_options INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Werror>
  # Designated initialisers name what differs from the default; the rest is the default on purpose.
  $<$<COMPILE_LANGUAGE:CXX>:-Wno-missing-field-initializers>
  # g++ 12 reports "literal" + std::string (GCC bug 105651).
  $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CXX_COMPILER_ID:GNU>>:-Wno-restrict>
  # A product and a sum are fused where the source says fma and nowhere else: bit-equality between
  # two code paths must not depend on what the compiler inlined.
  $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off>)

# Sections nobody refers to are dropped: the archives of gRPC are compiled this way, so is our code.
add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-ffunction-sections>
                    $<$<COMPILE_LANGUAGE:CXX>:-fdata-sections>)
add_link_options(LINKER:--gc-sections LINKER:--as-needed LINKER:--no-undefined)

if(GODWIT_SANITIZE)
  add_compile_options(
    $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${GODWIT_SANITIZE}>
    $<$<COMPILE_LANGUAGE:CXX>:-fno-sanitize-recover=all>
    $<$<COMPILE_LANGUAGE:CXX>:-fno-omit-frame-pointer>
    # False positives of g++ 12 in instrumented code.
    $<$<COMPILE_LANGUAGE:CXX>:-Wno-maybe-uninitialized>)
  add_link_options(-fsanitize=${GODWIT_SANITIZE})
endif()
