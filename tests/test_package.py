"""An installed wheel works outside a checkout: what it reads travels with it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from tests.made_up_runs import GROUPS, base_of, world

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = 77  # as pyproject.toml says
BELONGS = (
    "mmtune", "data", "eval", "scripts", "docs", "tests",
    "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CITATION.cff",
)  # fmt: skip
LOOK = """
import json
from pathlib import Path
import mmtune
from mmtune.core.files import share
from mmtune.data.cards import load_card
from mmtune.evaluation.protocol import load_protocol, load_suite, task_names
from mmtune.parts.spec import CONNECTORS, TOWERS
from mmtune.tuning.base import TUNERS
suite = load_suite("tiny")
print(json.dumps({
    "package": str(Path(mmtune.__file__).parent),
    "tasks": task_names(),
    "hashes": {task: load_protocol(task).hash for task in task_names()},
    "suite": suite.source + suite.target,
    "card": load_card("tiny_iconqa").splits,
    "model": (share("data") / "tiny" / "model" / "config.json").is_file(),
    "tuners": [TUNERS.load(name).__name__ for name in TUNERS.names()],
    "parts": [
        table.load(name.replace("N", "2")).__name__
        for table in (TOWERS, CONNECTORS)
        for name in table.names()
    ],
}))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout to build from, so that the checkout stays as it is."""
    try:
        too_old = int(version("setuptools").partition(".")[0]) < SETUPTOOLS
    except PackageNotFoundError:
        too_old = True
    if too_old:
        pytest.skip(f"building needs setuptools {SETUPTOOLS}, which this environment lacks")
    folder = tmp_path_factory.mktemp("package") / "source"
    folder.mkdir()
    for name in BELONGS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def installed(source: Path) -> Path:
    """The wheel's contents in a folder of their own."""
    wheels, target = source.parent / "wheels", source.parent / "installed"
    if importlib.util.find_spec("build"):
        command = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels), str(source)]
    else:
        command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels)]
        command.append(str(source))
    built = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=source.parent)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def python(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs outside the checkout, with nothing but the wheel's contents on the path."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=installed.parent,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_runs(installed: Path) -> None:
    ran = python(installed, "-m", "mmtune.cli", "score", "--help")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "--per_sample" in ran.stdout
    metadata = next(installed.glob("mmtune-*.dist-info"))
    assert "mmtune = mmtune.cli:main" in (metadata / "entry_points.txt").read_text()


def test_protocols_suites_cards_and_parts_come_along(
    installed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = python(installed, "-c", LOOK)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert Path(found["package"]) == installed / "mmtune"
    capsys.readouterr()
    exec(LOOK, {})
    expected = json.loads(capsys.readouterr().out)
    for key in expected.keys() - {"package"}:
        assert found[key] == expected[key]


def test_the_wheel_writes_a_report_with_its_page(installed: Path, tmp_path: Path) -> None:
    base, runs = base_of(tmp_path), world(tmp_path, GROUPS, seeds=(0,))
    command = ["report", "--base", base, *runs, "--suite", "tiny", "--output_path", tmp_path / "out"]
    ran = python(installed, "-m", "mmtune.cli", *map(str, command))
    assert ran.returncode == 0, ran.stderr
    assert "report.html" in ran.stdout
    assert "lorasculpt" in (tmp_path / "out" / "report.html").read_text()


def test_every_file_of_the_checkout_is_in_the_wheel(installed: Path) -> None:
    """And the other way round: nothing is left in it that the checkout no longer has."""
    places = {"mmtune": "mmtune", "data": "mmtune/share/data", "eval": "mmtune/share/eval"}
    for folder, place in places.items():
        here = {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file()}
        here = {path for path in here if "__pycache__" not in path.parts}
        there = {
            path.relative_to(installed / place) for path in (installed / place).rglob("*") if path.is_file()
        }
        if folder == "mmtune":
            there = {path for path in there if path.parts[0] != "share"}
        assert there == here


def test_the_source_distribution_is_a_whole_checkout(source: Path) -> None:
    code = "from setuptools.build_meta import build_sdist; build_sdist('../sdist')"
    built = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=source)
    assert built.returncode == 0, built.stdout + built.stderr
    (archive,) = (source.parent / "sdist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        there = {Path(*Path(member.name).parts[1:]) for member in packed if member.isfile()}
    for name in BELONGS:
        files = (ROOT / name).rglob("*") if (ROOT / name).is_dir() else [ROOT / name]
        here = {path.relative_to(ROOT) for path in files if path.is_file()}
        assert {path for path in here if "__pycache__" not in path.parts} <= there
