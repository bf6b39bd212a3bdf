"""One part alone: written, taken by assemble again, and the model is the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmtune.cli import main
from mmtune.interop.comparison import logits
from mmtune.parts.assembly import Asked, assemble_folder
from mmtune.parts.model import VisionLanguageModel
from mmtune.tuning.lora import LoraOptions
from tests import tiny_models as tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with adapters on its tower and its language model."""
    folder = tmp_path_factory.mktemp("tuned")
    model = tiny.model(folder)
    assert model.options.vision
    model.options.vision.fit = "squash"
    for part in ("vision", "language"):
        LoraOptions(lr=1e-3, rank=2, alpha=4).make().attach(model, part)
        for name, parameter in model.part(part).named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    model.eval().save_pretrained(folder / "final")
    return folder / "final"


def test_parts_written_alone_make_the_model_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("vision", "connector", "language"):
        assert main(["export", str(folder), str(tmp_path / part), "--to", part]) == 0
        assert "with the written part" in capsys.readouterr().out
    assert json.loads((tmp_path / "vision" / "part.json").read_text()) == {
        "part": "vision",
        "tower": "clip",
        "fit": "squash",
        "layer": -1,
    }
    vision, connector, language = (str(tmp_path / part) for part in ("vision", "connector", "language"))
    assemble_folder(Asked(vision, connector, language), tmp_path / "again")
    again, before = (VisionLanguageModel.from_pretrained(place) for place in (tmp_path / "again", folder))
    torch.testing.assert_close(logits(again), logits(before), rtol=0, atol=1e-4)
    assert again.options.vision and again.options.vision.fit == "squash" and not again.adapters


def test_parts_are_not_taken_for_each_other(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["export", str(folder), str(tmp_path / "tower"), "--to", "vision", "--dtype", "bfloat16"]) == 0
    )
    assert main(["export", str(folder), str(tmp_path / "tower"), "--to", "vision"]) == 2
    tower = str(tmp_path / "tower")
    wrong = ["--vision", tower, "--connector", "linear", "--language", tower]
    assert main(["assemble", *wrong, str(tmp_path / "out")]) == 2
    assert "part.json: this is a part 'vision', not 'language'" in capsys.readouterr().err
    assert main(["assemble", "--base", str(folder), "--vision", tower, str(tmp_path / "out")]) == 2
    assert "its language has an adapter" in capsys.readouterr().err
