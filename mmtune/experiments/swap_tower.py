"""Towers in the place of a model's own: each is put in, aligned, tuned if wanted, evaluated; one report.

What is found before anything trains: the faults of every run, what of a fit is possible, and of each tower
its tokens, its parameters and the memory its stages take.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
from mmtune.training.folder import open_run
from mmtune.training.signals import Signals

FACTS = "towers.json"
MOST_PICTURES = 1000  # that are decoded to see whether they are whole


def run_swap(
    path: Path, overrides: list[str] | None = None, signals: Signals | None = None
) -> dict[str, Any]:
    """Trains and evaluates what is not finished yet, and returns the report (see make_swap_report).

    signals: as in `train`. Raises UserError with the faults of all runs before anything trains, and, once the
    others are through, for the runs that failed.
    """
    from mmtune.experiments.swap_report import make_swap_report

    options, swaps = plan_swap(path, overrides)
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
    return make_swap_report(options, [swap for swap in swaps if _possible(swap, known)], known)


def plan_swap(path: Path, overrides: list[str] | None = None) -> tuple[SwapOptions, list[Swap]]:
    """The swap and its runs, checked, with all that they start from: fitted connectors are made.

    Written to the swap's folder: towers.json, what is known of each tower; fits/TOWER, the connectors;
    plan/RUN.yaml, each run as `mmtune train` takes it. Raises UserError.
    """
    from mmtune.experiments.fit_connector import fit_connector
    from mmtune.parts.outline import outline_of

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
        made = fit_connector(options.base, old, new, options.fit, options.fitted(name))
        tell(say_fit(name, made))
    for swap in swaps:
        text = yaml.safe_dump(to_dict(swap.run), sort_keys=False)
        write_text(options.folder / "plan" / f"{swap.run.name}.yaml", text)
    return options, swaps


def commands(path: Path, options: SwapOptions, swaps: list[Swap]) -> list[list[str]]:
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
    return [*found, ["swap-tower", str(path), "--report"]]


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
    from dataclasses import replace

    assert model.connector
    return replace(model, connector=replace(model.connector, weights=None))


def _look(options: SwapOptions, swaps: list[Swap], source: Source) -> dict[str, Any]:
    """What is known of each tower before anything trains. Raises UserError with the faults of them all."""
    from mmtune.experiments.fit_connector import why_not
    from mmtune.parts.outline import count, outline_of, unused_layers
    from mmtune.training.check import Faults, Gpus, check_stage

    base = outline_of(ModelOptions(base=options.base)) if options.base else None
    facts: dict[str, Any] = {}
    found: dict[Fault, list[str]] = {}
    for number, name in enumerate(options.towers):
        run = next(swap.run for swap in swaps if swap.tower == name)
        model = _from_scratch(run.model)
        faults = Faults(source, [])
        outline = faults.gather((), outline_of, model)
        if outline is None:
            place = source.where(("towers", name))
            found |= {Fault(f"{place}: {each.what}", each.where, each.mend): [] for each in faults.found}
            continue
        no_fit = None
        if FITTED in options.starts and base is not None:
            no_fit = why_not(base, outline)
            if no_fit and SCRATCH not in options.starts:
                where = source.where(("towers", name))
                found[
                    Fault(f"no connector can be fitted to it: {no_fit}", where, "Add scratch to starts.")
                ] = []
        used = count(outline.vision)
        facts[name] = {
            "tower": options.towers[name]["tower"],
            "image_size": outline.vision.image_size,
            "patch": outline.vision.patch,
            "image_tokens": outline.image_tokens,
            "parameters": used,
            "whole": used + unused_layers(model, outline),
            "connector": outline.connector.kind,
            "connector_parameters": count(outline.connector),
            "no_fit": no_fit,
            "memory": [],
        }
        for i, stage in enumerate(run.all_stages()):
            pictures = 0 if number or i else MOST_PICTURES
            fresh = outline_of(model) if i else outline
            made = check_stage(faults, ("stages", str(i)), stage, fresh, run, pictures, Gpus())
            if made.memory:
                passes = made.memory.passes[made.memory.checkpointing]
                facts[name]["memory"].append(made.memory.own.total(passes))
        for fault in faults.found:
            found.setdefault(fault, []).append(name)
    if found:
        raise UserError.of(
            Fault(fault.what + (f" (with {', '.join(names)})" if names else ""), fault.where, fault.mend)
            if len(names) < len(options.towers)
            else fault
            for fault, names in found.items()
        )
    return facts
