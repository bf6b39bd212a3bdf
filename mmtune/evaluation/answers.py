"""What the answers look like beside their score: forgetting a format is not forgetting what a picture shows.

A fall splits in two: what a lenient reader (metrics/repair.py) regains is lost form, the rest is lost
knowledge, as far as the answers show it.

A model tuned on one task may know the answer to another and give it in the tuned task's form (an option's
letter, a number word). Scores cannot tell the two apart, and the net change of a score hides how many
answers changed sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from mmtune.evaluation.forgetting import Answers, check_same_questions, ci95, mean_sd
from mmtune.evaluation.metrics.base import clustered_stderr, plain


def answer_forms(
    base: Mapping[str, Answers], run: Mapping[str, Answers], source: Sequence[str], target: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Task -> how the run's answers to it look. A missing prediction is an empty answer.

    mean_length: characters. empty: percent of answers. For source tasks also, answers being the same but for
    outer space, case and one trailing period:

    new: percent of answers that neither the base nor the annotations give to any question of this task. Where
    the task has a closed set of answers these are no possible answers; where any word may be one, they
    include mere misreadings.
    off_format: percent of answers that are new and that the run gives, rightly, to some target question:
    those in the target's form.

    Both are 0 for the base itself.
    """
    targets_form = {
        plain(answer.text) for task in target for answer in run[task].values() if answer.score > 0
    }
    forms = {}
    for task in (*source, *target):
        said = [plain(answer.text) for answer in run[task].values()]
        forms[task] = {
            "mean_length": fmean(len(answer.text) for answer in run[task].values()),
            "empty": 100 * fmean(text == "" for text in said),
        }
        if task in source:
            possible = {plain(answer.text) for answer in base[task].values()}
            possible |= {plain(text) for answer in base[task].values() for text in answer.accepted}
            new = [text for text in said if text and text not in possible]
            forms[task]["new"] = 100 * len(new) / len(said)
            forms[task]["off_format"] = 100 * sum(text in targets_form for text in new) / len(said)
    return forms


def loss_parts(
    base: Mapping[str, Answers], run: Mapping[str, Answers], source: Sequence[str]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, list[float] | None]]]:
    """Task -> the drop in its two parts, in points, and the 95 % interval of each part.

    knowledge: the drop of the lenient score. format: what the run regains by lenient reading, less what the
    base does; the two add up to the drop. lenient: the run's lenient score. A task without lenient scores is
    left out. Raises UserError where the questions differ.
    """
    parts: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, list[float] | None]] = {}
    for task in source:
        check_same_questions(base[task], run[task], task)
        pairs = [(before, run[task][name]) for name, before in base[task].items()]
        read = [(b.lenient, r.lenient) for b, r in pairs if b.lenient is not None and r.lenient is not None]
        if len(read) < len(pairs):
            continue
        knowledge = [before - after for before, after in read]
        drops = [before.score - after.score for before, after in pairs]
        form = [drop - lost for drop, lost in zip(drops, knowledge, strict=True)]
        parts[task], intervals[task] = {"lenient": 100 * fmean(after for _, after in read)}, {}
        for name, values in (("format", form), ("knowledge", knowledge)):
            stderr = clustered_stderr(values, [before.cluster for before, _ in pairs])
            parts[task][name] = 100 * fmean(values)
            intervals[task][name] = ci95(parts[task][name], None if stderr is None else 100 * stderr)
    return parts, intervals


def flips(base: Mapping[str, Answers], run: Mapping[str, Answers]) -> dict[str, dict[str, int]]:
    """Task -> how many questions the base had right and the run has wrong, and the other way round.

    Right is a score of at least a half, where an answer may be partly right. Raises UserError where the
    questions differ.
    """
    counts = {}
    for task, answers in base.items():
        check_same_questions(answers, run[task], task)
        pairs = [(answer.score >= 0.5, run[task][name].score >= 0.5) for name, answer in answers.items()]
        counts[task] = {
            "right_to_wrong": sum(before and not after for before, after in pairs),
            "wrong_to_right": sum(after and not before for before, after in pairs),
        }
    return counts


def over_seeds(
    rows: Sequence[Mapping[str, Mapping[str, float]]],
) -> dict[str, dict[str, dict[str, float | None]]]:
    """The same table with mean and SD over several runs for each number, of tasks that all have."""
    return {
        task: {key: mean_sd([row[task][key] for row in rows]) for key in numbers}
        for task, numbers in rows[0].items()
        if all(task in row for row in rows)
    }
