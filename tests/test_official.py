"""The stand-ins of the real benchmarks are read by the protocols as the real files are."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from mmtune.evaluation.protocol import load_protocol
from tests.official import make

COUNTS = {
    "iconqa_choose_txt": {"train": 24, "val": 6, "test": 12},
    "iconqa_choose_img": {"train": 24, "val": 6, "test": 12},
    "iconqa_fill_in_blank": {"train": 24, "val": 6, "test": 12},
    "textvqa_ocr": {"train": 24, "val": 16},
    "okvqa": {"train": 20, "val": 20},
    "ocrvqa_full": {"train": 20, "val": 8, "test": 16},
    "gqa": {"train": 24, "val": 10, "testdev": 16},
    "coco_caption": {"val": 5, "test": 10},
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    make(folder)
    return folder


@pytest.mark.parametrize("task", COUNTS)
def test_the_protocols_read_them(task: str, originals: Path) -> None:
    protocol = load_protocol(task)
    root = originals / protocol.root.name
    for split, count in COUNTS[task].items():
        questions, _ = protocol.questions(split, root)
        assert len(questions) == count
        if task != "okvqa":  # its pictures are COCO's
            assert all(
                (root / protocol.images / name).is_file() for each in questions for name in each.images
            )


def test_the_seed_decides(originals: Path, tmp_path: Path) -> None:
    def digest(folder: Path) -> dict[str, str]:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
        }

    make(tmp_path / "again")
    assert digest(tmp_path / "again") == digest(originals)
    make(tmp_path / "other", seed=1)
    assert digest(tmp_path / "other") != digest(originals)
