"""Checkpoint folders: every layout gives the same tensors, every damage has its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmtune.core.errors import UserError
from mmtune.interop import weights
from mmtune.interop.weights import checkpoint, local, tensors_of, write_tensors

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b.weight": torch.randn(5, dtype=torch.float32).half(),
    "c": torch.randn(2, 2, 2).bfloat16(),
    "d": torch.tensor(3),
}


def same(found: dict[str, weights.Stored]) -> None:
    assert found.keys() == TENSORS.keys()
    for name, stored in found.items():
        tensor = stored.read()
        assert tensor.dtype == stored.outline.dtype == TENSORS[name].dtype
        assert tensor.shape == stored.outline.shape and torch.equal(tensor, TENSORS[name])


@pytest.mark.parametrize("layout", ["one", "shards", "bin", "old bin", "bin shards", "no index"])
def test_layouts(tmp_path: Path, layout: str) -> None:
    if layout == "one":
        save_file(TENSORS, tmp_path / "model.safetensors")
    elif layout in ("shards", "no index"):
        stored = {name: weights.Stored(t.to("meta"), lambda t=t: t) for name, t in TENSORS.items()}  # type: ignore[misc]
        write_tensors(tmp_path, stored, shard=30)
        assert len(list(tmp_path.glob("model-0000*-of-00003.safetensors"))) == 3
        if layout == "no index":
            (tmp_path / "model.safetensors.index.json").unlink()
    elif layout == "bin shards":
        names = sorted(TENSORS)
        where = {name: f"pytorch_model-0000{1 + i // 2}-of-00002.bin" for i, name in enumerate(names)}
        for file in set(where.values()):
            torch.save({name: TENSORS[name] for name in names if where[name] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    else:
        zipped = layout == "bin"
        torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    same(checkpoint(tmp_path))


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    torch.save({"a": whole, "b": whole[:3], "c": whole.view(2, 3).T}, tmp_path / "pytorch_model.bin")
    write_tensors(tmp_path / "written", checkpoint(tmp_path))
    found = load_file(tmp_path / "written/model.safetensors")
    assert torch.equal(found["b"], whole[:3]) and torch.equal(found["c"], whole.view(2, 3).T)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    stored = {name: weights.Stored(t.to("meta"), lambda t=t: t) for name, t in TENSORS.items()}  # type: ignore[misc]
    write_tensors(tmp_path, stored, shard=30)
    return tmp_path


def test_a_missing_shard_has_a_name_with_and_without_an_index(shards: Path) -> None:
    (shards / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="no such file"):
        checkpoint(shards)
    (shards / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="no such file"):
        checkpoint(shards)


def test_all_faults_at_once(shards: Path) -> None:
    (shards / "model-00002-of-00003.safetensors").unlink()
    file = shards / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError) as refused:
        checkpoint(shards)
    assert [fault.what[:15] for fault in refused.value.faults] == ["no such file", "not a whole saf"]


def test_a_name_that_no_file_holds(shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    said["weight_map"]["renamed"] = said["weight_map"].pop("a")
    index.write_text(json.dumps(said))
    with pytest.raises(UserError, match="1 tensors are in no file that it names: renamed"):
        checkpoint(shards)


@pytest.mark.parametrize("damage", ["cut", "code", "list"])
def test_a_bin_that_is_no_file_of_tensors(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(100)} if damage != "list" else [torch.ones(1)], file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:200])
    if damage == "code":
        torch.save({"a": torch.ones(1), "run": Path("x")}, file)
    with pytest.raises(
        UserError, match=r"pytorch_model\.bin: (not a whole file of tensors|it holds no tensors)"
    ):
        tensors_of(file)


def test_a_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        assert name == "owner/name"
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(weights, "snapshot_download", fetch)
    assert local("owner/name") == tmp_path
    assert ["*.safetensors" in each for each in asked] == [True, False] and "*.bin" in asked[1]
    (tmp_path / "model.safetensors").touch()
    local("owner/name")
    assert len(asked) == 3

    def absent(name: str, allow_patterns: list[str]) -> str:
        raise OSError("Repository not found")

    monkeypatch.setattr(weights, "snapshot_download", absent)
    with pytest.raises(UserError, match="not to be had from the hub: Repository not found"):
        local("owner/name")
    assert local(tmp_path) == tmp_path
