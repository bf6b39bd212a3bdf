"""Towers in the place of a model's own: each is put in, aligned, tuned if wanted, evaluated; one report.

What is found before anything trains: the faults of every run, what of a fit is possible, and of each tower
its tokens, its parameters and the memory its stages take.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mmtune.core.config import Source, to_dict
from mmtune.core.errors import Fault, UserError
from mmtune.core.files import read_json, write_json, write_text
from mmtune.core.processes import count as processes
from mmtune.core.processes import said_once, tell
from mmtune.evaluation.evaluate import check_data
from mmtune.evaluation.protocol import load_suite
from mmtune.experiments.estimate import expect
from mmtune.experiments.runs import evaluate_as, run_all
from mmtune.experiments.swap_options import FITTED, SCRATCH, Swap, SwapOptions, read_swap
from mmtune.parts.spec import ModelOptions
from mmtune.run import RunOptions
from mmtune.training.folder import open_run
from mmtune.training.signals import Signals

if TYPE_CHECKING:
    from mmtune.parts.model import VisionLanguageModel

FACTS = "towers.json"
PICTURES = 1000  # that are decoded to see whether they are whole


def run_swap(
    path: Path, overrides: list[str] | None = None, signals: Signals | None = None
) -> dict[str, Any]:
    """Trains and evaluates what is not finished yet, and returns the report (see make_swap_report).

    signals: as in `train`. Raises UserError with the faults of all runs before anything trains, and, once the
    others are through, for the runs that failed.
    """
    options, swaps = plan_swap(path, overrides)
    from mmtune.experiments.swap_report import make_swap_report

    runs = [swap.run for swap in swaps]
    for run in runs:  # what cannot go on is said before anything trains
        open_run(run, resume=True)
    suite = load_suite(options.evaluate.suite)
    base = options.folder / "base"
    if options.base:
        evaluate_as(options.evaluate, Path(options.base), suite, base)
    print(expect(runs, base, 1, options.jobs), flush=True)
    faults = run_all(runs, options.evaluate, suite, options.jobs, options.folder / "logs", signals)
    if faults:
        raise UserError.of(faults)
    return make_swap_report(options, swaps, read_json(options.folder / FACTS))


def report_swap(path: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """The report alone, of the runs that are finished; the others are named in it. Raises UserError."""
    from mmtune.experiments.swap_report import make_swap_report

    options, swaps = read_swap(path, overrides)
    facts = options.folder / FACTS
    if not facts.is_file():
        raise UserError(
            "this swap has not begun", where=options.folder, mend=f"Run: mmtune swap-tower {path} --plan"
        )
    known = read_json(facts)
    new = [name for name in options.towers if name not in known]
    if new:
        raise UserError(
            f"not planned yet: {', '.join(new)}",
            where=Source(path, overrides).where(("towers", new[0])),
            mend="The same command with --plan instead of --report plans what is new.",
        )
    known = {name: known[name] for name in options.towers}
    return make_swap_report(options, [swap for swap in swaps if _possible(swap, known)], known)


def plan_swap(path: Path, overrides: list[str] | None = None) -> tuple[SwapOptions, list[Swap]]:
    """The swap and its runs, checked, with all that they start from: fitted connectors are made.

    Written to the swap's folder: towers.json, what is known of each tower; fits/TOWER, the connectors;
    plan/RUN.yaml, each run as `mmtune train` takes it. Raises UserError.
    """
    with said_once():
        if processes() > 1:
            raise UserError(
                "a swap starts in one process",
                where="mmtune swap-tower",
                mend="--plan writes a YAML for each run: torchrun ... -m mmtune train PLAN.yaml",
            )
    options, swaps = read_swap(path, overrides)
    suite = load_suite(options.evaluate.suite)
    check_data(suite.given, options.evaluate.split, options.evaluate.root, options.evaluate.limit)
    from mmtune.experiments.fit_connector import fit_connector
    from mmtune.parts.outline import outline_of

    facts = _look(options, swaps, Source(path, overrides))
    swaps = [swap for swap in swaps if _possible(swap, facts)]
    for name, known in facts.items():
        if known["no_fit"]:
            tell(f"mmtune: {name} starts from scratch alone: {known['no_fit']}")
    write_json(options.folder / FACTS, facts)
    models = {swap.tower: swap.run.model for swap in swaps if swap.start == FITTED}
    for name, model in models.items():
        assert options.base
        old = outline_of(ModelOptions(options.base, dtype=model.dtype))
        new = outline_of(_from_scratch(model))
        started = [each.parent.name for each in options.folder.glob(f"{name}_{FITTED}_s*/metrics.jsonl")]
        made = fit_connector(options.base, old, new, options.fit, options.fitted(name), sorted(started))
        tell(say_fit(name, made))
    for swap in swaps:
        text = yaml.safe_dump(to_dict(swap.run), sort_keys=False)
        write_text(options.folder / "plan" / f"{swap.run.name}.yaml", text)
    return options, swaps


def commands(path: Path, overrides: list[str], options: SwapOptions, swaps: list[Swap]) -> list[list[str]]:
    """What `--plan` leaves to do, as command lines: the base's evaluation, each run, the report."""
    found = []
    how = options.evaluate
    place = options.folder / "base" / load_suite(how.suite).folder(how.split)
    if options.base:
        words = ["eval", "--model", options.base, "--suite", how.suite, "--output_path", str(place)]
        words += ["--split", how.split] if how.split else []
        words += ["--limit", str(how.limit)] if how.limit else []
        words += ["--data_root", str(how.root)] if how.root else []
        words += ["--batch_size", str(how.batch_size), "--dtype", how.dtype, "--skip_done"]
        found.append(words)
    found += [["train", str(options.folder / "plan" / f"{s.run.name}.yaml"), "--resume"] for s in swaps]
    return [*found, ["swap-tower", str(path), *overrides, "--report"]]


def say_fit(name: str, made: dict[str, Any]) -> str:
    """A fit in one line."""
    r2 = made["r2"]
    return (
        f"{name}: connector fitted on {made['pictures']} pictures, ridge {made['ridge']:g} of the features' "
        f"variance; R² on others {r2['preactivations']:.3f}, of the image tokens {r2['image_tokens']:.3f}"
    )


def _possible(swap: Swap, facts: dict[str, Any]) -> bool:
    return swap.start == SCRATCH or not facts[swap.tower]["no_fit"]


def _from_scratch(model: ModelOptions) -> ModelOptions:
    """The same with a new connector: the fitted one may not be there yet."""
    assert model.connector
    return replace(model, connector=replace(model.connector, weights=None))


def _look(options: SwapOptions, swaps: list[Swap], source: Source) -> dict[str, Any]:
    """What is known of each tower before anything trains. Raises UserError with the faults of them all."""
    from mmtune.parts.outline import outline_of

    base = outline_of(ModelOptions(base=options.base)) if options.base else None
    facts: dict[str, Any] = {}
    found: dict[Fault, list[str]] = {}
    for name in options.towers:
        run = next(swap.run for swap in swaps if swap.tower == name)
        try:
            # A picture is broken or whole whatever looks at it: they are decoded once.
            facts[name], faults = _facts(
                run, base, FITTED in options.starts, source, 0 if facts else PICTURES
            )
        except UserError as error:
            place = source.where(("towers", name))
            found |= {Fault(f.what, f"{place}: {f.where}", f.mend): [name] for f in error.faults}
            continue
        if facts[name]["no_fit"] and SCRATCH not in options.starts:
            what = f"no connector can be fitted to it: {facts[name]['no_fit']}"
            found[Fault(what, source.where(("towers", name)), "Add scratch to starts.")] = [name]
        for fault in faults:
            found.setdefault(fault, []).append(name)
    everywhere = len(options.towers)
    if found:
        raise UserError.of(
            fault
            if len(names) == everywhere or "towers." in fault.where
            else replace(fault, what=f"{fault.what} (with {', '.join(names)})")
            for fault, names in found.items()
        )
    return facts


def _facts(
    run: RunOptions, base: VisionLanguageModel | None, fitted: bool, source: Source, pictures: int
) -> tuple[dict[str, Any], list[Fault]]:
    """What is known of a tower, and what is wrong with its stages.

    base: an outline, to which a connector may be `fitted`. pictures: of the data, to be decoded. Raises
    UserError where the model cannot be put together.
    """
    from mmtune.experiments.fit_connector import why_not
    from mmtune.parts.outline import count, outline_of, unused_layers
    from mmtune.training.check import Faults, Gpus, check_stage

    model = _from_scratch(run.model)
    outline = outline_of(model)
    used = count(outline.vision)
    known: dict[str, Any] = {
        "image_size": outline.vision.image_size,
        "patch": outline.vision.patch,
        "image_tokens": outline.image_tokens,
        "parameters": used,
        "whole": used + unused_layers(model, outline),
        "connector": outline.connector.kind,
        "connector_parameters": count(outline.connector),
        "no_fit": why_not(base, outline) if fitted and base else None,
        "memory": [],
    }
    faults = Faults(source, [])
    for number, stage in enumerate(run.all_stages()):
        fresh = outline_of(model) if number else outline  # its tuners stay attached
        made = check_stage(faults, ("stages", str(number)), stage, fresh, run, pictures, Gpus())
        if made.memory:
            passes = made.memory.passes[made.memory.checkpointing]
            known["memory"].append(made.memory.own.total(passes))
    return known, faults.found
