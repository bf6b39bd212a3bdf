"""Rows of training files, compared letter for letter with what the formats' rules give by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmtune.data.cards import load_card
from mmtune.data.samples import read_llava
from mmtune.evaluation.metrics.base import Question
from mmtune.prepare.training import as_text, asking, majority, samples

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
TEN = ("Nous", "dakota ", "Dakota", "dakota digital", "nous", "dakota digital", "x", "y", "z", "w")


def question(**more: object) -> Question:
    given = {"id": "7", "text": "How many?", "answers": ("two",), "image": "7.png", "cluster": "7", **more}
    return Question(**given)  # type: ignore[arg-type]


CHOICES = {"choices": ("one", "two", "2"), "answer_index": 1}
PICTURES = {"choices": ("a.png", "b.png"), "choice_images": ("7/a.png", "7/b.png"), "answer_index": 0}


@pytest.mark.parametrize(
    ("card", "asked", "text", "answers"),
    [
        ("iconqa_choose_txt", CHOICES, f"How many?\nA. one\nB. two\nC. 2{LETTER}", ["B"]),
        ("iconqa_lorasculpt", CHOICES, "How many?\nA. one\nB. two\nC. 2", ["B"]),
        ("iconqa_choose_img", PICTURES, f"How many?\nA. <image>\nB. <image>{LETTER}", ["A"]),
        (
            "iconqa_choose_img_composed",
            {"choices": ("A", "B"), "answers": ("B",), "answer_index": 1},
            f"How many?{LETTER}",
            ["B"],
        ),
        ("iconqa_fill_in_blank", {"answers": ("7,364",)}, f"How many?{SHORT}", ["7,364"]),
        ("textvqa", {"answers": TEN}, f"How many?{SHORT}", ["Nous"]),
        ("okvqa", {"answers": ("surfing",) * 6 + ("no",) * 4}, f"How many?{SHORT}", ["surfing"]),
        ("ocrvqa", {"answers": (" A Title, & More ",)}, f"How many?{SHORT}", ["A Title, & More"]),
        ("gqa", {"answers": ("yes",)}, f"How many?{SHORT}", ["yes"]),
        (
            "coco_caption",
            {"text": "", "answers": ("One.", " Two ")},
            "Provide a one-sentence caption for the provided image.",
            ["One.", "Two"],
        ),
    ],
)
def test_rows_are_what_the_protocol_asks_and_the_answer(
    card: str, asked: dict[str, object], text: str, answers: list[str]
) -> None:
    known = load_card(card)
    rows = samples(known, asking(known), [question(**asked)], seed=0)
    assert sorted(row["conversations"][1]["value"] for row in rows) == sorted(answers)
    for row in rows:
        assert row["conversations"][0] == {"from": "human", "value": f"<image>\n{text}"}
        assert row["conversations"][1]["from"] == "gpt"
        pictures = asked.get("choice_images", ())
        assert row["image"] == (["7.png", *pictures] if pictures else "7.png")  # type: ignore[misc]


def test_ties_go_to_the_answer_that_was_given_first() -> None:
    assert majority(TEN) == "Nous"  # nous twice, dakota twice, dakota digital twice
    assert majority(("b", "A", "a ", "b ")) == "b"
    assert majority(("", " ", "late")) == "late"
    assert majority(("", " ")) == ""


def test_the_seed_draws_the_samples_and_nothing_else_does() -> None:
    card = load_card("gqa")
    questions = [question(id=str(number)) for number in range(50)]
    order = [row["id"] for row in samples(card, asking(card), questions, seed=0)]
    assert sorted(order, key=int) == [str(number) for number in range(50)] != order
    assert [row["id"] for row in samples(card, asking(card), questions[::-1], seed=0)] == order
    assert [row["id"] for row in samples(card, asking(card), questions, seed=1)] != order
    card.limit = 10
    assert [row["id"] for row in samples(card, asking(card), questions, seed=0)] == order[:10]


def test_a_question_without_an_answer_gives_no_sample(tmp_path: Path) -> None:
    card = load_card("ocrvqa")
    rows = samples(card, asking(card), [question(answers=(" ",)), question(id="8")], seed=0)
    assert [row["id"] for row in rows] == ["8"]
    (tmp_path / "train.json").write_text(as_text(rows), encoding="utf-8")
    assert json.loads((tmp_path / "train.json").read_text(encoding="utf-8")) == rows
    [sample] = read_llava(tmp_path / "train.json", tmp_path)
    assert sample.images == (tmp_path / "7.png",)


def test_a_real_majority(real_data: Path) -> None:
    """The first questions of TextVQA's val, counted by hand."""
    rows = json.loads((real_data / "textvqa/TextVQA_0.5.1_val_first800.json").read_text(encoding="utf-8"))
    said = [majority(row["answers"]) for row in rows["data"][:7]]
    assert said == ["dakota", "copenhagen", "ale", "bowmore", "10 years", "22", "5:41"]
