from __future__ import annotations

import json
import os
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmtune.core.errors import UserError
from mmtune.data.batches import load_images
from mmtune.data.chat import IMAGE
from mmtune.data.image import ImageTransform
from mmtune.evaluation.metrics import iconqa
from mmtune.evaluation.metrics.base import Question
from mmtune.evaluation.protocol import load_protocol
from mmtune.evaluation.score import score_predictions

REAL = Path(os.environ.get("MMTUNE_REAL_DATA", "/nowhere")) / "iconqa"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="MMTUNE_REAL_DATA has no iconqa")


def asked(choices: tuple[str, ...], index: int) -> Question:
    return Question("1", "Which?", (choices[index],), None, "1", choices=choices, answer_index=index)


def blank(answer: str) -> Question:
    return Question("1", "How many?", (answer,), None, "1")


def check_every_option(question: Question) -> None:
    """The right option's letter and text score 1 in every form, the others' 0."""
    for index, text in enumerate(question.choices):
        mark = ascii_uppercase[index]
        ended = text.removesuffix(".") + "."
        right = float(index == question.answer_index)
        forms = [
            mark,
            mark.lower(),
            f"{mark}.",
            f"({mark})",
            f" {mark}\n",
            f"{mark}. {text}",
            f"({mark}) {ended}",
        ]
        for form in [*forms, text, f" {text} ", text.upper(), ended]:
            assert iconqa.choice(question, form) == iconqa.letter(question, form) == right, form
        assert iconqa.official(question, str(index)) == right
        assert iconqa.lorasculpt(question, mark) == iconqa.lorasculpt(question, mark.lower()) == right
        assert iconqa.lorasculpt(question, f"{mark}.") == iconqa.lorasculpt(question, f"{mark} ") == 0.0
    for form in ("", ".", "A B", "A or B", "Z", "zebra"):
        assert iconqa.choice(question, form) == 0.0


@needs_real_data
@pytest.mark.parametrize("task", ["choose_txt", "choose_img"])
def test_real_problems_with_options(task: str) -> None:
    questions = iconqa.read(REAL / task, task=task)
    assert len(questions) == 16
    for question in questions:
        check_every_option(question)
        assert len(question.images) == 1 + (len(question.choices) if task == "choose_img" else 0)


@needs_real_data
@pytest.mark.parametrize("task", iconqa.TASKS)
def test_real_problems_are_asked_with_all_their_pictures(task: str) -> None:
    transform = ImageTransform(56, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    for question in iconqa.read(REAL / task, task=task):
        [turn] = load_protocol(f"iconqa_{task}").turns(question)
        assert turn.text.startswith(f"{IMAGE}\n{question.text}\n")
        assert turn.text.count(IMAGE) == len(question.images)
        if task == "choose_img":
            lines = "\n".join(f"{letter}. {IMAGE}" for letter in "ABCDEF"[: len(question.choices)])
            assert f"{question.text}\n{lines}\nAnswer" in turn.text
        pictures = load_images([REAL / task / name for name in question.images], transform)
        assert pictures.shape == (len(question.images), 3, 56, 56)
        # Each is its own file's: drawn in black on white, none of them blank.
        assert all(picture.min() < picture.max() for picture in pictures)
        if task == "choose_img":
            stored = [REAL / task / question.id / f"choice_{i}.png" for i in range(len(question.choices))]
            expected = [transform(Image.open(path).convert("RGB")) for path in stored]
            assert all((a == b).all() for a, b in zip(pictures[1:].numpy(), expected, strict=True))


@needs_real_data
def test_real_problems_with_a_blank() -> None:
    questions = iconqa.read(REAL / "fill_in_blank", task="fill_in_blank")
    assert len(questions) == 16
    for question in questions:
        [answer] = question.answers
        for rule in (iconqa.normalised, iconqa.strict, iconqa.official):
            assert rule(question, answer) == 1.0 and rule(question, f"{answer}0") == rule(question, "") == 0.0
        assert iconqa.normalised(question, f" {answer.upper()}. ") == 1.0
        assert iconqa.strict(question, f"{answer}.") == iconqa.official(question, f"{answer}.") == 0.0


@pytest.mark.parametrize(
    "choices",
    [("yes", "no"), ("6:00 A.M.", "6:00 P.M."), ("cat", "cat house", "a cat"), ("2", "6", "8", "7", "9")],
)
def test_letters_and_texts(choices: tuple[str, ...]) -> None:
    for index in range(len(choices)):
        check_every_option(asked(choices, index))


def test_a_word_that_begins_like_a_letter_is_no_letter() -> None:
    for prediction in ("A cat", "a", "b", "Both", "A. dog", "A. bird", "The answer is A"):
        expected = float(prediction == "a")
        assert iconqa.choice(asked(("cat", "dog"), 0), prediction) == expected, prediction


def test_options_that_are_letters() -> None:
    """Shown as A: C, B: A, C: B. Text comes first in `choice`, the letter in `letter`."""
    question = asked(("C", "A", "B"), 1)
    assert [iconqa.choice(question, prediction) for prediction in ("A", "B", "C", "B. A", "(B) A")] == [
        1,
        0,
        0,
        1,
        1,
    ]
    assert [iconqa.letter(question, prediction) for prediction in ("A", "B", "C", "B. A", "A. A")] == [
        0,
        1,
        0,
        1,
        0,
    ]
    beyond = asked(("X", "Y"), 0)
    assert [iconqa.choice(beyond, prediction) for prediction in ("X", "x.", "A", "Y", "B")] == [1, 1, 1, 0, 0]


def test_options_that_read_alike() -> None:
    assert iconqa.choice(asked(("Yes", "yes"), 1), "yes") == 1.0
    assert iconqa.choice(asked(("Yes", "yes"), 1), "Yes") == 0.0
    assert iconqa.choice(asked(("Yes", "yes"), 1), "YES") == 0.0
    same = asked(("cat", "cat"), 1)
    assert [iconqa.choice(same, prediction) for prediction in ("cat", "A", "B")] == [0, 0, 1]


@given(st.lists(st.text(max_size=4), min_size=2, max_size=5), st.text(max_size=6))
def test_no_prediction_is_right_for_two_options(choices: list[str], prediction: str) -> None:
    for rule in (iconqa.choice, iconqa.letter, iconqa.lorasculpt, iconqa.official):
        assert sum(rule(asked(tuple(choices), index), prediction) for index in range(len(choices))) <= 1


@pytest.mark.parametrize(
    ("answer", "prediction", "score"),
    [
        ("7,364", "7364", 1),
        ("7364", "7,364.", 1),
        ("1,234,567", "1234567", 1),
        ("12", "1,2", 0),
        ("1234", "12,34", 0),
        ("3:00", "3:00", 1),
        ("o'clock", " O'clock", 1),
        ("quarter", "Quarter.", 1),
        ("3", "3.0", 0),
        ("A", "a", 1),
    ],
)
def test_a_blank_is_forgiven_its_form(answer: str, prediction: str, score: int) -> None:
    assert iconqa.normalised(blank(answer), prediction) == score
    assert iconqa.strict(blank(answer), prediction) == float(prediction == answer)


def test_rules_refuse_the_other_kind_of_question() -> None:
    for name in ("choice", "letter", "lorasculpt"):
        with pytest.raises(UserError, match=f"'{name}' needs options"):
            iconqa.RULES[name](blank("3"), "3")
    for name in ("normalised", "strict"):
        with pytest.raises(UserError, match=f"'{name}' is for blanks"):
            iconqa.RULES[name](asked(("a", "b"), 0), "a")


PROBLEMS: dict[str, dict[str, Any]] = {
    "3": {"question": "Which?", "choices": ["cat", "dog"], "answer": 1, "ques_type": "choose_txt"},
    "5": {"question": "How many?", "answer": "7", "ques_type": "fill_in_blank"},
    "8": {"question": "Which?", "choices": ["x", "y"], "answer": 0, "ques_type": "choose_txt"},
}
SPLITS = {
    "choose_txt_test": ["8", "3"],
    "choose_txt_minitest": [3],
    "fill_in_blank_test": ["5"],
    "choose_txt_val": ["5"],
}


def unpacked(folder: Path, problems: Any = PROBLEMS, splits: Any = SPLITS) -> Path:
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    return folder / "problems.json"


def test_official_files(tmp_path: Path) -> None:
    path = unpacked(tmp_path)
    (tmp_path / "pid2skills.json").write_text(json.dumps({"3": ["counting", "comparing"]}))
    first, second = iconqa.read(path)
    assert (first.id, first.choices, first.answers, first.answer_index) == ("8", ("x", "y"), ("x",), 0)
    assert second.image == "iconqa/test/choose_txt/3/image.png"
    assert (second.cluster, second.category) == ("3", ("counting", "comparing"))
    assert iconqa.read(tmp_path) == [first, second]
    assert iconqa.read(path, split="minitest") == [second]
    [filled] = iconqa.read(path, task="fill_in_blank")
    assert (filled.answers, filled.choices, filled.answer_index) == (("7",), (), None)


def test_a_breakdown_that_is_missing_is_said(tmp_path: Path) -> None:
    questions = iconqa.read(unpacked(tmp_path))
    assert (
        "no pid2skills.json"
        in score_predictions(questions, {}, load_protocol("iconqa_choose_txt")).warnings[-1]
    )
    (tmp_path / "pid2skills.json").write_text(json.dumps({"3": ["counting"]}))
    assert iconqa.warn(iconqa.read(tmp_path), {}) == []


def test_options_that_are_pictures(tmp_path: Path) -> None:
    problem = {"question": "Which?", "choices": ["choice_0.png", "choice_1.png"], "answer": 1}
    path = unpacked(tmp_path, {"4": {**problem, "ques_type": "choose_img"}}, {"choose_img_minitest": ["4"]})
    [question] = iconqa.read(path, task="choose_img", split="minitest")
    folder = "iconqa/test/choose_img/4/"
    assert question.choice_images == (f"{folder}choice_0.png", f"{folder}choice_1.png")
    assert question.images == (f"{folder}image.png", *question.choice_images)
    assert [iconqa.letter(question, said) for said in ("B", "(b)", "B. choice_1.png", "A", "1")] == [
        1,
        1,
        1,
        0,
        0,
    ]
    assert [iconqa.official(question, said) for said in ("1", "0", "B")] == [1, 0, 0]


def test_faults_are_named(tmp_path: Path) -> None:
    path = unpacked(tmp_path)
    with pytest.raises(UserError, match="unknown IconQA task 'choose'"):
        iconqa.read(path, task="choose")
    with pytest.raises(
        UserError, match=r"pid_splits\.json: no split 'choose_txt_dev'\n.*choose_txt_minitest"
    ):
        iconqa.read(path, split="dev")
    with pytest.raises(
        UserError, match="problem 5: a problem of task 'fill_in_blank', expected 'choose_txt'"
    ):
        iconqa.read(path, split="val")
    unpacked(tmp_path, splits={"choose_txt_test": ["9"]})
    with pytest.raises(UserError, match=r"problems\.json: problem 9 of split 'choose_txt_test'"):
        iconqa.read(path)
    unpacked(tmp_path, problems={**PROBLEMS, "3": {**PROBLEMS["3"], "answer": 2}})
    with pytest.raises(UserError, match="problem 3: 'answer' is 2, there are 2 choices"):
        iconqa.read(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither"):
        iconqa.read(tmp_path / "empty")
    (tmp_path / "pid_splits.json").unlink()
    with pytest.raises(UserError, match=r"pid_splits\.json: no such file"):
        iconqa.read(path)
