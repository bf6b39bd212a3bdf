"""mmtune export --to peft: peft loads it on the language model, and on transformers' LLaVA of the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from mmtune.cli import main
from mmtune.core.errors import UserError
from mmtune.interop import peft_export
from mmtune.interop.importing import import_model
from mmtune.interop.llava_hf_export import export_llava_hf
from mmtune.interop.peft_export import export_peft
from mmtune.parts.model import VisionLanguageModel, assemble
from mmtune.parts.spec import ModelOptions
from mmtune.tuning.lora import LoraOptions
from tests import tiny_models as tiny
from tests.interop import original_llava as original
from tests.tiny_llava import answers, compared, save_llava_hf

PREFIX = "base_model.model.model.language_model."


def tuned(base: Path, folder: Path, connector: bool = True, parts: tuple[str, ...] = ("language",)) -> Path:
    """A base with drawn adapters, three quarters of their entries pruned to zero, and a changed connector."""
    model = assemble(ModelOptions(base=str(base)))
    generator = torch.Generator().manual_seed(4)
    for part in parts:
        tuner = LoraOptions(lr=1e-3, rank=4, alpha=8).make()
        tuner.attach(model, part)
        for name in tuner.layers:
            for factor in tuner.pair(name):
                drawn = torch.randn(factor.shape, generator=generator)
                kept = torch.rand(factor.shape, generator=generator) < 0.25
                factor.data.copy_(drawn * kept)
    if connector:
        assert model.options.connector
        model.options.connector.weights = None
        for parameter in model.connector.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model folder that was imported from llava-hf."""
    import_model(str(save_llava_hf(tmp_path / "source")), tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("connector", [True, False])
@pytest.mark.parametrize("exported", [True, False])
def test_on_llava_hf_the_logits_are_ours(tmp_path: Path, base: Path, connector: bool, exported: bool) -> None:
    """On the folder that was imported, and on the base as mmtune exports it; the connector always travels."""
    folder = tuned(base, tmp_path / "tuned", connector)
    export_peft(folder, tmp_path / "out", for_llava_hf=True)
    if exported:
        export_llava_hf(base, tmp_path / "exported")
    llava: Any = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / ("exported" if exported else "source")
    )
    theirs = PeftModel.from_pretrained(llava, str(tmp_path / "out")).eval()
    model = VisionLanguageModel.from_pretrained(folder)
    for pictures in ([0, 0], [1, 1], [0, 3, 1]):
        for left in (False, True):
            found = compared(model, theirs, pictures, left)
            print(f"    {pictures!s:10} {'left' if left else 'right':6} {found:.1e}")
            assert found <= 1e-5
        mine, expected = answers(model, theirs, pictures)
        assert mine == expected
    # peft would fill in the connector without being told, but not save or switch it with the adapter.
    assert any(".modules_to_save." in name for name, _ in theirs.named_parameters())
    layers = {name for name, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert layers and all(name.startswith(PREFIX + "layers.") for name in layers)
    assert len(layers) == len(load_file(tmp_path / "out/adapter_model.safetensors").keys() - _connector()) / 2


def _connector() -> set[str]:
    names = [f"linear_{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias")]
    return {f"base_model.model.model.multi_modal_projector.{name}" for name in names}


def test_zeros_stay_zeros(tmp_path: Path, base: Path) -> None:
    folder = tuned(base, tmp_path / "tuned")
    export_peft(folder, tmp_path / "plain")
    export_peft(folder, tmp_path / "llava", for_llava_hf=True)
    before = load_file(folder / "adapter/language/adapter_model.safetensors")
    plain = load_file(tmp_path / "plain/adapter_model.safetensors")
    renamed = load_file(tmp_path / "llava/adapter_model.safetensors")
    assert before.keys() == plain.keys() and renamed.keys() - _connector() == {
        key.replace("base_model.model.model.", PREFIX) for key in before
    }
    for key, tensor in before.items():
        assert torch.equal(tensor, plain[key])
        assert torch.equal(tensor, renamed[key.replace("base_model.model.model.", PREFIX)])
        assert 0.6 < float((tensor == 0).float().mean()) < 0.9


def test_on_the_language_model_alone(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tuned(base, tmp_path / "tuned")
    assert main(["export", str(folder), str(tmp_path / "out"), "--to", "peft"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"It was trained on {base}/language." in said and "with peft" in said
    assert f"Not in here: the model's own connector, left in {folder}." in said
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base / "language")
    language = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    theirs = PeftModel.from_pretrained(language, str(tmp_path / "out")).eval()
    batch = tiny.batch([0, 0, 0])
    model = VisionLanguageModel.from_pretrained(folder)
    mask = batch.attention_mask.bool()
    with torch.no_grad():
        found = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[mask]
        mine = model.language.logits(model.language.hidden(model.splice(batch), batch.attention_mask)[mask])
    assert float((found - mine).abs().max() / mine.abs().max()) <= 1e-5


def test_a_connector_of_an_earlier_stage_travels(tmp_path: Path, base: Path) -> None:
    aligned = tuned(base, tmp_path / "aligned", parts=())
    folder = tuned(aligned, tmp_path / "tuned", connector=False)
    export_peft(folder, tmp_path / "out", for_llava_hf=True)
    llava: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "source")
    theirs = PeftModel.from_pretrained(llava, str(tmp_path / "out")).eval()
    assert compared(VisionLanguageModel.from_pretrained(folder), theirs, [1, 1], True) <= 1e-5


@pytest.mark.parametrize(
    ("parts", "left"), [(("language", "connector"), "connector"), (("language", "vision"), "vision")]
)
def test_what_stays_behind_is_named(tmp_path: Path, base: Path, parts: tuple[str, ...], left: str) -> None:
    folder = tuned(base, tmp_path / "tuned", connector=False, parts=parts)
    notes = export_peft(folder, tmp_path / "out")["notes"]
    assert notes[1] == f"Not in here: the model's own {left}, left in {folder}."


def test_that_the_base_was_in_four_bits_is_said(tmp_path: Path, base: Path) -> None:
    model = assemble(ModelOptions(base=str(base), quantize="nf4"))
    LoraOptions(lr=1e-3, rank=4, alpha=8).make().attach(model, "language")
    model.save_pretrained(tmp_path / "tuned")
    for for_llava_hf in (False, True):
        notes = export_peft(tmp_path / "tuned", tmp_path / f"out{for_llava_hf}", for_llava_hf)["notes"]
        assert notes[-1] == "The base was held in nf4; in full precision it is another."


def test_a_lora_that_was_imported(tmp_path: Path) -> None:
    clip, vicuna = original.save_clip(tmp_path / "clip"), original.save_vicuna(tmp_path / "vicuna")
    import_model(str(original.save_lora(tmp_path / "source", clip, vicuna)), tmp_path / "model")
    export_peft(tmp_path / "model", tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "model/language")
    given = torch.load(tmp_path / "source/adapter_model.bin", weights_only=True)
    held = load_file(tmp_path / "out/adapter_model.safetensors")
    assert held.keys() == given.keys() and all(torch.equal(held[name], given[name]) for name in given)
    with pytest.raises(UserError, match="lies in this folder alone"):
        export_peft(tmp_path / "model", tmp_path / "llava", for_llava_hf=True)


def test_a_suffix_would_hit_the_tower(tmp_path: Path, base: Path) -> None:
    """What full names are for: the tower's layers are called q_proj too."""
    export_peft(tuned(base, tmp_path / "tuned"), tmp_path / "out", for_llava_hf=True)
    targets = json.loads((tmp_path / "out/adapter_config.json").read_text())["target_modules"]
    source: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "source")
    names = [name for name, _ in source.named_modules()]
    assert all([name for name in names if name.endswith(target)] == [target] for target in targets)
    assert len([name for name in names if name.endswith("q_proj")]) > 2


@pytest.mark.parametrize("what", ["key", "connector", "value"])
def test_a_damaged_export_is_refused_and_nothing_stays(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    folder = tuned(base, tmp_path / "tuned")

    def damaged(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        key = next(
            name
            for name in tensors
            if name.endswith("linear_2.weight" if what == "connector" else "B.weight")
        )
        tensor = tensors.pop(key)
        if what != "connector":
            tensors[key.replace("layers.0", "layers.9") if what == "key" else key] = tensor * 1.5
        save_file(tensors, file, metadata=metadata)

    monkeypatch.setattr(peft_export, "save_file", damaged)
    with pytest.raises(UserError, match=r"the adapter cannot be loaded|the logits differ"):
        export_peft(folder, tmp_path / "out", for_llava_hf=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "source", "tuned"]


def test_what_an_adapter_cannot_hold(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="its language model has no adapter"):
        export_peft(base, tmp_path / "out")
    folder = tuned(base, tmp_path / "tower", parts=("language", "vision"))
    with pytest.raises(UserError, match="vision tuned too"):
        export_peft(folder, tmp_path / "out", for_llava_hf=True)
    export_peft(folder, tmp_path / "alone")
    for flags in (["--to", "merged", "--for", "llava-hf"], ["--to", "peft", "--dtype", "bfloat16"]):
        assert main(["export", str(folder), str(tmp_path / "out"), *flags]) == 2
    assert "--dtype does not go with --to peft" in capsys.readouterr().err
