# The functions that the CMakeLists.txt of each folder is written with. DEPS takes names of our own
# targets (engine, kernels: godwit::engine, godwit::kernels) and any imported target (godwit::absl,
# Threads::Threads); a name that is no target fails when CMake generates.
include(GoogleTest)

function(_godwit_deps out)
  set(result)
  foreach(dep IN LISTS ARGN)
    if(dep MATCHES "::|^/|^\\$")
      list(APPEND result ${dep})
    else()
      string(REGEX REPLACE "^godwit_" "" dep ${dep})
      list(APPEND result godwit::${dep})
    endif()
  endforeach()
  set(${out} ${result} PARENT_SCOPE)
endfunction()

# godwit_library(NAME x [SRCS a.cc...] [DEPS ...] [PRIVATE_DEPS ...])
# Static library godwit_x, alias godwit::x; without SRCS a header-only one. PRIVATE_DEPS are those
# that only the .cc files see (nlohmann_json, prometheus-cpp).
function(godwit_library)
  cmake_parse_arguments(L "" "NAME" "SRCS;DEPS;PRIVATE_DEPS" ${ARGN})
  set(target godwit_${L_NAME})
  _godwit_deps(deps ${L_DEPS})
  if(L_SRCS)
    add_library(${target} STATIC ${L_SRCS})
    target_link_libraries(${target} PUBLIC godwit_options ${deps} PRIVATE ${L_PRIVATE_DEPS})
  else()
    add_library(${target} INTERFACE)
    target_link_libraries(${target} INTERFACE godwit_options ${deps} ${L_PRIVATE_DEPS})
  endif()
  add_library(godwit::${L_NAME} ALIAS ${target})
endfunction()

# godwit_isa_sources(<target> ISA portable|avx2|avx512bf16|amx SRCS a.cc...)
# Compiles SRCS for one instruction set and links the objects into <target>. The same file may be
# given for several sets: GODWIT_ISA is defined as the name of the set, for its namespace. Such a
# file must not instantiate inline functions of other headers (std::vector, absl): the linker keeps
# one copy for the whole program, and it could be the one with AVX-512 in it.
# tests/check_isa_objects.sh looks.
function(godwit_isa_sources target)
  cmake_parse_arguments(I "" "ISA" "SRCS" ${ARGN})
  set(flags_portable)
  # Exactly what kernels/cpu/select_isa.cc asks the processor for.
  set(flags_avx2 -mavx2 -mfma -mf16c)
  set(flags_avx512bf16 ${flags_avx2} -mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl
    -mavx512bf16 -mprefer-vector-width=512)
  set(flags_amx ${flags_avx512bf16} -mamx-tile -mamx-bf16)
  if(NOT DEFINED flags_${I_ISA})
    if(NOT I_ISA STREQUAL "portable")
      message(FATAL_ERROR "godwit_isa_sources: unknown ISA '${I_ISA}'")
    endif()
  endif()
  set(objects ${target}_${I_ISA})
  if(NOT TARGET ${objects})
    add_library(${objects} OBJECT)
    target_compile_options(${objects} PRIVATE -O3 ${flags_${I_ISA}})
    target_compile_definitions(${objects} PRIVATE GODWIT_ISA=${I_ISA})
    target_include_directories(${objects} PRIVATE
      $<TARGET_PROPERTY:${target},INCLUDE_DIRECTORIES>)
    target_link_libraries(${objects} PRIVATE godwit_options)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${objects}>)
    set_property(GLOBAL APPEND PROPERTY GODWIT_ISA_OBJECTS ${objects})
  endif()
  target_sources(${objects} PRIVATE ${I_SRCS})
endfunction()

# godwit_executable(NAME godwit SRCS a.cc... [DEPS ...] [PRIVATE_DEPS ...])
function(godwit_executable)
  cmake_parse_arguments(E "" "NAME" "SRCS;DEPS" ${ARGN})
  _godwit_deps(deps ${E_DEPS})
  add_executable(${E_NAME} ${E_SRCS})
  target_link_libraries(${E_NAME} PRIVATE godwit_options ${deps})
endfunction()

# godwit_test(NAME subject_test SRCS subject_test.cc... DEPS ... [LABELS grpc ...]
#             [PROPERTIES TIMEOUT 60 ...])
# A GoogleTest executable in tests/ of the build folder; each TEST is one test of ctest. A test that
# runs gRPC carries the label grpc, and is not built for the thread sanitizer.
# Tests read: GODWIT_TEST_DATA (golden/ and assets/; unset where there is none: skip with a reason),
# GODWIT_SOURCE_DIR (models/), GODWIT_BIN_DIR (the executable).
function(godwit_test)
  cmake_parse_arguments(T "" "NAME" "SRCS;DEPS;LABELS;PROPERTIES" ${ARGN})
  if("grpc" IN_LIST T_LABELS AND GODWIT_SANITIZE MATCHES "thread")
    return()
  endif()
  _godwit_deps(deps ${T_DEPS})
  add_executable(${T_NAME} ${T_SRCS})
  target_link_libraries(${T_NAME} PRIVATE godwit_options ${deps} GTest::gmock GTest::gtest_main)
  set_target_properties(${T_NAME} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  if("grpc" IN_LIST T_LABELS)
    set_property(GLOBAL APPEND PROPERTY GODWIT_GRPC_TESTS ${T_NAME})
  endif()
  set(environment GODWIT_SOURCE_DIR=${PROJECT_SOURCE_DIR} GODWIT_BIN_DIR=${CMAKE_BINARY_DIR}/bin)
  if(GODWIT_TEST_DATA)
    list(APPEND environment GODWIT_TEST_DATA=${GODWIT_TEST_DATA})
  elseif(EXISTS ${PROJECT_SOURCE_DIR}/../shared/golden)
    list(APPEND environment GODWIT_TEST_DATA=${PROJECT_SOURCE_DIR}/../shared)
  endif()
  # Discovery at test time unescapes a list four times on its way to set_tests_properties.
  list(JOIN environment "\\\\\\\\\\\\\\\\;" environment)
  list(JOIN T_LABELS "\\\\\\\\\\\\\\\\;" labels)
  set(properties ENVIRONMENT "${environment}" TIMEOUT 300)
  if(labels)
    list(APPEND properties LABELS "${labels}")
  endif()
  gtest_discover_tests(${T_NAME} DISCOVERY_MODE PRE_TEST DISCOVERY_TIMEOUT 60
    PROPERTIES ${properties} ${T_PROPERTIES})
endfunction()

# godwit_benchmark(NAME bench_subject SRCS bench_subject.cc... DEPS ...)
# A Google Benchmark executable in bench/ of the build folder; ctest does not run it.
function(godwit_benchmark)
  cmake_parse_arguments(B "" "NAME" "SRCS;DEPS" ${ARGN})
  _godwit_deps(deps ${B_DEPS})
  add_executable(${B_NAME} ${B_SRCS})
  target_link_libraries(${B_NAME} PRIVATE godwit_options ${deps} benchmark::benchmark_main)
  set_target_properties(${B_NAME} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bench)
endfunction()
