#!/usr/bin/env bash
# The main job on a small real model: score the reference once, then train without it.
# Usage: demo.sh MODEL_FOLDER OUTPUT_FOLDER
set -euo pipefail
model=$1 out=$2
here=$(dirname "$0")
export HF_HUB_OFFLINE=1

run() {
    echo
    echo "\$ $*"
    "$@"
}

mkdir -p "$out"
run dpo-cache precompute --model "$model" --dataset "$here/data/train.jsonl" --cache "$out/cache" --name demo --split train
run dpo-cache precompute --model "$model" --dataset "$here/data/heldout.jsonl" --cache "$out/cache" --name demo-heldout --split train

if [ -d "$out/run/model" ]; then
    echo
    echo "Trained before (delete $out/run to train again):"
    cat "$out/result.txt"
    exit
fi
rm -rf "$out/run" # a run that was cut off
run dpo-cache train --cache "$out/cache" --output "$out/run" --pairs demo --eval-pairs demo-heldout \
    --batch-size 8 --lr 1e-5 --beta 0.1 | tee "$out/result.txt"
