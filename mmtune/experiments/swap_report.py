"""What each tower is worth: scores with intervals, costs, differences, what a fitted start saves.

Written to the swap's folder as swap.json, swap.png and swap.html.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from mmtune.core.errors import Fault, UserError
from mmtune.core.files import read_json, read_jsonl, write_json
from mmtune.evaluation.differences import compare_pairs
from mmtune.evaluation.forgetting import (
    Answers,
    Evaluation,
    check_comparable,
    ci95,
    mean_sd,
    read_evaluation,
    score_of,
    seed_mean,
    summary,
)
from mmtune.evaluation.protocol import Suite, load_protocol, load_suite
from mmtune.evaluation.significance import mean95, wilson95
from mmtune.experiments.swap_options import FITTED, SCRATCH, Swap, SwapOptions
from mmtune.experiments.swap_words import words
from mmtune.run import RunOptions
from mmtune.training.folder import changed_keys

SUMMARY = ("source", "target", "mean")
Curve = list[tuple[int, float]]  # the loss of the probe after each step it looked at


def make_swap_report(options: SwapOptions, swaps: Sequence[Swap], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The report of a swap's finished runs. facts: what is known of each tower, as in towers.json.

    Raises UserError, and writes nothing, where none is finished, where one is of another config or evaluation
    than is asked for now, and where evaluations cannot be compared.
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
    _check_as_planned(options, suite, done, {**({"base": base} if base else {}), **evaluations})
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
        "uncontrolled": _uncontrolled(rows, options.control, facts),
        "alignment_only": len(options.stages) == 1,
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
            "without_pictures": [task for task in suite.tasks if _is_blind(first, task)],
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


def _check_as_planned(
    options: SwapOptions, suite: Suite, done: Sequence[Swap], evaluations: Mapping[str, Evaluation]
) -> None:
    """Raises UserError for what was trained or evaluated otherwise than the swap's YAML now says."""
    how, faults = options.evaluate, []
    for swap in done:
        # Where a fitted connector lies moves with the swap's folder.
        if changed := changed_keys(swap.run, ("model.connector.weights",) if swap.start == FITTED else ()):
            what = f"it was trained with another config, in: {', '.join(changed)}"
            mend = "Take that config, or give the swap another name, or remove the run's folder."
            faults.append(Fault(what, swap.run.name, mend))
    wanted: dict[str, Any] = {"limit": how.limit, "dtype": how.dtype}
    for task, given in zip(suite.tasks, suite.given, strict=True):
        protocol = load_protocol(given)
        wanted[f"{task}: protocol"] = protocol.hash
        wanted[f"{task}: split"] = how.split or protocol.report_split
    for name, found in evaluations.items():
        its = {"limit": found.limit, "dtype": found.made_with["precision"]}
        for task in suite.tasks:
            its |= {f"{task}: protocol": found.protocols[task], f"{task}: split": found.splits[task]}
        faults += [
            Fault(
                f"it was evaluated with another {key}: {its[key]}, where {value} is asked for",
                name,
                "Ask for that, or evaluate again: the same command without --report does.",
            )
            for key, value in wanted.items()
            if its[key] != value
        ]
    if faults:
        raise UserError.of(faults)


def _is_blind(evaluation: Evaluation, task: str) -> bool:
    rows = read_jsonl(evaluation.folder / f"samples_{task}.jsonl")
    return not any(row.get("image") for _, row in rows)


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
    speeds = [align_speed(swap.run) for swap in members]
    return {
        "label": label,
        "tower": tower,
        "start": start,
        "seeds": [swap.run.seed for swap in members],
        "runs": [swap.run.name for swap in members],
        **_scored(its, mean, suite),
        "facts": facts[tower],
        "fit": _fit(options, tower) if start == FITTED else None,
        "samples_per_s": fmean(speeds),
        "speeds": speeds,
        "questions_per_s": fmean(map(_questions_per_s, its)),
        "curves": curves,
    }


def _scored(its: Sequence[Evaluation], mean: Mapping[str, Answers], suite: Suite) -> dict[str, Any]:
    """Each set's score and their means: over seeds, with their SD and the questions' interval about it.

    mean: each question's score averaged over the seeds. The sets are independent of one another.
    """
    made: dict[str, Any] = {"scores": {}}
    for task in suite.tasks:
        cell = mean_sd([each.scores[task]["score"] for each in its])
        unit = its[0].scores[task]["unit"]
        made["scores"][task] = {**cell, "ci95": _interval(mean[task], unit), "unit": unit}
    cells = {
        "source": [made["scores"][task] for task in suite.source],
        "target": [made["scores"][task] for task in suite.target],
    }
    summaries = [_summary(each, suite) for each in its]
    for which in SUMMARY:
        of = cells.get(which) or [made["source"], made["target"]]
        interval = mean95([cell["mean"] for cell in of], [cell["ci95"] for cell in of])
        made[which] = {**mean_sd([each[which] for each in summaries]), "ci95": interval}
    return made


def _interval(answers: Answers, unit: str) -> list[float] | None:
    """Of one set's score: Wilson's for a share, the central limit's for captions, which have no highest."""
    if unit == "%":
        return wilson95(
            [each.score for each in answers.values()], [each.cluster for each in answers.values()]
        )
    interval = ci95(*score_of(answers))
    return interval and [max(0.0, interval[0]), interval[1]]


def _fit(options: SwapOptions, tower: str) -> dict[str, Any]:
    made = read_json(options.fitted(tower) / "fit.json")
    return {key: made[key] for key in ("pictures", "ridge", "r2")}


def align_speed(run: RunOptions) -> float:
    """Samples per second of a run's first stage: the median over what it logged, the slow beginning apart."""
    lines = [line for _, line in read_jsonl(run.folder / "metrics.jsonl") if line["stage"] == 1]
    return float(median(line["samples_per_s"] for line in lines[1:] or lines))


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


# ---- Comparisons -----------------------------------------------------------------------------------------


def _pairs(rows: Sequence[Mapping[str, Any]], control: str | None) -> dict[str, list[tuple[str, str]]]:
    """Which rows are compared, a less b: with the control and the best that started alike; both starts."""
    labels = {(row["tower"], row["start"]): row["label"] for row in rows}
    best: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        best[row["start"]] = max(best.get(row["start"], row), row, key=lambda each: each["mean"]["mean"])
    found = {
        "control": [
            (row["label"], labels[control, row["start"]])
            for row in rows
            if row["tower"] != control and (control, row["start"]) in labels
        ],
        "best": [
            (row["label"], best[row["start"]]["label"]) for row in rows if row is not best[row["start"]]
        ],
        "starts": [
            (labels[tower, FITTED], label)
            for (tower, start), label in labels.items()
            if start == SCRATCH and (tower, FITTED) in labels
        ],
    }
    return {which: pairs for which, pairs in found.items() if pairs}


def _uncontrolled(
    rows: Sequence[Mapping[str, Any]], control: str | None, facts: Mapping[str, Any]
) -> dict[str, str]:
    """The rows that no row of the control started like, and why: unlike starts are not compared."""
    if control is None:
        return {}
    there = {row["start"] for row in rows if row["tower"] == control}
    no_fit = facts[control]["no_fit"]
    why = {
        SCRATCH: "its own run from scratch is not there",
        FITTED: f"it has no fitted start ({no_fit})" if no_fit else "its own fitted run is not there",
    }
    return {
        row["label"]: why[row["start"]]
        for row in rows
        if row["tower"] != control and row["start"] not in there
    }
