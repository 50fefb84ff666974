# gRPC, protobuf, Abseil, upb, c-ares and re2 from the distribution's STATIC archives, none of
# their symbols exported.
#
# Why: libsentencepiece.so carries and exports its own protobuf-lite 3.14. With libprotobuf.so in
# the same process one binds to the other and aborts. The distribution's CMake packages (gRPC,
# absl, protobuf, re2) name shared libraries only, so CMake is asked for the code generators, and
# the archives are named here. No target may name gRPC::*, absl::* or protobuf::libprotobuf: one of
# them brings the shared protobuf back. tests/check_symbols.sh holds the line.
#
# godwit::absl   everything under kernels/, engine/ and scheduler/ may link it
# godwit::grpc   proto/ and what stands on it
find_package(Protobuf 3.21 REQUIRED)  # FindProtobuf: protobuf::protoc
find_program(GODWIT_GRPC_CPP_PLUGIN grpc_cpp_plugin REQUIRED)
find_package(OpenSSL REQUIRED)
find_package(ZLIB REQUIRED)
find_package(Threads REQUIRED)
mark_as_advanced(GODWIT_GRPC_CPP_PLUGIN)

# _godwit_archive_group(<name> ARCHIVES a.a... LINKS target...)
# One imported static library whose file is a linker script, GROUP(a.a b.a ...): the linker scans
# the group until nothing new is resolved, and CMake sees one library with ordinary dependencies,
# so a target that reaches Abseil twice (directly and through gRPC) names it once, in order.
function(_godwit_archive_group name)
  cmake_parse_arguments(G "" "" "ARCHIVES;LINKS" ${ARGN})
  set(script ${CMAKE_BINARY_DIR}/cmake/libgodwit_${name}.a)
  list(JOIN G_ARCHIVES "\n  " members)
  file(CONFIGURE OUTPUT ${script} CONTENT "GROUP (\n  ${members}\n)\n")
  add_library(godwit::${name} STATIC IMPORTED GLOBAL)
  set_target_properties(godwit::${name} PROPERTIES
    IMPORTED_LOCATION ${script}
    INTERFACE_LINK_LIBRARIES "${G_LINKS}"
    INTERFACE_LINK_OPTIONS LINKER:--exclude-libs,ALL)
endfunction()

# (pkg_check_modules on grpc++ gives the same list but takes 9 s at each configure.)
set(_archives)
foreach(_name IN ITEMS grpc++_reflection grpc++ grpc upb address_sorting gpr protobuf cares re2)
  find_library(GODWIT_ARCHIVE_${_name} NAMES lib${_name}.a REQUIRED)
  mark_as_advanced(GODWIT_ARCHIVE_${_name})
  list(APPEND _archives ${GODWIT_ARCHIVE_${_name}})
endforeach()
cmake_path(GET GODWIT_ARCHIVE_grpc PARENT_PATH _libdir)
file(GLOB _absl ${_libdir}/libabsl_*.a)
# The flags library registers command-line flags at start; nothing here uses it.
list(FILTER _absl EXCLUDE REGEX "/libabsl_flags_|failure_signal_handler")

_godwit_archive_group(absl ARCHIVES ${_absl} LINKS Threads::Threads)
_godwit_archive_group(grpc ARCHIVES ${_archives}
  LINKS godwit::absl OpenSSL::SSL OpenSSL::Crypto ZLIB::ZLIB Threads::Threads ${CMAKE_DL_LIBS})

# godwit_proto_library(NAME x [GRPC] ROOT dir FILES a/b.proto... [DEPS ...])
# C++ of the .proto files as target godwit_x, alias godwit::x; included as "a/b.pb.h".
function(godwit_proto_library)
  cmake_parse_arguments(P "GRPC" "NAME;ROOT" "FILES;DEPS" ${ARGN})
  set(target godwit_${P_NAME})
  set(out ${CMAKE_CURRENT_BINARY_DIR}/gen/${P_NAME})
  file(MAKE_DIRECTORY ${out})
  add_library(${target} STATIC)
  add_library(godwit::${P_NAME} ALIAS ${target})
  foreach(file IN LISTS P_FILES)
    string(REGEX REPLACE "\\.proto$" "" stem ${file})
    set(generated ${out}/${stem}.pb.cc ${out}/${stem}.pb.h)
    set(arguments --proto_path=${P_ROOT} --cpp_out=${out})
    if(P_GRPC)
      list(APPEND generated ${out}/${stem}.grpc.pb.cc ${out}/${stem}.grpc.pb.h)
      list(APPEND arguments --grpc_out=${out}
        --plugin=protoc-gen-grpc=${GODWIT_GRPC_CPP_PLUGIN})
    endif()
    add_custom_command(OUTPUT ${generated}
      COMMAND protobuf::protoc ${arguments} ${P_ROOT}/${file}
      DEPENDS ${P_ROOT}/${file}
      COMMENT "protoc ${file}" VERBATIM)
    target_sources(${target} PRIVATE ${generated})
  endforeach()
  target_include_directories(${target} SYSTEM PUBLIC ${out})
  target_link_libraries(${target} PUBLIC ${P_DEPS} godwit::grpc)
endfunction()
