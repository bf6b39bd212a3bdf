"""Parts that don't fit each other are refused with both shapes, by configs alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmtune.cli import main
from mmtune.core.errors import UserError
from mmtune.parts.model import VisionLanguageModel, assemble
from mmtune.parts.outline import outline_of, outline_of_configs
from mmtune.parts.shapes import require_fit
from mmtune.parts.spec import ConnectorOptions, LanguageOptions, ModelOptions, VisionOptions
from tests import tiny_models as tiny
from tests.world import run_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `base`, and parts of other shapes beside it, all of whose files of weights are empty.

    So whatever is said of them, no weights were read for it.
    """
    folder = tmp_path_factory.mktemp("parts")
    tiny.model(folder).save_pretrained(folder / "base")
    tiny.save_tower(folder / "wide", hidden_size=32)
    tiny.save_tower(folder / "fine", image_size=24)
    tiny.save_language(folder / "large", hidden_size=48)
    tiny.save_language(folder / "short", max_position_embeddings=4)
    for file in folder.rglob("model.safetensors"):
        file.write_bytes(b"")
    return folder


def described(folder: Path, **parts: Any) -> ModelOptions:
    """Parts beside the base, by their folders' names."""
    made: dict[str, Any] = {}
    if "vision" in parts:
        made["vision"] = VisionOptions("clip", str(folder / parts["vision"]))
    if "language" in parts:
        made["language"] = LanguageOptions(str(folder / parts["language"]))
    if "connector" in parts:
        made["connector"] = ConnectorOptions(**parts["connector"])
    return ModelOptions(base=str(folder / "base"), **made)


SCALE = {"kind": "pixel_shuffle", "options": {"scale": 2}}
NEW = r"\n *Start a new one, under model, and train it: connector: \{kind: mlp2x_gelu\}"


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"vision": "wide"}, rf"it takes 24 and gives 32, but the tower is 32 wide and the .* 32{NEW}"),
        ({"language": "large"}, rf"it takes 24 and gives 32, but the tower is 24 wide and the .* 48{NEW}"),
        ({"vision": "fine", "connector": SCALE}, "a scale of 2 does not divide the tower's grid of 3 x 3"),
        ({"language": "short"}, "a picture is 4 tokens, and the language model was made for 4"),
    ],
)
def test_misfits_are_told_before_any_weights_are_read(folder: Path, parts: Any, said: str) -> None:
    for work in (assemble, outline_of, outline_of_configs):
        with pytest.raises(UserError, match=said):
            work(described(folder, **parts))


def test_what_fits_is_told_by_its_broken_weights_alone(folder: Path) -> None:
    fits = described(folder, vision="wide", language="large", connector={"kind": "mlp2x_gelu"})
    with pytest.raises(UserError, match=r"model\.safetensors|cannot be loaded"):
        assemble(fits)


def test_faults_of_both_sides_at_once(folder: Path) -> None:
    wrong = ModelOptions(
        vision=VisionOptions("clip", str(folder / "large")),
        connector=ConnectorOptions("linear"),
        language=LanguageOptions(str(folder / "nowhere")),
    )
    with pytest.raises(UserError) as raised:
        require_fit(wrong)
    assert [fault.where for fault in raised.value.faults] == [str(folder / "large"), str(folder / "nowhere")]
    resampler = {"kind": "resampler", "options": {"queries": 300}}
    with pytest.raises(UserError, match="a picture is 300 tokens, and the language model was made for 256"):
        assemble(described(folder, connector=resampler))
    both = {"kind": "mlp3x_gelu", "weights": str(folder / "base" / "connector")}
    with pytest.raises(UserError, match=r"its kind is 'mlp2x_gelu', here it is 'mlp3x_gelu'; it takes 24"):
        assemble(described(folder, vision="wide", connector=both))


def test_every_command_says_the_same(
    folder: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "base", tmp_path / "swapped")
    config = json.loads((folder / "base" / "config.json").read_text())
    config["vision"]["weights"] = str(folder / "wide")
    config["language"]["weights"] = str(folder / "lm")
    (tmp_path / "swapped" / "config.json").write_text(json.dumps(config))
    run = run_file(world, tmp_path)
    text = yaml.safe_load(run.read_text())
    text["model"] = {
        "base": str(folder / "base"),
        "vision": {"tower": "clip", "weights": str(folder / "wide")},
    }
    run.write_text(yaml.safe_dump(text))
    commands = [
        ["check", str(run)],
        ["check", "--shapes", str(run)],
        ["train", str(run)],
        [
            "eval",
            "--model",
            str(tmp_path / "swapped"),
            "--tasks",
            "tiny_text",
            "--output_path",
            str(tmp_path),
            "--data_root",
            str(world / "datasets" / "tiny"),
        ],
    ]
    for command in commands:
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "it takes 24 and gives 32, but the tower is 32 wide and the language model 32" in said
        assert "connector: {kind: mlp2x_gelu}" in said
    with pytest.raises(UserError, match="it takes 24 and gives 32"):
        VisionLanguageModel.from_pretrained(tmp_path / "swapped")


def test_flash_attention_in_float32_is_refused_by_configs_alone(folder: Path) -> None:
    wanted = replace(described(folder), attention="flash")
    with pytest.raises(UserError, match="CLIPVisionModel: it is held in float32, and flash attention takes"):
        outline_of_configs(wanted)
    assert outline_of_configs(replace(wanted, dtype="bfloat16")).image_tokens == 4  # the GPU is elsewhere
