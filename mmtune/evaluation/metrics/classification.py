"""Closed-set classification: accuracy as the score; precision, recall and F1, the confusion matrix, refusals.

The figures are those of scikit-learn's `precision_recall_fscore_support` with `zero_division=0` and, in the
macro averages, `labels` the classes that have questions. What is no label of the set has a column of its
own, wrong for every class, so the micro precision is above the micro recall where a model leaves the set.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mmtune.core.errors import UserError
from mmtune.evaluation.metrics import exact
from mmtune.evaluation.metrics.base import Question, Rule, plain, some
from mmtune.evaluation.metrics.iconqa import option_by_letter

METRIC = "accuracy"
OTHER, MISSING = "(other)", "(missing)"
LARGEST_MATRIX = 50
"""Classes up to which the confusion matrix is written; beyond, the most frequent confusions are."""


@dataclass(frozen=True)
class LabelSet:
    """The labels of a file, those that mean a refusal, and what else an answer that refuses may say."""

    labels: tuple[str, ...]
    refusal: tuple[str, ...] = ()
    refusing: tuple[re.Pattern[str], ...] = ()
    by_text: Mapping[str, str] = field(default_factory=dict)
    """A label but for outer space, case and one trailing period -> the label."""

    def said(self, text: str) -> str:
        """The label that an answer is; the first of refusal where it refuses in other words; else OTHER."""
        label = self.by_text.get(plain(text))
        if label is not None:
            return label
        return self.refusal[0] if any(pattern.search(text) for pattern in self.refusing) else OTHER

    def said_by_letter(self, text: str) -> str:
        """As `said`, but an option's letter comes first, for prompts with {options}."""
        index = option_by_letter(self.labels, text)
        return self.said(text) if index is None else self.labels[index]


@dataclass(frozen=True)
class ClosedQuestion(Question):
    """A question whose answer is one label of a set."""

    among: LabelSet = LabelSet(())


Said = Callable[[LabelSet, str], str]
SAID: dict[str, Said] = {"label": LabelSet.said, "letter": LabelSet.said_by_letter}


def _rule(said: Said) -> Rule:
    return lambda question, prediction: float(said(_labels(question), prediction) == question.answers[0])


RULES: dict[str, Rule] = {name: _rule(said) for name, said in SAID.items()}


def also(
    questions: Sequence[Question], predictions: Mapping[str, str], rule: str, scores: Sequence[float]
) -> dict[str, Any]:
    """Precision, recall and F1 in points: macro, micro and per class; the confusion matrix; refusals.

    Macro averages are over the classes that have questions; macro F1 is the mean of their F1. What has no
    denominator is 0. `other` and `missing` count the answers outside the set and the missing ones.
    """
    pairs = [
        (
            question.answers[0],
            SAID[rule](_labels(question), predictions[question.id])
            if question.id in predictions
            else MISSING,
        )
        for question in questions
    ]
    among = _labels(questions[0])
    counts = Counter(pairs)
    asked = Counter(truth for truth, _ in pairs)
    answered = Counter(said for _, said in pairs)
    classes = {
        label: {
            **_figures(counts[label, label], answered[label], asked[label]),
            "n": asked[label],
            "answered": answered[label],
        }
        for label in among.labels
    }
    there = [classes[label] for label in among.labels if asked[label]]
    right = sum(counts[label, label] for label in among.labels)
    inside = len(pairs) - answered[OTHER] - answered[MISSING]
    figures: dict[str, Any] = {
        "macro": {
            name: sum(each[name] for each in there) / len(there) for name in ("precision", "recall", "f1")
        },
        "micro": _figures(right, inside, len(pairs)),
        "other": answered[OTHER],
        "missing": answered[MISSING],
    }
    if among.refusal:
        figures["refusal"] = _refusals(pairs, frozenset(among.refusal))
    figures["classes"] = classes
    if len(among.labels) <= LARGEST_MATRIX:
        columns = [*among.labels, OTHER, MISSING]
        rows = {truth: [counts[truth, said] for said in columns] for truth in among.labels}
        return {**figures, "confusion": {"columns": columns, "rows": rows}}
    wrong = sorted((-n, truth, said) for (truth, said), n in counts.items() if truth != said)
    return {**figures, "most_confused": [[truth, said, -n] for n, truth, said in wrong[:LARGEST_MATRIX]]}


def _refusals(pairs: Sequence[tuple[str, str]], refusal: frozenset[str]) -> dict[str, float | int]:
    """Valid questions against those that are to be refused; any label of `refusal` refuses."""
    both = Counter((truth in refusal, said in refusal) for truth, said in pairs)
    to_refuse = both[True, True] + both[True, False]
    valid = both[False, True] + both[False, False]
    return {
        "to_refuse": to_refuse,
        "valid": valid,
        "refused_of_to_refuse": _points(both[True, True], to_refuse),
        "refused_of_valid": _points(both[False, True], valid),
        **_figures(both[True, True], both[True, True] + both[False, True], to_refuse),
    }


def _figures(right: int, answered: int, asked: int) -> dict[str, float]:
    return {
        "precision": _points(right, answered),
        "recall": _points(right, asked),
        "f1": _points(2 * right, answered + asked),
    }


def _points(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0


def _labels(question: Question) -> LabelSet:
    assert isinstance(question, ClosedQuestion)
    return question.among


def read(
    path: Path,
    labels: Sequence[str] | None = None,
    refusal: Sequence[str] = (),
    refusing: Sequence[str] = (),
) -> list[Question]:
    """The questions of a JSONL file: question_id, text, answer, and where there are any image and category.

    labels: the set, in the order in which a prompt's {choices} and {options} show it; without it all answers
    of the file, sorted. refusal: labels that mean the question is to be refused. refusing: regular
    expressions; where an answer is no label and holds one of them, but for case, it is the first of refusal.
    Raises UserError for an answer that is no label, for labels that differ in nothing but case, space or a
    trailing period, and for a faulty expression.
    """
    questions = exact.read(path)
    refusal = _texts("refusal", refusal)
    answers = sorted({question.answers[0] for question in questions})
    given = answers if labels is None else _texts("labels", labels)
    given += [label for label in refusal if label not in given]
    by_text: dict[str, str] = {}
    for label in given:
        if plain(label) in by_text:
            raise UserError(
                f"the labels '{by_text[plain(label)]}' and '{label}' read the same",
                where=path,
                mend="Answers are compared but for case, outer space and one trailing period: give one name.",
            )
        by_text[plain(label)] = label
    unknown = [answer for answer in answers if plain(answer) not in by_text]
    if unknown:
        raise UserError(
            f"answers that are no label: {some(unknown)}",
            where=path,
            mend=f"The protocol's labels are {some(given, 12)}.",
        )
    if refusing and not refusal:
        raise UserError(
            "refusing is given without refusal",
            where=path,
            mend="Name the label that such an answer stands for: refusal: [unanswerable].",
        )
    patterns = tuple(_pattern(text) for text in _texts("refusing", refusing))
    among = LabelSet(tuple(given), tuple(refusal), patterns, by_text)
    return [
        ClosedQuestion(
            **{
                **_shallow(question),
                "answers": (by_text[plain(question.answers[0])],),
                "choices": among.labels,
            },
            among=among,
        )
        for question in questions
    ]


def _texts(option: str, values: Sequence[Any]) -> list[str]:
    """The texts of an option's list. Raises UserError, also for what YAML makes of an unquoted yes or no."""
    if not isinstance(values, list | tuple):
        raise UserError(f"{option}: expected a list", mend="Write it like [cat, dog].")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
            mend = 'Quote it: "yes", "no".' if isinstance(value, bool) else "Give each a text."
            raise UserError(f"{option}: {value!r} is no text", mend=mend)
    return [str(value) for value in values]


def _shallow(question: Question) -> dict[str, Any]:
    return {each.name: getattr(question, each.name) for each in fields(question)}


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text, re.IGNORECASE)
    except re.error as error:
        raise UserError(
            f"refusing: '{text}' is no regular expression: {error}", mend="Escape its marks with \\."
        ) from None
