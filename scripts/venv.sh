# Sourced by the other scripts, from the checkout: makes .venv, installs mmtune into it, puts it first on PATH.
# An argument names the extra to install as well, such as test. Nothing is done twice.
extra="${1:-}"
here="$(pwd -P)"
stamp=".venv/installed${extra:+-$extra}"
made_in="$(cat .venv/made-in 2>/dev/null || echo "$here")"

if [ "$made_in" != "$here" ] || ! [ -f "$stamp" ] \
  || [ setup.cfg -nt "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  # Made elsewhere, it still points there; without pip, its making was interrupted.
  if [ "$made_in" != "$here" ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python="${PYTHON:-python3}"
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "'$python' is no Python 3.11 or newer. Install one (Debian, Ubuntu: apt install python3 python3-venv)" >&2
      echo "or name one: PYTHON=/path/to/python3.11 bash scripts/$(basename "$0")" >&2
      exit 2
    fi
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
      echo "'$python' has no venv module. Install it (Debian, Ubuntu: apt install python3-venv)" >&2
      exit 2
    fi
    "$python" -m venv --clear .venv
  fi
  echo "$here" > .venv/made-in
  echo "Installing mmtune and what it needs into .venv (torch alone is large; this happens once) ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}"
  touch .venv/installed "$stamp"
fi
export VIRTUAL_ENV="$here/.venv"
export PATH="$VIRTUAL_ENV/bin:$PATH"

# Small models on a few cores: threads that spin while they wait would only be in each other's way.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
