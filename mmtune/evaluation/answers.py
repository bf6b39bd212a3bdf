"""What the answers look like beside their score: forgetting a format is not forgetting what a picture shows.

A model tuned on one task may know the answer to another and give it in the tuned task's form (an option's
letter, a number word). Scores cannot tell the two apart, and the net change of a score hides how many
answers changed sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from mmtune.evaluation.forgetting import Answers, check_same_questions, mean_sd
from mmtune.evaluation.metrics.base import plain


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
    """The same table with mean and SD over several runs for each number."""
    return {
        task: {key: mean_sd([row[task][key] for row in rows]) for key in numbers}
        for task, numbers in rows[0].items()
    }
