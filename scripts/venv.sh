# Sourced by the other scripts: makes .venv in the checkout, installs mmtune into it, and activates it.
# An argument names the extra to install as well, such as test. Nothing is done twice.
extra="${1:-}"
stamp=".venv/installed${extra:+-$extra}"
if [ ! -f "$stamp" ] || [ setup.cfg -nt "$stamp" ]; then
  [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
  echo "Installing mmtune and what it needs into .venv (torch alone is large; this happens once) ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}"
  touch "$stamp"
fi
# shellcheck disable=SC1091
source .venv/bin/activate

# Small models on a few cores: threads that spin while they wait would only be in each other's way.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
