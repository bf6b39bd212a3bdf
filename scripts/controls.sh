#!/usr/bin/env bash
# The controls of the quickstart's table: what carries the effect, and what does not? Three seeds each, the test
# split, one report with the frontier and where gain and forgetting sit. Interrupted, it goes on where it was.
# Usage: bash scripts/controls.sh [--jobs N]       (runs at a time; by default one per core, at most 8)
set -euo pipefail
cd "$(dirname "$0")/.."

jobs="$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)"
if [ "$jobs" -gt 8 ]; then jobs=8; fi
while [ $# -gt 0 ]; do
  case "$1" in
    --jobs)
      if ! [[ "${2:-}" =~ ^[1-9][0-9]*$ ]]; then echo "--jobs wants a number, 1 or more" >&2; exit 2; fi
      jobs="$2"; shift 2 ;;
    *) echo "unknown option $1; usage: bash scripts/controls.sh [--jobs N]" >&2; exit 2 ;;
  esac
done
source scripts/venv.sh

mmtune data prepare tiny
mmtune sweep scripts/tiny/controls.yaml "jobs=$jobs"
