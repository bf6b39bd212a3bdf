"""The hash of a model folder: the same wherever it lies, another after any change that matters."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mmtune.core.errors import UserError
from mmtune.parts import fingerprint
from mmtune.parts.fingerprint import changed_parts, model_hash, start_hash
from mmtune.parts.spec import ConnectorOptions, ModelOptions
from mmtune.tuning.lora import LoraOptions
from tests import tiny_models as tiny


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A tower and a language model, and `tuned`: a connector and an adapter that refer to them."""
    folder = tmp_path / "project"
    model = tiny.model(folder)
    LoraOptions(lr=1e-3, rank=2).make().attach(model, "language")
    model.save_pretrained(folder / "tuned")
    return folder


def test_a_project_may_move_as_a_whole(project: Path, tmp_path: Path) -> None:
    before = model_hash(project / "tuned")
    assert len(before) == 16
    shutil.copytree(project, tmp_path / "deep" / "elsewhere")
    assert model_hash(tmp_path / "deep" / "elsewhere" / "tuned") == before


@pytest.mark.parametrize(
    "file",
    [
        "tower/model.safetensors",
        "lm/model.safetensors",
        "tuned/connector/model.safetensors",
        "tuned/adapter/language/adapter_model.safetensors",
    ],
)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "edges"])
def test_any_weight_counts(project: Path, file: str, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not whole:
        monkeypatch.setattr(fingerprint, "WHOLE", 0)
        monkeypatch.setattr(fingerprint, "EDGE", 64)
    before = model_hash(project / "tuned")
    weights = load_file(project / file)
    for tensor in weights.values():
        tensor.view(-1)[0] += 1
    os.remove(project / file)
    save_file(weights, project / file, metadata={"format": "pt"})
    assert model_hash(project / "tuned") != before


@pytest.mark.parametrize("file", ["tuned/config.json", "lm/tokenizer.json", "tower/config.json"])
def test_so_do_config_and_tokenizer(project: Path, file: str) -> None:
    before = model_hash(project / "tuned")
    text = (project / file).read_text()
    (project / file).write_text(text.replace("{", '{"more": 1, ', 1))
    assert model_hash(project / "tuned") != before


def test_a_card_or_a_training_state_beside_it_does_not(project: Path) -> None:
    before = model_hash(project / "tuned")
    for place in ("tuned", "tuned/training", "lm"):
        (project / place).mkdir(exist_ok=True)
        (project / place / "README.md").write_text("A card.")
    (project / "tuned" / "trained.json").write_text("{}")
    assert model_hash(project / "tuned") == before


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        model_hash(tmp_path / "missing")
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(UserError, match="not the config of an mmtune model"):
        model_hash(tmp_path)


def test_where_a_run_starts(project: Path) -> None:
    tuned = str(project / "tuned")
    assert start_hash(ModelOptions(tuned)) == model_hash(project / "tuned")
    assert start_hash(ModelOptions(tuned, dtype="bfloat16")) == model_hash(project / "tuned")
    assert start_hash(ModelOptions(tuned, connector=ConnectorOptions("linear"))) is None
    assert start_hash(tiny.parts(project)) is None


def test_no_torch_for_a_hash() -> None:
    code = "import sys, mmtune.parts.fingerprint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_changed_parts_are_those_of_other_content(tmp_path: Path) -> None:
    base = tiny.model(tmp_path)
    base.save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    assert changed_parts(tmp_path / "copy", tmp_path / "base") == []
    LoraOptions(lr=1e-3, rank=2).make().attach(base, "language")
    base.save_pretrained(tmp_path / "deep" / "lora")
    assert changed_parts(tmp_path / "deep" / "lora", tmp_path / "base") == ["language"]
    file = tmp_path / "copy" / "connector" / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1e-6
    save_file(tensors, file)
    assert changed_parts(tmp_path / "copy", tmp_path / "base") == ["connector"]
    assert changed_parts(tmp_path / "copy", tmp_path / "deep" / "lora") == ["connector", "language"]
