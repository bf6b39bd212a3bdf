"""What changed on the same questions, tested: a run against its base, and one method against another.

A difference is run less base, and a less b. Holm's adjustment is over the source sets together and over the
target sets together: what was forgotten and what was gained are two questions, and the doubt about the first
is to be 5 % over all its sets, not over each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

from mmtune.evaluation.forgetting import Answers, check_same_questions, ci95, stderr_of_mean
from mmtune.evaluation.significance import detectable, flip_signs, holm, moves, paired

Methods = Mapping[str, Mapping[str, Answers]]
"""Label -> task -> the answers of a method, each question's score averaged over its seeds."""


def changes(
    base: Mapping[str, Answers], run: Mapping[str, Answers], source: Sequence[str], target: Sequence[str]
) -> dict[str, Any]:
    """`source`, `target` and `tasks` (by name): what `paired` says of run less base, in points.

    Each task also has p_holm. Source and Target are means of independent sets: where there are several, their
    standard error is sqrt(sum SE_i^2) / n, and for p the signs of all their pictures are flipped together.
    Raises UserError where the questions differ.
    """
    tasks = {task: paired_answers(base[task], run[task], task) for task in (*source, *target)}
    for together in (source, target):
        adjusted = holm([tasks[task]["p"] for task in together])
        for task, p in zip(together, adjusted, strict=True):
            tasks[task]["p_holm"] = p
    moved = {task: moves(*_differences(base[task], run[task])) for task in tasks}
    return {
        which: _mean([tasks[task] for task in named], [moved[task] for task in named])
        for which, named in (("source", source), ("target", target))
    } | {"tasks": tasks}


def paired_answers(base: Answers, run: Answers, task: str) -> dict[str, Any]:
    """What `paired` says of run less base. Raises UserError where the questions differ."""
    check_same_questions(base, run, task)
    return paired(*_differences(base, run))


def _differences(base: Answers, run: Answers) -> tuple[list[float], list[str]]:
    """Run less base, question by question, and the cluster of each."""
    differences = [run[name].score - answer.score for name, answer in base.items()]
    return differences, [answer.cluster for answer in base.values()]


def between(
    methods: Methods,
    runs: Mapping[str, Sequence[Mapping[str, float]]],
    source: Sequence[str],
    target: Sequence[str],
) -> dict[str, Any]:
    """Each method compared with the best (the highest Mean) and with the first one.

    runs: label -> `source`, `target` and `mean` of each of its runs.

    Returns `best`, `first` and `pairs`, a list of {"a", "b", "source", "target", "tasks"}, every difference a
    less b. In `source` and `target` there are also p_holm, over all pairs with the same b, and stderr_seeds,
    the standard error that the spread between seeds leaves to the difference (None where either has a single
    seed). The best was chosen by these very scores, so that its lead is flattered.
    """
    labels = list(methods)
    best = max(labels, key=lambda label: fmean(run["mean"] for run in runs[label]))
    pairs: list[dict[str, Any]] = []
    for b in dict.fromkeys((best, labels[0])):
        others = [a for a in labels if a != b and {a, b} not in [{p["a"], p["b"]} for p in pairs]]
        pairs += compare_pairs([(a, b) for a in others], methods, runs, source, target)
    return {"best": best, "first": labels[0], "pairs": pairs}


def compare_pairs(
    pairs: Sequence[tuple[str, str]],
    methods: Methods,
    runs: Mapping[str, Sequence[Mapping[str, float]]],
    source: Sequence[str],
    target: Sequence[str],
) -> list[dict[str, Any]]:
    """Of each pair a less b, as `between` has it; p_holm of Source and Target is over these pairs."""
    rows: list[dict[str, Any]] = [
        {"a": a, "b": b, **changes(methods[b], methods[a], source, target)} for a, b in pairs
    ]
    for which in ("source", "target"):
        adjusted = holm([row[which]["p"] for row in rows])
        for row, p in zip(rows, adjusted, strict=True):
            spread = _stderr_seeds(*[[run[which] for run in runs[row[label]]] for label in "ab"])
            row[which] |= {"p_holm": p, "stderr_seeds": spread}
    return rows


def _mean(rows: Sequence[Mapping[str, Any]], moved: Sequence[np.ndarray]) -> dict[str, Any]:
    """The mean of independent sets' differences; one set's own, where it is the only one.

    moved: what each cluster of each set moves that set's difference by. The central limit would make too much
    of a few changed answers: four lost and none won of a hundred are p = 0.043 by it, 0.125 in truth.
    """
    if len(rows) == 1:
        return {key: rows[0][key] for key in ("difference", "stderr", "ci95", "p", "test", "detectable")}
    difference = fmean(row["difference"] for row in rows)
    stderr = stderr_of_mean([row["stderr"] for row in rows])
    together = np.concatenate(moved) / len(rows)
    question = 100 / fmean(row["n"] for row in rows) / len(rows)
    return {
        "difference": difference,
        "stderr": stderr,
        "ci95": ci95(difference, stderr),
        **flip_signs(together),
        "detectable": None if stderr is None else detectable(stderr, together, question),
    }


def _stderr_seeds(a: Sequence[float], b: Sequence[float]) -> float | None:
    if min(len(a), len(b)) < 2:
        return None
    return math.hypot(stdev(a) / len(a) ** 0.5, stdev(b) / len(b) ** 0.5)
