"""Prompts from LLaVA's question files: TextVQA's real one, and every way in which one does not fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmtune.core.errors import UserError
from mmtune.evaluation.metrics.base import Question
from mmtune.evaluation.protocol import load_protocol
from mmtune.evaluation.question_files import asked_from
from mmtune.evaluation.score import read_predictions

FIRST = Question("1", "What is it?", ("a",), "x.jpg", "x")
SECOND = Question("2", "Who is it? ", ("b",), "x.jpg", "x")


def written(folder: Path, *rows: dict[str, Any], name: str = "questions.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def row(identity: object, text: str, **more: Any) -> dict[str, Any]:
    return {"question_id": identity, "text": text, "category": "default", **more}


def test_prompts_are_matched_by_id_or_by_image_and_question(tmp_path: Path) -> None:
    texts = ["What is it?\nBriefly.", "WHO is it?\nOCR: A\nBriefly."]
    by_id = written(tmp_path, row(2, texts[1]), row("1", texts[0], image="val/x.png"))
    first, second = asked_from(by_id, [FIRST, SECOND])
    assert first == replace(FIRST, asked=texts[0], image="val/x.png")
    assert second == replace(SECOND, asked=texts[1])
    of_captions = written(tmp_path, *({"id": i, "image": "x.jpg", "text": t} for i, t in enumerate(texts, 1)))
    assert [q.asked for q in asked_from(of_captions, [FIRST, SECOND])] == texts
    by_image = written(tmp_path, row("x", texts[1]), row("x", texts[0]))
    assert [q.asked for q in asked_from(by_image, [FIRST, SECOND])] == texts
    numbered = written(tmp_path, row(0, texts[1], image="x.jpg"), row(1000, texts[0], image="x.jpg"))
    assert [q.asked for q in asked_from(numbered, [FIRST, SECOND])] == texts


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(1, "a")], r"questions\.jsonl: no prompt for the questions: 2\n"),
        ([row(1, "a"), row(2, "b"), row(3, "c")], "line 3, question_id 3: prompts to questions that are not"),
        ([row(1, "a"), row(2, "b"), row(2, "c")], "more than one prompt to a question: 2"),
        ([row(1, "a"), {"question_id": 2}], "line 2, question_id 2: 'text' is missing"),
        ([row("x", "what is it?"), row("x", "What else?")], "line 2, question_id x: prompts to questions"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        asked_from(written(tmp_path, *rows), [FIRST, SECOND])
    assert "question_id" in message or "questions.jsonl" in str(caught.value)


def test_llavas_textvqa_file_replaces_the_prompt(tmp_path: Path, real_data: Path) -> None:
    folder = real_data / "textvqa"
    shutil.copy(folder / "TextVQA_0.5.1_val_first800.json", tmp_path / "TextVQA_0.5.1_val.json")
    file = folder / "llava_textvqa_val_v051_ocr_first800.jsonl"
    own = load_protocol("textvqa")
    protocol = own.asked_by(file)
    assert protocol.hash != own.hash
    moved = shutil.copy(file, tmp_path)
    assert own.asked_by(Path(moved)).hash == protocol.hash
    questions, _ = protocol.questions("val", tmp_path)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    assert [protocol.turns(question)[0].text for question in questions] == [
        f"<image>\n{line['text']}" for line in lines
    ]
    assert [question.image for question in questions] == [line["image"] for line in lines]
    assert protocol.files("val", tmp_path) == [tmp_path / "TextVQA_0.5.1_val.json", file.resolve()]
    with pytest.raises(UserError, match="no question file of split 'train'"):
        protocol.question_file("train")


def test_a_picture_in_a_prompt_is_refused(tmp_path: Path) -> None:
    protocol = load_protocol("textvqa").asked_by(written(tmp_path, row(1, "a <image>")))
    with pytest.raises(UserError, match="its text holds <image>"):
        protocol.turns(replace(FIRST, asked="a <image>"))


def test_lmms_evals_samples_are_predictions(tmp_path: Path) -> None:
    samples = [
        {"doc_id": 0, "doc": {"question_id": 1, "answers": ["z"]}, "target": "z", "filtered_resps": ["a"]},
        {"doc_id": 1, "submission": {"question_id": 2, "answer": "b norm"}, "filtered_resps": [["b"]]},
    ]
    path = written(tmp_path, *samples, name="samples.jsonl")
    assert read_predictions(path, [FIRST, SECOND]) == {"1": "a", "2": "b"}
    path = written(tmp_path, {**samples[0], "filtered_resps": ["a", "b"]}, name="samples.jsonl")
    with pytest.raises(UserError, match="line 1, question_id 1: the prediction should be a text"):
        read_predictions(path, [FIRST, SECOND])
