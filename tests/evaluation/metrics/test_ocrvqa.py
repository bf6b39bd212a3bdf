from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtune.core.errors import UserError
from mmtune.evaluation.metrics import ocrvqa
from mmtune.evaluation.metrics.base import Question
from mmtune.evaluation.protocol import load_protocol
from mmtune.evaluation.score import score_file

BOOKS: dict[str, dict[str, Any]] = {
    "0002": {
        "imageURL": "http://ecx.images-amazon.com/images/I/51.JPEG?size=1",
        "questions": ["Who wrote this book?", "What is the title of this book?"],
        "answers": ["Jane Roe", "Cats & Dogs, Vol. 2"],
        "title": "Cats & Dogs, Vol. 2",
        "authorName": "Jane Roe",
        "genre": "Travel",
        "split": 3,
    },
    "17": {
        "imageURL": "http://ecx.images-amazon.com/images/I/52.gif",
        "questions": ["Is this a games related book?"],
        "answers": ["No"],
        "genre": "Calendars",
        "split": 3,
    },
    "18": {"imageURL": "x.jpg", "questions": ["Who?"], "answers": ["I"], "genre": "Travel", "split": 1},
}


def written(folder: Path, content: Any, name: str = "dataset.json") -> Path:
    path = folder / name
    jsonl = name.endswith(".jsonl")
    path.write_text("\n".join(map(json.dumps, content)) if jsonl else json.dumps(content))
    return path


def test_official_file(tmp_path: Path) -> None:
    path = written(tmp_path, BOOKS)
    first, second, third = ocrvqa.read(path)
    assert first == Question(
        "0002_0", "Who wrote this book?", ("Jane Roe",), "0002.JPEG", "0002", category="Travel"
    )
    assert (second.id, second.cluster, second.answers) == ("0002_1", "0002", ("Cats & Dogs, Vol. 2",))
    assert (third.image, third.category) == ("17.gif", "Calendars")
    assert [question.id for question in ocrvqa.read(path, split="train")] == ["18_0"]
    assert ocrvqa.read(path, extension=".jpg")[2].image == "17.jpg"


def test_a_sample_is_drawn_by_ids_and_seed_alone(tmp_path: Path) -> None:
    book = {"imageURL": "x.jpg", "questions": ["Who?"] * 5, "answers": ["I"] * 5, "split": 3}
    books = {str(i): book for i in range(40)}
    path = written(tmp_path, books)
    drawn = [question.id for question in ocrvqa.read(path, sample=30)]
    assert len(set(drawn)) == 30
    assert drawn == [question.id for question in ocrvqa.read(path) if question.id in drawn]
    backwards = written(tmp_path, dict(reversed(books.items())), "backwards.json")
    assert {question.id for question in ocrvqa.read(backwards, sample=30)} == set(drawn)
    assert {question.id for question in ocrvqa.read(path, sample=10)} < set(drawn)
    assert {question.id for question in ocrvqa.read(path, sample=30, seed=1)} != set(drawn)
    assert len(ocrvqa.read(path, sample=201)) == 200
    # The first three of seed 0, so that a sample stays the same in later versions.
    assert [question.id for question in ocrvqa.read(path, sample=3)] == ["18_2", "23_3", "26_1"]


def test_predictions_on_the_whole_split(tmp_path: Path) -> None:
    """The task that draws 2,000 says so and names the one that does not."""
    book = {"imageURL": "x.jpg", "questions": ["Who?"] * 5, "answers": ["I"] * 5, "split": 3}
    path = written(tmp_path, {str(i): book for i in range(401)})
    said = [{"question_id": f"{i}_{j}", "text": "i"} for i in range(401) for j in range(5)]
    answers = written(tmp_path, said, "answers.jsonl")
    with pytest.raises(UserError, match=r"among the 2000 that task ocrvqa draws(.|\n)*ocrvqa_full"):
        score_file(load_protocol("ocrvqa").for_split("test"), answers, path)
    score = score_file(load_protocol("ocrvqa_full").for_split("test"), answers, path)
    assert (score.score, score.n, score.missing) == (100, 2005, 0)


CONVERTED = [
    {"question_id": 5, "image": "5.jpg", "text": "Who?", "answer": "I"},
    {"question_id": 5, "image": "5.jpg", "text": "What title?", "answer": "No"},
    {"question_id": 6, "image": "6.jpg", "text": "Who?", "answer": "You"},
]


@pytest.mark.parametrize("name", ["sampled.jsonl", "sampled.json"])
def test_converted_files_join_on_book_and_question(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, CONVERTED, name)
    questions = ocrvqa.read(path)
    assert [question.id for question in questions] == ["5_0", "5_1", "6_0"]
    assert [question.cluster for question in questions] == ["5", "5", "6"]
    answers = written(
        tmp_path,
        [
            {"question_id": 6, "prompt": "Who?\nAnswer briefly.", "text": "you"},
            {"question_id": 5, "prompt": "What title?\nAnswer briefly.", "text": "no."},
            {"question_id": 5, "prompt": "Who?\nAnswer briefly.", "text": "i "},
        ],
        "answers.jsonl",
    )
    protocol = load_protocol("ocrvqa").for_split("test")
    scores = {
        rule: [row["score"] for row in score_file(protocol, answers, path, rule).per_question]
        for rule in ocrvqa.RULES
    }
    assert scores == {
        "lorasculpt": [0, 0, 1],
        "llava-hr": [1, 0, 1],
        "vlmevalkit": [1, 0, 1],
        "exact": [1, 1, 1],
    }


def test_a_short_answer_is_asked_for_once(tmp_path: Path) -> None:
    suffix = "\nAnswer the question using a single word or phrase."
    rows = [{**CONVERTED[0], "text": "Who?" + suffix}, {**CONVERTED[2], "text": "Who?"}]
    for question in ocrvqa.read(written(tmp_path, rows, "sampled.jsonl")):
        assert load_protocol("ocrvqa").turns(question)[0].text == f"<image>\nWho?{suffix}"


def test_converted_ids_that_name_one_question_stay(tmp_path: Path) -> None:
    rows = [{**row, "question_id": i} for i, row in enumerate(CONVERTED)]
    questions = ocrvqa.read(written(tmp_path, rows, "sampled.jsonl"))
    assert [(question.id, question.cluster) for question in questions] == [
        ("0", "5.jpg"),
        ("1", "5.jpg"),
        ("2", "6.jpg"),
    ]


@given(st.text(max_size=6), st.lists(st.sampled_from(["a", "A", ".", " ", "\t", "é", "É", ", "]), max_size=6))
def test_rules_agree_with_an_independent_one(answer: str, pieces: list[str]) -> None:
    question = Question("1", "Who?", (answer,), None, "1")
    for prediction in ("".join(pieces), answer, f" {answer.upper()} ", answer + "".join(pieces)):
        same = prediction.lower() == answer.lower()
        trimmed = prediction.lower().split() == answer.lower().split() and (
            prediction.lower().strip() == answer.lower().strip()
        )
        assert ocrvqa.RULES["lorasculpt"](question, prediction) == same
        assert ocrvqa.RULES["llava-hr"](question, prediction) == trimmed
        assert ocrvqa.RULES["vlmevalkit"](question, prediction) == trimmed


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (BOOKS, {"split": "testdev"}, "no split 'testdev'"),
        (BOOKS, {"sample": 0}, "sample: 0 is no number"),
        (BOOKS, {"sample": "all"}, "sample: 'all' is no number"),
        ({"1": {**BOOKS["17"], "answers": []}}, {}, "book 1: 1 questions and 0 answers"),
        ({"1": {**BOOKS["17"], "answers": [3]}}, {}, "book 1: 'answers' should be a list of texts"),
        ({"1": []}, {}, "book 1: expected an object, found list"),
        ({"18": BOOKS["18"]}, {}, "no questions"),
        (3, {}, "expected an object or a list, found int"),
        ([{"question_id": 1, "text": "Who?", "answer": "I"}], {}, r"\[0\]: 'image' is missing"),
    ],
)
def test_faults_are_named(tmp_path: Path, content: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ocrvqa.read(written(tmp_path, content), **options)
