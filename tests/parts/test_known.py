"""The configs that are kept here."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtune.core.errors import UserError
from mmtune.core.files import read_json
from mmtune.parts.known import CONFIGS, KNOWN, config_of


def test_every_config_is_known_by_the_name_it_says() -> None:
    assert {path.name for path in CONFIGS.iterdir()} == set(KNOWN.values())
    for name, file in KNOWN.items():
        kept = read_json(CONFIGS / file)
        about = kept["_about"]
        assert about["of"].split(",")[0] == name
        assert about["licence"] and about["source"]
        known = config_of(name, "open_clip_config.json" if "model_cfg" in kept else "config.json")
        assert known == {key: value for key, value in kept.items() if key != "_about"}


def test_a_folder_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "lmsys" / "vicuna-7b-v1.5"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "mine"}')
    assert config_of("lmsys/vicuna-7b-v1.5") == {"model_type": "mine"}


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(UserError, match=r"Did you mean 'llava-hf/llava-1.5-7b-hf'\?"):
        config_of("llava-hf/llava-1.5-7b")
    with pytest.raises(UserError, match="Known: Qwen/Qwen2"):
        config_of("/nowhere")


def test_each_is_known_by_the_file_it_has() -> None:
    name = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert set(config_of(name, "open_clip_config.json")) == {"model_cfg", "preprocess_cfg"}
    with pytest.raises(UserError, match=r"its open_clip_config.json is known here, not its config.json"):
        config_of(name)
    with pytest.raises(UserError, match=r"its config.json is known here, not its open_clip_config.json"):
        config_of("facebook/dinov2-large", "open_clip_config.json")


def test_a_folder_without_a_config_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        config_of(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="not the config of a model"):
        config_of(str(tmp_path))
