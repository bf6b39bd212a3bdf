#!/usr/bin/env bash
# Makes the vision towers of the tiny world again from nothing, each in its library's own format: one trained by
# contrast with captions, one on labels, one without either, and one not trained at all. Writes runs/tiny_towers_sN
# for seed N; those that ship, data/tiny/towers, are not touched. A second run makes what is missing.
# Usage: bash scripts/tiny_towers.sh [--seed N]
set -euo pipefail
cd "$(dirname "$0")/.."

seed=0
while [ $# -gt 0 ]; do
  case "$1" in
    --seed)
      if ! [[ "${2:-}" =~ ^[0-9]+$ ]]; then echo "--seed wants a number, 0 or more" >&2; exit 2; fi
      seed="$2"; shift 2 ;;
    *) echo "unknown option $1; usage: bash scripts/tiny_towers.sh [--seed N]" >&2; exit 2 ;;
  esac
done
source scripts/venv.sh tiny_towers
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

out="runs/tiny_towers_s$seed"
mmtune data prepare tiny
for kind in supervised self_supervised contrastive; do
  python scripts/tiny/towers/make.py "$kind" "$out/$kind" --seed "$seed"
done
python scripts/tiny/towers/make.py supervised "$out/random" --seed "$seed" --untrained
echo "The towers: $out. Those that ship are data/tiny/towers."
