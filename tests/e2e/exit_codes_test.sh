#!/usr/bin/env bash
# exit_codes_test.sh GODWIT MODELS: 0 done, 2 usage, 3 model or back end cannot be loaded, 1 other;
# each failure is one line on stderr that names what is wrong, and nothing on stdout.
set -uo pipefail
godwit=$1
model=$2/godwit-tale-draft
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0

expect() {  # expect CODE WORD ARG...
  local code=$1 word=$2 got
  shift 2
  "$godwit" "$@" > "$work/out" 2> "$work/err" < /dev/null
  got=$?
  if ((got != code)); then
    echo "godwit $*: exit $got, not $code"
    failures=1
  fi
  if ((code != 0)) && [[ -n $(<"$work/out") ]]; then
    echo "godwit $*: failed, but wrote to stdout: $(head -n 1 "$work/out")"
    failures=1
  fi
  if ! grep -qF -- "$word" "$work/out" "$work/err"; then
    echo "godwit $*: '$word' is not in: $(cat "$work/err")"
    failures=1
  fi
}

mkdir "$work/empty"
cp -r "$model" "$work/cut" && truncate -s 100000 "$work/cut/model.safetensors"
printf 'not json' > "$work/empty/config.json"

expect 0 Usage --help
expect 0 --max-tokens generate --help
expect 0 parameters inspect "$model"
expect 0 '"token_ids"' generate --model "$model" --prompt Once --max-tokens 2 --json
expect 0 '"token_ids"' generate --model="$model" --token-ids=1,5,9 --max-tokens=2 --json --temperature=0
expect 2 --no-such-flag generate --model "$model" --prompt a --no-such-flag
expect 2 --prompt generate --model "$model"
expect 2 temperature generate --model "$model" --prompt a --temperature -1
expect 2 99999999 generate --model "$model" --token-ids 1,99999999
expect 2 no-such-command no-such-command
expect 3 "$work/none" generate --model "$work/none" --token-ids 1
expect 3 config.json generate --model "$work/empty" --token-ids 1
expect 3 model.safetensors generate --model "$work/cut" --token-ids 1
expect 3 "$work/none" serve --model "$work/none" --listen 127.0.0.1:0
expect 1 127.0.0.1:1 health --server 127.0.0.1:1 --timeout 2
expect 1 127.0.0.1:1 complete --server 127.0.0.1:1 --prompt a
exit "$failures"
