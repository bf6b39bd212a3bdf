"""Saved adapters, read without a model: against what peft itself makes of the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file
from torch import nn

from mmtune.core.errors import UserError
from mmtune.parts.adapters import named_apart, read_adapter
from mmtune.tuning.lora import LoraOptions, LoraTuner
from tests import tiny_models as tiny


class Layers(nn.Module):
    """Two numbered blocks of two linear layers, neither of them square."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(6, 10), "down": nn.Linear(10, 6)}) for _ in range(2)
        )


def save_peft(folder: Path, seed: int = 0, **changes: Any) -> PeftModel:
    """An adapter of peft's on `Layers`, B drawn too; the weights lie in two files under `folder`/base."""
    torch.manual_seed(7)
    layers = Layers()
    weights = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 3, "lora_alpha": 5.0, "target_modules": ["up", "down"], **changes})
    adapted = get_peft_model(layers, config)
    for module in adapted.modules():
        if isinstance(module, Linear):
            nn.init.normal_(module.lora_B.get_parameter("default.weight"))
    adapted.save_pretrained(str(folder))
    base = folder / "base"
    base.mkdir()
    first = {name: tensor for name, tensor in weights.items() if name.startswith("blocks.0")}
    save_file(first, base / "model-00001-of-00002.safetensors")
    rest = {name: tensor for name, tensor in weights.items() if name not in first}
    save_file(rest, base / "model-00002-of-00002.safetensors")
    return adapted


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"blocks.1.up": 11.0}, "rank_pattern": {"down": 2}},
        {"target_modules": ["blocks.1.down"]},
    ],
)
def test_an_update_is_what_peft_adds_to_the_weight(tmp_path: Path, changes: dict[str, Any]) -> None:
    adapted = save_peft(tmp_path / "a", **changes)
    read = read_adapter(tmp_path / "a", tmp_path / "a" / "base")
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in adapted.named_modules()
        if isinstance(module, Linear)
    }
    assert set(read.modules) == set(layers)
    for name, layer in layers.items():
        pair, weight = read.pair(name), read.weight(name)
        torch.testing.assert_close(pair.scale * pair.b @ pair.a, layer.get_delta_weight("default"))
        assert weight is not None
        torch.testing.assert_close(weight, layer.get_base_layer().weight, rtol=0, atol=0)


def test_a_model_folder_and_the_run_it_lies_in(tmp_path: Path) -> None:
    model = tiny.model(tmp_path / "parts")
    tuners = {part: LoraTuner(LoraOptions(lr=1e-3, rank=2, alpha=3)) for part in ("connector", "language")}
    for part, tuner in tuners.items():
        tuner.attach(model, part)
    run = tmp_path / "a_run"
    model.save_pretrained(run / "final")
    read = read_adapter(run / "final")
    (run / "run.yaml").write_text("name: a_run\n")
    assert [read_adapter(place).name for place in (run, run / "final")] == ["a_run", "a_run"]
    assert read_adapter(run / "final" / "adapter" / "language").name == "a_run"
    names = list(tuners["language"].layers) + [f"connector/{n}" for n in tuners["connector"].layers]
    assert sorted(read.modules) == sorted(names)
    a, b = tuners["connector"].pair("linear_1")
    pair = read.pair("connector/linear_1")
    assert torch.equal(pair.a, a) and torch.equal(pair.b, b) and pair.scale == 1.5
    weight = read.weight("connector/linear_1")
    assert weight is not None
    assert torch.equal(weight, model.connector.state_dict()["linear_1.base_layer.weight"])
    q_proj = "model.layers.1.self_attn.q_proj"
    frozen = load_file(tmp_path / "parts" / "lm" / "model.safetensors")[f"{q_proj}.weight"]
    found = read.weight(q_proj)
    assert found is not None and torch.equal(found, frozen)


def test_names_of_a_whole_models_files(tmp_path: Path) -> None:
    """LLaVA's files call the language model's layers otherwise than transformers does in memory."""
    a, b, w = torch.randn(2, 4), torch.randn(5, 2), torch.randn(5, 4)
    on_disk = {"language_model.model.layers.0.q.weight": w, "vision.layers.0.q.weight": torch.randn(5, 4)}
    (tmp_path / "base").mkdir()
    save_file(on_disk, tmp_path / "base" / "model.safetensors")
    for number, name in enumerate(("model.language_model.layers.0.q", "model.layers.0.q")):
        folder = tmp_path / str(number)
        write_adapter(folder, {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b})
        found = read_adapter(folder, tmp_path / "base").weight(name)
        assert found is not None and torch.equal(found, w)
    write_adapter(tmp_path / "x", {"layers.0.q.lora_A.weight": a, "layers.0.q.lora_B.weight": b})
    with pytest.raises(UserError, match=r"2 weights there could be that of layers\.0\.q"):
        read_adapter(tmp_path / "x", tmp_path / "base").weight("layers.0.q")


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    folder.mkdir()
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    described = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": None, **config}
    (folder / "adapter_config.json").write_text(json.dumps(described))


def test_without_its_base(tmp_path: Path) -> None:
    save_peft(tmp_path / "a")
    read = read_adapter(tmp_path / "a")
    assert read.weight("blocks.0.up") is None and read.bases() == []


def test_what_cannot_be_read(tmp_path: Path) -> None:
    def refused(folder: Path, match: str, base: Path | None = None) -> None:
        with pytest.raises(UserError, match=match):
            read = read_adapter(folder, base)
            [read.weight(module) for module in read.modules]

    half = {"q.lora_A.weight": torch.ones(2, 4)}
    whole = {**half, "q.lora_B.weight": torch.ones(5, 2)}
    write_adapter(tmp_path / "half", half)
    refused(tmp_path / "half", "only A or only B")
    write_adapter(tmp_path / "dora", whole, use_dora=True)
    refused(tmp_path / "dora", "DoRA")
    write_adapter(tmp_path / "loha", whole, peft_type="LOHA")
    refused(tmp_path / "loha", "LOHA")
    write_adapter(tmp_path / "good", whole)
    (tmp_path / "base").mkdir()
    refused(tmp_path / "good", "no file of weights", tmp_path / "base")
    save_file({"q.weight": torch.ones(5, 3)}, tmp_path / "base" / "model.safetensors")
    refused(tmp_path / "good", "the weight of q is 5 x 3", tmp_path / "base")
    save_file({"q.weight": torch.ones(5, 4, dtype=torch.uint8)}, tmp_path / "base" / "model.safetensors")
    refused(tmp_path / "good", "not quantised|uint8", tmp_path / "base")
    (tmp_path / "good" / "adapter_model.safetensors").write_bytes(b"\x10")
    refused(tmp_path / "good", "not a whole safetensors file")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("name: run\n")
    refused(tmp_path / "run", "not finished")
    refused(tmp_path / "nowhere", "no such folder")


def test_names_are_told_apart(tmp_path: Path) -> None:
    whole = {"q.lora_A.weight": torch.ones(2, 4), "q.lora_B.weight": torch.ones(5, 2)}
    for above in ("x", "y"):
        (tmp_path / above).mkdir()
        write_adapter(tmp_path / above / "same", whole)
    both = [read_adapter(tmp_path / above / "same") for above in ("x", "y")]
    named_apart(both)
    assert [each.name for each in both] == [str(each.folder) for each in both]
    with pytest.raises(UserError, match="given twice"):
        named_apart([read_adapter(tmp_path / "x" / "same") for _ in range(2)])
