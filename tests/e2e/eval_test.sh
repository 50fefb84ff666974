#!/usr/bin/env bash
# eval_test.sh GODWIT MODELS: an evaluation of a model in its own process and of the same model
# behind a server give the same answers.
set -euo pipefail
godwit=$1
model=$2/godwit-tale-draft
work=$(mktemp -d)
server=
# shellcheck disable=SC2317  # the trap calls it
cleanup() {
  [[ -z $server ]] || kill -KILL "$server" 2> /dev/null || true
  rm -rf "$work"
}
trap cleanup EXIT

fail() { echo "FAILED: $*"; tail -n 20 "$work"/*; exit 1; }

"$godwit" serve --model "$model" --listen 127.0.0.1:0 --metrics-listen "" > "$work/serve.log" 2>&1 &
server=$!
for ((attempt = 0; attempt < 1200; ++attempt)); do
  grep -q '^godwit: serving' "$work/serve.log" && break
  kill -0 "$server" 2> /dev/null || fail "the server ended"
  sleep 0.05
done
port=$(sed -nE 's/^godwit: serving .* on port ([0-9]+).*/\1/p' "$work/serve.log")

both() {  # both NAME ARG...
  local name=$1
  shift
  "$godwit" eval "$@" --model "$model" --json --picture "$work/$name.svg" \
    > "$work/$name-offline" 2> "$work/$name.log" || fail "$name: offline"
  "$godwit" eval "$@" --server "127.0.0.1:$port" --json > "$work/$name-served" \
    2> "$work/$name.log" || fail "$name: served"
  diff <(grep -v '"target"' "$work/$name-offline") <(grep -v '"target"' "$work/$name-served") \
    || fail "$name: offline and served differ"
  grep -q '</svg>' "$work/$name.svg" || fail "$name: no picture"
}
both lines lines --lengths 3,9 --samples 3
both passkey passkey --lengths 128,256 --samples 3 --template vicuna
for ((line = 0; line < 400; ++line)); do echo "It rained on day $line. Nobody came."; done > "$work/text"
both niah niah --text "$work/text" --lengths 256 --samples 3
both perplexity perplexity-by-length --text "$work/text" --lengths 64,512 --samples 3

printf '{"prompt": "a", "expected_number": 1, "num_lines": 1}\n{}\n' > "$work/bad.jsonl"
code=0
"$godwit" eval lines --file "$work/bad.jsonl" --server "127.0.0.1:$port" 2> "$work/bad.log" || code=$?
((code == 2)) || fail "a bad file: exit $code, not 2"
grep -q 'bad.jsonl: line 2' "$work/bad.log" || fail "a bad file is not named"
echo "eval: offline = served"
