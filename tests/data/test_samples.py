"""LLaVA training files in both forms, and what is said about broken ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtune.core.errors import UserError
from mmtune.data.chat import IMAGE, Turn
from mmtune.data.samples import MOST_FAULTS, Sample, image_first, read_llava

GOOD: dict[str, Any] = {
    "id": "000000033471",
    "image": "coco/000000033471.jpg",
    "conversations": [
        {"from": "human", "value": f"{IMAGE}\nWhat is on the bus?"},
        {"from": "gpt", "value": "An advertisement."},
    ],
}
TEXT: dict[str, Any] = {
    "id": 7,
    "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
}


def _written(folder: Path, rows: list[Any], form: str) -> Path:
    path = folder / f"train.{form}"
    if form == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def _place(path: Path, index: int) -> str:
    return f"{path}, line {index + 1}" if path.suffix == ".jsonl" else f"{path}, sample {index}"


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_samples(tmp_path: Path, form: str) -> None:
    path = _written(tmp_path, [GOOD, TEXT], form)
    first, second = read_llava(path, tmp_path / "images")
    assert first.id == "000000033471"
    assert first.images == (tmp_path / "images/coco/000000033471.jpg",)
    assert first.turns == (
        Turn("user", f"{IMAGE}\nWhat is on the bus?"),
        Turn("assistant", "An advertisement."),
    )
    assert second == Sample("7", (), (Turn("user", "Hi"), Turn("assistant", "Hello")))


def test_several_pictures_and_a_system_turn(tmp_path: Path) -> None:
    row = {
        "id": "two",
        "image": ["a.png", "b.png"],
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "user", "value": f"{IMAGE} or {IMAGE}?"},
            {"from": "assistant", "value": "The first."},
        ],
    }
    (sample,) = read_llava(_written(tmp_path, [row], "json"), tmp_path)
    assert sample.images == (tmp_path / "a.png", tmp_path / "b.png")
    assert [turn.role for turn in sample.turns] == ["system", "user", "assistant"]


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_limit(tmp_path: Path, form: str) -> None:
    path = _written(tmp_path, [GOOD, TEXT, {"id": "broken"}], form)
    assert [sample.id for sample in read_llava(path, tmp_path, limit=2)] == ["000000033471", "7"]


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no id": ({key: GOOD[key] for key in ("image", "conversations")}, "'id' must be"),
    "true id": ({**GOOD, "id": True}, "'id' must be"),
    "image number": ({**GOOD, "image": 3}, "'image' must be a path"),
    "image null": ({**GOOD, "image": None}, "but 0 pictures"),
    "images": ({**TEXT, "images": ["a.png"]}, "'images' is not read"),
    "image empty": ({**GOOD, "image": [""]}, "'image' must be a path"),
    "no conversations": ({"id": "a"}, "'conversations' must be"),
    "empty conversations": ({"id": "a", "conversations": []}, "'conversations' must be"),
    "turn text": ({"id": "a", "conversations": ["Hi"]}, "turn 1 must be"),
    "no value": ({"id": "a", "conversations": [{"from": "human"}]}, "turn 1 must be"),
    "no speaker": ({"id": "a", "conversations": [{"value": "x"}]}, "turn 1: unknown speaker"),
    "list speaker": (
        {"id": "a", "conversations": [{"from": ["human"], "value": "x"}]},
        "turn 1: unknown speaker",
    ),
    "speaker": (
        {"id": "a", "conversations": [GOOD["conversations"][0], {"from": "bot", "value": "x"}]},
        "turn 2: unknown speaker 'bot'",
    ),
    "no placeholder": ({**GOOD, "conversations": TEXT["conversations"]}, "0 <image>"),
    "no picture": ({**GOOD, "image": []}, "1 <image> in the conversation, but 0 pictures"),
    "no answer": ({"id": "a", "conversations": [{"from": "human", "value": "Hi"}]}, "nothing to learn"),
    "empty answer": (
        {"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}]},
        "nothing to learn",
    ),
}


@pytest.mark.parametrize("form", ["json", "jsonl"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_sample_is_named(tmp_path: Path, form: str, name: str) -> None:
    row, message = BROKEN[name]
    path = _written(tmp_path, [TEXT, row, GOOD], form)
    with pytest.raises(UserError) as caught:
        read_llava(path, tmp_path)
    (fault,) = caught.value.faults
    assert message in fault.what
    assert fault.where.startswith(_place(path, 1))
    if isinstance(row.get("id"), str):
        assert f"(id {row['id']})" in fault.where


def test_a_sample_that_is_no_object(tmp_path: Path) -> None:
    path = _written(tmp_path, [TEXT, [1]], "json")
    with pytest.raises(UserError, match="sample 1: expected an object, found list"):
        read_llava(path, tmp_path)


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_every_fault_at_once(tmp_path: Path, form: str) -> None:
    rows = [GOOD, {"id": "a"}, TEXT, {**GOOD, "id": "b", "image": []}]
    path = _written(tmp_path, rows, form)
    with pytest.raises(UserError) as caught:
        read_llava(path, tmp_path)
    assert [fault.where for fault in caught.value.faults] == [
        f"{_place(path, 1)} (id a)",
        f"{_place(path, 3)} (id b)",
    ]


def test_very_many_faults_are_cut_short_and_said_to_be(tmp_path: Path) -> None:
    path = _written(tmp_path, [{"id": str(i)} for i in range(5 * MOST_FAULTS)], "json")
    with pytest.raises(UserError) as caught:
        read_llava(path, tmp_path)
    assert len(caught.value.faults) == MOST_FAULTS + 1
    assert "there may be more" in caught.value.faults[-1].what


@pytest.mark.parametrize("content", ["", "[]", "{}", '"text"', "[{"])
def test_files_without_samples(tmp_path: Path, content: str) -> None:
    path = tmp_path / "train.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"train\.json"):
        read_llava(path, tmp_path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.jsonl: no such file"):
        read_llava(tmp_path / "no.jsonl", tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"What is it?\n{IMAGE}", f"{IMAGE}\nWhat is it?"),
        (f"{IMAGE}\nWhat is it?", f"{IMAGE}\nWhat is it?"),
        (f"{IMAGE} and {IMAGE}", f"{IMAGE}\n{IMAGE}\nand"),
        (f" {IMAGE}\n", IMAGE),
        ("No picture ", "No picture "),
    ],
)
def test_image_first(text: str, expected: str) -> None:
    sample = Sample("a", (), (Turn("user", text), Turn("assistant", " kept ")))
    assert image_first(sample).turns == (Turn("user", expected), Turn("assistant", " kept "))


@given(
    st.lists(st.lists(st.sampled_from([IMAGE, "a", " ", "\n", "bus"])).map("".join), min_size=1, max_size=3)
)
def test_image_first_keeps_the_number_of_pictures_in_each_turn(texts: list[str]) -> None:
    sample = Sample("a", (), tuple(Turn("user", text) for text in texts))
    moved = image_first(sample)
    assert [t.text.count(IMAGE) for t in moved.turns] == [text.count(IMAGE) for text in texts]
    assert image_first(moved) == moved
    for turn in moved.turns:
        count = turn.text.count(IMAGE)
        assert turn.text.startswith("\n".join([IMAGE] * count))
