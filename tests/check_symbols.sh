#!/bin/sh
# check_symbols.sh FILE...
# No protobuf, Abseil or gRPC symbol may cross between the executable and a shared library: neither
# exported (libsentencepiece would bind to ours) nor undefined (we would bind to its protobuf-lite
# 3.14). A weak unresolved one ('w') is harmless. Nor may a file need the shared protobuf, gRPC,
# Abseil or CUDA libraries. libsentencepiece.so is the library of libgodwit_spm.so alone.
bad=$(for file in "$@"; do
  nm -DC "$file" | awk -v file="$file" \
    '$1 != "w" && /google::protobuf|absl::|grpc::|grpc_core::/ {print file ": symbol " $0}'
  needed=$(readelf -d "$file" | sed -n 's/.*NEEDED.*\[\(.*\)\]/\1/p')
  echo "$needed" | grep -E '^lib(protobuf|grpc|absl|cuda|cublas)' | sed "s|^|$file: needs |"
  case $file in
    *libgodwit_spm.so) ;;
    *) echo "$needed" | grep '^libsentencepiece' | sed "s|^|$file: needs |" ;;
  esac
done)
[ -z "$bad" ] || { echo "$bad"; exit 1; }
