#!/usr/bin/env bash
# Makes the tiny model again from nothing: the world, the tokenizer, the stages of training, its scores.
# Writes runs/tiny_pretrain_sN for seed N; the model that ships is not touched. A second run goes on where the
# first was interrupted, or says that it is done.
# Usage: bash scripts/pretrain_tiny.sh [--seed N]
set -euo pipefail
cd "$(dirname "$0")/.."

seed=0
while [ $# -gt 0 ]; do
  case "$1" in
    --seed)
      if ! [[ "${2:-}" =~ ^[0-9]+$ ]]; then echo "--seed wants a number, 0 or more" >&2; exit 2; fi
      seed="$2"; shift 2 ;;
    *) echo "unknown option $1; usage: bash scripts/pretrain_tiny.sh [--seed N]" >&2; exit 2 ;;
  esac
done
source scripts/venv.sh

name="tiny_pretrain_s$seed"
mmtune data prepare tiny
mmtune train scripts/tiny/pretrain.yaml "name=$name" "seed=$seed" --resume
for suite in tiny tiny_letters; do
  for split in val test; do
    mmtune eval --model "runs/$name/final" --suite "$suite" --split "$split" --batch_size 100 --skip_done \
      --output_path "runs/$name/eval/$suite-$split"
  done
done
echo "The model: runs/$name/final. The one that ships is data/tiny/model."
