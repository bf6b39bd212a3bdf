from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmtune.training import meter as meter_file
from mmtune.training.meter import Meter


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(meter_file, "time", SimpleNamespace(perf_counter=made))
    return made


def test_speeds_are_those_since_the_last_line(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "metrics.jsonl"
    with Meter(path, "run", 0, 4) as meter:
        for step in (1, 2, 3):
            clock.now += 2
            meter.step(step, 1.0, samples=8, tokens=100)
            if step != 2:
                clock.now += 5  # a probe's look
                meter.log({"step": step, "loss": 0.5})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 0.5, "samples_per_s": 4.0, "tokens_per_s": 50.0},
        {"step": 3, "loss": 0.5, "samples_per_s": 4.0, "tokens_per_s": 50.0},
    ]


def test_without_a_terminal_a_line_now_and_then_with_an_estimate(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Meter(tmp_path / "metrics.jsonl", "my run", 100, 200) as meter:
        for step in range(101, 111):
            clock.now += 6
            meter.step(step, 2.5, 1, 1)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3  # at 18, 36 and 54 s
    # 18 s for 3 steps since it was resumed: 97 more take 582 s.
    assert said[0] == "my run: step 103 of 200, loss 2.500, about 9.7 min left"


def test_the_last_step_is_always_said(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Meter(tmp_path / "metrics.jsonl", "run", 0, 2) as meter:
        meter.step(1, 1.0, 1, 1)
        meter.step(2, 1.0, 1, 1)
    assert capsys.readouterr().err.splitlines() == ["run: step 2 of 2, loss 1.000, about 0.0 min left"]


def test_what_is_not_json_is_not_written(tmp_path: Path) -> None:
    with Meter(tmp_path / "metrics.jsonl", "run", 0, 2) as meter, pytest.raises(ValueError, match="JSON"):
        meter.log({"loss": float("nan")})
