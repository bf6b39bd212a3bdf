#!/usr/bin/env bash
# LoRASculpt, one thing changed at a time around scripts/tiny/lorasculpt.yaml: three seeds each, the test split, one
# report. It says at the start how long it will take. Interrupted, it goes on where it was.
# Usage: bash scripts/ablate_lorasculpt.sh [--jobs N]       (runs at a time; by default one per core, at most 8)
set -euo pipefail
cd "$(dirname "$0")/.."

jobs="$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)"
if [ "$jobs" -gt 8 ]; then jobs=8; fi
while [ $# -gt 0 ]; do
  case "$1" in
    --jobs)
      if ! [[ "${2:-}" =~ ^[1-9][0-9]*$ ]]; then echo "--jobs wants a number, 1 or more" >&2; exit 2; fi
      jobs="$2"; shift 2 ;;
    *) echo "unknown option $1; usage: bash scripts/ablate_lorasculpt.sh [--jobs N]" >&2; exit 2 ;;
  esac
done
source scripts/venv.sh

mmtune data prepare tiny
mmtune sweep scripts/tiny/ablate.yaml "jobs=$jobs"
