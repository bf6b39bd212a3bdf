"""A few questions of a task with what each model answered, chosen where the answers differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtune.core.files import read_jsonl

RIGHT = 0.5  # the score of a question from which its answer counts as right, for choosing and for marks
EACH = 3  # questions of a task
Row = dict[str, Any]


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


def choose_examples(base: Path, models: Mapping[str, Path], task: str) -> list[Example]:
    """Up to three questions of a task, from the evaluations' folders; the first answers are the base's.

    One that the base got right and most others wrong, one the other way round, then those with the most
    distinct answers: so they show how answers changed, not how often. Where every model gave the same
    answers, the first question alone.
    """
    before = _rows(base, task)
    after = {label: _rows(folder, task) for label, folder in models.items()}

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
    take(unknown, lambda question: len(models) - wrong(question), 1)
    for _ in range(EACH):
        take(questions, distinct, 2)
    chosen = chosen or questions[:1]
    return [_example(question, [("base", before), *after.items()]) for question in chosen]


def _rows(folder: Path, task: str) -> dict[str, Row]:
    return {str(row["question_id"]): row for _, row in read_jsonl(folder / f"samples_{task}.jsonl")}


def _example(question: str, tables: Sequence[tuple[str, Mapping[str, Row]]]) -> Example:
    given: dict[str | None, Given] = {}
    for label, rows in tables:
        row = rows[question]
        text = row["prediction"]
        given.setdefault(text, Given(text, row["score"], [])).by.append(label)
    row = tables[0][1][question]
    targets = list(dict.fromkeys(map(str, row.get("target", []))))
    return Example(question, row.get("prompt", ""), targets, list(given.values()))
