"""mmtune export --to merged, against sums made here in fp64, and that a wrong merge leaves nothing behind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmtune.cli import main
from mmtune.core.errors import UserError
from mmtune.interop import comparison, merged
from mmtune.interop.comparison import compare, logits, probe
from mmtune.interop.merged import export_merged
from mmtune.parts.loading import torch_dtype
from mmtune.parts.model import VisionLanguageModel, assemble
from mmtune.parts.quantized import full_weight, is_quantized
from mmtune.parts.spec import ModelOptions
from mmtune.tuning.lora import LoraOptions
from tests import tiny_models as tiny


def tuned(
    folder: Path,
    quantize: Any = None,
    dtype: Any = "float32",
    parts: Any = ("language",),
    spread: float = 0.1,
) -> Path:
    """A model folder with adapters, both factors drawn, on a language model stored in a dtype."""
    options = tiny.parts(folder / "parts")
    assert options.language and options.language.weights
    file = Path(options.language.weights) / "model.safetensors"
    stored = {name: tensor.to(torch_dtype(dtype)) for name, tensor in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    model = assemble(
        ModelOptions(
            vision=options.vision, connector=options.connector, language=options.language, quantize=quantize
        )
    )
    generator = torch.Generator().manual_seed(4)
    for part in parts:
        tuner = LoraOptions(lr=1e-3, rank=2, alpha=3).make()
        tuner.attach(model, part)
        for name in tuner.layers:
            for factor in tuner.pair(name):
                factor.data.copy_(torch.randn(factor.shape, generator=generator) * spread)
    model.save_pretrained(folder / "tuned")
    return folder / "tuned"


def by_hand(folder: Path, part: str = "language") -> dict[str, torch.Tensor]:
    """W + (alpha / r) B A of each adapted layer by name, fp64."""
    core: Any = VisionLanguageModel.from_pretrained(folder).core(part)
    factors = load_file(folder / "adapter" / part / "adapter_model.safetensors")
    found = {}
    for key, a in factors.items():
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            layer = core.get_submodule(name).get_base_layer()
            weight = full_weight(layer) if is_quantized(layer) else layer.weight
            b = factors[key.replace("lora_A", "lora_B")]
            found[name] = weight.double() + 3 / 2 * (b.double() @ a.double())
    return found


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_sums_are_those_of_fp64(tmp_path: Path, quantize: Any, stored: str) -> None:
    folder = tuned(tmp_path, quantize, stored)
    made = export_merged(folder, tmp_path / "merged")
    expected = by_hand(folder)
    assert len(expected) == 14
    written = load_file(tmp_path / "merged/language/model.safetensors")
    for name, weight in expected.items():
        torch.testing.assert_close(written[f"{name}.weight"].double(), weight, rtol=3e-7, atol=1e-7)
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert not (tmp_path / "merged/adapter").exists()
    assert "adapter" not in config["language"] and "quantize" not in config["language"]
    assert json.loads((tmp_path / "merged/merged.json").read_text()) == made
    assert made["dequantized"] == quantize and made["merged"] == ["language"]
    again = VisionLanguageModel.from_pretrained(tmp_path / "merged")
    reference = VisionLanguageModel.from_pretrained(folder, dequantize=True)
    assert compare("", logits(reference), logits(again), None).relative < 1e-5


def test_a_part_of_its_own_comes_along_and_another_stays(tmp_path: Path) -> None:
    folder = tuned(tmp_path, parts=("language", "vision"))
    made = export_merged(folder, tmp_path / "merged")
    assert made["merged"] == ["vision", "language"]
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert [config[part]["weights"] for part in ("vision", "connector", "language")] == [
        "vision",
        "connector",  # it was in the model's own folder
        "language",
    ]
    folder = tuned(tmp_path / "other")
    export_merged(folder, tmp_path / "other/merged")
    config = json.loads((tmp_path / "other/merged/config.json").read_text())
    assert config["vision"]["weights"] == "../parts/tower"


def test_bf16_says_what_it_loses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against the rounding made here, matrix by matrix."""
    folder = tuned(tmp_path)
    assert main(["export", str(folder), str(tmp_path / "m"), "--to", "merged", "--dtype", "bfloat16"]) == 0
    plain = VisionLanguageModel.from_pretrained(folder).core("language")
    gone = whole = 0.0
    written = load_file(tmp_path / "m/language/model.safetensors")
    for name, weight in by_hand(folder).items():
        layer: Any = plain.get_submodule(name)
        base = layer.get_base_layer().weight
        update = weight - base.double()
        kept = written[f"{name}.weight"].double() - base.bfloat16().double()
        gone += float((kept - update).square().sum())
        whole += float(update.square().sum())
    lost = json.loads((tmp_path / "m/merged.json").read_text())["update_lost_to_rounding"]
    assert lost == pytest.approx((gone / whole) ** 0.5, rel=1e-3)
    assert f"{lost:.0%} is lost to rounding" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["merge", "file"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_wrong_merge_is_refused_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, quantize: Any
) -> None:
    folder = tuned(tmp_path, quantize)
    before = sorted(path.name for path in tmp_path.iterdir())
    if where == "merge":

        def drop(self: VisionLanguageModel, name: str) -> None:
            self.adapters.pop(name).unload()
            getattr(self.options, name).weights = None

        monkeypatch.setattr(VisionLanguageModel, "merge_adapter", drop)
    else:
        save = VisionLanguageModel.save_pretrained

        def damaged(self: VisionLanguageModel, place: Path) -> None:
            self.language.hf.get_output_embeddings().weight.data *= 1.01
            save(self, place)

        monkeypatch.setattr(VisionLanguageModel, "save_pretrained", damaged)
    what = "merged in fp32" if where == "merge" else "as written, float32"
    with pytest.raises(UserError, match=f"{what}: the logits differ by .* nothing was written"):
        export_merged(folder, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_layer_without_its_update_is_refused_in_bf16_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It differs by less than what rounding may make."""
    folder = tuned(tmp_path, spread=0.03)
    save = VisionLanguageModel.save_pretrained
    layer = "model.layers.0.mlp.up_proj.weight"

    def damaged(self: VisionLanguageModel, place: Path) -> None:
        save(self, place)
        file = place / "language/model.safetensors"
        stored = load_file(file)
        stored[layer] = load_file(tmp_path / "parts/lm/model.safetensors")[layer].bfloat16()
        save_file(stored, file, metadata={"format": "pt"})

    monkeypatch.setattr(VisionLanguageModel, "save_pretrained", damaged)
    with pytest.raises(UserError, match="as written, bfloat16: the logits differ by") as refused:
        export_merged(folder, tmp_path / "merged", "bfloat16")
    found = re.search(r"differ by (\S+) of", str(refused.value))
    assert found and 1e-4 < float(found[1]) < merged.ROUNDED
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_bf16_files_hold_what_was_rounded(tmp_path: Path, quantize: Any) -> None:
    rows = export_merged(tuned(tmp_path, quantize), tmp_path / "merged", "bfloat16")["comparison"]
    found = {row["what"]: row for row in rows}
    assert found["rounded to bfloat16"]["relative"] > 1e-4
    assert found["as written, bfloat16"]["relative"] < 1e-6


def test_nothing_to_merge_or_no_place(tmp_path: Path) -> None:
    folder = tuned(tmp_path)
    export_merged(folder, tmp_path / "merged")
    with pytest.raises(UserError, match="there already"):
        export_merged(folder, tmp_path / "merged")
    with pytest.raises(UserError, match="no adapter"):
        export_merged(tmp_path / "merged", tmp_path / "again")


def test_the_probe_is_always_the_same_and_has_all_kinds(tmp_path: Path) -> None:
    model = tiny.model(tmp_path)
    one, other = probe(model), probe(model)
    assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.images, other.images)
    pictures = (one.input_ids < 0).sum(1) // tiny.IMAGE_TOKENS
    assert pictures.tolist() == [0, 0, 1, 1, 2]
    assert len({picture.numpy().tobytes() for picture in one.images}) == 4


def test_no_number_is_no_agreement() -> None:
    good = torch.ones(2, 3)
    with pytest.raises(UserError, match="differ by nan"):
        merged._checked(compare("it", good, good * float("nan"), 1e-4), Path("here"))


@pytest.mark.parametrize(("free", "moves"), [(2**30 + 4096, False), (2**30 + 5000, True)])
def test_a_model_goes_where_there_is_room(monkeypatch: pytest.MonkeyPatch, free: int, moves: bool) -> None:
    """4096 bytes of weights, an eighth more and 1 GB."""
    gpu = torch.device("cuda", 0)
    layer = torch.nn.Linear(32, 32, bias=False)
    went = []

    def to(device: torch.device) -> torch.nn.Linear:
        went.append(device)
        return layer

    monkeypatch.setattr(layer, "to", to)
    monkeypatch.setattr(comparison, "best_device", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**40))
    assert comparison.placed(layer) is layer
    assert went == ([gpu] if moves else [])
