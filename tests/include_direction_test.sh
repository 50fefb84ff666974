#!/usr/bin/env bash
# Fails when an #include goes up, sideways, or reaches a third-party library from a folder that may
# not know it: the table of docs/architecture.md section 1.
#
#   include_direction_test.sh ROOT              checks the tree
#   include_direction_test.sh --planted         checks that each kind of violation is found
set -euo pipefail

# FILE  INCLUDE  per line; prints the violations, fails when there are any.
check_edges() {
  awk '
    # May a file of `folder` include `path` of folder `to`?
    function allowed(file, folder, to, path) {
      if (folder == "tests" || folder == "bench") return 1
      if (to == folder) return 1
      # The macros CHECK and RETURN_IF_ERROR are for everyone but the leaves.
      if (path ~ /^kernels\/base\/(check|status)\.h$/) return folder != "tokenizer" && folder != "proto"
      if (folder == "kernels") return to == "kernels/base"
      if (folder ~ /^kernels\/(ref|cpu|cuda)$/) return to == "kernels" || to == "kernels/base"
      if (folder == "engine") return to ~ /^kernels(\/base|\/cpu)?$/
      if (folder == "scheduler")
        return path ~ /^engine\/(batch|cache_manager)\.h$/ || to == "kernels/base"
      if (folder == "server") return to ~ /^(scheduler|tokenizer|proto|engine)$/
      if (folder == "cli") return to ~ /^(server|scheduler|proto|tokenizer|engine|kernels(\/base)?)$/
      return 0
    }
    # The file that may use the third-party header, or "" when it is none of those.
    function third_party_home(path) {
      if (path ~ /^(grpc|grpcpp|google\/protobuf)\//) return "^(proto|server|cli|tests|bench)/"
      if (path ~ /^prometheus\//) return "^(server|tests)/"
      if (path ~ /^sentencepiece/) return "^tokenizer/[a-z_]*\\.cc$"
      if (path ~ /^nlohmann\//)
        return "^(engine/(json_object|safetensors)\\.cc$|cli/|tests/|bench/)"
      if (path ~ /^CLI\//) return "^(cli|bench)/"
      if (path ~ /^(cuda|cublas|cub\/|thrust\/|cooperative_groups|mma\.h|nv)/) return "^kernels/cuda/"
      if (path ~ /^(dnnl|oneapi|cblas|mkl)/) return "^(kernels/cpu|bench)/"
      if (path ~ /^(gtest|gmock)\//) return "^tests/"
      if (path ~ /^benchmark\//) return "^bench/"
      # The thread sanitizer cannot see into the packaged Abseil: std::mutex below the server.
      if (path ~ /^absl\/synchronization\//) return "^(server|cli|tests|bench)/"
      return ""
    }
    function folder_of(path) {
      if (path ~ /\.pb\.h$/) return "proto"
      if (match(path, /^kernels\/(base|ref|cpu|cuda)\//)) return substr(path, 1, RLENGTH - 1)
      if (match(path, /^(proto|tokenizer|kernels|engine|scheduler|server|cli|tests|bench)\//))
        return substr(path, 1, RLENGTH - 1)
      return ""
    }
    {
      file = $1; quoted = ($2 ~ /^"/); path = substr($2, 2, length($2) - 2)
      folder = folder_of(file); to = folder_of(path); home = third_party_home(path)
      why = ""
      if (home != "") { if (file !~ home) why = folder " may not use this library" }
      else if (to != "") { if (!allowed(file, folder, to, path)) why = folder " may not see " to }
      else if (quoted && path !~ /^absl\//) why = "write the path from the root of the project"
      if (folder == "tokenizer" && file ~ /spm/ && path ~ /^absl\//)
        why = "sentencepiece and Abseil do not share a file"
      if (folder == "kernels/cuda" && path ~ /^absl\//) why = "no Abseil crosses into the plugin"
      if (why != "") { print file ": #include " $2 ": " why; bad = 1 }
    }
    END { exit bad }'
}

check_tree() {
  local root=$1 files
  cd "$root"
  mapfile -t files < <(find proto tokenizer kernels engine scheduler server cli tests bench \
    \( -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) 2> /dev/null | sort)
  ((${#files[@]})) || { echo "no source files under $root"; exit 1; }
  grep -HoE '^[[:space:]]*#[[:space:]]*include[[:space:]]*(<[^>]*>|"[^"]*")' "${files[@]}" \
    | sed -E 's/:[[:space:]]*#[[:space:]]*include[[:space:]]*/ /' | check_edges
  echo "${#files[@]} files, no include goes up"
}

expect() {  # expect good|bad FILE INCLUDE
  local verdict=good
  check_edges <<< "$2 $3" > /dev/null || verdict=bad
  [[ $verdict == "$1" ]] || { echo "$2 including $3 is called $verdict, but it is $1"; failed=1; }
}

check_planted() {
  local failed=0 root
  expect good engine/engine.cc '"kernels/backend.h"'
  expect good engine/backend_loader.cc '"kernels/cpu/cpu_backend.h"'
  expect good engine/safetensors.cc '<nlohmann/json.hpp>'
  expect good scheduler/scheduler.h '"engine/batch.h"'
  expect good scheduler/scheduler.cc '"kernels/base/check.h"'
  expect good server/server.cc '"godwit/v1/inference.grpc.pb.h"'
  expect good server/metrics.cc '<prometheus/registry.h>'
  expect good cli/main.cc '<CLI/CLI.hpp>'
  expect good cli/step_driver.cc '"scheduler/scheduler.h"'
  expect good tests/engine/engine_test.cc '"kernels/ref/ref.h"'
  expect good kernels/cuda/backend.cc '<cublasLt.h>'
  expect good tokenizer/spm.cc '<sentencepiece_processor.h>'
  expect bad kernels/ops.h '"engine/batch.h"'
  expect bad kernels/base/tensor.h '"kernels/ops.h"'
  expect bad kernels/backend.cc '"kernels/cpu/cpu_backend.h"'
  expect bad kernels/cpu/linear.cc '"kernels/ref/ref.h"'
  expect bad kernels/cpu/linear.cc '<cuda_runtime.h>'
  expect bad kernels/cuda/backend.cc '"absl/status/status.h"'
  expect bad engine/engine.cc '"scheduler/request.h"'
  expect bad engine/engine.cc '"kernels/ref/ref.h"'
  expect bad engine/engine.cc '<nlohmann/json.hpp>'
  expect bad engine/engine.cc '"absl/synchronization/mutex.h"'
  expect bad scheduler/scheduler.cc '"engine/engine.h"'
  expect bad scheduler/scheduler.cc '"kernels/backend.h"'
  expect bad scheduler/scheduler.cc '<grpcpp/grpcpp.h>'
  expect bad scheduler/scheduler.cc '"tokenizer/tokenizer.h"'
  expect bad tokenizer/tokenizer.cc '"kernels/base/status.h"'
  expect bad tokenizer/tokenizer.h '<sentencepiece_processor.h>'
  expect bad tokenizer/spm.cc '"absl/status/status.h"'
  expect bad server/server.cc '"cli/main.h"'
  expect bad server/server.cc '"kernels/backend.h"'
  expect bad server/server.cc '<CLI/CLI.hpp>'
  expect bad cli/main.cc '"kernels/cpu/cpu_backend.h"'
  expect bad engine/engine.cc '"tests/testing/fake.h"'
  expect bad engine/engine.cc '"engine.h"'
  expect bad engine/engine.cc '<gtest/gtest.h>'

  # And through the file system, with the spellings of #include that a compiler takes.
  root=$(mktemp -d)
  mkdir -p "$root/engine"
  printf '#pragma once\n#include <vector>\n' > "$root/engine/a.h"
  ("$0" "$root" > /dev/null) || { echo "a clean tree fails"; failed=1; }
  printf '  #  include"scheduler/request.h"  // up\n' > "$root/engine/b.cc"
  if ("$0" "$root" > /dev/null); then echo "an upward include in a file is not found"; failed=1; fi
  rm -rf "$root"
  exit "$failed"
}

case ${1:-} in
  --planted) check_planted ;;
  '') echo "usage: $0 ROOT | --planted" >&2; exit 2 ;;
  *) check_tree "$1" ;;
esac
