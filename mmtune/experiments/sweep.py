"""A grid of overrides -> runs, each trained and evaluated; finished ones are skipped; ends in one report."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmtune.core.config import Report, Source, parse
from mmtune.core.errors import UserError
from mmtune.run import RunOptions, read_run
from mmtune.training.signals import Signals


@dataclass
class SweepOptions:
    """run: the YAML that is varied, relative to the sweep's. grid: a list of values for each dotted key;
    several keys with commas between take the same value.

    The best run is the one with the highest `choose` on `split` of `suite`: never choose on test.
    """

    name: str
    run: Path
    base: Path
    grid: dict[str, list[Any]]
    suite: str
    split: str = "val"
    choose: Literal["source", "target", "mean", "harmonic_mean"] = "mean"
    output: Path = Path("runs")

    def check(self, fault: Report) -> None:
        if not self.grid:
            fault("grid", "an empty grid")
        for key, values in self.grid.items():
            if not values:
                fault(f"grid.{key}", "no values")


def read_sweep(path: Path, overrides: list[str] | None = None) -> tuple[SweepOptions, list[RunOptions]]:
    """The sweep and its runs. Raises UserError with the faults of the sweep or of any run."""
    options: SweepOptions = parse(SweepOptions, Source(path, overrides))
    run_file = path.parent / options.run
    runs = []
    for values in itertools.product(*options.grid.values()):
        chosen = dict(zip(options.grid, values, strict=True))
        short = "_".join(f"{key.rpartition('.')[2]}{_short(value)}" for key, value in chosen.items())
        settings = [
            f"{key.strip()}={json.dumps(value)}" for keys, value in chosen.items() for key in keys.split(",")
        ]
        places = [f"name={short}", f"output={options.output / options.name}"]
        runs.append(read_run(run_file, settings + places))
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise UserError("two points of the grid have the same name", where=path)
    return options, runs


def run_sweep(
    path: Path, overrides: list[str] | None = None, signals: Signals | None = None
) -> dict[str, Any]:
    """Trains and evaluates what is not finished yet. Returns the report, with `best`: a name.

    signals: as in `train`.

    Raises UserError where the folder of a run holds another run than the sweep asks for.
    """
    from mmtune.evaluation.evaluate import evaluate_suite
    from mmtune.evaluation.protocol import load_suite
    from mmtune.evaluation.report import make_report
    from mmtune.training.folder import open_run

    options, runs = read_sweep(path, overrides)
    suite = load_suite(options.suite)
    folder = options.output / options.name
    base = folder / "base"
    finished = [
        open_run(run, resume=True) for run in runs
    ]  # what cannot go on is said before anything trains

    evaluate_suite(options.base, suite, base, options.split)
    for run, done in zip(runs, finished, strict=True):
        if not done:
            from mmtune.training.loop import train

            train(run, resume=True, signals=signals)
        attribution = run.evaluate is not None and run.evaluate.attribution
        evaluate_suite(run.folder / "final", suite, run.folder, options.split, attribution)
    report = make_report(base, [run.folder for run in runs], suite, options.split, folder / "report")
    best = max(report["runs"], key=lambda run: run[options.choose])
    return {**report, "best": best["name"]}


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace("/", "_")
