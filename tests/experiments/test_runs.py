from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmtune.core.errors import UserError
from mmtune.experiments import runs

SIGNALLED = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from mmtune.experiments import runs
from mmtune.training.signals import Signals

here = Path(sys.argv[1])

def train(run, how, suite, signals):
    signals.hold()
    (here / f"{run.name} trains").touch()
    while signals.waiting is None:
        time.sleep(0.01)
    time.sleep(run.seconds)
    (here / f"{run.name} saved").touch()
    signals.stop("with a checkpoint")

runs._run_one = train
if __name__ == "__main__":
    four = [SimpleNamespace(name=name, folder=here / name, seconds=i % 2) for i, name in enumerate("abcd")]
    with Signals("mmtune sweep"):
        runs.run_all(four, None, None, 2, here / "logs")
"""


def test_a_run_that_fails_in_any_way_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(run: Any, *rest: Any) -> None:
        if run.name == "a":
            raise RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB")
        if run.name == "b":
            raise UserError("no such thing", where="here")

    monkeypatch.setattr(runs, "_run_one", train)
    three: Any = [SimpleNamespace(name=name, folder=tmp_path / name) for name in "abc"]
    how: Any = None
    faults = runs.run_all(three, how, how, 1, tmp_path / "logs")
    log = tmp_path / "logs" / "a.log"
    reason = "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB"
    assert [str(fault) for fault in faults] == [f"a: {reason}\n    See {log}.", "b: here: no such thing"]
    assert "Traceback" in log.read_text() and not (tmp_path / "logs" / "b.log").exists()
    assert "3 of 3: c done" in capsys.readouterr().out


@pytest.mark.parametrize("everyone", [True, False], ids=["to all processes", "to the parent"])
def test_by_sigterm_each_run_saves_a_checkpoint_and_no_other_begins(tmp_path: Path, everyone: bool) -> None:
    """A cluster sends it to all; the parent sends it on, so that the others then get it twice."""
    script = tmp_path / "script.py"
    script.write_text(SIGNALLED)
    began = [sys.executable, str(script), str(tmp_path)]
    sweep = subprocess.Popen(began, start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 120
        while not all((tmp_path / f"{name} trains").exists() for name in "ab"):
            assert sweep.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        (os.killpg if everyone else os.kill)(sweep.pid, signal.SIGTERM)
        said = sweep.communicate(timeout=120)[1]
    finally:
        if sweep.poll() is None:
            os.killpg(sweep.pid, signal.SIGKILL)
    assert "stopped by SIGTERM; go on with\n    mmtune sweep" in said
    assert all((tmp_path / f"{name} saved").exists() for name in "ab"), said
    assert not any((tmp_path / f"{name} trains").exists() for name in "cd")
