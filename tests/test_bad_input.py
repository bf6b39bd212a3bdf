"""Each kind of bad input ends with 2 and one clear message, or is read rightly; bad_input/ holds the kinds.

`python tests/test_bad_input.py` prints each kind with what is said of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from mmtune.cli import main  # noqa: E402
from tests.bad_input import configs, models, pictures, samples, scores  # noqa: E402
from tests.bad_input.bench import Bench, Kind, Said  # noqa: E402
from tests.world import build  # noqa: E402

TABLES = {"configs": configs, "samples": samples, "pictures": pictures, "models": models, "scores": scores}
KINDS: dict[str, Kind] = {f"{table}: {kind.name}": kind for table, m in TABLES.items() for kind in m.KINDS}
SECONDS = 30  # for one kind; most take a tenth of one


@contextlib.contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


@contextlib.contextmanager
def held_by_permissions() -> Iterator[None]:
    """As a user whom permissions of files hold; root reads what it likes (capabilities(7), Linux)."""
    if os.geteuid() != 0:
        yield
        return
    libc, header, sets = ctypes.CDLL(None), _Header(0x20080522, 0), (_Sets * 2)()
    assert libc.capget(ctypes.byref(header), sets) == 0
    before = sets[0].effective
    sets[0].effective &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(ctypes.byref(header), sets) == 0
    try:
        yield
    finally:
        sets[0].effective = before
        assert libc.capset(ctypes.byref(header), sets) == 0


def run(kind: Kind, bench: Bench) -> Said:
    """Makes the kind's files and runs its command in this process."""
    command = [str(argument) for argument in kind.command(bench)]
    out, err = io.StringIO(), io.StringIO()
    said = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with no_longer_than(SECONDS), held_by_permissions(), said[0], said[1]:
        try:
            code = main(command)
        except SystemExit as error:  # argparse's own faults
            code = int(error.code or 0)
    return Said(code, out.getvalue(), err.getvalue())


@pytest.fixture
def bench(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.chdir(world)
    return Bench(world, tmp_path)


def test_no_kind_is_lost() -> None:
    assert len(KINDS) == sum(len(module.KINDS) for module in TABLES.values())


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_bad_input(kind: Kind, bench: Bench) -> None:
    bench.said = said = run(kind, bench)
    assert "Traceback" not in said.out + said.err
    if kind.then is not None:
        assert said.code == 0, said.err
        assert kind.then(bench)
        return
    assert said.code == 2, said.err
    assert "mmtune: " in said.err or "usage: mmtune" in said.err
    for part in (kind.what, kind.where, kind.mend):
        assert part in said.err, f"{part!r} is not in: {said.err}"
    assert kind.what
    assert kind.where
    assert kind.mend


OUTSIDE = [
    "configs: an unknown key",
    "samples: broken JSON",
    "models: a broken config",
    "scores: two answers to a question",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_process_of_its_own_ends_with_2(name: str, bench: Bench) -> None:
    kind = KINDS[name]
    command = [sys.executable, "-m", "mmtune.cli", *map(str, kind.command(bench))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command, cwd=bench.world, env=environment, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2
    assert kind.what in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not ended.stdout


def print_table() -> None:
    """Each kind and what is said of it, as text; a kind that is read rightly has no message of a fault."""
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "world"
        build(world)
        os.chdir(world)
        for table, module in TABLES.items():
            print(f"\n{table.upper()}")
            for number, kind in enumerate(module.KINDS):
                bench = Bench(world, Path(folder) / f"{table}{number}")
                bench.here.mkdir()
                bench.said = said = run(kind, bench)
                print(f"\n{kind.name}: exit code {said.code}")
                if kind.then is not None:
                    print("    read rightly" if kind.then(bench) else "    NOT READ RIGHTLY")
                _, found, message = said.err.partition("mmtune")
                lines = (found + message).replace(f"{bench.here}/", "").strip().splitlines()
                print("\n".join(f"    {line[:240]}" for line in lines if not line.startswith("run: step")))


if __name__ == "__main__":
    print_table()
