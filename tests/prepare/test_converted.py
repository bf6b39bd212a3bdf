"""Question and training files of other projects: recognised, compared with the official ones, linked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmtune.cli import main
from mmtune.evaluation.protocol import load_protocol
from tests import official

SHORT = "\nAnswer the question using a single word or phrase."


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(name: str, folder: Path, *more: str) -> int:
    given = ["--source", str(folder / "source"), "--output_path", str(folder / name), "--partial"]
    return main(["data", "prepare", name, *given, *more])


@pytest.fixture
def source(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The stand-in of the set that the test's `name` says, as a user has it."""
    official.make(tmp_path / "official")
    shutil.copytree(tmp_path / "official" / request.getfixturevalue("name"), tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("name", ["gqa"])
def test_a_question_file_is_linked_and_its_command_told(
    name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = load(source / "testdev_balanced_questions.json")
    rows = [
        {
            "question_id": i,
            "image": f"{q['imageId']}.jpg",
            "text": q["question"] + SHORT,
            "category": "default",
        }
        for i, q in questions.items()
    ]
    lines(source / "GQA/llava_gqa_testdev_balanced.jsonl", *rows)
    assert prepare("gqa", tmp_path) == 0
    file = tmp_path / "gqa/llava_gqa_testdev_balanced.jsonl"
    told = f"--tasks gqa --question_file gqa={file} --output_path DIR"
    assert told in capsys.readouterr().out
    asked, _ = load_protocol("gqa").asked_by(file).questions(root=tmp_path / "gqa")
    assert [question.asked for question in asked] == [row["text"] for row in rows]
    lines(source / "GQA/llava_gqa_testdev_balanced.jsonl", *rows[1:])
    assert prepare("gqa", tmp_path) == 2
    assert f"no prompt for the questions: {rows[0]['question_id']}" in capsys.readouterr().err


def iconqa_rows(source: Path, split: str = "test") -> list[dict[str, Any]]:
    problems = load(source / "problems.json")
    pids = load(source / "pid_splits.json")[f"choose_txt_{split}"]
    rows = []
    for number, pid in enumerate(pids):
        choices = (f"{mark}. {text}" for mark, text in zip("ABC", problems[pid]["choices"], strict=True))
        text = "\n".join([problems[pid]["question"], *choices])
        image = f"iconqa/{split}/choose_txt/{pid}/image.png"
        answer = "ABC"[problems[pid]["answer"]]
        rows.append({"question_id": number, "image": image, "text": text, "answer": answer})
    return rows


def llava_samples(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "id": number,
            "image": row["image"],
            "conversations": [
                {"from": "human", "value": f"<image>\n{row['text']}"},
                {"from": "gpt", "value": row["answer"]},
            ],
        }
        for number, row in enumerate(rows)
    ]


@pytest.mark.parametrize("name", ["iconqa"])
def test_the_released_samples_are_the_training_split_of_the_official_ones(
    name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = iconqa_rows(source, "train")
    other = "B" if right[0]["answer"] == "A" else "A"
    for rows, said in (
        (iconqa_rows(source), "questions that are not in iconqa_choose_txt's annotations: 0"),
        ([right[0] | {"answer": other}, *right[1:]], "answers that are not the official ones: 0"),
        (
            [right[0] | {"text": right[0]["text"].replace("A. ", "A. not ")}, *right[1:]],
            "options that are not the official ones: 0",
        ),
    ):
        (source / "iconqa_txt-train.json").write_text(json.dumps(llava_samples(rows)))
        assert prepare("iconqa", tmp_path, "--cards", "none") == 2
        assert said in capsys.readouterr().err
    (source / "iconqa_txt-train.json").write_text(json.dumps(llava_samples(right[5:])))
    assert prepare("iconqa", tmp_path, "--cards", "none") == 0


@pytest.mark.parametrize("name", ["iconqa"])
def test_the_released_iconqa_takes_the_place_of_ours(
    name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Made here where it is absent, which is said; where it is there, with ids and an order of its own."""
    card = ("--cards", "iconqa_lorasculpt")
    assert prepare("iconqa", tmp_path, *card) == 0
    file = tmp_path / "iconqa/iconqa_txt-test.jsonl"
    assert file.readlink() == Path("iconqa_txt-test.mmtune.jsonl")
    manifest = tmp_path / "iconqa/prepared.json"
    assert load(manifest)["converted"]["iconqa_txt-test.jsonl"]["whose"] == "made here"
    rows = iconqa_rows(source)
    ours = [json.loads(line) for line in file.read_text().splitlines()]
    same = ("image", "text", "answer")
    assert [[row[key] for key in same] for row in ours] == [[row[key] for key in same] for row in rows]

    lines(source / "IconQA_txt/iconqa_txt-test.jsonl", *rows[::-1])
    samples = llava_samples(iconqa_rows(source, "train"))
    (source / "IconQA_txt/iconqa_txt-train.json").write_text(json.dumps(samples))
    capsys.readouterr()
    assert prepare("iconqa", tmp_path, *card) == 0
    said = capsys.readouterr().out
    assert "mmtune eval --model DIR --tasks iconqa_lorasculpt --output_path DIR" in said
    assert "data: [{card: iconqa_lorasculpt, split: released}]" in said
    assert file.samefile(source / "IconQA_txt/iconqa_txt-test.jsonl")
    assert load(manifest)["converted"]["iconqa_txt-test.jsonl"]["whose"] == "LoRASculpt's"
    asked, _ = load_protocol("iconqa_lorasculpt").questions(root=tmp_path / "iconqa")
    assert [question.id for question in asked] == [str(row["question_id"]) for row in rows[::-1]]


@pytest.mark.parametrize("name", ["iconqa"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": "A"}, "answers that are not the official ones: 0"),
        ({"text": "What else?\nA. 1\nB. 2"}, "questions that are not in iconqa_choose_txt's annotations: 0"),
        ({"image": "iconqa/test/choose_txt/9/image.png"}, "questions that are not in iconqa_choose_txt's"),
    ],
)
def test_a_file_of_other_questions_is_refused(
    name: str,
    source: Path,
    tmp_path: Path,
    change: dict[str, str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = iconqa_rows(source)
    if change == {"answer": "A"}:
        change = {"answer": "B" if rows[0]["answer"] == "A" else "A"}
    rows[0] |= change
    lines(source / "iconqa_txt-test.jsonl", *rows)
    assert prepare("iconqa", tmp_path, "--cards", "none") == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ocrvqa"])
def test_the_sample_of_ocrvqa(
    name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several questions to an id, and every picture a .jpg, as LLaVA saves them."""
    for cover in source.glob("images/*.png"):
        cover.rename(cover.with_suffix(".jpg"))
    books = load(source / "dataset.json")
    rows = [
        {"question_id": book, "image": f"{book}.jpg", "text": q + SHORT, "answer": a, "category": "default"}
        for book, row in books.items()
        if row["split"] == 3
        for q, a in zip(row["questions"], row["answers"], strict=True)
    ]
    lines(source / "LoRASculpt_JSON_files/OCRVQA/sampled_ocrvqa_test.jsonl", *rows)
    assert prepare("ocrvqa", tmp_path) == 0
    assert "--tasks ocrvqa_lorasculpt --output_path DIR" in capsys.readouterr().out
    asked, _ = load_protocol("ocrvqa_lorasculpt").questions(root=tmp_path / "ocrvqa")
    assert len(asked) == len(rows) == 16


def test_real_textvqa_with_llavas_question_file(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """800 real questions and LLaVA's lines for them, which carry the image's id, no question's."""
    (tmp_path / "source/train_images").mkdir(parents=True)
    rows = real_data / "textvqa/TextVQA_0.5.1_val_first800.json"
    shutil.copy(rows, tmp_path / "source/TextVQA_0.5.1_val.json")
    lava = real_data / "textvqa/llava_textvqa_val_v051_ocr_first800.jsonl"
    shutil.copy(lava, tmp_path / "source/llava_textvqa_val_v051_ocr.jsonl")
    for image_id in {row["image_id"] for row in load(rows)["data"]}:
        Image.new("RGB", (4, 4)).save(tmp_path / f"source/train_images/{image_id}.jpg")
    assert prepare("textvqa", tmp_path, "--cards", "none") == 0
    said = capsys.readouterr().out
    file = tmp_path / "textvqa/llava_textvqa_val_v051_ocr.jsonl"
    assert "textvqa, val: 800 questions; officially 5,000" in said
    assert f"--tasks textvqa --question_file textvqa={file}" in said
    asked, _ = load_protocol("textvqa").asked_by(file).questions(root=tmp_path / "textvqa")
    wanted = [json.loads(line)["text"] for line in lava.read_text(encoding="utf-8").splitlines()]
    assert sorted(str(question.asked) for question in asked) == sorted(wanted)
