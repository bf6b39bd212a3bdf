"""A tower and a connector that lie outside the package, through the whole of it, none of it edited."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mmtune.cli import main
from mmtune.core import table
from mmtune.core.errors import UserError
from mmtune.parts.model import VisionLanguageModel
from mmtune.parts.outline import outline_of
from mmtune.parts.spec import ModelOptions, VisionOptions
from tests.world import FROZEN, FULL, run_file, trained

PACKAGE = '''
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmtune.core.files import read_json, write_json
from mmtune.parts.connector.base import Connector
from mmtune.parts.vision.base import VisionTower


class Patches(VisionTower):
    """A linear map of each patch."""

    has_cls, prefix, resample, own_fit, crop_pct = False, 0, "bicubic", "squash", 1.0

    def __init__(self, width, patch=16):
        super().__init__()
        self.width, self.patch, self.image_size = width, patch, 64
        self.tokens = (64 // patch) ** 2
        self.mean = self.std = (0.5, 0.5, 0.5)
        self.conv = nn.Conv2d(3, width, patch, patch)

    @classmethod
    def load(cls, weights, layer, dtype, image_size=None):
        made = cls(**read_json(f"{weights}/config.json"))
        made.load_state_dict(load_file(f"{weights}/model.safetensors"))
        return made.to(dtype)

    @classmethod
    def create(cls, config, layer, image_size=None):
        return cls(**config)

    def save(self, folder, tensors=None):
        folder.mkdir()
        save_file(dict(tensors or self.state_dict()), folder / "model.safetensors")
        write_json(folder / "config.json", {"width": self.width, "patch": self.patch})

    def layers(self):
        return []

    def checkpoint_activations(self, on=True):
        pass

    def attend_by(self, implementation):
        pass

    def forward(self, images):
        return self.conv(self.normalise(images, self.conv.weight.dtype)).flatten(2).mT


class Halves(Connector):
    """The mean of each two features."""

    def __init__(self, vision_width, language_width, bias: bool = True):
        super().__init__(vision_width, language_width, bias=bias)
        self.linear = nn.Linear(vision_width, language_width, bias=bias)

    def tokens(self, features):
        return features // 2

    def forward(self, features):
        return self.linear(features.unflatten(1, (-1, 2)).mean(2))
'''
TOWER = "patchwork.parts:Patches"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package, installed; its connector has an entry point, its tower none."""
    (tmp_path / "patchwork").mkdir()
    (tmp_path / "patchwork" / "__init__.py").touch()
    (tmp_path / "patchwork" / "parts.py").write_text(PACKAGE)
    info = tmp_path / "patchwork-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: patchwork\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mmtune.connectors]\nhalves = patchwork.parts:Halves\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(table, "_allowed", set())
    table._entry_points.cache_clear()
    yield tmp_path
    table._entry_points.cache_clear()


def test_trained_saved_loaded_and_evaluated(
    package: Path, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    run = run_file(
        world,
        package / "runs",
        model={
            "base": str(world / "base"),
            "vision": {"tower": TOWER, "config": {"width": 20}},
            "connector": {"kind": "halves", "options": {"bias": False}},
        },
        tune={"vision": FULL, "connector": FULL, "language": FROZEN},
    )
    assert main(["check", str(run)]) == 0
    assert "a picture is 8 tokens" in capsys.readouterr().out
    assert main(["train", str(run)]) == 0
    final = package / "runs" / "run" / "final"
    assert sorted(name for name in trained(final) if "linear" in name or "conv" in name) == [
        "connector/model.safetensors:linear.weight",
        "vision/model.safetensors:conv.bias",
        "vision/model.safetensors:conv.weight",
    ]

    model = VisionLanguageModel.from_pretrained(final)  # its run named the tower
    assert type(model.vision).__name__ == "Patches" and model.image_tokens == 8
    again = {name: t for name, t in trained(final).items() if name.startswith("vision")}
    assert torch.equal(model.vision.state_dict()["conv.bias"], again["vision/model.safetensors:conv.bias"])

    # Another process, which no run told of the tower: the folder alone must not make it import anything.
    monkeypatch.setattr(table, "_allowed", set())
    asked = ["eval", "--model", str(final), "--tasks", "tiny_colour", "--limit", "4", "--output_path"]
    with pytest.raises(UserError, match=f"it names code outside mmtune, {TOWER}"):
        VisionLanguageModel.from_pretrained(final)
    assert main([*asked, str(package / "refused")]) == 2
    assert f"MMTUNE_ALLOW={TOWER}" in capsys.readouterr().err
    monkeypatch.setenv("MMTUNE_ALLOW", TOWER)
    assert main([*asked, str(package / "scores")]) == 0
    assert json.loads((package / "scores" / "results.json").read_text())["results"]["tiny_colour"]


def test_a_tower_that_lacks_something_is_told_what(package: Path, world: Path) -> None:
    lacking = PACKAGE.replace("has_cls, prefix,", "prefix,").replace("False, 0,", "0,")
    (package / "unfinished.py").write_text(lacking.replace("def layers", "def layer"))
    wrong = ModelOptions(str(world / "base"), VisionOptions("unfinished:Patches", config={"width": 24}))
    with pytest.raises(UserError, match=r"Patches lacks has_cls, layers\n.*add-a-tower"):
        outline_of(wrong)


def test_check_tells_what_is_wrong_with_them(
    package: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"kind": "patchwork.parts:Halve"}
    run = run_file(world, package / "runs", model={"base": str(world / "base"), "connector": wrong})
    assert main(["check", str(run)]) == 2
    said = capsys.readouterr().err
    assert "model.connector.kind: patchwork.parts has no Halve" in said and "Did you mean 'Halves'?" in said
    assert main(["check", str(run), 'model.connector={kind: halves, options: {bias: "no", half: 2}}']) == 2
    said = capsys.readouterr().err
    assert "model.connector.options.bias: expected true or false, found 'no'" in said
    assert "model.connector.options.half: unknown option 'half'" in said
