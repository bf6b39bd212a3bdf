#!/usr/bin/env bash
# Evaluation alone, with four GPUs of 24 GB: what runs that are there already forgot and gained, whole and with each
# trained part put back as in the base, in OUT/report-SUITE. What has its scores is not asked again.
#
# Usage: bash scripts/forgetting_4x4090.sh [METHOD ...]
#   METHOD: lorasculpt (when none is given), lora, a control of either (scripts/4x4090/steps.sh), or all: those that
#   scripts/iconqa_4x4090.sh or scripts/coco_4x4090.sh trained as OUT/METHOD_sSEED
#
# What can be set, as in: SUITE=forgetting SEEDS="0 1 2" bash scripts/forgetting_4x4090.sh lora lorasculpt
MODEL="${MODEL:-llava-hf/llava-1.5-7b-hf}"   # a folder or hub name, in llava-hf's or the original LLaVA's format
BASE="${BASE:-models/llava-1.5-7b}"          # where it is imported to, once: 14 GB
SOURCES="${SOURCES:-datasets}"               # where the downloaded originals lie: SOURCES/iconqa, SOURCES/okvqa, ...
SETS="${SETS:-iconqa okvqa ocrvqa gqa textvqa}"  # those that SUITE asks
OUT="${OUT:-runs/iconqa}"                    # where the runs lie, and where scores and report go
SUITE="${SUITE:-forgetting}"                 # what is measured: a name in eval/suites, or a YAML of your own
GPUS="${GPUS:-4}"                            # processes, one for each GPU
SEEDS="${SEEDS:-0}"                          # those the runs were trained with
EVAL_BATCH="${EVAL_BATCH:-16}"               # questions answered at a time on a GPU
DTYPE="${DTYPE:-bfloat16}"                   # of the evaluation; float32 needs 28 GB for the weights of 7B
LIMIT="${LIMIT:-}"                           # only the first so many questions of each task: for a trial
PARTIAL="${PARTIAL:-}"                       # yes: the data need not be whole, for a trial; results say so
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/4x4090/steps.sh

read_arguments "$@"
if [ ${#overrides[@]} -gt 0 ]; then echo "nothing is trained here, so there is nothing to override" >&2; exit 2; fi
runs=()
for seed in $SEEDS; do
  for method in "${methods[@]}"; do
    if ! [ -d "$OUT/${method}_s$seed/final" ]; then
      echo "there is no finished run $OUT/${method}_s$seed; train it: bash scripts/iconqa_4x4090.sh $method" >&2
      exit 2
    fi
    runs+=("$OUT/${method}_s$seed")
  done
done
find_mmtune

import_base
# shellcheck disable=SC2086
prepare none $SETS

echo "== the base's scores"
evaluate "$BASE" "$OUT/base"
for run in "${runs[@]}"; do
  echo "== $run"
  evaluate "$run/final" "$run"
  for part in vision connector language; do
    if [ -d "$run/final/$part" ] || [ -d "$run/final/adapter/$part" ]; then evaluate "$run/final" "$run" "$part"; fi
  done
done

echo "== report"
mmtune report --base "$OUT/base" "${runs[@]}" --suite "$SUITE" --output_path "$OUT/report-$(suite_name)"
