#!/usr/bin/env bash
# The larger pair, from a corpus to two folders that godwit loads: OUT/target and OUT/draft.
#
#   pair.sh CORPUS TOKENIZER OUT [toy]
#
# CORPUS holds the works of corpus.tsv and what debian_corpus.py wrote, TOKENIZER comes from
# "tokenizer.py train --code". On one H100 it takes about 6.5 minutes: TARGET_SECONDS and DRAFT_SECONDS of
# training (schedules follow the clock), the rest encodes, compiles and labels. toy: seconds on a CPU,
# the same steps at a hundredth of the size.
set -euo pipefail
corpus=$1 tokenizer=$2 out=$3 size=${4:-full}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
mkdir -p "$out"
since() { echo "[$SECONDS s] $*"; }

target=() draft=() labels=(--label-tokens 24000000) compile=yes
lanes=${LANES:-16}
if [[ $size == toy ]]; then
  small=(--no-compile --length 128 --lanes 4 --evals 2)
  target=("${small[@]}" --set dim=128 layers=3 heads=2 glu=192)
  draft=("${small[@]}" --set dim=64 layers=2 heads=1 glu=96)
  labels=(--label-tokens 20000) compile=no
else
  target=(--evals 4 --lanes "$lanes") draft=(--evals 3)
fi
# So little of the text is read twice that nothing needs dropout.
train_target() { "$python" "$here/train.py" pair-target --dropout 0 --lr 0.008 "$@"; }
train_draft() { "$python" "$here/train.py" pair-draft --dropout 0 --distill 0.9 --distance 2 "$@"; }

# Draft and teacher are compiled while the corpus is encoded and the target compiles.
compiling=
if [[ $compile == yes ]]; then
  train_draft --data none --out "$out/compile" --seconds 1 --compile-only --teacher pair-target "${draft[@]}" \
    > "$out/compile.log" 2>&1 &
  compiling=$!
fi
"$python" "$here/tokenizer.py" encode --corpus "$corpus" --model "$tokenizer" --out "$out/data" --workers "$(nproc)" \
  --split-bytes 40000
since encoded
train_target --data "$out/data" --out "$out/run-target" --seconds "${TARGET_SECONDS:-200}" "${target[@]}"
since target trained
"$python" "$here/export.py" folder "$out/run-target/model.pt" --tokenizer "$tokenizer" --bos 2 --out "$out/target" &
exporting=$!
[[ -z $compiling ]] || wait "$compiling" || tail -3 "$out/compile.log"
train_draft --data "$out/data" --out "$out/run-draft" --seconds "${DRAFT_SECONDS:-85}" "${labels[@]}" \
  --teacher "$out/run-target/model.pt" "${draft[@]}"
wait "$exporting"
"$python" "$here/export.py" folder "$out/run-draft/model.pt" --tokenizer "$tokenizer" --bos 2 --out "$out/draft"
since draft trained
