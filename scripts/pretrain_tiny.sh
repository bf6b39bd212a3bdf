#!/usr/bin/env bash
# Makes the tiny model again from nothing: the world, the tokenizer, three stages of training, its scores.
# Usage: bash scripts/pretrain_tiny.sh [--seed N]     (runs/tiny_pretrain; the shipped model is not touched)
set -euo pipefail
cd "$(dirname "$0")/.."
seed=0
if [ "${1:-}" = "--seed" ]; then seed="$2"; fi
source scripts/venv.sh

name="tiny_pretrain_s$seed"
mmtune data prepare tiny
resume=()
if [ -d "runs/$name" ]; then resume=(--resume); fi
mmtune train scripts/tiny/pretrain.yaml "name=$name" "seed=$seed" "${resume[@]}"
mmtune eval --model "runs/$name/final" --suite tiny --split val --output_path "runs/$name/eval/tiny-val"
mmtune eval --model "runs/$name/final" --suite tiny --output_path "runs/$name/eval/tiny-test"
echo "The model: runs/$name/final. The one that ships is data/tiny/model."
