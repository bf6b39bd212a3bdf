#!/usr/bin/env bash
# LLaVA-1.5-7B on COCO captions with four GPUs of 24 GB: what it scores before, training for one epoch, what it scores
# after, and what was gained and forgotten, in OUT/report. Interrupted, the same command goes on where it was.
#
# Usage: bash scripts/coco_4x4090.sh [METHOD ...] [key=value ...]
#   METHOD: lorasculpt (when none is given), lora, a control of either (scripts/4x4090/steps.sh), or all
#   key=value: laid over the YAML of every method, for example train.micro_batch_size=2
#
# What can be set, as in: MODEL=/models/llava-1.5-7b-hf SEEDS="0 1 2" bash scripts/coco_4x4090.sh lora lorasculpt
MODEL="${MODEL:-llava-hf/llava-1.5-7b-hf}"   # a folder or hub name, in llava-hf's or the original LLaVA's format
BASE="${BASE:-models/llava-1.5-7b}"          # where it is imported to, once: 14 GB
SOURCES="${SOURCES:-datasets}"               # where the downloaded originals lie: SOURCES/coco, SOURCES/okvqa, ...
OUT="${OUT:-runs/coco}"                      # runs, scores and the report
SUITE="${SUITE:-lorasculpt_coco}"            # what is measured: a name in eval/suites, or a YAML of your own
GPUS="${GPUS:-4}"                            # processes, one for each GPU
ENGINE="${ENGINE:-ddp}"                      # how they share the work: ddp, zero1, zero2, zero3, fsdp2
SEEDS="${SEEDS:-0}"                          # each method is trained once with each; three tell more than one
EVAL_BATCH="${EVAL_BATCH:-16}"               # questions answered at a time on a GPU
DTYPE="${DTYPE:-bfloat16}"                   # of the evaluation; float32 needs 28 GB for the weights of 7B
LIMIT="${LIMIT:-}"                           # only the first so many questions of each task: for a trial
PARTIAL="${PARTIAL:-}"                       # yes: the data need not be whole, for a trial; results say so
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/4x4090/steps.sh

read_arguments "$@"
settings=("data=[{card: coco_caption, split: train, limit: 10000, image_first: true}]" train.epochs=1
  "train.engine=$ENGINE" "evaluate.suite=$SUITE" "evaluate.batch_size=$EVAL_BATCH"
  "evaluate.dtype=$DTYPE"
  ${LIMIT:+"evaluate.limit=$LIMIT"})
find_mmtune

check_shapes
import_base
prepare coco_caption coco
prepare_upstream okvqa ocrvqa gqa textvqa
check_runs

echo "== the base's scores"
evaluate "$BASE" "$OUT/base"

runs=()
for seed in $SEEDS; do
  for method in "${methods[@]}"; do
    train "$method" "$seed"
    runs+=("$OUT/${method}_s$seed")
  done
done

echo "== report"
mmtune report --base "$OUT/base" "${runs[@]}" --suite "$SUITE" --output_path "$OUT/report"
