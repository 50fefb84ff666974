#!/usr/bin/env bash
# shipped_model_test.sh GODWIT MODELS: the server as its own process, the client as another.
set -euo pipefail
godwit=$1
models=$2
work=$(mktemp -d)
server=
# shellcheck disable=SC2317  # the trap calls it
cleanup() {
  [[ -z $server ]] || kill -KILL "$server" 2> /dev/null || true
  rm -rf "$work"
}
trap cleanup EXIT

fail() { echo "FAILED: $*"; cat "$work"/*.log; exit 1; }

for model in godwit-tale godwit-tale-draft; do
  : > "$work/serve.log"  # now, not when the server starts: the last one's first line would be found
  "$godwit" serve --model "$models/$model" --listen 127.0.0.1:0 --metrics-listen 127.0.0.1:0 \
    > "$work/serve.log" 2>&1 &
  server=$!
  for ((attempt = 0; attempt < 1200; ++attempt)); do
    grep -q '^godwit: serving' "$work/serve.log" && break
    kill -0 "$server" 2> /dev/null || fail "$model: the server ended"
    sleep 0.05
  done
  port=$(sed -nE 's/^godwit: serving .* on port ([0-9]+);.*/\1/p' "$work/serve.log")
  metrics_port=$(sed -nE 's|^godwit: serving .*/metrics on port ([0-9]+).*|\1|p' "$work/serve.log")
  [[ -n $port && -n $metrics_port ]] || fail "$model: no ports in the server's first line"

  [[ $("$godwit" health --server "127.0.0.1:$port") == SERVING ]] || fail "$model: not SERVING"

  # Over gRPC, in chunks, and offline: the same text.
  prompt="The king had three sons, and"
  "$godwit" complete --server "127.0.0.1:$port" --prompt "$prompt" --max-tokens 48 --temperature 0 \
    --quiet > "$work/streamed" 2> "$work/complete.log" || fail "$model: complete"
  "$godwit" generate --model "$models/$model" --prompt "$prompt" --max-tokens 48 --temperature 0 \
    > "$work/offline" 2> "$work/generate.log" || fail "$model: generate"
  (($(wc -c < "$work/streamed") > 60)) || fail "$model: only $(wc -c < "$work/streamed") bytes"
  diff "$work/streamed" "$work/offline" || fail "$model: streamed and offline text differ"

  exec 3<> "/dev/tcp/127.0.0.1/$metrics_port"
  printf 'GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n' >&3
  tr -d '\r' <&3 > "$work/metrics"
  exec 3>&-
  grep -q "^godwit_generation_tokens_total{model_name=\"$model\"} 48$" "$work/metrics" \
    || fail "$model: $(grep generation_tokens "$work/metrics")"

  kill -TERM "$server"
  wait "$server" || fail "$model: exit $? after SIGTERM"
  server=
done
echo "both shipped models serve, agree with offline generation, and stop"
