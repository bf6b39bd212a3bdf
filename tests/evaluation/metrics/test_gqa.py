from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmtune.core.errors import UserError
from mmtune.evaluation.metrics import gqa
from mmtune.evaluation.metrics.base import Question

ROW = {
    "question": "Is the cup red?",
    "answer": "yes",
    "imageId": "n161313",
    "isBalanced": True,
    "types": {"structural": "verify", "semantic": "attr"},
}


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        ("yes", 1),
        ("Yes", 1),
        ("YES.", 1),
        ("yes..", 1),
        ("no", 0),
        ("yes\n", 0),
        (" yes", 0),
        ("yes. ", 0),
        ("", 0),
    ],
)
def test_rule(prediction: str, score: int) -> None:
    assert gqa.gqa(Question("1", "Is it?", ("yes",), None, "1"), prediction) == score


def written(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(content))
    return path


def test_questions_of_an_official_file(tmp_path: Path) -> None:
    [question] = gqa.read(written(tmp_path, {"201307251": ROW}))
    assert question == Question(
        "201307251", "Is the cup red?", ("yes",), "n161313.jpg", "n161313", category="verify"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([ROW], "expected an object of questions"),
        ({}, "no questions"),
        ({"1": []}, "question 1: expected an object, found list"),
        ({"1": {"question": "Is it?"}}, "question 1: 'imageId' is missing"),
        ({"1": ROW, "2": {**ROW, "isBalanced": False}}, "not balanced: 2"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        gqa.read(written(tmp_path, content))
    assert "questions.json" in str(error.value)
