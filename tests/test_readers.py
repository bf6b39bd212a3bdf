"""Every reader of somebody else's JSON: a right reading or a UserError, whatever the file holds.

A valid file is changed in a few places at random, by any JSON value; what is then read must be of the
promised types, and what went in unchanged must come out unchanged.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmtune.core.errors import UserError
from mmtune.core.files import read_json, read_jsonl
from mmtune.data.chat import IMAGE, Turn
from mmtune.data.samples import ROLES, Sample, read_llava
from mmtune.evaluation.metrics import (
    exact,
    gqa,
    iconqa,
    ocrvqa,
    okvqa,
    pope,
    scienceqa,
    textvqa,
    vizwiz,
    vqav2,
)
from mmtune.evaluation.metrics.base import Question
from mmtune.evaluation.score import read_predictions
from mmtune.parts.model import read_options
from mmtune.parts.spec import ModelOptions

values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["", IMAGE, "human"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


REMOVED = object()
ODD = [
    None,
    True,
    0,
    -1,
    10**400,
    1.5,
    float("nan"),
    "",
    "x",
    "\ud800",
    "\0",
    [],
    ["x"],
    [None],
    {},
    {"x": 1},
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all that stands in a document, its root included."""
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return [path, *(place for key, inner in entries for place in places(inner, (*path, key)))]


def changed(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    """The document with another value in a place, or without it."""
    made = copy.deepcopy(document)
    *way, last = place
    holder = made
    for key in way:
        holder = holder[key]
    if value is REMOVED:
        del holder[last]
    else:
        holder[last] = value
    return made


@st.composite
def spoilt(draw: st.DrawFn, document: Any) -> Any:
    """The document with one to three of its places changed."""
    for _ in range(draw(st.integers(1, 3))):
        if inside := [place for place in places(document) if place]:
            document = changed(document, draw(st.sampled_from(inside)), draw(st.just(REMOVED) | values))
    return document


LLAVA = [
    {
        "id": "a",
        "image": "a.png",
        "conversations": [{"from": "human", "value": f"{IMAGE}\nWhat?"}, {"from": "gpt", "value": "That."}],
    },
    {"id": 7, "conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]},
]
TEXTVQA = {
    "data": [
        {"question_id": 1, "image_id": "x", "question": "What?", "answers": ["a"] * 10},
        {"question_id": 2, "image_id": "y", "question": "Who?", "answers": ["b"] * 10},
    ]
}
VQA = {
    "annotations": [
        {
            "question_id": 1,
            "image_id": 7,
            "question_type": "what",
            "answer_type": "other",
            "answers": [{"answer": "a", "raw_answer": "as", "answer_confidence": "yes", "answer_id": 1}] * 10,
        },
    ]
}
VIZWIZ = [
    {
        "image": "a.jpg",
        "question": "What?",
        "answers": [{"answer": "a", "answer_confidence": "yes"}] * 10,
        "answer_type": "other",
        "answerable": 1,
    }
]
GQA = {
    "1": {
        "imageId": "x",
        "question": "What?",
        "answer": "a",
        "isBalanced": True,
        "types": {"structural": "query"},
    },
    "2": {"imageId": 3, "question": "Who?", "answer": "b"},
}
JSONL = [
    {"question_id": "1", "text": "What?", "answer": 3, "image": "x.png", "category": "c"},
    {"question_id": 2, "text": "Who?", "answer": "b"},
]
ICONQA = {
    "problems.json": {
        "1": {"ques_type": "choose_txt", "question": "What?", "choices": ["a", "b"], "answer": 1},
        "2": {"ques_type": "choose_txt", "question": "Who?", "choices": ["a", 2], "answer": 0},
    },
    "pid_splits.json": {"choose_txt_test": ["1", 2]},
    "pid2skills.json": {"1": ["counting"], "2": []},
}
OCRVQA = {
    "1": {
        "imageURL": "x/1.jpg",
        "questions": ["Who?", "What?"],
        "answers": ["a", "b"],
        "split": 3,
        "genre": "c",
    },
    "2": {"imageURL": "x/2.jpg", "questions": ["Who?"], "answers": ["a"], "split": 1},
}
SCHOOL = {
    "question": "What?",
    "choices": ["a", "b"],
    "answer": 1,
    "hint": "h",
    "image": "image.png",
    "grade": "grade3",
    "subject": "s",
    "split": "test",
}
SCIENCEQA = {"problems.json": {"1": SCHOOL, "2": SCHOOL}, "pid_splits.json": {"test": ["1", 2]}}
POPE = [
    {"question_id": 1, "image": "x.jpg", "text": "Is there?", "label": "yes"},
    {"question_id": 2, "image": "x.jpg", "text": "Is there?", "label": "no", "category": "random"},
]
QUESTIONS = [Question(name, "What?", ("a",), None, name) for name in ("1", "2")]
ANSWERS = [{"question_id": "1", "text": "a", "prompt": "What?"}, {"question_id": 2, "text": "b"}]
MODEL = {
    "mmtune": 1,
    "vision": {"tower": "clip", "weights": "./vision", "layer": -2, "fit": "pad"},
    "connector": {"kind": "linear", "weights": "./connector"},
    "language": {"weights": "./language", "chat": "template", "adapter": "adapter/language"},
}


def are_questions(found: list[Question]) -> bool:
    for question in found:
        assert isinstance(question.id, str) and isinstance(question.text, str)
        assert question.answers and all(isinstance(answer, str) for answer in question.answers)
        assert question.image is None or isinstance(question.image, str)
        several = (question.category,) if isinstance(question.category, str) else question.category
        assert all(isinstance(category, str) for category in several)
        assert all(isinstance(choice, str) for choice in question.choices)
    assert len({question.id for question in found}) == len(found)
    return bool(found)


def are_samples(found: list[Sample]) -> bool:
    for sample in found:
        assert isinstance(sample.id, str)
        assert sum(turn.text.count(IMAGE) for turn in sample.turns) == len(sample.images)
        assert any(turn.role == "assistant" and turn.text for turn in sample.turns)
        assert all(turn.role in ROLES.values() for turn in sample.turns)
    return bool(found)


def are_texts(found: dict[str, str]) -> bool:
    return all(name in ("1", "2") and isinstance(text, str) for name, text in found.items())


def lines(rows: Any) -> str:
    """As JSONL where it is a list, else a line."""
    return "\n".join(json.dumps(row) for row in rows) if isinstance(rows, list) else json.dumps(rows)


Reader = tuple[Any, str, Callable[[Any], str], Callable[[Path], Any], Callable[[Any], bool]]
READERS: dict[str, Reader] = {
    "llava json": (LLAVA, "a.json", json.dumps, lambda p: read_llava(p, p.parent), are_samples),
    "llava jsonl": (LLAVA, "a.jsonl", lines, lambda p: read_llava(p, p.parent), are_samples),
    "textvqa": (TEXTVQA, "a.json", json.dumps, textvqa.read, are_questions),
    "vqav2": (VQA, "a.json", json.dumps, vqav2.read, are_questions),
    "okvqa": (VQA, "a.json", json.dumps, okvqa.read, are_questions),
    "vizwiz": (VIZWIZ, "a.json", json.dumps, vizwiz.read, are_questions),
    "gqa": (GQA, "a.json", json.dumps, gqa.read, are_questions),
    "jsonl questions": (JSONL, "a.jsonl", lines, exact.read, are_questions),
    "iconqa": (ICONQA, "problems.json", json.dumps, iconqa.read, are_questions),
    "ocrvqa": (OCRVQA, "a.json", json.dumps, ocrvqa.read, are_questions),
    "ocrvqa converted": (JSONL[:1] * 2, "a.jsonl", lines, ocrvqa.read, are_questions),
    "scienceqa": (SCIENCEQA, "problems.json", json.dumps, scienceqa.read, are_questions),
    "pope": (
        POPE,
        "coco_pope_random.json",
        lines,
        lambda p: pope.read(p, categories=["random"]),
        are_questions,
    ),
    "predictions": (ANSWERS, "a.jsonl", lines, lambda p: read_predictions(p, QUESTIONS), are_texts),
    "predictions list": (ANSWERS, "a.json", json.dumps, lambda p: read_predictions(p, QUESTIONS), are_texts),
    "predictions map": (
        {"1": "a", "2": "b"},
        "a.json",
        json.dumps,
        lambda p: read_predictions(p, QUESTIONS),
        are_texts,
    ),
    "model": (
        MODEL,
        "config.json",
        json.dumps,
        lambda p: read_options(p.parent),
        lambda m: isinstance(m, ModelOptions),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("readers")
    for part in ("vision", "connector", "language"):
        (made / part).mkdir()
    return made


def write(folder: Path, kind: str, document: Any) -> Path:
    _, name, form, _, _ = READERS[kind]
    if kind in ("iconqa", "scienceqa") and isinstance(document, dict):  # several files in one document
        for each in READERS[kind][0]:
            (folder / each).write_text(json.dumps(document.get(each)))
    else:
        (folder / name).write_text(form(document))
    return folder / name


@pytest.mark.parametrize("kind", READERS)
def test_the_valid_files_are_read(folder: Path, kind: str) -> None:
    document, _, _, read, is_right = READERS[kind]
    assert is_right(read(write(folder, kind, document)))


def check(folder: Path, kind: str, document: Any) -> None:
    _, _, _, read, is_right = READERS[kind]
    try:
        found = read(write(folder, kind, document))
    except UserError as error:
        assert error.faults
        assert all(fault.what for fault in error.faults)
    else:
        assert is_right(found)


@pytest.mark.parametrize("kind", READERS)
def test_every_place_with_every_kind_of_value(folder: Path, kind: str) -> None:
    document = READERS[kind][0]
    for odd in ODD:
        check(folder, kind, odd)
        for place in filter(None, places(document)):
            check(folder, kind, changed(document, place, odd))
    for place in filter(None, places(document)):
        check(folder, kind, changed(document, place, REMOVED))


@pytest.mark.parametrize("kind", READERS)
@given(data=st.data())
@settings(max_examples=100)
def test_several_places_with_any_value(folder: Path, kind: str, data: st.DataObject) -> None:
    check(folder, kind, data.draw(spoilt(READERS[kind][0])))


@pytest.mark.parametrize("read", [read_json, read_jsonl])
@given(content=st.binary(max_size=60) | values.map(lambda value: json.dumps(value).encode()))
@example(b'{"a": "\\ud800"}')
@example(b'{"a": ' + b"1" * 5000 + b"}")
@settings(max_examples=150)
def test_any_bytes_are_json_or_an_error(folder: Path, read: Callable[[Path], Any], content: bytes) -> None:
    path = folder / "bytes"
    path.write_bytes(content)
    try:
        found = read(path)
    except UserError as error:
        assert str(path) in error.faults[0].where
    else:
        json.dumps(found, ensure_ascii=False).encode()  # whole characters: what can be read can be written


@pytest.mark.parametrize("text", ['{"1": ' + "1" * 5000 + "}", '{"1": ' * 100_000])
def test_answers_no_parser_takes(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="not valid JSON"):
        read_predictions(tmp_path / "a.json", QUESTIONS)


speech = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).map(
    lambda text: text.replace(IMAGE, "")
)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    turns = [Turn("system", draw(speech))] if draw(st.booleans()) else []
    pictures: list[str] = []
    for _ in range(draw(st.integers(1, 3))):
        parts = draw(st.lists(speech, min_size=1, max_size=3))
        asked = IMAGE.join(parts)
        pictures += [f"{len(pictures)}.png" for _ in range(asked.count(IMAGE))]
        turns += [Turn("user", asked), Turn("assistant", draw(speech.filter(str.strip)))]
    return Sample(
        draw(st.text(st.characters(exclude_categories=["Cs"]))), tuple(map(Path, pictures)), tuple(turns)
    )


@pytest.mark.parametrize("form", ["json", "jsonl"])
@given(written=st.lists(samples(), min_size=1, max_size=3), ascii_only=st.booleans())
@settings(max_examples=60)
def test_samples_come_back_as_they_were_written(
    folder: Path, form: str, written: list[Sample], ascii_only: bool
) -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    rows = [
        {
            "id": sample.id,
            **({"image": [str(image) for image in sample.images]} if sample.images else {}),
            "conversations": [{"from": names[turn.role], "value": turn.text} for turn in sample.turns],
        }
        for sample in written
    ]
    dumped = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    text = "\n".join(dumped) if form == "jsonl" else f"[{', '.join(dumped)}]"
    (folder / f"samples.{form}").write_text(text)
    expected = [Sample(s.id, tuple(folder / str(image) for image in s.images), s.turns) for s in written]
    assert read_llava(folder / f"samples.{form}", folder) == expected
