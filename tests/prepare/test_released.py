"""LLaVA's released training files: what is odd in them is read, counted and named."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import pytest

from mmtune.cli import main
from mmtune.data.chat import IMAGE
from mmtune.data.samples import read_llava, read_rows
from mmtune.prepare.originals import Released
from mmtune.prepare.released import LATE_START, NO_PICTURE, count_faults, ready
from tests import official

MADE = "train_llava_instruct.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    for name in ("llava_pretrain", "llava_instruct"):
        official.SETS[name](folder / name, Random(0))
    return folder


def prepare(name: str, source: Path, root: Path, *more: str) -> int:
    return main(["data", "prepare", name, "--source", str(source), "--output_path", str(root), *more])


def test_the_mixture_as_it_is_trained_on(
    originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, root = originals / "llava_instruct", tmp_path / "llava_instruct"
    theirs = sorted(os.listdir(source / "ocr_vqa/images"))
    assert prepare("llava_instruct", source, root, "--partial") == 0
    said = capsys.readouterr().out
    assert "links to 1 pictures that are there by another ending" in said
    assert f"1 samples: {LATE_START} (late_0)" in said
    assert "1 samples left out: 1 <image> in the conversation, but 0 pictures (tag_0)" in said
    assert "10 ids stand for several samples, which all stay" in said
    assert sorted(os.listdir(source / "ocr_vqa/images")) == theirs  # the user's own folder stays as it is

    published = {row["id"]: row for row in json.loads((source / "llava_v1_5_mix665k.json").read_text())}
    samples = read_llava(root / MADE, root)  # all can be read
    assert len(samples) == 21 and sum(not sample.images for sample in samples) == 1
    assert all(Path(str(picture)).is_file() for sample in samples for picture in sample.images)
    (late,) = [row for row in json.loads((root / MADE).read_text()) if row["id"] == "late_0"]
    assert late["conversations"] == published["late_0"]["conversations"][1:]
    made = json.loads((root / "prepared.json").read_text())["made"][MADE]
    assert made["of"] == {"coco": 4, "gqa": 4, "ocr_vqa": 4, "text": 1, "textvqa": 4, "vg": 4}
    assert made["mended"] == {LATE_START: ["late_0"]} and made["ids_of_several"] == 10

    before = (root / MADE).stat().st_mtime_ns
    assert prepare("llava_instruct", source, root, "--partial") == 0
    assert "as before" in capsys.readouterr().out and (root / MADE).stat().st_mtime_ns == before


def test_counts_and_pictures_are_the_published_ones_or_it_is_refused(
    originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(originals / "llava_instruct", source)
    (source / "gqa/images/000000000001.jpg").unlink()
    assert prepare("llava_instruct", source, tmp_path / "llava_instruct") == 2
    said = capsys.readouterr().err
    assert "22 samples, published are 665,298" in said
    assert "4 samples with a picture in coco, published are 364,100" in said
    assert "2 samples without a picture, published are 40,688" in said
    assert "1 samples lack their picture: 0" in said
    assert not (tmp_path / "llava_instruct" / MADE).exists()
    rows = read_rows(source / "llava_v1_5_mix665k.json")
    same = Released("f", "c", 22, of={"coco": 4, "gqa": 4, "ocr_vqa": 4, "textvqa": 4, "vg": 4, "text": 2})
    assert count_faults(same, rows, source) == []
    assert list(ready(rows, source, 0).left_out) == [
        "1 <image> in the conversation, but 0 pictures",
        NO_PICTURE,
    ]


def test_captions_out_of_the_archive(
    originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """images.zip as it comes, its folders at the top; the set from an archive is the set from a folder."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(originals / "llava_pretrain/blip_laion_cc_sbu_558k.json", source)
    shutil.make_archive(str(source / "images"), "zip", originals / "llava_pretrain/images")
    for folder, name in ((source, "packed"), (originals / "llava_pretrain", "unpacked")):
        assert prepare("llava_pretrain", folder, tmp_path / name, "--partial") == 0
    assert "24 samples, published are 558,128" in capsys.readouterr().out
    made = [tmp_path / name / "train_llava_pretrain.json" for name in ("packed", "unpacked")]
    assert made[0].read_bytes() == made[1].read_bytes()
    samples = read_llava(made[0], tmp_path / "packed/images")
    assert len(samples) == 24 and all(IMAGE in sample.turns[0].text for sample in samples)
    assert [sample.id for sample in samples] != sorted(sample.id for sample in samples)  # drawn, not in order


def test_archives_of_one_name_lie_beside_what_comes_out_of_them(originals: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(originals / "llava_instruct", source)
    for folder, member, name in (("gqa", "images", "images"), ("vg", "VG_100K", "images")):
        with zipfile.ZipFile(source / folder / f"{name}.zip", "w") as archive:
            for picture in (source / folder / member).iterdir():
                archive.write(picture, f"{member}/{picture.name}")
        shutil.rmtree(source / folder / member)
    assert prepare("llava_instruct", source, tmp_path / "llava_instruct", "--partial") == 0
    rows: list[dict[str, Any]] = json.loads((tmp_path / "llava_instruct" / MADE).read_text())
    assert len(rows) == 21
