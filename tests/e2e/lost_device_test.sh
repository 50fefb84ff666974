#!/usr/bin/env bash
# lost_device_test.sh GODWIT PLUGIN MODELS: a device that is lost while a request runs. The server
# says why, turns NOT_SERVING, answers UNAVAILABLE until the drain limit, and exits with 1.
set -uo pipefail
godwit=$1
plugin=$2
model=$3/godwit-tale-draft
work=$(mktemp -d)
server=
# shellcheck disable=SC2317  # the trap calls it
cleanup() {
  [[ -z $server ]] || kill -KILL "$server" 2> /dev/null || true
  rm -rf "$work"
}
trap cleanup EXIT

fail() { echo "FAILED: $*"; tail -n 20 "$work"/*.log; exit 1; }

# The plugin is looked for beside the executable.
cp "$godwit" "$(dirname "$godwit")"/libgodwit_spm.so "$work"
cp "$plugin" "$work/libgodwit_cuda.so"
godwit=$work/godwit

"$godwit" serve --model "$model" --backend cuda --max-tokens-per-step 128 --max-sequences 4 \
  --listen 127.0.0.1:0 --metrics-listen "" --drain-timeout 4 > "$work/serve.log" 2>&1 &
server=$!
for ((attempt = 0; attempt < 1200; ++attempt)); do
  grep -q '^godwit: serving' "$work/serve.log" && break
  kill -0 "$server" 2> /dev/null || fail "the server ended"
  sleep 0.05
done
port=$(sed -nE 's/^godwit: serving .* on port ([0-9]+).*/\1/p' "$work/serve.log")
[[ -n $port ]] || fail "no port in the server's first line"

complete() {
  "$godwit" complete --server "127.0.0.1:$port" --prompt Once --max-tokens "$1" --temperature 0 \
    --quiet > "$work/complete.log" 2>&1
}
complete 8 || fail "the device works, the request does not"
complete 60 && fail "a request ended well on a lost device"
lost=$SECONDS
grep -q 'UNAVAILABLE: the device was lost' "$work/complete.log" || fail "another reason"
complete 8 && fail "a request ended well after the loss"
grep -q 'UNAVAILABLE: the device was lost' "$work/complete.log" || fail "another reason afterwards"
for ((attempt = 0; attempt < 40; ++attempt)); do
  state=$("$godwit" health --server "127.0.0.1:$port" --timeout 2 2>&1)
  [[ $state == *NOT_SERVING* ]] && break
  sleep 0.05
done
[[ $state == *NOT_SERVING* ]] || fail "health is $state"

wait "$server"
code=$?
server=
((code == 1)) || fail "exit $code, not 1"
((SECONDS - lost <= 20)) || fail "it took $((SECONDS - lost)) s to end"
grep -q 'the device is lost.*planted: the device fell off the bus' "$work/serve.log" \
  || fail "the server does not say why"
echo "a lost device is told to clients, probes and the operator"
