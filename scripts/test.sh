#!/usr/bin/env bash
# Passes the tests: makes .venv if need be, then ruff, mypy and pytest.
# Usage: bash scripts/test.sh [pytest arguments]
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
python -m pytest "$@"
