"""Faults of a model's options, found without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmtune.parts.spec import ConnectorOptions, LanguageOptions, ModelOptions, VisionOptions


def faults(options: Any) -> list[tuple[str, str, str]]:
    """(key, what, mend) of each fault."""
    found: list[tuple[str, str, str]] = []
    options.check(lambda key, what, mend="", absent=False: found.append((key, what, mend)))
    return found


@pytest.mark.parametrize(
    ("options", "key", "what"),
    [
        (VisionOptions("clop", "w"), "tower", "unknown vision tower 'clop'"),
        (VisionOptions("clip", "w", layer=3), "layer", "expected a negative number, found 3"),
        (VisionOptions("clip"), "", "give either 'weights' or, to start from scratch, 'config'"),
        (VisionOptions("clip", "w", {"hidden_size": 8}), "", "give either"),
        (ConnectorOptions("mlp"), "kind", "unknown connector 'mlp'"),
        (LanguageOptions("w", chat="vicuna"), "chat", "unknown chat format 'vicuna'"),
        (LanguageOptions(), "", "give either"),
        (LanguageOptions(config={"model_type": "llama"}), "", "needs a 'tokenizer'"),
    ],
)
def test_each_fault_is_named(options: Any, key: str, what: str) -> None:
    [(found_key, found_what, _)] = faults(options)
    assert found_key == key and found_what.find(what) >= 0


def test_a_near_name_is_suggested() -> None:
    assert faults(ConnectorOptions("mlp2x_gelo"))[0][2] == "Did you mean 'mlp2x_gelu'?"


def test_sound_options_have_no_fault() -> None:
    vision, connector, language = VisionOptions("clip", "w"), ConnectorOptions("linear"), LanguageOptions("w")
    for options in (vision, connector, language, ModelOptions(None, vision, connector, language)):
        assert faults(options) == []


def test_a_model_needs_a_base_or_three_parts(tmp_path: Path) -> None:
    found = faults(ModelOptions(vision=VisionOptions("clip", "w")))
    assert [what for _, what, _ in found] == [
        "neither 'base' nor 'connector' is given",
        "neither 'base' nor 'language' is given",
    ]
    assert "no folder" in faults(ModelOptions(base=str(tmp_path / "nowhere")))[0][1]
    assert "holds no config.json" in faults(ModelOptions(base=str(tmp_path)))[0][1]
    (tmp_path / "config.json").write_text("{}")
    assert faults(ModelOptions(base=str(tmp_path))) == []


def test_the_model_that_ships_is_a_base_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "installed" / "tiny").mkdir(parents=True)
    (tmp_path / "installed" / "tiny" / "config.json").write_text("{}")
    monkeypatch.setattr("mmtune.core.files.share", lambda kind: tmp_path / "installed")
    monkeypatch.chdir(tmp_path)
    assert faults(ModelOptions(base="data/tiny")) == []
    assert "no folder" in faults(ModelOptions(base="data/tyny"))[0][1]


def test_no_torch_for_options() -> None:
    code = "import sys, mmtune.parts.spec, mmtune.parts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_parts_that_ship_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tower = VisionOptions("clip", weights="data/tiny/model/vision")
    assert (Path(str(tower.weights)) / "config.json").is_file()
    Path("data/tiny/model/vision").mkdir(parents=True)  # one's own comes first
    assert VisionOptions("clip", weights="data/tiny/model/vision").weights == "data/tiny/model/vision"
    assert VisionOptions("clip", weights="openai/clip-l").weights == "openai/clip-l"
