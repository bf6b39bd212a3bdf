"""The vision towers that ship: small, described, better than the untrained one; and how they are made."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtune.core.files import share
from mmtune.data.tiny import Sizes, generate
from mmtune.parts.spec import TOWERS
from mmtune.parts.vision.base import VisionTower

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "tiny" / "towers"
SHIPPED = share("data") / "tiny" / "towers"
KINDS = {"contrastive": "open_clip", "supervised": "timm", "self_supervised": "dinov2"}
FAMILIES = {**KINDS, "random": "timm"}  # of those that ship


@pytest.fixture(scope="module")
def scripts() -> Any:
    """Imports a file of the scripts' folder, as Python does where one of them is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield importlib.import_module


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of a seed that no tower was trained on."""
    folder = tmp_path_factory.mktemp("towers") / "tiny"
    sizes = Sizes(
        train=600, text=1, val=1, test=1, downstream_train=1, downstream_val=1, downstream_test=1, simple=1
    )
    generate(folder, 1, sizes)
    return folder


def opened(family: str, folder: Path) -> VisionTower:
    tower: VisionTower = TOWERS.load(family).load(str(folder), layer=-1, dtype=torch.float32)
    return tower.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_shipped_tower_is_small_and_described(name: str) -> None:
    files = [path for path in (SHIPPED / name).iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 2**20
    assert {path.suffix for path in files} == {".safetensors", ".json", ".md"}
    card = (SHIPPED / name / "README.md").read_text(encoding="utf-8")
    for word in ("scripts/tiny_towers.sh", "seed", "Probe", "Licence"):
        assert word in card, word


def test_trained_towers_tell_things_apart_better_than_the_untrained_one(scripts: Any, world: Path) -> None:
    """Through mmtune's own towers, on pictures that none of them saw."""
    pictures = scripts("pictures")
    parts = pictures.read_pictures(world)
    pixels = torch.cat([part.pixels for part in parts])
    contents = torch.cat([part.contents for part in parts])
    letters = {}
    for name, family in FAMILIES.items():
        tower = opened(family, SHIPPED / name)
        assert (tower.width, tower.tokens, tower.image_size) == (pictures.WIDTH, 16, pictures.SIDE)
        with torch.no_grad():
            letters[name] = pictures.probe(tower(pixels), contents)["letter"]
    for name in FAMILIES.keys() - {"random"}:
        assert letters[name] >= letters["random"] + 10, letters


@pytest.mark.parametrize("kind", KINDS)
def test_the_script_writes_what_mmtune_opens(scripts: Any, world: Path, tmp_path: Path, kind: str) -> None:
    """Two steps change the tower; its features here are those the script's own library gives."""
    make, module, pictures = scripts("make"), scripts(kind), scripts("pictures")
    common = ["--world", str(world), "--pictures", "20"]
    make.main([kind, str(tmp_path / "untrained"), "--untrained", *common])
    make.main([kind, str(tmp_path / "trained"), "--steps", "2", *common])
    seen, _ = pictures.read_pictures(world, 20)
    torch.manual_seed(0)
    model = module.new().half().float().eval()  # as it is saved
    before, after = (opened(KINDS[kind], tmp_path / name) for name in ("untrained", "trained"))
    with torch.no_grad():
        torch.testing.assert_close(
            before(seen.pixels), module.features(model, seen.pixels), atol=1e-5, rtol=1e-5
        )
        assert (after(seen.pixels) - before(seen.pixels)).abs().max() > 1e-3
    assert "2 steps" in (tmp_path / "trained" / "README.md").read_text()


def test_a_tower_that_is_there_is_left_alone(scripts: Any, tmp_path: Path, capsys: Any) -> None:
    scripts("make").main(["supervised", str(tmp_path)])
    assert "there already" in capsys.readouterr().out
