from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


# LLaVA's conversion and the official scorer: 1; VLMEvalKit: full stops count; lmms-eval: spaces count.
@pytest.mark.parametrize(
    ("prediction", "official", "llava", "vlmevalkit", "lmms_eval"),
    [
        ("traffic light", 1, 1, 1, 1),
        ("Traffic light", 0, 1, 1, 1),
        ("traffic light.", 0, 1, 0, 1),
        ("traffic light\n", 0, 0, 1, 0),
        (" traffic light", 0, 0, 1, 0),
        ('"traffic light"', 0, 0, 0, 1),
        ("traffic-light", 0, 0, 0, 0),
        ("traffic light!", 0, 0, 0, 1),
        ("", 0, 0, 0, 0),
    ],
)
def test_the_projects_rules_differ(
    prediction: str, official: int, llava: int, vlmevalkit: int, lmms_eval: int
) -> None:
    question = Question("1", "What is it?", ("traffic light",), None, "1")
    scores = {name: rule(question, prediction) for name, rule in gqa.RULES.items()}
    assert scores == {
        "official": official,
        "gqa": llava,
        "lorasculpt": llava,
        "vlmevalkit": vlmevalkit,
        "lmms-eval": lmms_eval,
    }


def by_hand(name: str, answer: str, prediction: str) -> bool:
    """The rules again, character by character."""
    if name in ("gqa", "lorasculpt"):
        while prediction and prediction[-1] == ".":
            prediction = prediction[:-1]
        return prediction.lower() == answer
    if name == "vlmevalkit":
        return " ".join(["", prediction, ""]).lower().strip() == answer.lower().strip()
    if name == "lmms-eval":
        ascii_marks = {chr(i) for i in range(33, 127) if not chr(i).isalnum()}
        kept = ["".join(c for c in text.lower() if c not in ascii_marks) for text in (prediction, answer)]
        return kept[0] == kept[1]
    return prediction == answer


@given(
    st.sampled_from(["yes", "traffic light", "t-shirt", "", "café"]),
    st.lists(st.sampled_from(["yes", "Traffic", "light", "t-shirt", ".", "!", " ", "\n", "É", "é", "caf"])),
)
def test_rules_agree_with_an_independent_one(answer: str, pieces: list[str]) -> None:
    question = Question("1", "What is it?", (answer,), None, "1")
    for name, rule in gqa.RULES.items():
        for prediction in ("".join(pieces), answer + "".join(pieces), "".join(pieces) + answer.upper()):
            assert rule(question, prediction) == by_hand(name, answer, prediction), (name, prediction)


def test_binary_and_open_questions() -> None:
    questions = [
        Question(str(i), "What?", ("a",), None, "1", category=kind)
        for i, kind in enumerate(("verify", "query", "choose", "query", ""))
    ]
    assert gqa.also(questions, {}, "gqa", [1.0, 0.0, 0.0, 1.0, 1.0]) == {"binary": 50.0, "open": 50.0}


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
        ([ROW], "expected an object, found list"),
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
