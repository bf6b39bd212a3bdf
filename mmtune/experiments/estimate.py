"""How long the runs of a sweep will take: as the finished ones took, or as a try of some seconds says."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from threading import Timer
from typing import NoReturn

from mmtune.core.files import read_json, read_jsonl
from mmtune.run import RunOptions, Stage
from mmtune.training.signals import Signals

TRY_SECONDS = 15.0
FEW = 3  # so many runs are not worth a try


def expect(runs: Sequence[RunOptions], base: Path, evaluations: int, jobs: int) -> str:
    """A line for the terminal: how many runs are to do, and, where that can be known, for how long.

    base: the folder with the base's results. evaluations: of each run. jobs: runs at a time.
    """
    finished = [run for run in runs if _is_finished(run)]
    left = [run for run in runs if run not in finished]
    line = f"{len(runs)} runs, {len(finished)} of them finished"
    if finished and left:
        seconds, how = fmean(map(spent, finished)), "as those took"
    elif len(left) > FEW and (training := _tried(left[0])):
        seconds = training + evaluations * _seconds_of_evaluations(base)
        how = f"as a try of the first for {TRY_SECONDS:.0f} s says"
    else:
        return line
    minutes = len(left) * seconds / min(jobs, len(left)) / 60
    beside = f" with {jobs} at a time, if they do not slow each other," if jobs > 1 else ""
    return f"{line};{beside} about {minutes:.0f} min to go, {seconds:.0f} s a run, {how}"


class Progress:
    """Tells of each run that is through, and how long the rest will take at the pace of this sweep so far."""

    def __init__(self, runs: Sequence[RunOptions]) -> None:
        self.count, self.through, self.trained = len(runs), 0, 0
        self.left = {run.name for run in runs if not _is_finished(run)}
        self.began = time.monotonic()

    def tell(self, run: RunOptions, failed: bool) -> None:
        self.through += 1
        line = f"{self.through} of {self.count}: {run.name} {'FAILED' if failed else 'done'}"
        if run.name in self.left:  # the others take no time
            self.left.remove(run.name)
            self.trained += 1
            minutes = (time.monotonic() - self.began) / 60 / self.trained * len(self.left)
            line += f"; about {minutes:.0f} min left"
        print(line, flush=True)


def spent(run: RunOptions) -> float:
    """The seconds that a run's logged steps and its evaluations took."""
    return sum(seconds for seconds, _ in _logged(run)) + _seconds_of_evaluations(run.folder)


def _is_finished(run: RunOptions) -> bool:
    return (run.folder / "final" / "trained.json").is_file() and any(run.folder.glob("eval/**/results.json"))


def _logged(run: RunOptions) -> list[tuple[float, int]]:
    """The seconds and the steps between the lines of a run's metrics.jsonl."""
    stages = run.all_stages()
    found, before = [], 0
    for _, line in read_jsonl(run.folder / "metrics.jsonl"):
        steps = line["step"] - before
        samples = steps * stages[line["stage"] - 1].train.batch_size
        found.append((samples / line["samples_per_s"], steps))
        before = line["step"]
    return found


def _seconds_of_evaluations(folder: Path) -> float:
    results = [read_json(path) for path in folder.glob("eval/**/results.json")]
    return sum(float(result["total_evaluation_time_seconds"]) for result in results)


def _tried(run: RunOptions) -> float | None:
    """The seconds that the training of a run will take, by its first steps, taken in a folder of their own.

    None where it fails, which is told when its turn comes.
    """
    from mmtune.training.loop import train

    with tempfile.TemporaryDirectory() as folder:
        trial = replace(run, output=Path(folder))
        try:
            with suppress(_TimeIsUp):
                train(trial, signals=_Enough())
            first, *others = _logged(trial)  # the first step is slower than the rest
            seconds, made = map(sum, zip(*(others or [first]), strict=True))
            return seconds / made * sum(map(_steps, run.all_stages()))
        except Exception:  # an estimate is not worth a sweep
            return None


def _steps(stage: Stage) -> int:
    from mmtune.training.plan import count_steps, read_samples

    own = 0 if stage.train.steps else sum(len(read_samples(data)[0]) for data in stage.data)
    return count_steps(own, stage.train)


class _TimeIsUp(Exception):
    pass


class _Enough(Signals):
    """As if a signal came some time after the first step began: a step is finished, and the training ends."""

    def hold(self) -> None:
        timer = Timer(TRY_SECONDS, self.come)
        timer.daemon = True
        timer.start()

    def come(self) -> None:
        self.waiting = signal.SIGTERM

    def stop(self, done: str) -> NoReturn:
        raise _TimeIsUp
