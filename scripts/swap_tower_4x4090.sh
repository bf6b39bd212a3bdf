#!/usr/bin/env bash
# Vision towers on a 7B language model with four GPUs of 24 GB, by LLaVA-1.5's recipe: whether they fit, the data, the
# connector aligned on 558k captions, 665k conversations, scores, and one report over all towers, in OUT/LANGUAGE.
# Interrupted, the same command goes on where it was.
#
# Usage: bash scripts/swap_tower_4x4090.sh [TOWER ...] [LANGUAGE ...] [key=value ...]
#   TOWER: clip, siglip, siglip2, dinov2, open_clip, or another line of scripts/4x4090/swap.yaml; all when none is given
#   LANGUAGE: vicuna (when none is given), qwen, or both
#   key=value: laid over scripts/4x4090/swap.yaml, for example towers.clip.weights=/models/clip-l
#
# What can be set, as in: METHOD=lorasculpt SEEDS="0 1 2" bash scripts/swap_tower_4x4090.sh clip siglip vicuna qwen
VICUNA="${VICUNA:-lmsys/vicuna-7b-v1.5}"     # folders or hub names
QWEN="${QWEN:-Qwen/Qwen2.5-7B-Instruct}"
METHOD="${METHOD:-lora}"                     # of the second stage: lora, or lorasculpt
SOURCES="${SOURCES:-datasets}"               # where the downloaded originals lie: SOURCES/llava_pretrain, ...
SETS="${SETS:-iconqa okvqa ocrvqa gqa textvqa}"  # those that SUITE asks
OUT="${OUT:-runs/swap}"                      # runs, scores and the reports
SUITE="${SUITE:-forgetting}"                 # what is measured: a name in eval/suites, or a YAML of your own
GPUS="${GPUS:-4}"                            # processes, one for each GPU
ENGINE="${ENGINE:-zero2}"                    # of the second stage: zero2, fsdp2, zero3; the first takes ddp
SEEDS="${SEEDS:-0}"                          # each tower is trained once with each; three tell more than one
EVAL_BATCH="${EVAL_BATCH:-16}"               # questions answered at a time on a GPU
DTYPE="${DTYPE:-bfloat16}"                   # of the evaluation; float32 needs 28 GB for the weights of 7B
LIMIT="${LIMIT:-}"                           # only the first so many questions of each task: for a trial
PARTIAL="${PARTIAL:-}"                       # yes: the data need not be whole, for a trial; results say so
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/4x4090/steps.sh
yaml=scripts/4x4090/swap.yaml

for given in "$@"; do
  case "$given" in -h | --help) print_help ;; esac
done
find_mmtune

# The YAML's towers, one a line: its name, and what it is as JSON.
read_towers() {
  python -c 'import json, sys
from mmtune.core.config import Source
for name, tower in Source(sys.argv[1]).tree["towers"].items():
    print(name, json.dumps(tower))' "$yaml"
}

# Sorts the arguments into towers, languages and overrides.
described=$(read_towers)
known=$(cut -d ' ' -f 1 <<< "$described" | tr '\n' ' ')
towers=(); languages=(); overrides=()
for given in "$@"; do
  case "$given" in
    name=* | output=* | seeds=* | starts=* | jobs=* | towers=* | model=* | model.language=* | model.language.weights=*)
      echo "'$given' is not for this script: set OUT, SEEDS, VICUNA or QWEN, name the towers and languages;" \
        "connectors start from scratch, one run at a time" >&2
      exit 2 ;;
    *=*) overrides+=("$given") ;;
    vicuna | qwen)
      if ! [[ " ${languages[*]:-} " == *" $given "* ]]; then languages+=("$given"); fi ;;
    all) read -ra towers <<< "$known" ;;
    *)
      if ! [[ " $known " == *" $given "* ]]; then
        echo "unknown tower or language '$given'; known: all $known; vicuna qwen" >&2
        exit 2
      fi
      if ! [[ " ${towers[*]:-} " == *" $given "* ]]; then towers+=("$given"); fi ;;
  esac
done
if [ ${#towers[@]} -eq 0 ]; then read -ra towers <<< "$known"; fi
if [ ${#languages[@]} -eq 0 ]; then languages=(vicuna); fi

# What METHOD changes of the YAML.
case "$METHOD" in
  lora) changes=() ;;
  lorasculpt)
    changes=('stages.1.tune.connector.penalty={kind: conflict, weight: 1.0}'
      'stages.1.tune.language={tuner: lorasculpt, rank: 128, alpha: 256, dropout: 0.05, targets: all-linear, lr: 2e-4, density: 0.1, prune_at: 100, penalty: {kind: conflict, weight: 1.0, omega: 1.0, modules: pruned}}') ;;
  *) echo "unknown METHOD '$METHOD'; known: lora lorasculpt" >&2; exit 2 ;;
esac

# The chosen towers, as the YAML has them: "clip: {"tower": "clip", ...}, siglip: {...}".
chosen=""
for tower in "${towers[@]}"; do
  chosen+=$(sed -n "s/^$tower {/$tower: {/p" <<< "$described")", "
done

# swap LANGUAGE FLAG: mmtune swap-tower for the chosen towers on a language model.
swap() {
  local language
  case "$1" in
    vicuna) language="{weights: $VICUNA, chat: vicuna_v1}" ;;
    qwen) language="{weights: $QWEN, chat: template}" ;;
  esac
  mmtune swap-tower "${@:2}" "$yaml" "name=$1" "output=$OUT" "model.language=$language" "towers={$chosen}" \
    "seeds=[${SEEDS// /, }]" "stages.1.train.engine=$ENGINE" "evaluate.suite=$SUITE" \
    "evaluate.batch_size=$EVAL_BATCH" "evaluate.dtype=$DTYPE" ${LIMIT:+"evaluate.limit=$LIMIT"} \
    "${changes[@]}" "${overrides[@]}"
}

for language in "${languages[@]}"; do
  echo "== do the towers fit $language, and the GPUs?"
  swap "$language" --shapes --processes "$GPUS"
done

prepare llava_pretrain llava_pretrain
prepare llava_instruct llava_instruct
# shellcheck disable=SC2086
prepare none $SETS

for language in "${languages[@]}"; do
  echo "== check: every tower on $language, and its data"
  swap "$language" --plan
  for tower in "${towers[@]}"; do
    for seed in $SEEDS; do
      echo "== $tower on $language, seed $seed"
      on_all_gpus train "$OUT/$language/plan/${tower}_scratch_s$seed.yaml" --resume
    done
  done
done

for language in "${languages[@]}"; do
  echo "== report: $OUT/$language"
  swap "$language" --report
done
