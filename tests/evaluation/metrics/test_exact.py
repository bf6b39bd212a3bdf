from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmtune.core.errors import UserError
from mmtune.evaluation.metrics import exact
from mmtune.evaluation.metrics.base import Question
from mmtune.evaluation.protocol import load_protocol
from mmtune.evaluation.score import score_file


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
    assert [exact.RULES[name](question, "b") for name in ("exact", "lorasculpt")] == [1.0, 1.0]


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


LETTERED = "Which animal barks?\nA. cat\nB. dog\nAnswer with the option's letter."


def test_options_are_read_from_the_text(tmp_path: Path) -> None:
    """LoRASculpt's IconQA: the whole prompt under text, the letter under answer."""
    rows = [
        {"question_id": 1, "text": LETTERED, "answer": "B", "image": "1.png"},
        {"question_id": 2, "text": "Is it\nA. 1\nor rather\nA. 2\nB. 3\nC. 4", "answer": "c"},
        {"question_id": 3, "text": LETTERED, "answer": "C"},
        {"question_id": 4, "text": LETTERED, "answer": "dog"},
        {"question_id": 5, "text": "A. only one", "answer": "A"},
    ]
    first, second, *others = exact.read(written(tmp_path, rows))
    assert (first.choices, first.answer_index, first.answers) == (("cat", "dog"), 1, ("B",))
    assert (second.choices, second.answer_index) == (("2", "3", "4"), 2)
    assert all((question.choices, question.answer_index) == ((), None) for question in others)
    predictions = ("B", "b", "B.", "(B)", "B. dog", "dog", "B ", "A")
    assert [exact.RULES["letter"](first, said) for said in predictions] == [1, 1, 1, 1, 1, 1, 1, 0]
    assert [exact.RULES["lorasculpt"](first, said) for said in predictions] == [1, 1, 0, 0, 0, 0, 0, 0]
    with pytest.raises(UserError, match="'letter' needs options, question 4 has none"):
        exact.RULES["letter"](others[1], "B")


def test_a_prompt_from_the_file_is_asked_as_it_stands(tmp_path: Path) -> None:
    [question] = exact.read(
        written(tmp_path, [{"question_id": 1, "text": LETTERED, "answer": "B", "image": "1.png"}])
    )
    [turn] = load_protocol("iconqa_lorasculpt").turns(question)
    assert turn.text == f"<image>\n{LETTERED}"


def test_the_files_questions_are_the_denominator(tmp_path: Path) -> None:
    """LoRASculpt's script divides by the number of predictions, here one of two."""
    rows = [{"question_id": i, "text": LETTERED, "answer": "B"} for i in (1, 2)]
    path = written(tmp_path, rows)
    (tmp_path / "answers.jsonl").write_text('{"question_id": 1, "prompt": "", "text": "B"}')
    score = score_file(load_protocol("iconqa_lorasculpt"), tmp_path / "answers.jsonl", path, "lorasculpt")
    assert (score.score, score.n, score.missing) == (50.0, 2, 1)
