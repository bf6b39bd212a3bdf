from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtune.core.errors import UserError
from mmtune.evaluation.metrics import scienceqa
from mmtune.evaluation.metrics.base import Question
from mmtune.evaluation.protocol import load_protocol
from mmtune.evaluation.score import score_predictions

PROBLEM = {
    "question": "Which is a mammal?",
    "choices": ["a dog", "an owl", "a carp"],
    "answer": 0,
    "hint": "",
    "image": None,
    "task": "closed choice",
    "grade": "grade2",
    "subject": "natural science",
    "topic": "biology",
    "lecture": "",
    "solution": "",
    "split": "test",
}
PROBLEMS: dict[str, dict[str, Any]] = {
    "4": PROBLEM,
    "5": {**PROBLEM, "image": "image.png", "grade": "grade7", "subject": "social science"},
    "9": {**PROBLEM, "image": "image.png", "hint": "Owls lay eggs.", "grade": "grade12", "answer": 1},
    "12": {**PROBLEM, "hint": "Owls lay eggs.", "subject": "language science"},
}
SPLITS = {"test": ["4", "5", "9", "12"], "minitest": ["9"], "trainval": []}


def written(folder: Path, problems: Any = PROBLEMS, splits: Any = SPLITS) -> Path:
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    return folder / "problems.json"


def test_official_files(tmp_path: Path) -> None:
    path = written(tmp_path)
    plain, pictured, both, hinted = scienceqa.read(path)
    assert plain == Question(
        "4",
        "Which is a mammal?",
        ("a dog",),
        None,
        "4",
        choices=("a dog", "an owl", "a carp"),
        category=("natural science", "no context", "grades 1-6"),
        answer_index=0,
    )
    assert (pictured.image, pictured.context) == ("test/5/image.png", "")
    assert pictured.category == ("social science", "image context", "grades 7-12")
    assert both.category == ("natural science", "text context", "image context", "grades 7-12")
    assert (both.context, both.answers, hinted.image) == ("Owls lay eggs.", ("an owl",), None)
    assert scienceqa.read(path, split="minitest") == [both]
    assert scienceqa.read(path, images_only=True) == [pictured, both]


def test_a_question_without_a_picture_is_asked_without(tmp_path: Path) -> None:
    plain, _, both, _ = scienceqa.read(written(tmp_path))
    options = (
        "A. a dog\nB. an owl\nC. a carp\nAnswer with the option's letter from the given choices directly."
    )
    protocol = load_protocol("scienceqa")
    assert protocol.turns(plain)[0].text == f"Which is a mammal?\n{options}"
    asked = f"<image>\nContext: Owls lay eggs.\nWhich is a mammal?\n{options}"
    assert protocol.turns(both)[0].text == asked


@pytest.mark.parametrize(
    ("prediction", "llava", "lmms_eval", "letter"),
    [
        ("B", 1, 1, 1),
        (" B\n", 0, 1, 1),
        (" B ", 0, 1, 1),
        ("b", 0, 1, 1),
        ("b.", 0, 0, 1),
        ("B.", 0, 1, 1),
        ("B. an owl", 1, 1, 1),
        ("B.an owl", 0, 1, 1),
        ("B\nbecause", 0, 0, 0),
        ("(B)", 0, 0, 1),
        ("an owl", 0, 0, 1),
        ("The answer is B.", 1, 0, 0),
        ("The answer is B!", 1, 0, 0),
        ("I think. The answer is B", 0, 0, 0),  # nothing follows the letter
        ("The answer is B.\nThe answer is B.", 0, 0, 0),  # stated twice
        ("The answer is A or rather: The answer is B.", 0, 0, 0),
        ("The answer is b.", 0, 0, 0),
        ("the answer is B.", 0, 0, 0),
        ("A", 0, 0, 0),
        ("E", 0, 0, 0),
        ("AB", 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_rules(prediction: str, llava: int, lmms_eval: int, letter: int) -> None:
    question = Question("1", "Which?", ("an owl",), None, "1", choices=("a dog", "an owl"), answer_index=1)
    scores = [scienceqa.RULES[name](question, prediction) for name in ("llava", "lmms-eval", "letter")]
    assert scores == [llava, lmms_eval, letter]
    assert scienceqa.RULES["official"](question, prediction) == 0
    assert scienceqa.RULES["official"](question, "1") == 1


def llava_by_hand(text: str, choices: int) -> int | None:
    """The option LLaVA's scorer finds, looked for place by place."""
    letters = "ABCDE"
    mark = "The answer is "
    found = None
    if len(text) == 1 and text in letters:
        found = text
    elif any(text.startswith(f"{letter}. ") for letter in letters):
        found = text[0]
    else:
        after = [text[i + len(mark) :] for i in range(len(text)) if text.startswith(mark, i)]
        stated = [rest[0] for rest in after if rest[:1].isupper() and rest[1:2] not in ("", "\n")]
        if len(stated) == 1 and stated[0] in letters:
            found = stated[0]
    index = letters.index(found) if found else -1
    return index if 0 <= index < choices else None


PIECES = ["A", "B", "E", "a", ". ", ".", "\n", " ", "The answer is ", "the answer is ", "cat", "(", ")"]


@given(st.lists(st.sampled_from(PIECES), max_size=8), st.integers(2, 5))
def test_llavas_rule_agrees_with_an_independent_one(pieces: list[str], count: int) -> None:
    prediction = "".join(pieces)
    found = llava_by_hand(prediction, count)
    for index in range(count):
        question = Question("1", "Which?", ("",), None, "1", choices=("x",) * count, answer_index=index)
        assert scienceqa.llava(question, prediction) == (found == index), prediction


def test_breakdown(tmp_path: Path) -> None:
    questions = scienceqa.read(written(tmp_path))
    score = score_predictions(questions, {"4": "A", "9": "B", "12": "C"}, load_protocol("scienceqa"))
    assert score.score == 50.0
    assert {name: (row["score"], row["n"]) for name, row in score.by_category.items()} == {
        "natural science": (100.0, 2),
        "social science": (0.0, 1),
        "language science": (0.0, 1),
        "no context": (100.0, 1),
        "image context": (50.0, 2),
        "text context": (50.0, 2),
        "grades 1-6": (50.0, 2),
        "grades 7-12": (50.0, 2),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 3}, "problem 4: 'answer' is 3, there are 3 choices"),
        ({"choices": "abc"}, "problem 4: 'choices' should be list"),
        ({"hint": None}, "problem 4: 'hint' should be str"),
        ({"grade": "second"}, "problem 4: 'second' is no grade"),
        ({"image": 3}, "problem 4: 'image' should be str"),
    ],
)
def test_broken_problems_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        scienceqa.read(written(tmp_path, {**PROBLEMS, "4": {**PROBLEM, **change}}))


def test_splits_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pid_splits\.json: no split 'dev'"):
        scienceqa.read(written(tmp_path), split="dev")
    with pytest.raises(UserError, match="problem 7 of split 'test'"):
        scienceqa.read(written(tmp_path, splits={"test": ["7"]}))
    with pytest.raises(UserError, match="no questions"):
        scienceqa.read(written(tmp_path), split="trainval")
