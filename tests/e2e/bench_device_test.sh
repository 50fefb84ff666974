#!/usr/bin/env bash
# bench_device_test.sh GODWIT: the benchmarks of a device run on the CPU too, on tiny shapes, and
# print a figure for everything that was asked for.
set -uo pipefail
godwit=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0

expect() {  # expect COUNT WORD: of the last output
  local got
  got=$(grep -cF -- "$2" "$work/out")
  if ((got != $1)); then
    echo "'$2' is in $got lines, not $1, of:"
    cat "$work/out"
    failures=1
  fi
}
run() {
  "$godwit" bench "$@" --backend cpu > "$work/out" 2> "$work/err" < /dev/null && return
  echo "godwit bench $*: $(cat "$work/err")"
  failures=1
}

for shape in tnl-tiny llama-tiny; do
  run engine --shape "$shape" --contexts 64,200 --batches 1,3 --lengths 128,200 --steps 8 \
    --repeats 2 --json --output "$work/file"
  expect 6 '"tokens_per_s"'
  expect 4 '"percent_of_memory_floor"'
  expect 2 '"percent_of_product_rate"'
  cmp -s "$work/out" "$work/file" || { echo "--output differs from stdout"; failures=1; }
done
run engine --shape llama-tiny --phase decode --contexts 64,1M --steps 8 --kv-memory 0.01
expect 1 'no room for one'
expect 2 'decode  llama-tiny'
run kernels --size tiny --json
expect 83 '"percent_of_ceiling"'
run kernels --size tiny --filter paged
expect 6 paged_decode
expect 6 paged_prefill
exit "$failures"
