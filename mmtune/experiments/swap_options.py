"""The YAML of a swap of towers, and the runs it stands for: each tower, start and seed is an ordinary run.

No torch here, so that the faults of the YAML are told at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmtune.core.config import Report, Source, build, parse, to_dict
from mmtune.core.errors import Fault, UserError
from mmtune.parts.spec import saved_part
from mmtune.run import DataOptions, EvaluateOptions, RunOptions, check_name

Start = Literal["scratch", "fitted"]
SCRATCH: Start = "scratch"
FITTED: Start = "fitted"
LEAST_PICTURES = 10
OWN = ("base", "fits", "plan", "logs", "report")  # what a swap's folder and its tables hold beside the towers


@dataclass
class FitOptions:
    """On what connectors are fitted: pictures alone, no label is read.

    data: by default that of the first stage. pictures: so many different ones, evenly over their order.
    batch_size: pictures at a time.
    """

    data: list[DataOptions] = field(default_factory=list)
    pictures: int = 300
    batch_size: int = 16

    def check(self, fault: Report) -> None:
        if self.pictures < LEAST_PICTURES:
            mend = "One in ten chooses the ridge, and one in ten measures the fit."
            fault("pictures", f"expected {LEAST_PICTURES} or more, found {self.pictures}", mend)
        if self.batch_size < 1:
            fault("batch_size", f"expected 1 or more, found {self.batch_size}")


@dataclass
class SwapOptions:
    """Which towers, on what model, trained and measured how.

    model: as in a run, but for the tower: `base`, whose language model is taken, or `language` alone.
    connector: as in a run; by default as the base's. towers: by name, each as `vision` in a run, with a
    `connector` of its own if wanted. stages, evaluate: as in a run; the first stage is the alignment.

    starts: of the connector, `scratch` or `fitted` by least squares to the base's image tokens; a tower for
    which it cannot be fitted has `scratch` alone. seeds: each run once with every one of them. control: a
    tower against which the others are tested. jobs: so many runs at a time.
    """

    name: str
    model: dict[str, Any]
    towers: dict[str, dict[str, Any]]
    stages: list[dict[str, Any]]
    evaluate: EvaluateOptions
    connector: dict[str, Any] = field(default_factory=dict)
    starts: list[Start] = field(default_factory=lambda: [SCRATCH])
    fit: FitOptions = field(default_factory=FitOptions)
    seeds: list[int] = field(default_factory=lambda: [0])
    control: str | None = None
    jobs: int = 1
    output: Path = Path("runs")

    def check(self, fault: Report) -> None:
        check_name(self.name, fault)
        for name in self.towers:
            check_name(name, lambda _, what, mend, name=name: fault(f"towers.{name}", what, mend))
            if name in OWN:
                mend = "Give it another name: that one is the swap's own, in its folder and its tables."
                fault(f"towers.{name}", f"no tower can be called '{name}'", mend)
        for name in ("towers", "stages", "starts", "seeds"):
            values = getattr(self, name)
            if not values:
                fault(name, "empty: there is nothing to run")
            elif name in ("starts", "seeds") and len(set(values)) < len(values):
                fault(name, f"one is given twice: {values}")
        if "vision" in self.model:
            fault("model", "'vision' is what is swapped", "Name it under towers.")
        if "connector" in self.model:
            fault("model", "the connector stands beside the model here", "Write connector: at the top.")
        given: dict[str, Any] = {"connector": self.connector}
        given |= {f"towers.{name}.connector": its.get("connector") for name, its in self.towers.items()}
        for key, connector in given.items():
            if isinstance(connector, dict) and "weights" in connector:
                fault(key, "a connector starts anew here, or is fitted", "Leave its weights out: see starts.")
        if FITTED in self.starts and not self.base:
            fault("starts", "there is no base whose image tokens a connector could be fitted to")
        if self.towers and self.control is not None and self.control not in self.towers:
            fault("control", f"no tower is called '{self.control}'", f"There are {', '.join(self.towers)}.")
        if self.jobs < 1:
            fault("jobs", f"expected 1 or more, found {self.jobs}")

    @property
    def base(self) -> str | None:
        return self.model.get("base")

    @property
    def folder(self) -> Path:
        return self.output / self.name

    def fitted(self, tower: str) -> Path:
        """Where the connector that was fitted to a tower lies."""
        return self.folder / "fits" / tower


@dataclass(frozen=True)
class Swap:
    """A run of a swap: which tower, how its connector starts, with which seed."""

    tower: str
    start: str
    run: RunOptions


def read_swap(
    path: Path, overrides: list[str] | None = None, absent: list[Fault] | None = None
) -> tuple[SwapOptions, list[Swap]]:
    """The swap and its runs, tower by tower. Raises UserError with the faults of all of them.

    absent: gathers what is not there, which is no fault then.
    """
    source = Source(path, overrides)
    source.absent = absent
    options: SwapOptions = parse(SwapOptions, source)
    swaps: list[Swap] = []
    faults: dict[Fault, None] = {}
    for tower in options.towers:
        for start in options.starts:
            for seed in options.seeds:
                described = _RunOfSwap.of(source, options, tower, start, seed)
                run = build(RunOptions, described.tree, (), described)
                if run is not None:
                    _check_alignment(run, described)
                    swaps.append(Swap(tower, start, run))
                faults |= dict.fromkeys(described.faults)
    if faults:
        raise UserError.of(faults)
    if not options.fit.data:
        options.fit.data = swaps[0].run.all_stages()[0].data
    return options, swaps


class _RunOfSwap(Source):
    """A run's YAML as a swap describes it: its faults are told where the swap's own YAML says so."""

    swap: Source
    tower: str
    seed: int

    @classmethod
    def of(cls, swap: Source, options: SwapOptions, tower: str, start: str, seed: int) -> _RunOfSwap:
        made = cls.parsed(swap.path, _run(options, tower, start, seed))
        assert isinstance(made, cls)
        made.swap, made.absent, made.tower, made.seed = swap, swap.absent, tower, options.seeds.index(seed)
        return made

    def where(self, key: tuple[str, ...]) -> str:
        match key:
            case ("model", "vision", *rest):
                key = ("towers", self.tower, *rest)
            case ("model", "connector", *rest):
                own = ("towers", self.tower, "connector")
                key = (*(own if own in self.swap.lines else ("connector",)), *rest)
            case ("seed",):
                key = ("seeds", str(self.seed))
        return self.swap.where(key)


def _check_alignment(run: RunOptions, source: Source) -> None:
    """Reports a first stage that is no alignment: its curves would be of more than a connector."""
    tune = run.all_stages()[0].tune
    for part in ("vision", "language"):
        if getattr(tune, part).tuner != "frozen":
            what = f"the first stage is the alignment, which trains the connector alone, not the {part}"
            mend = f"Put an alignment before this stage, or leave the {part} out of it."
            source.fault(("stages", "0", "tune", part), what, mend)
    if tune.connector.tuner == "frozen":
        what = "the first stage is the alignment, and its connector is frozen"
        source.fault(("stages", "0", "tune"), what, "For example connector: {tuner: full, lr: 1e-3}.")


def _run(options: SwapOptions, tower: str, start: str, seed: int) -> dict[str, Any]:
    """A run's YAML, as a tree."""
    vision = dict(options.towers[tower])
    connector = vision.pop("connector", None) or options.connector or _kept(options.base)
    if start == FITTED and isinstance(connector, dict):
        connector = {**connector, "weights": str(options.fitted(tower))}
    return {
        "name": f"{tower}_{start}_s{seed}",
        "seed": seed,
        "model": {**options.model, "vision": vision, "connector": connector},
        "stages": options.stages,
        "evaluate": to_dict(options.evaluate),
        "output": str(options.folder),
    }


def _kept(base: str | None) -> dict[str, Any] | None:
    """The base's connector, but for its weights; None where there is none."""
    saved = saved_part(base, "connector") if isinstance(base, str) else {}
    return {key: value for key, value in saved.items() if key not in ("weights", "adapter")} or None
