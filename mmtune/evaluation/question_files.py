"""LLaVA's converted question files: the whole prompt of each question, in place of a protocol's own.

A line is {"question_id", "image", "text", "category"}, of captions {"id", "image", "text"}; the official
answers stay in the annotation file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mmtune.core.errors import UserError
from mmtune.core.files import read_jsonl
from mmtune.evaluation.metrics.base import Question, field, some
from mmtune.evaluation.score import Row, matched_rows


def asked_from(path: Path, questions: Sequence[Question]) -> list[Question]:
    """The questions, asked in the words of a question file, with its pictures where it names them.

    A line and a question belong together by question_id or, where no id is a question's (TextVQA's file has
    the image's there), by image and the first line of the text, but for case. Raises UserError, naming some,
    where a line has no question or a question no line, or two.
    """
    rows = []
    for line, row in read_jsonl(path):
        where = f"{path}, line {line}"
        key = "id" if "id" in row and "question_id" not in row else "question_id"
        identity = str(field(row, key, (str, int), where))
        where = f"{where}, question_id {identity}"
        text = field(row, "text", str, where)
        image = field(row, "image", str, where) if row.get("image") is not None else None
        rows.append(Row(where, identity, text, text, image))
    found = matched_rows(path, rows, questions, "prompt")
    if without := [question.id for question in questions if question.id not in found]:
        raise UserError(
            f"no prompt for the questions: {some(without)}",
            where=path,
            mend="Take the question file of the same split, whole.",
        )
    return [
        replace(question, asked=found[question.id].text, image=found[question.id].image or question.image)
        for question in questions
    ]
