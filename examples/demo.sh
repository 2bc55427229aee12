#!/usr/bin/env bash
# The main job on a small real model: score the reference once, then train without it, and see what was learned.
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
run dpo-cache precompute "$out/cache" --model "$model" --dataset "$here/data/train.jsonl" --name demo
run dpo-cache precompute "$out/cache" --model "$model" --dataset "$here/data/heldout.jsonl" --name demo-heldout

if [ -d "$out/run/model" ]; then
    echo
    echo "Trained before (delete $out/run to train again):"
    cat "$out/result.txt"
else
    rm -rf "$out/run" # a run that was cut off
    run dpo-cache train "$out/cache" --output "$out/run" --pairs demo --eval-pairs demo-heldout \
        --lora-r 16 --lr 4e-4 --batch-size 8 | tee "$out/result.txt"
fi
run python "$here/compare.py" "$out/cache" demo-heldout "$here/data/heldout.jsonl" "$model" "$out/run"
