"""What every scorer shares: a question, a task's score, and the standard error that respects pictures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

from mmtune.core.errors import UserError
from mmtune.core.files import read_json


@dataclass(frozen=True)
class Question:
    """One question of a benchmark with its official answers."""

    id: str
    """Unique in its file."""
    text: str
    """The question as the annotation file has it, without the protocol's suffix."""
    answers: tuple[str, ...]
    """The official answers: ten for TextVQA, the right option's text for a choice, one elsewhere."""
    image: str | None
    """The picture's path relative to the task's image root; None for text only."""
    cluster: str
    """What makes questions dependent: the image id, or the question id where there is no picture."""
    choices: tuple[str, ...] = ()
    """The options' texts (file names where the options are pictures), in the order they are shown."""
    choice_images: tuple[str, ...] = ()
    """The pictures of `choices`, one each, where the options are pictures: paths like `image`."""
    category: str | tuple[str, ...] = ""
    """Skill or type, for breakdowns; a question with several counts once in each."""
    answer_index: int | None = None
    """Which of `choices` is right. Two options may read alike, so the answer's text does not tell."""
    ocr: tuple[str, ...] | None = None
    """The tokens an OCR system read in the picture; None where no file of them was given."""
    asked: str | None = None
    """The whole prompt as a question file words it; None where the protocol's prompt asks."""
    context: str = ""
    """What is read before the question, such as ScienceQA's hint."""

    @property
    def images(self) -> tuple[str, ...]:
        """All its pictures in the order they are shown: its own, then the options'."""
        return (*((self.image,) if self.image else ()), *self.choice_images)


Rule = Callable[[Question, str], float]
"""Scores one prediction: a number in [0, 1], but for CIDEr, which goes up to 10."""


@dataclass(frozen=True)
class OverAll:
    """A rule that has to see all questions first: CIDEr weighs words by their rarity in the references."""

    prepare: Callable[[Sequence[Question], Mapping[str, str]], Rule]
    """Of all questions and the predictions (question id -> text) that there are."""


@dataclass(frozen=True)
class TaskScore:
    """The score of a file of predictions, in points: 100 times the mean over its questions."""

    task: str
    rule: str
    metric: str
    score: float
    stderr: float | None
    """In points, clustered; None where one question alone leaves it undefined."""
    n: int
    """Questions in the annotation file: the denominator, whatever was predicted."""
    missing: int
    per_question: list[dict[str, Any]]
    """In the annotation file's order: question_id, prediction (None: missing), score (0 to 1), cluster and,
    but for captions, lenient (0 to 1).
    """
    by_category: dict[str, dict[str, float]]
    """Category -> {"score": points, "n": questions}."""
    unit: str = "%"
    """What a point is: "%", or "CIDEr x 100"."""
    lenient: float | None = None
    """In points, after format repair (metrics/repair.py); None for captions, which have no one right form."""
    also: dict[str, Any] = dataclass_field(default_factory=dict)
    """Further figures of the same predictions that go with the score (precision, BLEU), ready for JSON."""
    warnings: tuple[str, ...] = ()
    """What whoever prints the score must say beside it."""

    def summary(self) -> dict[str, Any]:
        """All but the single questions, ready for JSON."""
        return {
            "task": self.task,
            "rule": self.rule,
            "metric": self.metric,
            "score": self.score,
            "stderr": self.stderr,
            "n": self.n,
            "missing": self.missing,
            "unit": self.unit,
            **({} if self.lenient is None else {"lenient": self.lenient}),
            "by_category": self.by_category,
            **({"also": self.also} if self.also else {}),
            **({"warnings": list(self.warnings)} if self.warnings else {}),
        }


def clustered_stderr(scores: Sequence[float], clusters: Sequence[str]) -> float | None:
    """The standard error of the mean of `scores`, in their unit; None for fewer than two scores.

    Questions about one picture succeed and fail together, so their covariance is added to the plain
    central-limit variance (Miller, "Adding Error Bars to Evals", arXiv 2411.00640, section 2.2). Where
    every question has a picture of its own this is the plain standard error.
    """
    n = len(scores)
    if n < 2:
        return None
    mean = math.fsum(scores) / n
    residuals = [score - mean for score in scores]
    squares = math.fsum(residual * residual for residual in residuals)
    of_cluster: dict[str, list[float]] = {}
    for residual, cluster in zip(residuals, clusters, strict=True):
        of_cluster.setdefault(cluster, []).append(residual)
    # A cluster's squared sum holds the squares of its members, already counted in the plain variance.
    products = math.fsum(
        math.fsum(members) ** 2 - math.fsum(member * member for member in members)
        for members in of_cluster.values()
        if len(members) > 1
    )
    variance = squares / (n * (n - 1)) + products / n**2
    # Members that cancel leave a variance of nearly zero, which rounding may push below it.
    return math.sqrt(max(variance, 0.0))


def plain(text: str) -> str:
    """A free-form answer without what does not change its meaning: outer space, case, one trailing period."""
    return text.strip().removesuffix(".").rstrip().casefold()


def read_object(path: Path, mend: str) -> dict[str, Any]:
    """A JSON file that holds an object. Raises UserError, with `mend`, where it holds anything else."""
    return an_object(read_json(path), path, mend)


def an_object(value: Any, where: object, mend: str = "Fetch the file anew.") -> dict[str, Any]:
    """The value itself. Raises UserError where it is no object of JSON."""
    if not isinstance(value, dict):
        raise UserError(f"expected an object, found {type(value).__name__}", where=where, mend=mend)
    return value


def texts(row: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    """The texts under `key`. Raises UserError where it is no list of texts."""
    found = field(row, key, list, where)
    if not all(isinstance(text, str) for text in found):
        raise UserError(f"'{key}' should be a list of texts", where=where, mend="Fetch the file anew.")
    return tuple(found)


def field(row: dict[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`row[key]`. Raises UserError where it is missing or not of `kind` (a bool is never a number here)."""
    if key not in row:
        raise UserError(f"'{key}' is missing", where=where, mend=f"Found: {', '.join(row) or 'nothing'}.")
    value = row[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(each.__name__ for each in kinds)
        raise UserError(
            f"'{key}' should be {expected}, found {type(value).__name__}",
            where=where,
            mend="Is it the file as it was published or written?",
        )
    return value


def image_path(template: str, image_id: object) -> str:
    """`template` with its `{image_id}` filled in, `{image_id:012d}` as twelve digits.

    Raises UserError for any other placeholder, and for an id that is no number where digits are asked for.
    """
    try:
        return template.format(image_id=image_id)
    except (KeyError, IndexError, AttributeError, ValueError):
        raise UserError(
            f"image: '{template}' is not a template of a picture's path, or does not fit the id {image_id!r}",
            mend="Write it like {image_id}.jpg or COCO_val2014_{image_id:012d}.jpg; "
            "the only placeholder is {image_id}.",
        ) from None


def checked(questions: list[Question], path: Path) -> list[Question]:
    """The questions themselves. Raises UserError where there are none or two share an id."""
    if not questions:
        raise UserError("no questions in this file", where=path, mend="Was it written whole?")
    count = Counter(question.id for question in questions)
    twice = [identity for identity in count if count[identity] > 1]
    if twice:
        raise UserError(
            f"question ids occur more than once: {some(twice)}",
            where=path,
            mend="An id must name one question: a prediction could not be matched otherwise.",
        )
    return questions


def some(names: Iterable[object], show: int = 5) -> str:
    """The first few names, and how many there are where that is not all."""
    written = [str(name) for name in names]
    shown = ", ".join(written[:show])
    return shown if len(written) <= show else f"{shown}, ... ({len(written)} in all)"
