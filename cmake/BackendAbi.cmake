# godwit::backend_abi, the generated header kernels/backend_abi.h: a number that the executable and a
# back end plugin must agree on. It is a hash of the headers whose layouts cross the boundary, so a
# plugin built from other headers is refused by name and never called.
set(_headers
  ${PROJECT_SOURCE_DIR}/kernels/ops.h
  ${PROJECT_SOURCE_DIR}/kernels/backend.h
  ${PROJECT_SOURCE_DIR}/kernels/base/op_status.h
  ${PROJECT_SOURCE_DIR}/kernels/base/tensor.h)
set_property(DIRECTORY ${PROJECT_SOURCE_DIR} APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${_headers})

set(_digests)
foreach(_header IN LISTS _headers)
  file(SHA256 ${_header} _digest)
  string(APPEND _digests ${_digest})
endforeach()
string(SHA256 _digest "${_digests}")
string(SUBSTRING ${_digest} 0 16 GODWIT_BACKEND_ABI)
configure_file(${PROJECT_SOURCE_DIR}/cmake/backend_abi.h.in
  ${PROJECT_BINARY_DIR}/generated/kernels/backend_abi.h @ONLY)

add_library(godwit_backend_abi INTERFACE)
target_include_directories(godwit_backend_abi INTERFACE ${PROJECT_BINARY_DIR}/generated)
add_library(godwit::backend_abi ALIAS godwit_backend_abi)
