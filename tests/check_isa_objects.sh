#!/bin/sh
# check_isa_objects.sh ISA OBJECT...
# Object files compiled for one instruction set may define weak symbols only in the namespace named
# after it: of an inline function the linker keeps one copy for the whole program, and if that is
# the one with AVX-512 in it, the server dies of SIGILL on a machine without.
isa=$1
shift
bad=$(for object in "$@"; do
  nm -C --defined-only "$object" \
    | awk -v object="$object" -v isa="$isa::" '$2 ~ /^[WVu]$/ && !index($0, isa) {print object ": " $0}'
done)
[ -z "$bad" ] || { echo "$bad"; exit 1; }
