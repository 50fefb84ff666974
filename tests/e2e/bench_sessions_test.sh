#!/usr/bin/env bash
# bench_sessions_test.sh GODWIT MODELS: the states of a recurrent and of a softmax model are forked,
# saved and restored, and a document's forks answer as whoever reads it again.
set -uo pipefail
godwit=$1 models=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0

fail() {
  echo "$1, of:"
  grep -vE '"(mean|p50|p90|p99|max)"' "$work/out"
  cat "$work/err"
  failures=1
}
expect() {  # expect COUNT WORD: of the last output
  local got
  got=$(grep -cF -- "$2" "$work/out")
  ((got == $1)) || fail "'$2' is in $got lines, not $1"
}
run() {  # run CODE ARG...
  local code=$1
  shift
  "$godwit" bench sessions "$@" --backend cpu --repeats 2 --folder "$folder" \
    > "$work/out" 2> "$work/err" < /dev/null
  local got=$?
  ((got == code)) || fail "bench sessions $*: exit code $got, not $code"
}

folder=$work
document=(--document-tokens 2000 --questions 7 --question-tokens 5 --answer-tokens 6 --reread 4)
for model in "--model $models/godwit-tale-draft" "--shape llama-tiny --kv-memory 0.1"; do
  # shellcheck disable=SC2086  # two words each
  run 0 $model --contexts 64,1000,200 "${document[@]}" --json --output "$work/file"
  for figure in fork_us fork_and_launch_us save_ms restore_ms file_bytes; do expect 3 "\"$figure\""; done
  expect 1 '"document_tokens": 2048'
  expect 1 '"equal_answers": 4'
  distinct=$(sed -n 's/.*"distinct_answers": //p' "$work/out")
  ((distinct > 3)) || fail "the answers are too alike to tell anything"
  expect 1 '"ratio"'
  cmp -s "$work/out" "$work/file" || fail "--output differs from stdout"
done
# A softmax state grows with the context; a recurrent one does not.
run 0 --shape llama-tiny --kv-memory 0.01 --phase states --contexts 64,1M
expect 1 'no room for two'
run 0 --shape tnl-tiny --phase document "${document[@]}" --concurrency 1
expect 1 '4 of 4 answers equal'
expect 0 'fork us'
run 2 --shape tnl-tiny --contexts 64,x
folder=$work/absent
run 1 --shape tnl-tiny --phase states --contexts 64
grep -q "$work/absent.*No such file" "$work/err" || fail "the folder is not named"
[[ -z $(find "$work" -name 'godwit-bench-*') ]] || fail "a saved state is left behind"
exit "$failures"
