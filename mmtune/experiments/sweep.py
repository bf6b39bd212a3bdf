"""Many runs of a kind: a grid of overrides, or a list of them -> runs, each trained and evaluated.

Finished runs are skipped, so a sweep that was interrupted goes on; it ends in one report.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mmtune.core.config import Report, Source, parse, to_dict
from mmtune.core.errors import Fault, UserError
from mmtune.evaluation.metrics.base import some
from mmtune.evaluation.protocol import load_suite
from mmtune.experiments.estimate import expect
from mmtune.experiments.runs import evaluate_as, run_all
from mmtune.parts.fingerprint import model_hash, start_hash
from mmtune.run import EvaluateOptions, RunOptions, check_name, check_scales, deciding, read_run
from mmtune.training.signals import Signals

OWN = ("base", "logs", "report")  # what a sweep's folder holds beside its runs


@dataclass
class SweepOptions:
    """What is varied, and on what it is measured.

    run: the YAML that is varied, relative to the sweep's. grid: a list of values for each dotted key;
    several keys with commas between take the same value; every combination is a run. runs: instead of a
    grid, the runs by name, each a mapping of dotted keys to values; `run` among them names another YAML.
    seeds: each run once with every one of them, its name ending in _sN.

    choose: the best is the run, or the mean over its seeds, with the highest such number on `split` of
    `suite`; never on test. attribution, scales and kl are as in a run's own `evaluate`, which a sweep leaves
    aside: all its runs are measured in the one way that stands here.
    jobs: so many runs at a time, in processes of their own, which share the cores.
    """

    name: str
    base: Path
    suite: str
    run: Path | None = None
    grid: dict[str, list[Any]] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    split: str = "val"
    choose: Literal["source", "target", "mean", "harmonic_mean"] | None = None
    attribution: bool = False
    scales: list[float] = field(default_factory=list)
    kl: bool = False
    batch_size: int = 100
    jobs: int = 1
    output: Path = Path("runs")

    def check(self, fault: Report) -> None:
        check_name(self.name, fault)
        if bool(self.grid) == bool(self.runs):
            fault("", "give either 'grid' or 'runs'", "A grid holds a list of values for each dotted key.")
        for key, values in self.grid.items():
            if not values:
                fault(f"grid.{key}", "no values")
        if self.run is None and (self.grid or not all("run" in changes for changes in self.runs.values())):
            fault("", "'run' is missing", "Name the YAML that is varied.")
        if len(set(self.seeds)) < len(self.seeds):
            fault("seeds", f"a seed is given twice: {self.seeds}")
        for name in ("jobs", "batch_size"):
            if getattr(self, name) < 1:
                fault(name, f"expected 1 or more, found {getattr(self, name)}")
        check_scales(self.scales, fault)
        if self.choose and self.split == "test":
            fault("split", "a choice made on test leaves nothing to test it on", "Choose on val.")


def read_sweep(path: Path, overrides: list[str] | None = None) -> tuple[SweepOptions, list[RunOptions]]:
    """The sweep and its runs. Raises UserError with the faults of the sweep or of any run."""
    options: SweepOptions = parse(SweepOptions, Source(path, overrides))
    runs, faults = [], []
    for name, changes in _points(options):
        file = path.parent / str(changes.pop("run", options.run))
        settings = [f"{key}={json.dumps(value, default=str)}" for key, value in changes.items()]
        seeded = [(f"{name}_s{seed}", [f"seed={seed}"]) for seed in options.seeds] or [(name, [])]
        for full_name, seed in seeded:
            places = [f"name={full_name}", f"output={options.output / options.name}"]
            try:
                runs.append(read_run(file, settings + seed + places))
            except UserError as error:
                faults += [
                    Fault(fault.what, f"{path}, {name}: {fault.where}", fault.mend) for fault in error.faults
                ]
                break  # the other seeds would say the same
    if faults:
        raise UserError.of(faults)
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise UserError("two points of the grid have the same name", where=path)
    if own := sorted(set(names) & set(OWN)):
        raise UserError(
            f"no run of a sweep can be called {some(own)}",
            where=path,
            mend="There lie the sweep's own files.",
        )
    return options, runs


def without_copies(runs: list[RunOptions]) -> tuple[list[RunOptions], list[str]]:
    """The runs of which no earlier one has the same config and seed, and a line about each of the others."""
    first: dict[str, RunOptions] = {}
    lines = []
    for run in runs:
        same = first.setdefault(json.dumps(deciding(to_dict(run)), sort_keys=True), run)
        if same is not run:
            lines.append(f"{run.name} is the same as {same.name}, so it is not run a second time")
    return list(first.values()), lines


def _points(options: SweepOptions) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and changes of each run, but for seeds."""
    for name, changes in options.runs.items():
        yield name, dict(changes)
    words = _short_keys(list(options.grid))
    for values in itertools.product(*options.grid.values()) if options.grid else ():
        chosen = dict(zip(options.grid, values, strict=True))
        short = "_".join(f"{words[key]}{_short(value)}" for key, value in chosen.items())
        yield short, {key.strip(): value for keys, value in chosen.items() for key in keys.split(",")}


def run_sweep(
    path: Path, overrides: list[str] | None = None, signals: Signals | None = None
) -> dict[str, Any]:
    """Trains and evaluates what is not finished yet. Returns the report, with `best` where one is chosen.

    signals: as in `train`.

    Of runs with one config and seed the first is run, and the terminal is told. Raises UserError where the
    folder of a run holds another run than the sweep asks for, or a run starts from another model than the
    sweep's base; and, once the others are through, for the runs that failed.
    """
    from mmtune.evaluation.report import make_report
    from mmtune.training.folder import open_run

    options, runs = read_sweep(path, overrides)
    runs, copies = without_copies(runs)
    for line in copies:
        print(f"mmtune: {line}", file=sys.stderr)
    suite = load_suite(options.suite)
    folder = options.output / options.name
    base = folder / "base"
    for run in runs:  # what cannot go on is said before anything trains
        open_run(run, resume=True)
    _check_bases(runs, options)
    plain = EvaluateOptions(options.suite, split=options.split, batch_size=options.batch_size)
    evaluate_as(plain, options.base, suite, base)
    how = replace(plain, attribution=options.attribution, scales=options.scales, kl=options.kl)
    evaluations = 1 + 2 * options.attribution + len(options.scales)
    print(expect(runs, base, evaluations, options.jobs), flush=True)
    faults = run_all(runs, how, suite, options.jobs, folder / "logs", signals)
    if faults:
        raise UserError.of(faults)
    report = make_report(base, [run.folder for run in runs], suite, options.split, folder / "report")
    if options.choose is None:
        return report
    best = max(report["groups"], key=lambda group: group[options.choose]["mean"])
    return {**report, "best": best["label"]}


def _check_bases(runs: list[RunOptions], options: SweepOptions) -> None:
    """Raises UserError for runs that the report at the end would refuse."""
    base = model_hash(options.base)
    faults = []
    for run in runs:
        start = start_hash(run.model)
        if start not in (None, base):
            what = f"it starts from model {start} ({run.model.base}), but the sweep's base is model {base}"
            faults.append(Fault(what, run.name, f"Give both the same model: {options.base}, or the run's."))
        if start is None and (options.attribution or options.scales or options.kl):
            what = "there is no base model whose parts could be put back, or that it could be held against"
            mend = "Start it from model.base alone, or leave the sweep's attribution, scales and kl out."
            faults.append(Fault(what, run.name, mend))
    if faults:
        raise UserError.of(faults)


def _short_keys(keys: list[str]) -> dict[str, str]:
    """The last word of each dotted key, or, where two keys end alike, its last two."""
    last = {key: key.split(".")[-1] for key in keys}
    alike = {key for key in keys if list(last.values()).count(last[key]) > 1}
    return {key: "_".join(key.split(".")[-2:]) if key in alike else last[key] for key in keys}


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace("/", "_")
