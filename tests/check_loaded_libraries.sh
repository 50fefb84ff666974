#!/bin/sh
# check_loaded_libraries.sh FILE...
# What the loader brings in, dependencies of dependencies included, has no second protobuf, gRPC or
# Abseil in it, and no CUDA.
bad=$(for file in "$@"; do
  ldd "$file" | grep -E 'lib(protobuf|grpc|absl|cuda|cublas)|not found' | sed "s|^|$file:|"
done)
[ -z "$bad" ] || { echo "$bad"; exit 1; }
