"""LLaVA's TextVQA prompts made anew: the question file of LLaVA-1.5 is the reference, letter by letter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mmtune.core.errors import UserError
from mmtune.evaluation.protocol import Protocol, load_protocol

ROSETTA = "TextVQA_Rosetta_OCR_v0.2_val.json"


def written(folder: Path, tokens: dict[str, list[str]]) -> Path:
    """An OCR file in Rosetta's layout."""
    rows = [{"image_id": name, "ocr_tokens": found, "ocr_info": []} for name, found in tokens.items()]
    (folder / ROSETTA).write_text(json.dumps({"data": rows}))
    return folder / ROSETTA


def asked(folder: Path, *rows: tuple[str, str]) -> Path:
    data = [
        {"question_id": number, "image_id": image, "question": text, "answers": ["x"] * 10}
        for number, (image, text) in enumerate(rows)
    ]
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": data}))
    return folder


def prompts(protocol: Protocol, folder: Path) -> list[str]:
    questions, _ = protocol.questions("val", folder)
    return [protocol.turns(question)[0].text.removeprefix("<image>\n") for question in questions]


def test_the_three_lines_of_llava(tmp_path: Path) -> None:
    asked(tmp_path, ("a", "what is the NASA logo?"), ("b", "who?"))
    written(tmp_path, {"a": ["NASA", "U,S", "{x}"], "b": []})
    last = "Answer the question using a single word or phrase."
    assert prompts(load_protocol("textvqa_ocr"), tmp_path) == [
        f"What is the nasa logo?\nReference OCR token: NASA, U,S, {{x}}\n{last}",
        f"Who?\nReference OCR token: \n{last}",
    ]


def test_what_is_asked_is_there_before_a_model_is_loaded(tmp_path: Path) -> None:
    asked(tmp_path, ("a", "what?"), ("b", "who?"))
    protocol = load_protocol("textvqa_ocr")
    with pytest.raises(
        UserError, match=r"its picture has no OCR tokens\n +Put TextVQA_Rosetta_OCR_v0\.2_val\.json "
    ):
        protocol.questions("val", tmp_path)
    written(tmp_path, {"a": ["x"]})
    with pytest.raises(UserError, match=r"Rosetta_OCR_v0\.2_val\.json: no OCR tokens of images: b\n"):
        protocol.questions("val", tmp_path)
    written(tmp_path, {"a": ["<image>"], "b": []})
    with pytest.raises(UserError, match="its text holds <image>"):
        protocol.questions("val", tmp_path)
    (tmp_path / ROSETTA).write_text('{"data": [{"image_id": "a", "ocr_tokens": [1]}]}')
    with pytest.raises(UserError, match="'ocr_tokens' should be texts"):
        protocol.questions("val", tmp_path)


def test_800_prompts_are_those_of_llavas_question_file(tmp_path: Path, real_data: Path) -> None:
    folder = real_data / "textvqa"
    shutil.copy(folder / "TextVQA_0.5.1_val_first800.json", tmp_path / "TextVQA_0.5.1_val.json")
    lines = (folder / "llava_textvqa_val_v051_ocr_first800.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    # The tokens of the Rosetta file are those in LLaVA's second line; a comma within one cannot be told.
    tokens = {}
    for row in rows:
        (line,) = [line for line in row["text"].split("\n") if line.startswith("Reference OCR token:")]
        found = line.removeprefix("Reference OCR token: ")
        tokens[row["question_id"]] = found.split(", ") if found else []
    assert sum(not found for found in tokens.values()) > 5
    written(tmp_path, tokens)
    assert prompts(load_protocol("textvqa_ocr"), tmp_path) == [row["text"] for row in rows]
