"""`mmtune data prepare` on stand-ins of all sets, and on the real samples there are."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmtune.cli import main
from mmtune.data.batches import encode_samples
from mmtune.data.cards import load_card
from mmtune.data.chat import Chat
from mmtune.data.image import is_there
from mmtune.data.samples import read_llava
from mmtune.evaluation.protocol import load_protocol
from mmtune.prepare import dataset
from mmtune.prepare.dataset import MANIFEST
from mmtune.prepare.originals import load_originals
from tests import official
from tests.conftest import MakeTokenizer
from tests.world import run_file

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    official.make(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where all are prepared. Only to be read."""
    folder = tmp_path_factory.mktemp("work")
    for name in ("coco", *official.SETS):
        assert prepare(name, originals / name, folder / "datasets" / name) == 0
    return folder


def prepare(name: str, source: Path, root: Path, *more: str, partial: bool = True) -> int:
    given = ["data", "prepare", name, "--source", str(source), "--output_path", str(root), *more]
    return main([*given, "--partial"] if partial else given)


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def state(folder: Path) -> dict[str, object]:
    """Every file below a folder with its bytes and every link with where it leads."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.is_dir() or hashed(path)
    return found


def hashed(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- All of them --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", official.SETS)
def test_cards_can_be_trained_on(name: str, prepared: Path, make_tokenizer: MakeTokenizer) -> None:
    chat = Chat(make_tokenizer("llama_prepend"), "vicuna_v1", image_tokens=3)
    root = prepared / "datasets" / name
    for card in map(load_card, load_originals(name).cards):
        for split in set(card.splits) - {"released"}:
            samples = read_llava(root / card.splits[split], root / card.images)
            assert len(samples) >= 20
            assert all(is_there(path) for sample in samples for path in sample.images)
            examples, skipped = encode_samples(samples, chat, max_length=512)
            assert len(examples) == len(samples) and not skipped


def test_a_run_reads_cards_and_protocols(
    prepared: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny model is trained on what was made, and asked what was found, where it all lies by default."""
    monkeypatch.chdir(prepared)
    cards = ["iconqa_choose_txt", "iconqa_choose_img", "iconqa_choose_img_composed", "coco_caption"]
    replay = {"data": [{"card": "gqa"}, {"card": "okvqa", "limit": 8}], "share": 0.2}
    run = run_file(
        world,
        tmp_path,
        data=[{"card": card, "limit": 10} for card in cards],
        replay=replay,
        train={"steps": 2},
    )
    assert main(["train", str(run)]) == 0
    tasks = ["okvqa", "ocrvqa", "gqa", "textvqa_ocr", "coco_caption", *cards[:3], "iconqa_lorasculpt"]
    asked = ["--tasks", ",".join(tasks), "--limit", "2", "--output_path", str(tmp_path / "eval")]
    assert main(["eval", "--model", str(tmp_path / "run/final"), *asked]) == 0
    assert load(tmp_path / "eval/results.json")["results"].keys() == set(tasks)


@pytest.mark.parametrize("name", official.SETS)
def test_protocols_find_their_questions_and_pictures(name: str, prepared: Path) -> None:
    root = prepared / "datasets" / name
    counted = load(root / MANIFEST)["questions"]
    for task in load_originals(name).tasks:
        protocol = load_protocol(task)
        questions, _ = protocol.questions(root=root)
        assert counted[task][protocol.report_split]["questions"] == len(questions)
        names = [name for question in questions for name in question.images]
        assert names and all((root / protocol.images / name).is_file() for name in names)


def test_rows_are_those_of_the_originals(prepared: Path) -> None:
    """One row of each set, put together by hand from the official fields."""
    datasets = prepared / "datasets"

    def row(path: str, identity: str) -> tuple[str, str, str]:
        [found] = [each for each in load(datasets / path) if each["id"] == identity]
        human, gpt = found["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        return found["image"], human["value"].removeprefix("<image>\n"), gpt["value"]

    problem = load(datasets / "iconqa/problems.json")["24"]
    options = "".join(f"\n{mark}. {text}" for mark, text in zip("ABC", problem["choices"], strict=True))
    image = "iconqa/train/choose_txt/24/image.png"
    asked, letter = f"{problem['question']}{options}", "ABC"[problem["answer"]]
    assert row("iconqa/train_choose_txt.json", "24") == (image, asked + LETTER, letter)
    assert row("iconqa/train_lorasculpt_10k.json", "24") == (image, asked, letter)
    question = load(datasets / "textvqa/TextVQA_0.5.1_train.json")["data"][0]
    wanted = (f"{question['image_id']}.jpg", question["question"] + SHORT, question["answers"][0])
    assert row("textvqa/train_textvqa.json", str(question["question_id"])) == wanted
    image = "COCO_train2014_000000000009.jpg"
    asked = "What is done at a place with this sign?"
    assert row("okvqa/train_okvqa.json", "90") == (image, asked + SHORT, "waiting")  # the stem is "wait"
    book = load(datasets / "ocrvqa/dataset.json")["1000000009"]
    wanted = ("1000000009.png", book["questions"][0] + SHORT, book["answers"][0])
    assert row("ocrvqa/train_ocrvqa.json", "1000000009_0") == wanted
    question = load(datasets / "gqa/train_balanced_questions.json")["010000000"]
    wanted = (f"{question['imageId']}.jpg", question["question"] + SHORT, question["answer"])
    assert row("gqa/train_gqa.json", "010000000") == wanted
    images = load(datasets / "coco/dataset_coco.json")["images"]
    [picture] = [each for each in images if each["cocoid"] == 9]
    prompt = "Provide a one-sentence caption for the provided image."
    wanted = ("train2014/COCO_train2014_000000000009.jpg", prompt, picture["sentences"][2]["raw"])
    assert row("coco/train_coco_caption.json", "9_2") == wanted


def test_a_second_call_changes_nothing(
    prepared: Path, originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(prepared / "datasets", tmp_path / "datasets", symlinks=True)
    for name in official.SETS:
        root = tmp_path / "datasets" / name
        before = state(root)
        times = {path: path.stat().st_mtime_ns for path in root.glob("*.json")}
        assert prepare(name, root, root) == 0
        assert f"as before: {root / MANIFEST}" in capsys.readouterr().out
        assert state(root) == before
        assert {path: path.stat().st_mtime_ns for path in root.glob("*.json")} == times


def test_archives_give_the_same_as_unpacked_folders(prepared: Path, originals: Path, tmp_path: Path) -> None:
    """The originals as they come: one archive of IconQA, pictures in an archive of their own elsewhere."""
    packed = {
        "iconqa": [("iconqa_data", "iconqa_data", originals / "iconqa")],
        "gqa": [("questions1.2", ".", originals / "gqa"), ("images", ".", originals / "gqa")],
    }
    for name, archives in packed.items():
        for archive, inside, folder in archives:
            (tmp_path / "packing").mkdir()
            shutil.copytree(folder, tmp_path / "packing" / inside, dirs_exist_ok=True)
            shutil.make_archive(str(tmp_path / "source" / archive), "zip", tmp_path / "packing")
            shutil.rmtree(tmp_path / "packing")
        root = tmp_path / "datasets" / name
        assert prepare(name, tmp_path / "source", root) == 0
        assert load(root / MANIFEST) == load(prepared / "datasets" / name / MANIFEST)
        assert not any(path.is_symlink() for path in root.iterdir() if path.name != "iconqa_txt-test.jsonl")


# ---- What is not as it should be ----------------------------------------------------------------------


def test_all_that_is_absent_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare("okvqa", tmp_path / "nowhere", tmp_path / "datasets/okvqa", partial=False) == 2
    said = capsys.readouterr().err
    for original in load_originals("okvqa").originals:
        assert f"not there: {original.paths[0]}" in said
        assert original.url in said
    assert "13.51 GB, CC BY 4.0" in said
    assert not (tmp_path / "datasets").exists()


def test_evaluation_alone_needs_no_training_data(
    originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(originals / "textvqa", source)
    (source / "TextVQA_0.5.1_train.json").unlink()
    (source / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    root = tmp_path / "datasets/textvqa"
    assert prepare("textvqa", source, root) == 2
    assert "Only training needs it: --cards none goes without." in capsys.readouterr().err
    assert prepare("textvqa", source, root, "--cards", "none") == 0
    said = capsys.readouterr().out
    assert "not there, so textvqa_ocr cannot be asked: TextVQA_Rosetta_OCR_v0.2_val.json" in said
    assert "textvqa_ocr" not in load(root / MANIFEST)["questions"]
    assert not list(root.glob("train*.json"))
    assert prepare("textvqa", source, root, "--cards", "textqva") == 2
    assert "--cards: textvqa has no card 'textqva'\n    Did you mean 'textvqa'?" in capsys.readouterr().err


def test_a_file_that_one_task_reads_is_asked_for(
    originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, root = tmp_path / "source", tmp_path / "textvqa"
    shutil.copytree(originals / "textvqa", source)
    tokens = source / "TextVQA_Rosetta_OCR_v0.2_val.json"
    tokens.rename(tmp_path / "tokens")
    assert prepare("textvqa", source, root, "--cards", "none", partial=False) == 2
    said = capsys.readouterr().err
    assert f"not there: {tokens.name}" in said
    assert "Only the task textvqa_ocr needs it: --partial goes without." in said
    (tmp_path / "tokens").rename(tokens)
    assert prepare("textvqa", source, root, "--cards", "none") == 0
    assert load(root / MANIFEST)["questions"].keys() == {"textvqa", "textvqa_ocr"}


def test_the_manifest_says_how_each_file_was_made(originals: Path, tmp_path: Path) -> None:
    root = tmp_path / "okvqa"
    assert prepare("okvqa", originals / "okvqa", root, "--seed", "3") == 0
    assert prepare("okvqa", originals / "okvqa", root, "--cards", "none") == 0
    said = load(root / MANIFEST)
    assert said["dataset"] == "okvqa"
    assert said["made"]["train_okvqa.json"]["seed"] == 3
    assert said["made"]["train_okvqa.json"]["partial"] is True
    assert all(said["questions"]["okvqa"][split]["partial"] is True for split in ("train", "val"))
    assert "partial" not in said and "seed" not in said["made_with"]


def test_a_source_that_is_a_link(originals: Path, tmp_path: Path) -> None:
    """COCO lies beside the link, not beside what it leads to; nothing is read behind it by mistake."""
    (tmp_path / "downloads").mkdir()
    (tmp_path / "far").mkdir()
    shutil.copytree(originals / "okvqa", tmp_path / "far/okvqa")
    shutil.copytree(originals / "coco", tmp_path / "downloads/coco")
    (tmp_path / "downloads/okvqa").symlink_to(tmp_path / "far/okvqa")
    for source, root in (("downloads/okvqa", "datasets/okvqa"), ("downloads/okvqa", "downloads/okvqa")):
        assert prepare("okvqa", tmp_path / source, tmp_path / root) == 0
        assert (tmp_path / root / "val2014").samefile(tmp_path / "downloads/coco/val2014")


def test_counts_and_hashes_are_the_official_ones_or_said_not_to_be(
    originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare("gqa", originals / "gqa", tmp_path / "gqa", partial=False) == 2
    said = capsys.readouterr().err
    assert "gqa: 16 questions, the official testdev file gives 12578" in said
    assert "gqa: 24 questions, the official train file gives 943000" in said
    assert not list(tmp_path.glob("gqa/train_gqa.json")) and not (tmp_path / "gqa" / MANIFEST).exists()
    assert prepare("textvqa", originals / "textvqa", tmp_path / "textvqa", partial=False) == 2
    assert "its SHA-256 is not that of the published file, 4ceb5aad" in capsys.readouterr().err
    assert not list((tmp_path / "textvqa").iterdir())
    assert prepare("gqa", originals / "gqa", tmp_path / "gqa") == 0
    assert "partial: taken as it is" in capsys.readouterr().out
    assert load(tmp_path / "gqa" / MANIFEST)["questions"]["gqa"]["testdev"]["partial"] is True


def test_missing_pictures(originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    shutil.copytree(originals / "gqa", source)
    (source / "images/2300003.jpg").unlink()
    assert prepare("gqa", source, tmp_path / "gqa", partial=False) == 2
    assert "images: 1 of 12 pictures are not there: 2300003.jpg" in capsys.readouterr().err
    assert prepare("gqa", source, tmp_path / "gqa") == 0
    said = capsys.readouterr().out
    assert "22 samples, card gqa, split train; 2 questions without picture left out" in said
    assert "gqa, train: 24 questions; officially 943,000; 1 pictures are missing" in said
    shutil.copy(originals / "gqa/images/2300003.jpg", source / "images")
    assert prepare("gqa", source, tmp_path / "gqa") == 0
    assert "24 samples, card gqa, split train\n" in capsys.readouterr().out


def test_only_pictures_that_are_reported_or_trained_on_are_demanded(
    originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sample of OCR-VQA's test split needs its covers; the rest of the split and val are counted."""
    source, root = tmp_path / "source", tmp_path / "ocrvqa"
    shutil.copytree(originals / "ocrvqa", source)
    few = load_protocol("ocrvqa")
    few = replace(few, options={**few.options, "sample": 4}, expect={})
    monkeypatch.setattr(
        dataset, "load_protocol", lambda task: few if task == "ocrvqa" else load_protocol(task)
    )
    asked = {str(question.image) for question in few.questions("test", source)[0]}
    every = {str(question.image) for question in load_protocol("ocrvqa_full").questions("test", source)[0]}
    for name in ("2000000000.jpg", min(every - asked)):
        (source / "images" / name).unlink()
    assert prepare("ocrvqa", source, root, "--cards", "none", partial=False) == 0
    assert "ocrvqa_full, test: 16 questions; 1 pictures are missing" in capsys.readouterr().out
    (source / "images" / min(asked)).unlink()
    assert prepare("ocrvqa", source, root, "--cards", "none", partial=False) == 2
    assert f"pictures are not there: {min(asked)}" in capsys.readouterr().err


def test_pictures_are_composed_anew_of_another_source(
    originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, root = tmp_path / "source", tmp_path / "iconqa"
    shutil.copytree(originals / "iconqa", source)
    card = ("--cards", "iconqa_choose_img_composed")
    assert prepare("iconqa", source, root, *card) == 0
    assert load(root / MANIFEST)["composed"]["test"] == {"folder": "composed/test", "pictures": 12}
    pid = load(source / "pid_splits.json")["choose_img_train"][0]
    picture, drawn = source / f"iconqa/train/choose_img/{pid}/image.png", root / f"composed/train/{pid}.png"
    before = state(root / "composed/train")
    with Image.open(picture) as opened:
        Image.new("RGB", opened.size, "red").save(picture)
    (root / MANIFEST).unlink()
    capsys.readouterr()
    assert prepare("iconqa", source, root, *card) == 0
    assert "24 pictures, 1 of them drawn now" in capsys.readouterr().out
    after = state(root / "composed/train")
    assert {name for name in after if after[name] != before[name]} == {drawn.name}
    picture.unlink()
    assert prepare("iconqa", source, root, *card) == 0
    assert not drawn.exists()


def test_a_source_that_is_not_there(
    originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "gqa"
    assert prepare("gqa", originals / "gqa", root) == 0
    assert prepare("gqa", tmp_path / "gqq", root) == 2
    assert f"{tmp_path}/gqq: no such folder" in capsys.readouterr().err
    assert prepare("gqa", root, root) == 0


def test_pictures_that_lie_where_they_are_read(
    originals: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """OK-VQA without COCO's folders: images/ has all of them, beside the annotations or in the source."""
    for source, root in ((tmp_path / "a", tmp_path / "a"), (tmp_path / "b/source", tmp_path / "b/okvqa")):
        shutil.copytree(originals / "okvqa", source)
        assert prepare("okvqa", source, root) == 2
        assert "not there: val2014" in capsys.readouterr().err
        shutil.copytree(prepared / "datasets/okvqa/images", source / "images")
        assert prepare("okvqa", source, root) == 0
        assert len(list((root / "images").iterdir())) == 20


def test_all_broken_files_are_told_at_once(
    originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(originals / "gqa", source)
    for split in ("train", "testdev"):
        (source / f"{split}_balanced_questions.json").write_text('{"1": {"question": "What?"}}')
    assert prepare("gqa", source, tmp_path / "gqa") == 2
    said = capsys.readouterr().err
    assert said.startswith("mmtune: 2 faults")
    for split in ("train", "testdev"):
        assert f"{split}_balanced_questions.json, question 1: 'imageId' is missing" in said


def test_covers_that_were_saved_as_jpg(
    originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As LLaVA saves all of them. The user's folder stays as it is; links stand in its place."""
    source = tmp_path / "source"
    shutil.copytree(originals / "ocrvqa", source)
    for cover in source.glob("images/*.png"):
        cover.rename(cover.with_suffix(".jpg"))
    before = state(source)
    assert prepare("ocrvqa", source, tmp_path / "ocrvqa") == 0
    assert "links to 1 pictures" in capsys.readouterr().out
    assert state(source) == before
    assert (tmp_path / "ocrvqa/images/1000000009.png").samefile(source / "images/1000000009.jpg")
    assert prepare("ocrvqa", tmp_path / "ocrvqa", tmp_path / "ocrvqa") == 0


def test_what_has_changed_since_is_seen(
    originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, root = tmp_path / "source", tmp_path / "gqa"
    shutil.copytree(originals / "gqa", source)
    assert prepare("gqa", source, root) == 0
    made = root / "train_gqa.json"
    whole = made.read_text()
    made.write_text(whole.replace("red", "blue"))
    assert prepare("gqa", source, root) == 2
    assert "train_gqa.json: it has been changed since it was made" in capsys.readouterr().err
    made.write_text(whole)
    assert prepare("gqa", source, root, "--seed", "1") == 0
    assert made.read_text() != whole and sorted(made.read_text()) == sorted(whole)
    questions = source / "train_balanced_questions.json"
    questions.write_text(questions.read_text().replace("color", "colour"))
    assert prepare("gqa", source, root) == 2
    assert (
        "train_balanced_questions.json: it is not the file that was prepared before"
        in capsys.readouterr().err
    )
    (root / MANIFEST).unlink()
    assert prepare("gqa", source, root) == 2
    assert "train_gqa.json: it was not made here" in capsys.readouterr().err


def test_a_call_that_was_cut_off_goes_on(originals: Path, prepared: Path, tmp_path: Path) -> None:
    """Killed between the training files and the manifest: the same call ends in the same state."""
    root = tmp_path / "datasets/gqa"
    assert prepare("gqa", originals / "gqa", root) == 0
    before = state(root)
    (root / MANIFEST).unlink()
    assert prepare("gqa", originals / "gqa", root) == 0
    assert state(root) == before


def test_one_card_after_another(originals: Path, prepared: Path, tmp_path: Path) -> None:
    root = tmp_path / "datasets/iconqa"
    for card in ("iconqa_choose_txt", "iconqa_fill_in_blank"):
        assert prepare("iconqa", originals / "iconqa", root, "--cards", card) == 0
    assert not (root / "composed").exists()
    assert set(load(root / MANIFEST)["made"]) == {"train_choose_txt.json", "train_fill_in_blank.json"}
    assert prepare("iconqa", originals / "iconqa", root) == 0
    made = prepared / "datasets/iconqa"
    assert load(root / MANIFEST)["made"] == load(made / MANIFEST)["made"]


# ---- Real samples -------------------------------------------------------------------------------------


def test_real_iconqa_problems(real_data: Path, tmp_path: Path) -> None:
    """48 real problems, once as each split: every row is checked against its own data.json."""
    source = tmp_path / "source"
    problems, splits = {}, {}
    for task in ("choose_txt", "choose_img", "fill_in_blank"):
        folders = sorted((real_data / "iconqa" / task).iterdir())
        problems.update({folder.name: load(folder / "data.json") for folder in folders})
        for split in ("train", "val", "test"):
            splits[f"{task}_{split}"] = [folder.name for folder in folders]
            (source / "iconqa" / split).mkdir(parents=True, exist_ok=True)
            (source / "iconqa" / split / task).symlink_to(real_data / "iconqa" / task)
    for name, content in (("problems", problems), ("pid_splits", splits)):
        (source / f"{name}.json").write_text(json.dumps(content))
    root = tmp_path / "datasets/iconqa"
    assert prepare("iconqa", source, root) == 0
    seen = 0
    for card, task in (
        ("choose_txt", "choose_txt"),
        ("lorasculpt_10k", "choose_txt"),
        ("choose_img", "choose_img"),
        ("choose_img_composed", "choose_img"),
        ("fill_in_blank", "fill_in_blank"),
    ):
        for row in load(root / f"train_{card}.json"):
            problem = problems[row["id"]]
            choices = problem.get("choices", [])
            shown = choices if task == "choose_txt" else ["<image>"] * len(choices) * (card == "choose_img")
            lines = [problem["question"], *(f"{m}. {c}" for m, c in zip("ABCDE", shown, strict=False))]
            end = {"lorasculpt_10k": "", "fill_in_blank": SHORT}.get(card, LETTER)
            assert row["conversations"][0]["value"] == "<image>\n" + "\n".join(lines) + end
            right = problem["answer"] if task == "fill_in_blank" else "ABCDE"[problem["answer"]]
            assert row["conversations"][1]["value"] == right
            images = row["image"] if isinstance(row["image"], list) else [row["image"]]
            assert len(images) == 1 + len(choices) * (card == "choose_img")
            assert all((root / image).is_file() for image in images)
            seen += 1
    assert seen == 2 * len(splits["choose_txt_test"]) + 2 * 16 + len(splits["fill_in_blank_test"])
    questions, _ = load_protocol("iconqa_lorasculpt").questions(root=root)
    assert [q.choices for q in questions] == [tuple(problems[q.id]["choices"]) for q in questions]
    assert [q.answer_index for q in questions] == [problems[q.id]["answer"] for q in questions]


def test_real_coco_captions(real_data: Path, tmp_path: Path) -> None:
    """The captions of 126 real pictures, in Karpathy's layout: every one becomes a sample as it stands."""
    captions = load(real_data / "coco/captions_126.json")
    several: dict[int, list[str]] = {}
    for row in captions["annotations"]:
        several.setdefault(row["image_id"], []).append(row["caption"])
    source = tmp_path / "source"
    rows: list[dict[str, Any]] = []
    for place, (image_id, written) in enumerate(several.items()):
        split, half = [("train", "train"), ("restval", "val"), ("val", "val"), ("test", "val")][place % 4]
        name = f"COCO_{half}2014_{image_id:012d}.jpg"
        (source / f"{half}2014").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(source / f"{half}2014" / name)
        sentences = [{"raw": text, "tokens": []} for text in written]
        described = {"cocoid": image_id, "split": split, "filename": name, "filepath": f"{half}2014"}
        rows.append({**described, "sentences": sentences})
    (source / "dataset_coco.json").write_text(json.dumps({"images": rows, "dataset": "coco"}))
    assert prepare("coco", source, tmp_path / "coco") == 0
    for split in ("train", "restval"):
        wanted = {
            (row["filename"], sentence["raw"].strip())
            for row in rows
            if row["split"] == split
            for sentence in row["sentences"]
        }
        made = load(tmp_path / "coco" / f"{split}_coco_caption.json")
        assert {(Path(row["image"]).name, row["conversations"][1]["value"]) for row in made} == wanted
        assert all(
            row["conversations"][0]["value"]
            == "<image>\nProvide a one-sentence caption for the provided image."
            for row in made
        )
    questions, _ = load_protocol("coco_caption").questions(root=tmp_path / "coco")
    assert len(questions) == sum(row["split"] == "test" for row in rows)
