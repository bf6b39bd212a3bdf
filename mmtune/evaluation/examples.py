"""A few questions of a task with what each model answered, chosen where the answers differ."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtune.core.files import read_jsonl
from mmtune.data.chat import IMAGE

RIGHT = 0.5  # the score of a question from which its answer counts as right, for choosing and for marks
EACH = 3  # questions of a task
LONGEST = 400  # characters of a question or an answer; a runaway answer is told by its beginning
Row = dict[str, Any]
Rows = Mapping[str, Row]
"""The rows of a task's samples by question id."""


@dataclass(frozen=True)
class Given:
    """An answer, None where there is none, its score in [0, 1], and the models that gave it."""

    text: str | None
    score: float
    by: list[str]

    @property
    def right(self) -> bool:
        return self.score >= RIGHT


@dataclass(frozen=True)
class Example:
    """A question, as it was asked, the annotated answers, and the distinct answers it was given."""

    question_id: str
    prompt: str
    targets: list[str]
    given: list[Given]
    images: tuple[str, ...] = ()
    """The paths of its pictures, relative to the task's folder of pictures."""


def read_rows(folder: Path, task: str, base: bool) -> dict[str, Row]:
    """What a page shows of each question of an evaluation: of the base's also what was asked."""
    keys = ["prediction", "score"] + (["prompt", "target", "image", "category"] if base else [])
    return {
        str(row["question_id"]): {key: row[key] for key in keys if key in row}
        for _, row in read_jsonl(folder / f"samples_{task}.jsonl")
    }


def images_of(row: Row) -> tuple[str, ...]:
    """The paths of a question's pictures: none, one or several."""
    image = row.get("image")
    return tuple(map(str, image)) if isinstance(image, list | tuple) else ((str(image),) if image else ())


def prompt_of(row: Row) -> str:
    """What was asked, without the marks at its beginning that stand for pictures."""
    return re.sub(rf"^({IMAGE}\s*)+", "", row.get("prompt") or "")


def targets_of(row: Row) -> list[str]:
    """The annotated answers, each once."""
    target = row.get("target") or []
    return list(dict.fromkeys(map(str, target if isinstance(target, list) else [target])))


def plain(text: str, longest: int = LONGEST) -> str:
    """A text as a page can hold it: shortened, what no page may contain replaced."""
    more = len(text) - longest
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "�", text[:longest])
    return text if more <= 0 else f"{text}… ({more} more characters)"


def choose_examples(before: Rows, after: Mapping[str, Rows]) -> list[Example]:
    """Up to three questions of a task: the base's rows, and those of each model by its label.

    One that the base got right and most others wrong, one the other way round, then those with the most
    distinct answers: so they show how answers changed, not how often. Where every model gave the same
    answers, the first question alone.
    """

    def wrong(question: str) -> int:
        return sum(rows[question]["score"] < RIGHT for rows in after.values())

    def distinct(question: str) -> int:
        return len({rows[question]["prediction"] for rows in (before, *after.values())})

    questions = list(before)
    known = [question for question in questions if before[question]["score"] >= RIGHT]
    unknown = [question for question in questions if before[question]["score"] < RIGHT]
    chosen: list[str] = []

    def take(among: list[str], interest: Callable[[str], int], at_least: int) -> None:
        left = [question for question in among if question not in chosen and interest(question) >= at_least]
        if left and len(chosen) < EACH:
            chosen.append(max(left, key=interest))

    take(known, wrong, 1)
    take(unknown, lambda question: len(after) - wrong(question), 1)
    for _ in range(EACH):
        take(questions, distinct, 2)
    chosen = chosen or questions[:1]
    return [_example(question, [("base", before), *after.items()]) for question in chosen]


def _example(question: str, tables: Sequence[tuple[str, Rows]]) -> Example:
    given: dict[str | None, Given] = {}
    for label, rows in tables:
        row = rows[question]
        text = row["prediction"]
        given.setdefault(text, Given(text, row["score"], [])).by.append(label)
    row = tables[0][1][question]
    return Example(question, prompt_of(row), targets_of(row), list(given.values()), images_of(row))
