# Sourced by the scripts for four GPUs: what METHOD may be, and their steps. What can be set, they say themselves.

METHODS="lora lora_low_rate lora_attention lora_frozen_connector lora_replay lora_kl lorasculpt lorasculpt_reference \
lorasculpt_no_penalty lorasculpt_constant_mask lorasculpt_random_support lorasculpt_unpruned_penalty"

# A cluster's SIGTERM reaches the run as well, which writes its checkpoint; this waits for it, then ends. torchrun
# would give it 30 seconds for the rest of its step and the writing.
trap 'exit 143' TERM
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}"

# A script's head, with what can be set, is its help.
print_help() {
  sed -n '2,/^set / { /^set /d; s/^# \{0,1\}//; p }' "scripts/$(basename "$0")"
  exit 0
}

# Sorts the arguments into methods and overrides (key=value); no method means lorasculpt, "all" every one.
read_arguments() {
  methods=(); overrides=()
  local given
  for given in "$@"; do
    case "$given" in
      -h | --help) print_help ;;
      evaluate.suite=* | evaluate.dtype=* | evaluate.batch_size=* | evaluate.limit=* | evaluate.split=* | evaluate.root=*)
        echo "'$given' would not hold for the base: set SUITE, LIMIT, EVAL_BATCH or DTYPE instead" >&2
        exit 2 ;;
      *=*) overrides+=("$given") ;;
      all) read -ra methods <<< "$METHODS" ;;
      *)
        if ! [[ " $METHODS " == *" $given "* ]]; then
          echo "unknown method '$given'; known: all $METHODS" >&2
          exit 2
        fi
        if ! [[ " ${methods[*]:-} " == *" $given "* ]]; then methods+=("$given"); fi ;;
    esac
  done
  if [ ${#methods[@]} -eq 0 ]; then methods=(lorasculpt); fi
}

# A method's YAML, and what it changes of it: yaml, changes.
describe_method() {
  yaml="scripts/4x4090/${1%%_*}.yaml"
  case "$1" in
    lora | lorasculpt) changes=() ;;
    lora_low_rate) changes=(tune.language.lr=5e-5) ;;
    lora_attention) changes=('tune.language.targets=["model.layers.*.self_attn.*"]') ;;
    lora_frozen_connector) changes=('tune.connector={tuner: frozen}') ;;
    lora_replay) changes=('replay={data: [{card: okvqa, limit: 9000}, {card: ocrvqa, limit: 9000}, {card: gqa, limit: 9000}, {card: textvqa, limit: 9000}], share: 0.05}') ;;
    lora_kl) changes=('kl={weight: 0.1}') ;;
    lorasculpt_reference) changes=('tune={preset: reference}') ;;
    lorasculpt_no_penalty) changes=(tune.language.penalty=null tune.connector.penalty=null) ;;
    lorasculpt_constant_mask) changes=(tune.language.penalty.kind=constant tune.connector.penalty.kind=constant) ;;
    lorasculpt_random_support) changes=(tune.language.support=random) ;;
    lorasculpt_unpruned_penalty)
      yaml=scripts/4x4090/lora.yaml
      changes=('tune.language.penalty={kind: conflict, weight: 1.0}' 'tune.connector.penalty={kind: conflict, weight: 1.0}') ;;
  esac
}

# mmtune from the environment that is active, otherwise from .venv, which is made for it.
find_mmtune() {
  if ! command -v mmtune >/dev/null; then source scripts/venv.sh; fi
  if ! command -v torchrun >/dev/null; then echo "there is no torchrun beside mmtune; it comes with torch" >&2; exit 2; fi
}

# The suite's own name, where SUITE is a YAML.
suite_name() {
  if [ -f "$SUITE" ]; then sed -n 's/^name: *//p' "$SUITE"; else echo "$SUITE"; fi
}

# Starts mmtune once for each GPU.
on_all_gpus() {
  torchrun --standalone --nproc_per_node "$GPUS" -m mmtune "$@"
}

# What the runs need of memory, from configs alone: before anything is downloaded.
check_shapes() {
  echo "== do the parts fit each other, and the GPUs?"
  local method base="$MODEL"
  if [ -f "$BASE/config.json" ]; then base="$BASE"; fi
  for method in "${methods[@]}"; do
    describe_method "$method"
    mmtune check --shapes --processes "$GPUS" "$yaml" "${settings[@]}" "${changes[@]}" "${overrides[@]}" \
      "model.base=$base"
  done
}

# MODEL, of either format, as a folder of mmtune's: BASE. --fit pad: LLaVA-1.5 pads its pictures to a square.
import_base() {
  echo "== the base: $BASE"
  if [ -f "$BASE/config.json" ]; then
    sed -n 's/^  "from": /it is there, imported from /p' "$BASE/imported.json" 2>/dev/null || true
  else
    mmtune import "$MODEL" "$BASE" --fit pad
  fi
}

# prepare CARDS NAME ...: sets in datasets/, as cards and protocols read them, from the originals in SOURCES. CARDS: what
# is trained on; none where a set is asked alone.
prepare() {
  local cards="$1" name
  shift
  for name in "$@"; do
    echo "== datasets/$name"
    mmtune data prepare "$name" --source "$SOURCES/$name" --cards "$cards" ${PARTIAL:+--partial}
  done
}

# prepare_upstream NAME ...: sets that are asked, and that one method also trains on.
prepare_upstream() {
  if [[ " ${methods[*]} " == *" lora_replay "* ]]; then
    local name
    for name in "$@"; do prepare "$name" "$name"; done
  else
    prepare none "$@"
  fi
}

# Every fault of every run and its data, before one of them starts.
check_runs() {
  echo "== check"
  local method
  for method in "${methods[@]}"; do
    describe_method "$method"
    mmtune check --processes "$GPUS" "$yaml" "${settings[@]}" "${changes[@]}" "${overrides[@]}" "model.base=$BASE" --samples 1
  done
}

# evaluate MODEL FOLDER [PART]: its scores on SUITE, under FOLDER, perhaps with a part put back as in the base; those
# that are there already are kept.
evaluate() {
  on_all_gpus eval --model "$1" --suite "$SUITE" --output_path "$2/eval/$(suite_name)-test${3:+-restore-$3}" \
    ${3:+--restore "$3"} --skip_done --batch_size "$EVAL_BATCH" --dtype "$DTYPE" ${LIMIT:+--limit "$LIMIT"}
}

# train METHOD SEED: trains and evaluates it as OUT/METHOD_sSEED; what was interrupted goes on.
train() {
  describe_method "$1"
  echo "== $1, seed $2: $yaml ${changes[*]}"
  on_all_gpus train "$yaml" "${settings[@]}" "${changes[@]}" "${overrides[@]}" "model.base=$BASE" \
    "name=$1_s$2" "seed=$2" "output=$OUT" --resume
}
