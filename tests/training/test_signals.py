"""Ctrl-C and SIGTERM in the command: what they leave, what they say, and that the run goes on from there."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtune.cli import main
from mmtune.core.errors import UserError
from mmtune.parts import VisionLanguageModel
from mmtune.training.meter import SPEEDS, Meter
from mmtune.training.signals import SECONDS_OF_GRACE, Interrupted, Signals, leave_to_parent
from tests.world import greatest_difference, metrics, run_file, trained

TRAIN = {"steps": 5, "micro_batch_size": 4, "checkpoint": {"every": 2}}
NUMBERS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Those of a process in the foreground, and afterwards those that this process had."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert main(["train", str(run_file(world, folder, train=TRAIN))]) == 0
    return folder / "run"


def assert_same(one: Path, other: Path) -> None:
    assert greatest_difference(trained(one / "final"), trained(other / "final")) == 0
    lines = [
        [{k: v for k, v in line.items() if k not in SPEEDS} for line in metrics(run)] for run in (one, other)
    ]
    assert lines[0] == lines[1]


def interrupt(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[..., bool], *numbers: int
) -> None:
    """Sends this process signals before a call of `owner.name` for which `when` is true."""
    plain = getattr(owner, name)

    def sending(*args: Any, **kwargs: Any) -> Any:
        if when(*args):
            for number in numbers:
                os.kill(os.getpid(), number)
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, sending)


@NUMBERS
def test_the_step_is_finished_and_a_checkpoint_written(
    world: Path,
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: int,
) -> None:
    path = run_file(world, tmp_path / "a folder", train=TRAIN)
    folder = path.parent / "run"
    with monkeypatch.context() as patched:
        interrupt(patched, Meter, "step", lambda _, step, *__: step == 3, number)
        assert main(["train", str(path), "seed=0"]) == 128 + number
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3]
    assert {found.name for found in (folder / "checkpoints").iterdir()} == {"step-2", "step-3"}
    assert not (folder / "final").exists()
    said = capfd.readouterr().err
    assert "stopping after this step" in said
    *_, last, command = said.splitlines()
    assert last.endswith("after step 3, with a checkpoint; go on with")
    assert "Traceback" not in said
    program, *arguments = shlex.split(command)
    assert (program, arguments[-1]) == ("mmtune", "--resume")
    assert main(arguments) == 0
    assert_same(folder, whole)


def test_a_second_one_stops_at_once(
    world: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_file(world, tmp_path, train=TRAIN)
    twice = (signal.SIGINT, signal.SIGINT)
    with monkeypatch.context() as patched:
        interrupt(patched, Meter, "step", lambda _, step, *__: step == 3, *twice)
        assert main(["train", str(path)]) == 130
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
    assert {found.name for found in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-2"}
    assert main(["train", str(path), "--resume"]) == 0
    assert_same(tmp_path / "run", whole)


def test_in_the_last_step_the_run_is_finished(
    world: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = {"suite": "tiny", "root": str(world / "datasets/tiny"), "limit": 1}
    path = run_file(world, tmp_path, train=TRAIN, evaluate=evaluation)
    interrupt(monkeypatch, Meter, "step", lambda _, step, *__: step == 5, signal.SIGTERM)
    assert main(["train", str(path)]) == 143
    assert_same(tmp_path / "run", whole)
    assert not (tmp_path / "run" / "eval").exists()


@NUMBERS
def test_while_it_evaluates(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: int,
) -> None:
    evaluation = {"suite": "tiny", "root": str(world / "datasets/tiny"), "limit": 1}
    path = run_file(world, tmp_path, train={"steps": 1}, evaluate=evaluation)
    with monkeypatch.context() as patched:
        interrupt(patched, VisionLanguageModel, "generate", lambda *_: True, number)
        assert main(["train", str(path)]) == 128 + number
    said = capfd.readouterr().err
    assert said.endswith(f"; go on with\n    mmtune train {path} --resume\n")
    assert "Traceback" not in said
    assert not list(tmp_path.rglob("results.json"))
    assert main(["train", str(path), "--resume"]) == 0
    assert list(tmp_path.rglob("results.json"))


def test_before_the_first_step(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run_file(world, tmp_path, train={"steps": 1})
    with monkeypatch.context() as patched:
        interrupt(patched, torch.optim.AdamW, "__init__", lambda *_: True, signal.SIGTERM)
        assert main(["train", str(path)]) == 143
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert main(["train", str(path), "--resume"]) == 0


def test_one_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Signals():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_what_a_waiting_signal_broke_is_no_fault_of_ours(capfd: pytest.CaptureFixture[str]) -> None:
    """A worker that got the signal too dies, and the data loader with it."""
    with (
        pytest.raises(Interrupted, match="stopped by SIGTERM; go on with") as caught,
        Signals("x") as signals,
    ):
        signals.hold()
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("DataLoader worker is killed by signal: Terminated")
    assert caught.value.exit_code == 143
    with pytest.raises(UserError), Signals() as signals:
        signals.hold()
        os.kill(os.getpid(), signal.SIGTERM)
        raise UserError("the disk is full")


def test_a_worker_outlives_the_step() -> None:
    """Of a signal that is sent to all processes; but not for ever, or a hanging worker could not be ended."""
    leave_to_parent(0)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    assert SECONDS_OF_GRACE - 1 <= signal.alarm(0) <= SECONDS_OF_GRACE
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
