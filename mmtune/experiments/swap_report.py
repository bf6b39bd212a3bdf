"""What each tower is worth: scores with intervals, costs, differences, what a fitted start saves.

Written to the swap's folder as swap.json, swap.png and swap.html.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mmtune.core.errors import Fault, UserError
from mmtune.core.files import read_json, read_jsonl, write_json
from mmtune.evaluation.differences import compare_pairs
from mmtune.evaluation.forgetting import (
    Answers,
    Evaluation,
    check_comparable,
    ci95,
    half_width,
    mean_sd,
    read_evaluation,
    score_of,
    seed_mean,
    stderr_of_mean,
    summary,
)
from mmtune.evaluation.protocol import Suite, load_suite
from mmtune.evaluation.significance import Z95
from mmtune.experiments.swap_options import FITTED, SCRATCH, Swap, SwapOptions
from mmtune.run import RunOptions

SUMMARY = ("source", "target", "mean")
LEVEL = 0.05
Curve = list[tuple[int, float]]  # the loss of the probe after each step it looked at


def make_swap_report(options: SwapOptions, swaps: Sequence[Swap], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The report of a swap's finished runs. facts: what is known of each tower, as in towers.json.

    Raises UserError where none is finished, or evaluations cannot be compared.
    """
    from mmtune.experiments.swap_page import write_swap_page
    from mmtune.experiments.swap_picture import draw_swap

    suite = load_suite(options.evaluate.suite)
    place = suite.folder(options.evaluate.split)
    done = [swap for swap in swaps if is_finished(swap.run, place)]
    missing = [swap.run.name for swap in swaps if swap not in done]
    if not done:
        raise UserError(
            f"none of its {len(swaps)} runs is trained and evaluated",
            where=options.folder,
            mend="mmtune swap-tower without --report trains them.",
        )
    base = None
    if options.base and (options.folder / "base" / place / "results.json").is_file():
        base = read_evaluation(options.folder / "base" / place, suite.tasks)
    evaluations = {swap.run.name: read_evaluation(swap.run.folder / place, suite.tasks) for swap in done}
    first = base or next(iter(evaluations.values()))
    check_comparable(first, evaluations)
    _check_models(done, evaluations)

    groups: dict[str, list[Swap]] = {}
    several = len({swap.start for swap in done}) > 1
    for swap in done:
        groups.setdefault(f"{swap.tower}, {swap.start}" if several else swap.tower, []).append(swap)
    methods, runs, rows = {}, {}, []
    for label, members in groups.items():
        its = [evaluations[swap.run.name] for swap in members]
        methods[label] = {task: seed_mean([e.answers[task] for e in its], task) for task in suite.tasks}
        runs[label] = [_summary(each, suite) for each in its]
        rows.append(_row(label, members, its, methods[label], suite, options, facts))
    pairs = _pairs(rows, options.control)
    if base:
        methods["base"], runs["base"] = base.answers, [_summary(base, suite)]
        pairs = {"base": [(row["label"], "base") for row in rows], **pairs}
    compared = {
        which: compare_pairs(named, methods, runs, suite.source, suite.target)
        for which, named in pairs.items()
    }
    report: dict[str, Any] = {
        "name": options.name,
        "base": base and _base_row(base, suite),
        "rows": rows,
        "compared": compared,
        "control": options.control,
        "saved": _saved(rows),
        "missing": missing,
        "unanswered": {
            name: sum(score["missing"] for score in found.scores.values())
            for name, found in evaluations.items()
            if any(score["missing"] for score in found.scores.values())
        },
        "unlike": first.unlike,
        "no_fit": {name: known["no_fit"] for name, known in facts.items() if known["no_fit"]},
        "jobs": options.jobs,
        "made_with": {
            "suite": suite.name,
            "splits": first.splits,
            "source": list(suite.source),
            "target": list(suite.target),
            "limit": first.limit,
            **first.made_with,
            "protocols": first.protocols,
            "annotations": first.data,
        },
        "files": {name: str(options.folder / name) for name in ("swap.json", "swap.png", "swap.html")},
    }
    report["words"] = words(report)
    write_json(options.folder / "swap.json", report)
    draw_swap(report, options.folder / "swap.png")
    write_swap_page(report, options.folder / "swap.png", options.folder / "swap.html")
    return report


def is_finished(run: RunOptions, place: Path) -> bool:
    """Whether a run is trained to its end and evaluated."""
    return (run.folder / "final" / "trained.json").is_file() and (
        run.folder / place / "results.json"
    ).is_file()


def _check_models(done: Sequence[Swap], evaluations: Mapping[str, Evaluation]) -> None:
    faults = []
    for swap in done:
        trained = read_json(swap.run.folder / "final" / "trained.json").get("model_hash")
        found = evaluations[swap.run.name]
        if trained not in (None, found.model_hash):
            what = f"its final model is {trained}, but {found.model_hash} ({found.model}) was evaluated"
            faults.append(
                Fault(what, swap.run.name, f"Remove {found.folder}; the same command evaluates it.")
            )
    if faults:
        raise UserError.of(faults)


# ---- A row of the table ----------------------------------------------------------------------------------


def _summary(evaluation: Evaluation, suite: Suite) -> dict[str, float]:
    scores = {task: evaluation.scores[task]["score"] for task in suite.tasks}
    return summary(scores, suite.source, suite.target)


def _base_row(base: Evaluation, suite: Suite) -> dict[str, Any]:
    return {"label": "base", "seeds": [], **_scored([base], base.answers, suite)}


def _row(
    label: str,
    members: Sequence[Swap],
    its: Sequence[Evaluation],
    mean: Mapping[str, Answers],
    suite: Suite,
    options: SwapOptions,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    tower, start = members[0].tower, members[0].start
    curves = [read_curve(swap.run) for swap in members]
    return {
        "label": label,
        "tower": tower,
        "start": start,
        "seeds": [swap.run.seed for swap in members],
        "runs": [swap.run.name for swap in members],
        **_scored(its, mean, suite),
        "facts": facts[tower],
        "fit": _fit(options, tower) if start == FITTED else None,
        "samples_per_s": fmean(align_speed(swap.run) for swap in members),
        "questions_per_s": fmean(map(_questions_per_s, its)),
        "curves": curves,
    }


def _scored(its: Sequence[Evaluation], mean: Mapping[str, Answers], suite: Suite) -> dict[str, Any]:
    """Each set's score and their means: over seeds, with their SD and the questions' interval about it.

    mean: each question's score averaged over the seeds. The sets are independent of one another.
    """
    stderrs = {task: score_of(mean[task])[1] for task in suite.tasks}
    of = {"source": suite.source, "target": suite.target}
    errors = {which: stderr_of_mean([stderrs[task] for task in tasks]) for which, tasks in of.items()}
    errors["mean"] = stderr_of_mean(list(errors.values()))
    summaries = [_summary(each, suite) for each in its]
    made: dict[str, Any] = {"scores": {}}
    for task in suite.tasks:
        cell = mean_sd([each.scores[task]["score"] for each in its])
        made["scores"][task] = {**cell, "ci95": ci95(cell["mean"], stderrs[task])}  # type: ignore[arg-type]
    for which in SUMMARY:
        cell = mean_sd([each[which] for each in summaries])
        made[which] = {**cell, "ci95": ci95(cell["mean"], errors[which])}  # type: ignore[arg-type]
    return made


def _fit(options: SwapOptions, tower: str) -> dict[str, Any]:
    made = read_json(options.fitted(tower) / "fit.json")
    return {key: made[key] for key in ("pictures", "ridge", "r2")}


def align_speed(run: RunOptions) -> float:
    """Samples per second of a run's first stage, over its logged steps but the first, which is slower."""
    batch = run.all_stages()[0].train.batch_size
    lines = [line for _, line in read_jsonl(run.folder / "metrics.jsonl") if line["stage"] == 1]
    steps = [after["step"] - before["step"] for before, after in itertools.pairwise(lines)]
    seconds = [n * batch / line["samples_per_s"] for n, line in zip(steps, lines[1:], strict=True)]
    return sum(steps) * batch / sum(seconds) if seconds else float(lines[0]["samples_per_s"])


def _questions_per_s(evaluation: Evaluation) -> float:
    seconds = float(read_json(evaluation.folder / "results.json")["total_evaluation_time_seconds"])
    return sum(score["n"] for score in evaluation.scores.values()) / max(seconds, 0.1)


# ---- What the fitted start saves -------------------------------------------------------------------------


def read_curve(run: RunOptions) -> Curve:
    """The loss of the first stage's probe, step by step; empty where there is none."""
    lines = [line for _, line in read_jsonl(run.folder / "metrics.jsonl")]
    return [
        (line["step"], line["probe_loss"]) for line in lines if line["stage"] == 1 and "probe_loss" in line
    ]


def reaches(curve: Curve, loss: float) -> float | None:
    """The step at which a curve first comes down to a loss, straight between two looks; None for never."""
    before = None
    for step, value in curve:
        if value <= loss:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
        before = (step, value)
    return None


def steps_saved(scratch: Curve, fitted: Curve) -> dict[str, float | None]:
    """Two curves of one tower and seed against each other.

    `scratch_at`: the step at which scratch reaches what the fitted start had at its first look, `first`;
    `fitted_at`: the step at which the fitted start reaches what scratch had at its last look, `last`. None
    for never. Then the losses there, and at the end of the fitted start.
    """
    return {
        "first": fitted[0][0],
        "first_loss": fitted[0][1],
        "scratch_at": reaches(scratch, fitted[0][1]),
        "last": scratch[-1][0],
        "last_loss": scratch[-1][1],
        "fitted_at": reaches(fitted, scratch[-1][1]),
        "fitted_last_loss": fitted[-1][1],
    }


def _saved(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Tower -> of each seed that has both starts, and a probe, what the fitted one saves."""
    curves = {
        (row["tower"], row["start"], seed): curve
        for row in rows
        for seed, curve in zip(row["seeds"], row["curves"], strict=True)
        if curve
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for (tower, start, seed), fitted in curves.items():
        scratch = curves.get((tower, SCRATCH, seed))
        if start == FITTED and scratch:
            found.setdefault(tower, []).append({"seed": seed, **steps_saved(scratch, fitted)})
    return found


# ---- Comparisons, and in words ---------------------------------------------------------------------------


def _pairs(rows: Sequence[Mapping[str, Any]], control: str | None) -> dict[str, list[tuple[str, str]]]:
    """Which rows are compared, a less b: with the control that started alike, the best, the other start."""
    labels = {(row["tower"], row["start"]): row["label"] for row in rows}
    best = max(rows, key=lambda row: row["mean"]["mean"])["label"]
    found = {
        "best": [(row["label"], best) for row in rows if row["label"] != best],
        "starts": [
            (labels[tower, FITTED], label)
            for (tower, start), label in labels.items()
            if start == SCRATCH and (tower, FITTED) in labels
        ],
    }
    controls = {row["start"]: row["label"] for row in rows if row["tower"] == control}
    if controls:
        other = controls.get(SCRATCH) or controls[FITTED]
        found["control"] = [
            (row["label"], controls.get(row["start"], other)) for row in rows if row["tower"] != control
        ]
    return {which: pairs for which, pairs in found.items() if pairs}


def is_beyond(cell: Mapping[str, Any]) -> bool:
    """Whether a difference is beyond chance: by Holm's p over the questions and by 1.96 SE over seeds."""
    spread = Z95 * (cell["stderr_seeds"] or 0.0)
    return cell["p_holm"] is not None and cell["p_holm"] < LEVEL and abs(cell["difference"]) > spread


def words(report: Mapping[str, Any]) -> list[str]:
    """What the table shows, in sentences."""
    found = []
    rows = report["compared"].get("control", [])
    for which in ("source", "target") if rows else ():
        for how, wanted in (("beyond chance", True), ("within it", False)):
            named = [f"{row['a']} {_signed(row[which])}" for row in rows if is_beyond(row[which]) is wanted]
            found.append(
                f"{which.capitalize()} less {report['control']}'s, {how}: {'; '.join(named) or 'none'}."
            )
    for row in report["compared"].get("starts", []):
        tower = next(r["tower"] for r in report["rows"] if r["label"] == row["a"])
        less = ", ".join(f"{which} {_signed(row[which])}" for which in ("source", "target"))
        found.append(f"{tower}, fitted less scratch: {less}.{_steps(report['saved'].get(tower, []))}")
    return found


def _signed(cell: Mapping[str, Any]) -> str:
    half = half_width(cell["ci95"])
    return f"{cell['difference']:+.1f}" + ("" if half is None else f" ± {half:.1f}")


def _steps(saved: Sequence[Mapping[str, Any]]) -> str:
    """What the fitted start saves, as the mean over seeds."""
    if not saved:
        return ""
    first, last = fmean(one["first_loss"] for one in saved), fmean(one["last_loss"] for one in saved)
    steps = fmean(one["last"] for one in saved)
    begins = _at([one["scratch_at"] for one in saved])
    ends = [one["fitted_at"] for one in saved]
    less = "" if None in ends else f": {steps - fmean(ends):.0f} of {steps:.0f} steps saved"
    return (
        f" Its probe starts at a loss of {first:.3f}, which scratch reaches {begins}; it reaches scratch's "
        f"last loss, {last:.3f}, {_at(ends)}{less}."
    )


def _at(steps: Sequence[float | None]) -> str:
    known = [step for step in steps if step is not None]
    if len(known) == len(steps):
        return f"at step {fmean(known):.0f}"
    return f"with {len(known)} of {len(steps)} seeds only" if known else "not at all"
