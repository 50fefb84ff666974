#!/usr/bin/env bash
# NVIDIA's compute-sanitizer over the CUDA kernels, on a machine with a GPU:
#
#     ./dev build --preset cuda && tests/kernels/sanitize_cuda.sh [OUT_FOLDER [TEST_BINARY...]]
#
# memcheck runs the tests named (conformance, lightning_attention and lightning_prefill without any; minutes each); racecheck,
# initcheck and synccheck run smallest_test, every kernel at its smallest shapes. TESTS and BIN are the folders of the tests and of the
# plugin (build/cuda/tests, build/cuda/bin), LIMIT_S the seconds a tool may take (600). Exits with 1 if a tool reports anything.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:-build/sanitize}
shift $(($# < 1 ? $# : 1))
tests=${TESTS:-build/cuda/tests}
export GODWIT_BIN_DIR=${BIN:-build/cuda/bin}
mkdir -p "$out"
failed=0

check() {  # TOOL TEST
  local tool=$1 test=$2 log=$out/$1_$2.txt begin=$SECONDS
  if timeout "${LIMIT_S:-600}" compute-sanitizer --tool "$tool" --error-exitcode 77 --print-limit 400 \
    "$tests/$test" --gtest_filter='*cuda*' --gtest_brief=1 > "$log" 2>&1; then
    echo "$tool $test: clean ($((SECONDS - begin)) s)"
  else
    echo "$tool $test: $(grep -E 'SUMMARY|FAILED' "$log" | tr '\n' ' ')($((SECONDS - begin)) s; $log)"
    grep -E '^=+ +(at|Error|Warning|Invalid|Uninit|Race|Barrier|in )' "$log" | sed 's/^=* *//; s/+0x[0-9a-f]*//; s/ in [^ ]*$//' | sort | uniq -c | sort -rn | head -20
    failed=1
  fi
}

(($#)) || set -- conformance_test lightning_attention_test lightning_prefill_test
for test in "$@"; do check memcheck "$test"; done
for tool in racecheck initcheck synccheck; do check "$tool" smallest_test; done
exit "$failed"
