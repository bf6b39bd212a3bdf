from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmtune.core.errors import UserError
from mmtune.evaluation.metrics import exact
from mmtune.evaluation.metrics.base import Question


@pytest.mark.parametrize(
    ("prediction", "forgiving", "lorasculpt"),
    [("12", 1, 1), (" 12.\n", 1, 0), ("12.", 1, 0), ("12 ", 1, 0), ("1 2", 0, 0), ("", 0, 0)],
)
def test_rules(prediction: str, forgiving: int, lorasculpt: int) -> None:
    question = Question("1", "What is 7 plus 5?", ("12",), None, "1")
    assert exact.exact(question, prediction) == forgiving
    assert exact.lorasculpt(question, prediction) == lorasculpt


def test_case_is_forgiven_by_both() -> None:
    question = Question("1", "Which?", ("B",), None, "1")
    assert [rule(question, "b") for rule in exact.RULES.values()] == [1.0, 1.0]


def written(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_questions_with_and_without_pictures(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        [
            {"question_id": 1, "text": "What is 7 plus 5?", "answer": 12, "category": "plus"},
            {"question_id": "b", "text": "Where?", "answer": "here", "image": "x/1.png"},
        ],
    )
    assert exact.read(path) == [
        Question("1", "What is 7 plus 5?", ("12",), None, "1", category="plus"),
        Question("b", "Where?", ("here",), "x/1.png", "x/1.png"),
    ]


def test_a_file_without_answers_is_refused_with_its_line(tmp_path: Path) -> None:
    path = written(
        tmp_path, [{"question_id": 1, "text": "a", "answer": "b"}, {"question_id": 2, "text": "a"}]
    )
    with pytest.raises(UserError, match=r"questions\.jsonl, line 2, question_id 2: 'answer' is missing"):
        exact.read(path)
