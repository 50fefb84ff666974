#!/usr/bin/env bash
# Every figure of the CUDA section of docs/performance.md on one GPU, about 8 minutes in all:
#
#     ./dev build --preset cuda && bench/h100_report.sh OUT_FOLDER [PART...]
#
# Without PART all of them, in this order. Each prints the device and its ceilings; OUT_FOLDER/PART.txt is its log. BIN is the folder of the
# executable (build/cuda/bin), TESTS that of the tests (build/cuda/tests), GODWIT_TEST_DATA that of golden/ (or unset: those cases skip).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?usage: bench/h100_report.sh OUT_FOLDER [PART...]}
shift
bin=${BIN:-build/cuda/bin} tests=${TESTS:-build/cuda/tests}
mkdir -p "$out"
failures=0

tests_on_cuda() {
  local test status=0
  for test in conformance lightning_attention lightning_prefill golden replay; do
    GODWIT_BIN_DIR=$bin "$tests/${test}_test" --gtest_filter='*cuda*:*Cuda*:*Gpu*' --gtest_brief=1 || status=1
  done
  return "$status"
}
engine() { "$bin/godwit" bench engine "$@"; }
tnl_7b_decode() { engine --shape tnl-7b --phase decode --contexts 1k,4k,16k,32k,64k,256k,1M --output "$out/tnl_7b_decode.json"; }
tnl_7b_batch() { engine --shape tnl-7b --phase decode --contexts 1k,128k --batches 32,256; }
tnl_7b_prefill() { engine --shape tnl-7b --phase prefill --lengths 4k,64k,1M; }
tnl_7b_deterministic() { engine --shape tnl-7b --contexts 1k --batches 1,32,256 --lengths 4k --deterministic; }
tnl_1b() { engine --shape tnl-1b --contexts 1k --batches 1,64,256 --lengths 4k; }
llama_2_7b() { engine --shape llama-2-7b --contexts 512 --batches 1,32 --lengths 4k; }
llama_2_13b() { engine --shape llama-2-13b --contexts 512 --batches 1 --lengths 4k; }
# One process for each context, with memory for it and its copy that decodes: what a softmax model needs grows with it.
llama_2_7b_contexts() {
  local tokens
  for tokens in 1024 4096 16384 65536; do
    engine --shape llama-2-7b --phase decode --contexts "$tokens" --kv-memory "$(awk "BEGIN {print (2 * $tokens + 512) * 512 / 1024 / 1024}")" \
      --output "$out/llama_2_7b_$tokens.json"
  done
}
kernels() { "$bin/godwit" bench kernels; }
peers() {
  "${PYTHON:-python3}" bench/compare_peers.py --bin "$bin" --prefill 4x2048,1x8192,4x32768,1x131072,1x524288 --decode 1,32,256 \
    --softmax 1x8192,1x32768,4x8192 --paged 1x512,1x4096,1x32768,16x32768,64x4096
}

# serve SHAPE SERVE_ARG... -- BENCH_ARG...: load against a server of random weights; then what of its steps the device did not cover.
serve() {
  local shape=$1 log serve_args=() server ports status
  shift
  while [[ $1 != -- ]]; do serve_args+=("$1"); shift; done
  shift
  log=$(mktemp)
  "$bin/godwit" serve --shape "$shape" --listen 127.0.0.1:0 --metrics-listen 127.0.0.1:0 "${serve_args[@]}" > "$log" 2>&1 &
  server=$!
  until grep -q '^godwit: serving' "$log"; do
    kill -0 "$server" 2> /dev/null || { cat "$log"; return 1; }
    sleep 0.2
  done
  cat "$log"
  ports=$(sed -nE 's|^godwit: serving .* on port ([0-9]+);.*/metrics on port ([0-9]+).*|\1 \2|p' "$log")
  "$bin/godwit" bench serve --server "127.0.0.1:${ports% *}" "$@"
  status=$?
  exec 3<> "/dev/tcp/127.0.0.1/${ports#* }"
  printf 'GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' >&3
  tr -d '\r' <&3 | grep -E '^godwit_step_(overhead|time|duration)?[a-z_]*seconds'
  exec 3>&-
  kill -TERM "$server"
  wait "$server"
  rm -f "$log"
  return "$status"
}
server_llama_2_7b() { serve llama-2-7b -- --concurrency 32 --requests 32 --prompt-tokens 512 --output-tokens 128; }
server_tnl_1b() { serve tnl-1b -- --concurrency 64 --requests 256 --prompt-tokens 64 --output-tokens 256; }

parts=("$@")
((${#parts[@]})) || parts=(tests_on_cuda tnl_7b_decode tnl_7b_batch tnl_7b_prefill llama_2_7b server_llama_2_7b server_tnl_1b
  peers kernels tnl_7b_deterministic tnl_1b llama_2_13b llama_2_7b_contexts)
for part in "${parts[@]}"; do
  begin=$SECONDS
  echo "== $part"
  "$part" 2>&1 | tee "$out/$part.txt" || { echo "$part failed"; failures=1; }
  echo "== $part: $((SECONDS - begin)) s"
done
exit "$failures"
