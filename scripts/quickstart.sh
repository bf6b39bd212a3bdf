#!/usr/bin/env bash
# The main job on the tiny world: the base model, six ways of tuning it, and what each gained and forgot.
# No download but the packages; minutes on a CPU. A second run skips what is done.
# Usage: bash scripts/quickstart.sh [--seeds N] [--fresh]
set -euo pipefail
cd "$(dirname "$0")/.."

seeds=1
fresh=no
while [ $# -gt 0 ]; do
  case "$1" in
    --seeds)
      if ! [[ "${2:-}" =~ ^[1-9][0-9]*$ ]]; then echo "--seeds wants a number, 1 or more" >&2; exit 2; fi
      seeds="$2"; shift 2 ;;
    --fresh) fresh=yes; shift ;;
    *) echo "unknown option $1; usage: bash scripts/quickstart.sh [--seeds N] [--fresh]" >&2; exit 2 ;;
  esac
done
source scripts/venv.sh
out=runs/quickstart
if [ "$fresh" = yes ]; then rm -rf "$out" datasets/tiny; fi

mmtune data prepare tiny
echo "== base: the tiny model before tuning"
mmtune eval --model data/tiny/model --suite tiny --batch_size 100 --output_path "$out/base/eval/tiny-test" --skip_done

runs=()
for seed in $(seq 0 $((seeds - 1))); do
  for method in lora lora_tuned replay kl lorasculpt_no_penalty lorasculpt; do
    name="${method}_s$seed"
    runs+=("$out/$name")
    echo "== $name: scripts/tiny/$method.yaml with seed $seed"
    mmtune train "scripts/tiny/$method.yaml" "name=$name" "seed=$seed" "output=$out" --resume
  done
done

echo "== report"
mmtune report --base "$out/base" "${runs[@]}" --suite tiny --output_path "$out/report"
