"""Exact match on LLaVA question files that carry their answers."""

from __future__ import annotations

from pathlib import Path

from mmtune.core.files import read_jsonl
from mmtune.evaluation.metrics.base import Question, Rule, checked, field, plain

METRIC = "exact_match"


def exact(question: Question, prediction: str) -> float:
    """Equality but for outer space, case and one trailing period."""
    return float(plain(prediction) == plain(question.answers[0]))


def lorasculpt(question: Question, prediction: str) -> float:
    """Equality but for case, as LoRASculpt's script has it: a trailing space or period is wrong."""
    return float(prediction.lower() == question.answers[0].lower())


RULES: dict[str, Rule] = {"exact": exact, "lorasculpt": lorasculpt}


def read(path: Path) -> list[Question]:
    """The questions of a JSONL file: question_id, text, answer, and where there are any image and category.

    Raises UserError, naming file, line and id, for rows without their fields.
    """
    questions = []
    for line, row in read_jsonl(path):
        where = f"{path}, line {line}"
        identity = str(field(row, "question_id", (str, int), where))
        where = f"{where}, question_id {identity}"
        image = field(row, "image", str, where) if row.get("image") is not None else None
        questions.append(
            Question(
                id=identity,
                text=field(row, "text", str, where),
                answers=(str(field(row, "answer", (str, int, float), where)),),
                image=image,
                cluster=image if image is not None else identity,
                category=field(row, "category", str, where) if "category" in row else "",
            )
        )
    return checked(questions, path)
