"""A model tuned on one task after another: what it can do after each, as one matrix and five numbers.

R[t][i] is the score on task i after stage t, b_i the base's, T the number of tasks, all counted from 1 and in
points. The numbers, of which the first three come from Lopez-Paz and Ranzato (GEM, arXiv 1706.08840), F from
Chaudhry et al. (Riemannian Walk, arXiv 1801.10112) and MAA from Chen et al. (CoIN, arXiv 2403.08350):

ACC = mean over i of R[T][i], the average accuracy at the end.
BWT = mean over i < T of R[T][i] - R[i][i], backward transfer: below zero where later tasks cost earlier ones.
FWT = mean over i > 1 of R[i-1][i] - b_i, forward transfer: what earlier tasks brought to one before its turn.
F   = mean over i < T of max over t < T of R[t][i], less R[T][i]: forgetting since a task's best moment.
MAA = mean over t of the mean over i <= t of R[t][i], the average over the whole way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmtune.core.errors import UserError
from mmtune.core.files import read_json, write_json
from mmtune.evaluation.differences import paired_answers
from mmtune.evaluation.forgetting import (
    Evaluation,
    check_comparable,
    ci95,
    half_width,
    read_evaluation,
    short_names,
    stderr_of_mean,
)

NAMES = {
    "acc": "average accuracy at the end (ACC)",
    "bwt": "backward transfer (BWT)",
    "fwt": "forward transfer (FWT)",
    "forgetting": "forgetting since each task's best (F)",
    "maa": "average over the whole way (MAA)",
}


def sequence_numbers(scores: Sequence[Sequence[float]], base: Sequence[float]) -> dict[str, float | None]:
    """The five numbers of the module's docstring, in the scores' unit.

    scores: T rows, one after each stage, of T tasks each; base: T. bwt, fwt and forgetting of a single task
    are None.
    """
    count = len(base)
    last, earlier, later = scores[-1], range(count - 1), range(1, count)
    several = count > 1
    return {
        "acc": fmean(last),
        "bwt": fmean(last[i] - scores[i][i] for i in earlier) if several else None,
        "fwt": fmean(scores[i - 1][i] - base[i] for i in later) if several else None,
        "forgetting": fmean(max(row[i] for row in scores[:-1]) - last[i] for i in earlier)
        if several
        else None,
        "maa": fmean(fmean(row[: t + 1]) for t, row in enumerate(scores)),
    }


def make_sequence(base: Path, stages: Sequence[Path], tasks: Sequence[str], output: Path) -> dict[str, Any]:
    """The base's evaluation and one after each stage, each of all tasks; writes sequence.json to `output`.

    tasks: in the order they were tuned on, as many as stages. Intervals are about the questions: of ACC from
    the clustered errors, of BWT and FWT paired, the tasks independent. Raises UserError for evaluations that
    are missing or were made in different ways.
    """
    twice = sorted({task for task in tasks if list(tasks).count(task) > 1})
    if twice or len(stages) != len(tasks):
        what = f"task {twice[0]} is named twice" if twice else f"{len(stages)} stages, but {len(tasks)} tasks"
        raise UserError(what, mend="Give one evaluation after each task, in the order they were tuned on.")
    first = read_evaluation(base, tasks)
    after = [read_evaluation(stage, tasks) for stage in stages]
    check_comparable(first, {str(stage): each for stage, each in zip(stages, after, strict=True)})
    scores = [[each.scores[task]["score"] for task in tasks] for each in after]
    start = [first.scores[task]["score"] for task in tasks]
    units = {task: str(first.scores[task]["unit"]) for task in tasks}
    report = {
        "tasks": list(tasks),
        "base": {"folder": str(base), "scores": start},
        "stages": [
            {"after": task, "folder": str(stage), "scores": row}
            for task, stage, row in zip(tasks, stages, scores, strict=True)
        ],
        **sequence_numbers(scores, start),
        **_intervals(first, after, tasks, fmean(scores[-1])),
        "units": units,
        "warnings": _warnings(first, after, units),
        "made_with": {
            "rules": {task: first.scores[task]["rule"] for task in tasks},
            "protocols": first.protocols,
            "annotations": first.data,
            **first.made_with,
        },
    }
    write_json(output / "sequence.json", report)
    return report


def _intervals(
    base: Evaluation, after: Sequence[Evaluation], tasks: Sequence[str], acc: float
) -> dict[str, list[float] | None]:
    last = after[-1]
    found = {"acc_ci95": ci95(acc, stderr_of_mean([last.scores[task]["stderr"] for task in tasks]))}
    transfers = {
        "bwt": [(after[i], last, tasks[i]) for i in range(len(tasks) - 1)],
        "fwt": [(base, after[i - 1], tasks[i]) for i in range(1, len(tasks))],
    }
    for name, pairs in transfers.items():
        rows = [paired_answers(a.answers[task], b.answers[task], task) for a, b, task in pairs]
        value = fmean(row["difference"] for row in rows) if rows else 0.0
        found[f"{name}_ci95"] = ci95(value, stderr_of_mean([row["stderr"] for row in rows]))
    return found


def _warnings(base: Evaluation, after: Sequence[Evaluation], units: dict[str, str]) -> list[str]:
    warnings = []
    for before, each in zip([base, *after], after, strict=False):
        trained = Path(each.model) / "trained.json"
        start = read_json(trained).get("base") if trained.is_file() else None
        if start not in (None, before.model_hash):
            warnings.append(f"{each.folder}: its model did not start from that of {before.folder}")
        if each.model_hash == before.model_hash:
            warnings.append(f"{each.folder} and {before.folder} are of one and the same model")
    if len(set(units.values())) > 1:
        named = ", ".join(f"{task} {unit}" for task, unit in units.items())
        warnings.append(f"points of different units are averaged: {named}")
    return warnings


def print_sequence(report: dict[str, Any], console: Console) -> None:
    """The matrix, the score of each stage's own task in bold, and below it the five numbers."""
    if not console.is_terminal:  # a pipe has no width of its own
        console.width = max(console.width, 100)
    short = short_names(report["tasks"])
    table = Table(title="Scores (points) after each task", title_justify="left")
    table.add_column("", overflow="fold")
    for task in report["tasks"]:
        unit = report["units"][task]
        table.add_column(short[task] + (f"\n{unit}" if unit != "%" else ""), justify="right", overflow="fold")
    table.add_row("base", *[f"{score:.1f}" for score in report["base"]["scores"]])
    for t, stage in enumerate(report["stages"]):
        cells = [
            Text(f"{score:.1f}", style="bold" if i == t else "") for i, score in enumerate(stage["scores"])
        ]
        table.add_row(Text(f"after {short[stage['after']]}"), *cells)
    console.print(table)
    for key, name in NAMES.items():
        half = half_width(report.get(f"{key}_ci95"))
        spread = "" if half is None else f" ± {half:.1f} (95 %, questions)"
        said = "undefined for one task" if report[key] is None else f"{report[key]:.1f} points{spread}"
        console.print(f"{name}: {said}", highlight=False)
    for warning in report["warnings"]:
        console.print(Text(f"WARNING: {warning}", style="bold yellow"))
