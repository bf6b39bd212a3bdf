"""What a tuned model gained and what it forgot, with intervals. Arithmetic on finished evaluations, no torch.

Names and formulas follow the literature on forgetting (LoRASculpt, arXiv 2503.16843; Model Tailor;
SPIDER): Source is the mean over the upstream tasks, Target over what the model was tuned on.
Scores, drops and their errors are in points: per cent, for captions CIDEr x 100, which has no highest.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from mmtune.core.errors import Fault, UserError
from mmtune.core.files import read_json, read_jsonl
from mmtune.evaluation.metrics.base import clustered_stderr, field, some
from mmtune.evaluation.significance import Z95

NO_DIFFERENCE = ("name", "seed", "output", "evaluate")  # keys of a config by which no group differs
SUMMARIES = ("source", "target", "mean", "harmonic_mean", "o_mean")


class Answer(NamedTuple):
    """What one question brought: a score in [0, 1], and the cluster it depends on (its picture).

    text: what the model said, "" where it said nothing. accepted: the annotated answers. lenient: the score
    after format repair; None for captions.
    """

    score: float
    cluster: str
    text: str = ""
    accepted: tuple[str, ...] = ()
    lenient: float | None = None


Answers = Mapping[str, Answer]
"""The answers to one task by question id."""


@dataclass(frozen=True)
class Evaluation:
    """What one model scored on the tasks of a suite, read from an evaluation's folder."""

    folder: Path
    scores: dict[str, dict[str, Any]]
    """Task -> score, stderr, n, missing, rule, unit."""
    answers: dict[str, dict[str, Answer]]
    """Task -> the answers by question id."""
    protocols: dict[str, str]
    """Task -> hash of its protocol."""
    data: dict[str, str]
    """Task -> hash of its annotation file."""
    splits: dict[str, str]
    """Task -> the split its questions are from."""
    model_hash: str
    model: str
    """Which model it was, by the hash of its folder and by name."""
    made_with: dict[str, Any]
    """versions, precision, batch_size, padding: what may move a score without making it another one."""
    limit: int | None
    """Only the first so many questions of each task were asked."""
    unlike: dict[str, str]
    """Task -> how many questions its data has and how many the official one, where these differ."""
    decoding: dict[str, Any]
    restored: str | None
    """The part that was put back as it is in the base, if there was one."""
    scale: float | None
    """How far the model was on its way from the base, where it was not whole."""
    base_hash: str | None
    """The base in both cases."""


def read_evaluation(folder: Path, tasks: Sequence[str]) -> Evaluation:
    """The evaluation in a folder. Raises UserError where a task or a key is missing or its files disagree."""
    path = Path(folder) / "results.json"
    results = read_json(path)
    if not isinstance(results, dict):
        raise UserError(f"expected an object, found {type(results).__name__}", where=path)
    rows, configs, data, splits = (
        field(results, key, dict, str(path)) for key in ("results", "configs", "data", "splits")
    )
    absent = [task for task in tasks if task not in rows]
    if absent:
        raise UserError(
            f"it has no score of {some(absent)}",
            where=path,
            mend="Evaluate the whole suite, into this folder.",
        )
    scores, answers, protocols, hashes = {}, {}, {}, {}
    for task in tasks:
        where = f"{path}, {task}"
        scores[task] = _task_score(field(rows, task, dict, where), where)
        answers[task] = _read_answers(path.with_name(f"samples_{task}.jsonl"), scores[task])
        protocols[task] = field(field(configs, task, dict, where), "hash", str, where)
        hashes[task] = field(data, task, str, where)
    return Evaluation(
        folder=path.parent,
        scores=scores,
        answers=answers,
        protocols=protocols,
        data=hashes,
        splits={task: field(splits, task, str, f"{path}, splits") for task in tasks},
        model_hash=field(results, "model_hash", str, str(path)),
        model=field(results, "model", str, str(path)),
        made_with={
            # Before `versions` was of protocols, as lmms-eval has it, it was of packages.
            "versions": results.get("environment", results.get("versions")),
            **{key: results.get(key) for key in ("precision", "batch_size", "padding")},
        },
        limit=results.get("limit"),
        unlike=_unlike(results, tasks),
        decoding=results.get("decoding", {}),
        restored=results.get("restored"),
        scale=results.get("scale"),
        base_hash=results.get("base_hash"),
    )


def _unlike(results: dict[str, Any], tasks: Sequence[str]) -> dict[str, str]:
    found = {}
    for task in tasks:
        there = results.get("n-samples", {}).get(task, {}).get("original")
        official = results["configs"][task].get("expect", {}).get(results["splits"][task], there)
        if there != official:
            found[task] = f"{there:,} of officially {official:,}"
    return found


def _task_score(row: dict[str, Any], where: str) -> dict[str, Any]:
    return {
        "score": field(row, "score", (int, float), where),
        "stderr": field(row, "stderr", (int, float, type(None)), where),
        "n": field(row, "n", int, where),
        "missing": field(row, "missing", int, where),
        "rule": field(row, "rule", str, where),
        "unit": row.get("unit", "%"),
        **{key: row[key] for key in ("lenient", "kl", "kl_stderr") if key in row},
    }


def _read_answers(path: Path, of: dict[str, Any]) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    for line, row in read_jsonl(path):
        where = f"{path}, line {line}"
        identity = str(field(row, "question_id", (str, int), where))
        if identity in answers:
            raise UserError(
                f"question_id {identity} occurs a second time", where=where, mend="Evaluate again."
            )
        score = field(row, "score", (int, float), where)
        text = field(row, "prediction", (str, type(None)), where) or ""
        accepted = field(row, "target", list, where) if "target" in row else []
        cluster = str(field(row, "cluster", (str, int), where))
        lenient = field(row, "lenient", (int, float), where) if "lenient" in row else None
        answers[identity] = Answer(score, cluster, text, tuple(map(str, accepted)), lenient)
    mean = _points(answer.score for answer in answers.values())
    # A tolerance for scores that were rounded when they were written.
    if len(answers) != of["n"] or abs(mean - of["score"]) > 0.01:
        raise UserError(
            f"{len(answers)} questions with a mean of {mean:.2f}, "
            f"but results.json says {of['n']} with {of['score']:.2f}",
            where=path,
            mend="The files are of different evaluations: evaluate again.",
        )
    return answers


def _points(scores: Iterable[float]) -> float:
    return 100 * fmean(scores)


def check_comparable(base: Evaluation, others: Mapping[str, Evaluation]) -> None:
    """Raises UserError, with every difference, unless all scores were made as the base's were.

    The same decoding, the same part put back (or none), and for each task the same split, rule, protocol (its
    hash) and questions (the annotation file's hash, and how many of them).
    """
    faults = []
    for name, other in others.items():
        differences: list[tuple[str, str, Any, Any]] = [
            ("", "decoding", base.decoding, other.decoding),
            ("", "part put back", base.restored, other.restored),
            ("", "scale", base.scale, other.scale),
        ]
        for task, mine in base.scores.items():
            its = other.scores[task]
            differences += [
                (f"{task}: ", "split", base.splits[task], other.splits[task]),
                (f"{task}: ", "rule", mine["rule"], its["rule"]),
                (f"{task}: ", "protocol", base.protocols[task], other.protocols[task]),
                (f"{task}: ", "annotation file", base.data[task], other.data[task]),
                (f"{task}: ", "number of questions", mine["n"], its["n"]),
            ]
        faults += [
            Fault(
                f"{task}the {what} differs: {its}, but {mine} for the base; the scores cannot be compared",
                name,
                "Evaluate both again, in the same way.",
            )
            for task, what, mine, its in differences
            if mine != its
        ]
    if faults:
        raise UserError.of(faults)


def summary(scores: Mapping[str, float], source: Sequence[str], target: Sequence[str]) -> dict[str, float]:
    """Source, Target, and three ways to make one number of them.

    mean: (Source + Target) / 2, LoRASculpt's Avg. harmonic_mean: zero where either is. o_mean: over all
    tasks alike, so that the target weighs as little as any of them.
    """
    kept = fmean(scores[task] for task in source)
    gained = fmean(scores[task] for task in target)
    return {
        "source": kept,
        "target": gained,
        "mean": (kept + gained) / 2,
        "harmonic_mean": harmonic_mean(kept, gained),
        "o_mean": fmean(scores[task] for task in (*source, *target)),
    }


def unit_of(scores: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> str:
    """What the mean score of these tasks is counted in, as an axis says it."""
    units = {scores[task].get("unit", "%") for task in tasks}
    if len(units) > 1:
        return "points of different units"
    return "points" if units == {"%"} else str(units.pop())


def units_note(
    scores: Mapping[str, Mapping[str, Any]], source: Sequence[str], target: Sequence[str]
) -> str | None:
    """What has to be said wherever scores of these tasks are averaged; None where all are percentages."""
    units = {task: scores[task].get("unit", "%") for task in (*source, *target)}
    others: dict[str, list[str]] = {}
    for task, unit in units.items():
        if unit != "%":
            others.setdefault(unit, []).append(task)
    if not others:
        return None
    note = "; ".join(f"points of {', '.join(tasks)} are {unit}" for unit, tasks in others.items())
    mixed = [
        name
        for name, tasks in (("Source", source), ("Target", target), ("Mean, H-mean and O-mean", units))
        if len({units[task] for task in tasks}) > 1
    ]
    if mixed:
        note += f", those of the other sets per cent: {', '.join(mixed)} weigh unlike things"
    return f"Units: {note}."


def harmonic_mean(a: float, b: float) -> float:
    """2ab / (a + b) of two numbers that are not negative; 0 where either is 0."""
    return 2 / (1 / a + 1 / b) if a and b else 0.0


def stderr_of_mean(stderrs: Sequence[float | None]) -> float | None:
    """The standard error of the mean of independent test sets' scores: sqrt(sum SE_i^2) / n.

    None where one of them is undefined.
    """
    known = [stderr for stderr in stderrs if stderr is not None]
    return math.hypot(*known) / len(known) if known and len(known) == len(stderrs) else None


def ci95(value: float, stderr: float | None) -> list[float] | None:
    """The central-limit 95 % interval [low, high]; None where there is no standard error."""
    return None if stderr is None else [value - Z95 * stderr, value + Z95 * stderr]


def half_width(interval: Sequence[float] | None) -> float | None:
    """The ± of an interval [low, high]; None where there is none."""
    return None if interval is None else (interval[1] - interval[0]) / 2


def paired_drop(base: Answers, tuned: Answers, task: str) -> tuple[float, float | None]:
    """The points lost on a task, and their standard error (None for a single question).

    Base and tuned model answered the same questions, so the error is that of the differences, question
    by question, clustered by picture: smaller than the two scores' own errors suggest (Miller, "Adding
    Error Bars to Evals", arXiv 2411.00640, section 4). Raises UserError where the questions differ.
    """
    check_same_questions(base, tuned, task)
    differences = [answer.score - tuned[identity].score for identity, answer in base.items()]
    stderr = clustered_stderr(differences, [answer.cluster for answer in base.values()])
    return _points(differences), None if stderr is None else 100 * stderr


def check_same_questions(base: Answers, tuned: Answers, task: str) -> None:
    """Raises UserError where base and run answered different questions."""
    if base.keys() != tuned.keys():
        differ = sorted(base.keys() ^ tuned.keys())
        raise UserError(
            f"base and run answered different questions: {some(differ)}",
            where=f"task {task}",
            mend="Evaluate both on the same questions.",
        )


def retention(base: float, tuned: float) -> float | None:
    """The share of the base's score that is left; None where there was nothing to keep."""
    return tuned / base if base else None


def seed_mean(runs: Sequence[Answers], task: str) -> dict[str, Answer]:
    """Each question's score averaged over the runs of several seeds. Raises UserError where questions differ.

    The interval of their mean is then about the questions alone, with these very models given.
    """
    first = runs[0]
    if any(run.keys() != first.keys() for run in runs):
        raise UserError("the runs of one group answered different questions", where=f"task {task}")
    return {
        identity: Answer(fmean(run[identity].score for run in runs), answer.cluster)
        for identity, answer in first.items()
    }


def score_of(answers: Answers) -> tuple[float, float | None]:
    """The score of a task, and its standard error clustered by picture."""
    scores = [answer.score for answer in answers.values()]
    stderr = clustered_stderr(scores, [answer.cluster for answer in answers.values()])
    return _points(scores), None if stderr is None else 100 * stderr


def mean_sd(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation (over n - 1); one value has no deviation."""
    return {"mean": fmean(values), "sd": stdev(values) if len(values) > 1 else None}


def group_by_config(
    configs: Mapping[str, Mapping[str, Any]], data: Mapping[str, str]
) -> list[tuple[str, list[str]]]:
    """(label, names of the runs that differ in their seed alone, by seed), in the order they came.

    `configs` and `data` map a run's name to its resolved config and its training data's hash. A label is
    the first run's name without its seed; where two groups would share it, each keeps its whole name.
    Raises UserError for two runs of one config and one seed: a second copy is no second seed.
    """
    groups: dict[str, list[str]] = {}
    for name, config in configs.items():
        decides = {k: v for k, v in config.items() if k not in NO_DIFFERENCE}
        groups.setdefault(json.dumps([decides, data[name]], sort_keys=True), []).append(name)
    labels = [label_of(names[0]) for names in groups.values()]
    labelled = []
    for label, names in zip(labels, groups.values(), strict=True):
        seeds = [configs[name]["seed"] for name in names]
        if len(set(seeds)) < len(seeds):
            raise UserError(
                f"{some(names)} have the same config, and seeds {some(seeds)}",
                mend="Report one run of each seed: copies of it would make the seeds look alike.",
            )
        by_seed = sorted(names, key=lambda name: configs[name]["seed"])
        labelled.append((names[0] if labels.count(label) > 1 else label, by_seed))
    return labelled


def series_of(configs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The groups, by label, that differ in one number of their configs alone, in the order of that number.

    Such as LoRA at several rates: {"key": "tune.language.lr", "labels": [...]}. Three at least make a series.
    """
    flat = {label: _flat(config) for label, config in configs.items()}
    keys = dict.fromkeys(key for config in flat.values() for key in config)
    found = []
    for key in keys:
        alike: dict[str, list[str]] = {}
        for label, config in flat.items():
            if type(config.get(key)) in (int, float):
                rest = {k: v for k, v in config.items() if k != key}
                alike.setdefault(json.dumps(rest, sort_keys=True), []).append(label)
        for labels in alike.values():
            if len(labels) > 2:
                found.append({"key": key, "labels": sorted(labels, key=lambda label: flat[label][key])})
    return found


def _flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """a.b.c -> value, without what makes no difference to a group."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if above or key not in NO_DIFFERENCE:
            flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return flat


def label_of(name: str) -> str:
    """A run's name without its seed: `lora_s0`, `lora-s1` and `lora_seed2` are all `lora`."""
    return re.sub(r"[-_]s(eed)?\d+$", "", name) or name


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Each name without the words that all of several begin with."""
    words = [name.split("_") for name in names]
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))
    shared = min(len(list(same)), *(len(each) - 1 for each in words)) if len(names) > 1 else 0
    return {name: "_".join(name.split("_")[shared:]) for name in names}
