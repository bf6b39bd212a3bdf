"""The scripts: what they refuse, and how they come by a Python environment. Nothing is installed here."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"

# Stands for python3: makes an environment whose python writes down what it is asked to do.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *version_info*) exit "${TOO_OLD:-0}" ;;
  *ensurepip*) exit "${NO_VENV:-0}" ;;
  "-m venv --clear .venv") ;;
  *) exit 9 ;;
esac
echo "made" >> log
rm -rf .venv && mkdir -p .venv/bin
printf '#!/usr/bin/env bash\\n[ "$3" = --version ] || echo "pip ${@: -1}" >> log\\n' > .venv/bin/python
cp .venv/bin/python .venv/bin/mmtune
chmod +x .venv/bin/*
"""
USE = 'set -euo pipefail\nsource scripts/venv.sh "$@"\ncommand -v mmtune\necho "$VIRTUAL_ENV"\n'


@pytest.mark.parametrize(
    "script",
    [
        "quickstart.sh --seeds",
        "pretrain_tiny.sh --seed",
        "tiny_towers.sh --seed",
        "controls.sh --jobs",
        "ablate_lorasculpt.sh --jobs",
    ],
)
@pytest.mark.parametrize("given", ["", "x", "-1", "0.5"])
def test_an_option_without_its_number(script: str, given: str) -> None:
    name, option = script.split()
    ran = subprocess.run(
        ["bash", str(SCRIPTS / name), option, *([given] if given else [])],
        capture_output=True,
        text=True,
        timeout=10,
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert f"{option} wants a number" in ran.stderr


@pytest.mark.parametrize(
    "script", ["quickstart.sh", "pretrain_tiny.sh", "tiny_towers.sh", "controls.sh", "ablate_lorasculpt.sh"]
)
@pytest.mark.parametrize("option", ["--sed", "3", "--help"])
def test_unknown_options(script: str, option: str) -> None:
    ran = subprocess.run(
        ["bash", str(SCRIPTS / script), option, "1"], capture_output=True, text=True, timeout=10
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert f"unknown option {option}; usage: bash scripts/{script}" in ran.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with a space in its name, with venv.sh, a script that sources it, and the stand-in."""
    folder = tmp_path / "my checkout"
    (folder / "scripts").mkdir(parents=True)
    shutil.copy(SCRIPTS / "venv.sh", folder / "scripts")
    (folder / "scripts" / "use.sh").write_text(USE)
    (folder / "python").write_text(PYTHON)
    (folder / "python").chmod(0o755)
    for name in ("setup.cfg", "pyproject.toml"):
        (folder / name).touch()
    return folder


def use(checkout: Path, *arguments: str, **environment: str) -> tuple[list[str], str]:
    """What was done to have an environment, and what was said if that failed; the log starts anew."""
    ran = subprocess.run(
        ["bash", "scripts/use.sh", *arguments],
        cwd=checkout,
        env={**os.environ, "PYTHON": str(checkout / "python"), **environment},
        capture_output=True,
        text=True,
        timeout=30,
    )
    log = checkout / "log"
    done = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    if ran.returncode:
        assert ran.returncode == 2
        return done, ran.stderr
    command, environment_folder = ran.stdout.splitlines()[-2:]
    assert command == f"{checkout}/.venv/bin/mmtune"
    assert environment_folder == f"{checkout}/.venv"
    return done, ""


def test_made_once(checkout: Path) -> None:
    assert use(checkout) == (["made", "pip ."], "")
    assert use(checkout) == ([], "")
    assert use(checkout, "test") == (["pip .[test]"], "")
    assert use(checkout) == use(checkout, "test") == ([], "")


def test_the_tests_environment_serves_the_other_scripts_too(checkout: Path) -> None:
    assert use(checkout, "test") == (["made", "pip .[test]"], "")
    assert use(checkout) == ([], "")


@pytest.mark.parametrize("name", ["setup.cfg", "pyproject.toml"])
def test_installed_again_where_the_requirements_are_newer(checkout: Path, name: str) -> None:
    use(checkout)
    later = (checkout / ".venv" / "installed").stat().st_mtime + 5
    os.utime(checkout / name, (later, later))
    assert use(checkout)[0] == ["pip ."]


def test_an_interrupted_environment_is_repaired(checkout: Path) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (checkout / ".venv" / "bin" / "python").chmod(0o755)
    assert use(checkout)[0] == ["made", "pip ."]


def test_an_interrupted_installation_goes_on(checkout: Path) -> None:
    use(checkout)
    (checkout / ".venv" / "installed").unlink()
    assert use(checkout)[0] == ["pip ."]


@pytest.mark.parametrize("how", [shutil.move, shutil.copytree])
def test_a_moved_or_copied_checkout_gets_its_own(checkout: Path, how: object) -> None:
    use(checkout)
    there = checkout.with_name("another place")
    assert callable(how)
    how(str(checkout), str(there))
    assert use(there)[0] == ["made", "pip ."]
    assert use(there)[0] == []


def test_what_to_install_is_said(checkout: Path) -> None:
    done, said = use(checkout, TOO_OLD="1")
    assert done == [] and "is no Python 3.11 or newer" in said and "bash scripts/use.sh" in said
    done, said = use(checkout, PYTHON="/nowhere/python3")
    assert done == [] and "'/nowhere/python3' is no Python 3.11" in said
    done, said = use(checkout, NO_VENV="1")
    assert done == [] and "apt install python3-venv" in said
