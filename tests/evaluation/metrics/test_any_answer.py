"""What must hold of every rule, whatever a model writes and in whatever order the questions come."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from string import ascii_uppercase
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.evaluation.metrics import FORMATS
from mmtune.evaluation.metrics.base import OverAll, Question, TaskScore
from mmtune.evaluation.protocol import Protocol, load_protocol
from mmtune.evaluation.score import score_predictions

OPTIONS = [
    Question(
        "1", "Which?", ("a dog",), "1.png", "x", ("an owl", "a dog", "A"), category=("k", "l"), answer_index=1
    ),
    Question("2", "Which?", ("yes",), "2.png", "x", ("Yes", "yes", "7,364"), category="k", answer_index=1),
    Question("3", "Which?", ("ß",), None, "3", ("ß", "e\u0301", "😀", "", "B"), answer_index=0),
    Question("4", "Which?", ("1",), "4.png", "4", ("0", "1"), answer_index=1),
]
WORDS = [
    Question("1", "What?", ("traffic light",), "1.png", "x", category="query"),
    Question("2", "What?", ("yes",), "1.png", "x", category="verify"),
    Question("3", "What?", ("İstanbul 😀",), None, "3", category="query"),
    Question("4", "What?", ("7,364",), "4.png", "4", category="query"),
]
LABELS = [
    Question(str(i), "Is there a dog?", (label,), f"{i}.png", str(i // 2), category=category)
    for i, (label, category) in enumerate([("yes", "random"), ("no", "random"), ("no", "popular")])
]
QUESTIONS = {
    "iconqa_choose_txt": OPTIONS,
    "iconqa_fill_in_blank": WORDS,
    "iconqa_lorasculpt": OPTIONS,
    "gqa": WORDS,
    "ocrvqa": WORDS,
    "scienceqa": OPTIONS,
    "pope": LABELS,
}
# Rules of the format that are for the other kind of question.
FOR_WORDS = ("normalised", "strict")
FOR_OPTIONS = ("choice", "letter", "lorasculpt")


def rules(task: str) -> list[str]:
    protocol = load_protocol(task)
    other = FOR_OPTIONS if QUESTIONS[task] is WORDS else FOR_WORDS
    refused = other if protocol.format == "iconqa" else ()
    return [name for name in FORMATS.load(protocol.format).RULES if name not in refused]


CASES = [(load_protocol(task), name) for task in QUESTIONS for name in rules(task)]
every_rule = pytest.mark.parametrize(
    ("protocol", "rule"), CASES, ids=[f"{protocol.task}-{name}" for protocol, name in CASES]
)

PIECES = [
    *("A", "B", "b", "(B)", "A. ", ". ", ".", ",", " ", "\n", "\r", "\u2028", "yes", "No", "not", "no"),
    *("a dog", "an owl", "traffic light", "The answer is ", "7364", "7,364", "1", "ß", "SS", "e\u0301", "é"),
    *("😀", "İ", "i\u0307", "\x00", "NaN", "nan", "None", "'", '"', "<image>", "\u202e", "İstanbul 😀"),
]
answers = st.text(max_size=12) | st.lists(st.sampled_from(PIECES), max_size=5).map("".join)


@every_rule
@given(said=st.lists(answers, min_size=4, max_size=4), data=st.data())
@settings(max_examples=40)
def test_any_text_in_any_order(protocol: Protocol, rule: str, said: list[str], data: st.DataObject) -> None:
    questions = QUESTIONS[protocol.task]
    predictions = {question.id: text for question, text in zip(questions, said, strict=False)}
    for left_out in data.draw(st.sets(st.sampled_from(sorted(predictions)))):
        predictions.pop(left_out)
    score = score_predictions(questions, predictions, protocol, rule)
    for row in score.per_question:
        assert row["score"] in (0.0, 1.0) and (row["score"] == 0 or row["question_id"] in predictions)
    assert score_predictions(questions, predictions, protocol, rule) == score
    order = data.draw(st.permutations(questions))
    shuffled = score_predictions(order, dict(reversed(predictions.items())), protocol, rule)
    key = "question_id"
    assert sorted(shuffled.per_question, key=lambda row: str(row[key])) == score.per_question
    same_figures(shuffled, score)


def same_figures(one: TaskScore, other: TaskScore) -> None:
    """Sums in another order may differ in the last bits."""
    for name in ("score", "stderr", "lenient", "by_category"):
        assert getattr(one, name) == near(getattr(other, name)), name
    assert one.also.keys() == other.also.keys()
    assert all(one.also[name] == near(other.also[name]) for name in one.also)


def near(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: near(inner) for name, inner in value.items()}
    return pytest.approx(value, abs=1e-9) if isinstance(value, float) else value


LONG = [
    "a",
    "A. ",
    ". ",
    ".",
    "no ",
    "The answer is ",
    "The answer is B. ",
    "(",
    "1,",
    "7,364 ",
    "😀",
    "\n",
    "e\u0301",
]


@every_rule
@pytest.mark.parametrize("piece", LONG)
def test_answers_of_100_kb(protocol: Protocol, rule: str, piece: str) -> None:
    questions = QUESTIONS[protocol.task]
    text = piece * (100_000 // len(piece.encode()))
    began = time.process_time()
    score = score_predictions(questions, {question.id: text for question in questions}, protocol, rule)
    assert time.process_time() - began < 2
    assert math.isfinite(score.score)


@given(
    choices=st.permutations(["an owl", "a dog", "two cats", "A"]),
    said=st.integers(0, 3),
    right=st.integers(0, 3),
)
def test_options_in_another_order_change_no_answer_by_text(choices: list[str], said: int, right: int) -> None:
    """A letter means what it stands beside, a text means itself, wherever it stands."""
    fixed = ["an owl", "a dog", "two cats", "A"]
    question = Question("1", "Which?", (fixed[right],), None, "1", tuple(choices))
    question = replace(question, answer_index=choices.index(fixed[right]))
    mark = ascii_uppercase[choices.index(fixed[said])]
    for task, name, prediction in (
        ("iconqa_choose_txt", "choice", fixed[said]),
        ("iconqa_choose_txt", "letter", mark),
        ("iconqa_choose_txt", "letter", f"({mark.lower()}) {fixed[said]}"),
        ("iconqa_choose_txt", "lorasculpt", mark),
        ("iconqa_choose_txt", "official", str(choices.index(fixed[said]))),
        ("scienceqa", "llava", mark),
        ("scienceqa", "lmms-eval", f"{mark}. {fixed[said]}"),
    ):
        found = FORMATS.load(load_protocol(task).format).RULES[name]
        assert not isinstance(found, OverAll)
        assert found(question, prediction) == (said == right), (name, prediction)
