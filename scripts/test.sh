#!/usr/bin/env bash
# Passes the tests: makes .venv if need be, then ruff, mypy and pytest in a process for each core, at most eight.
# Usage: bash scripts/test.sh [pytest arguments], such as -n 0 for a single process
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh test

# Real benchmark rows, where someone keeps them beside the checkout; tests that need them skip otherwise.
if [ -z "${MMTUNE_REAL_DATA:-}" ] && [ -d ../shared/real ]; then
  MMTUNE_REAL_DATA="$(cd ../shared/real && pwd)"
  export MMTUNE_REAL_DATA
fi

python -m ruff check .
python -m ruff format --check .
python -m mypy
cores="$(python -c 'import os; print(min(os.cpu_count() or 1, 8))')"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Neighbouring tests stay together as long as there are enough, since they share what they have made.
python -m pytest -n "$cores" --dist worksteal "$@"
