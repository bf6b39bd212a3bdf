from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mmtune.experiments import estimate
from mmtune.experiments.estimate import Progress, expect, spent
from mmtune.run import RunOptions
from mmtune.training.signals import Interrupted
from tests.world import FULL, LORA, run_options


def finish(run: RunOptions, seconds: float) -> None:
    """As if its three steps of eight samples and its one evaluation had taken `seconds` each."""
    (run.folder / "final").mkdir(parents=True)
    (run.folder / "final" / "trained.json").touch()
    lines = [{"step": step, "stage": 1, "samples_per_s": 8 / seconds} for step in (1, 2, 3)]
    (run.folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    evaluated(run.folder, seconds)


def evaluated(folder: Path, seconds: float) -> None:
    results = folder / "eval" / "tiny-val" / "results.json"
    results.parent.mkdir(parents=True)
    results.write_text(json.dumps({"total_evaluation_time_seconds": f"{seconds:.1f}"}))


@pytest.fixture
def runs(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[RunOptions]:
    monkeypatch.chdir(world)
    return [run_options(world, tmp_path, f"run{seed}", seed=seed) for seed in range(6)]


def test_from_those_that_are_finished(runs: list[RunOptions], tmp_path: Path) -> None:
    finish(runs[0], 10)
    finish(runs[1], 50)
    assert (spent(runs[0]), spent(runs[1])) == (40, 200)
    said = "6 runs, 2 of them finished; about 8 min to go, 120 s a run, as those took"
    assert expect(runs, tmp_path / "base", 1, jobs=1) == said
    assert "with 2 at a time" in expect(runs, tmp_path, 1, 2) and "about 4 min" in expect(
        runs, tmp_path, 1, 2
    )
    assert expect(runs[:2], tmp_path, 1, 1) == "2 runs, 2 of them finished"


def test_progress_leaves_out_what_was_finished_before(
    runs: list[RunOptions], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate.time, "monotonic", iter([0, 120, 600]).__next__)
    finish(runs[0], 1)
    progress = Progress(runs[:4])
    for run, failed in zip(runs[:3], (False, False, True), strict=True):
        progress.tell(run, failed)
    assert capsys.readouterr().out.splitlines() == [
        "1 of 4: run0 done",
        "2 of 4: run1 done; about 4 min left",  # two runs of two minutes each
        "3 of 4: run2 FAILED; about 5 min left",
    ]


def test_few_runs_are_not_worth_a_try(runs: list[RunOptions], tmp_path: Path) -> None:
    assert expect(runs[:3], tmp_path, 1, 1) == "3 runs, 0 of them finished"


def test_a_try_stops_after_a_while_and_leaves_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setattr(estimate, "TRY_SECONDS", 1.0)
    logged: list[list[tuple[float, int]]] = []
    real = estimate._logged

    def noted(run: RunOptions) -> list[tuple[float, int]]:
        logged.append(real(run))
        return logged[-1]

    monkeypatch.setattr(estimate, "_logged", noted)
    runs = [run_options(world, tmp_path, f"long{i}", train={"steps": 50_000}, seed=i) for i in range(4)]
    evaluated(tmp_path / "base", 6)
    said = expect(runs, tmp_path / "base", evaluations=2, jobs=1)
    (lines,) = logged
    assert 0 < sum(steps for _, steps in lines) < 50_000
    after = lines[1:] or lines  # the first step is slower than the others
    seconds = sum(spent for spent, _ in after) / sum(steps for _, steps in after) * 50_000 + 2 * 6
    found = re.fullmatch(
        r"4 runs, 0 of them finished; about (\d+) min to go, (\d+) s a run, "
        r"as a try of the first for 1 s says",
        said,
    )
    assert found, said
    assert float(found[2]) == pytest.approx(seconds, abs=0.51)
    assert float(found[1]) == pytest.approx(4 * seconds / 60, abs=0.51)
    assert not runs[0].folder.exists()


def test_a_try_that_fails_says_nothing(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    tune: dict[str, Any] = {"vision": {"tuner": "frozen"}, "connector": FULL}
    tune["language"] = {**LORA, "targets": ["nowhere"]}
    runs = [run_options(world, tmp_path, f"run{i}", tune=tune, seed=i) for i in range(4)]
    assert expect(runs, tmp_path, 1, 1) == "4 runs, 0 of them finished"


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), OSError("disk full"), ValueError("odd")])
def test_whatever_a_try_dies_of_the_sweep_goes_on(
    runs: list[RunOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("mmtune.training.loop.train", raising(error))
    assert expect(runs, tmp_path, 1, 1) == "6 runs, 0 of them finished"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted(15, "SIGTERM")])
def test_the_user_can_end_a_try(
    runs: list[RunOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr("mmtune.training.loop.train", raising(error))
    with pytest.raises(type(error)):
        expect(runs, tmp_path, 1, 1)


def raising(error: BaseException) -> Any:
    def train(*_: Any, **__: Any) -> None:
        raise error

    return train
