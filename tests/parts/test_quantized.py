"""Language models in 4 and 8 bits: which values they hold, that these stay, what is refused.

The reference is NormalFloat4 written out: 16 levels, times the largest magnitude of each block of 64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mmtune.core.errors import UserError
from mmtune.parts.fingerprint import changed_parts, model_hash, same_weights, start_hash
from mmtune.parts.language import LanguageModel
from mmtune.parts.model import VisionLanguageModel, assemble, write_quantized
from mmtune.parts.outline import outline_of
from mmtune.parts.quantized import full_weight, is_quantized
from mmtune.parts.spec import ModelOptions
from mmtune.run import read_run
from mmtune.tuning.base import rows_of
from mmtune.tuning.full import FullOptions
from mmtune.tuning.lora import LoraOptions
from tests import tiny_models as tiny
from tests.parts.test_model import MIXED, attach_lora, logits, same
from tests.world import LORA, run_file

pytest.importorskip("bitsandbytes")

KINDS = ["nf4", "int8"]
# The quantiles of a normal distribution from the paper's appendix, to the digits printed there.
LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ]
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model folder with all parts its own."""
    model = tiny.model(tmp_path / "parts")
    for part in ("vision", "language"):
        getattr(model.options, part).weights = None
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(base: Path, kind: Any, dtype: Any = "float32") -> VisionLanguageModel:
    return assemble(ModelOptions(base=str(base), quantize=kind, dtype=dtype)).eval()


def layers(model: VisionLanguageModel) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.language.hf.named_modules() if is_quantized(module)}


def normal_float(weight: torch.Tensor) -> torch.Tensor:
    """The nearest level of each entry, times its block's largest magnitude."""
    padded = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    scale = padded.abs().amax(1, keepdim=True)
    nearest = (padded / scale).unsqueeze(-1).sub(LEVELS).abs().argmin(-1)
    return (LEVELS[nearest] * scale).flatten()[: weight.numel()].view(weight.shape)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_layers_but_the_head(tmp_path: Path, family: str, tied: bool, kind: str) -> None:
    weights = tiny.save_language(tmp_path, family, tie_word_embeddings=tied)
    plain = LanguageModel.load(weights, None, torch.float32).hf
    made = LanguageModel.load(weights, None, torch.float32, kind).hf
    linear = {name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    head = {name for name, module in plain.named_modules() if module is plain.get_output_embeddings()}
    assert {name for name, module in made.named_modules() if is_quantized(module)} == linear - head
    assert torch.equal(made.get_output_embeddings().weight, plain.get_output_embeddings().weight)


def test_nf4_holds_the_nearest_levels(base: Path) -> None:
    plain = VisionLanguageModel.from_pretrained(base).language.hf
    for name, layer in layers(load(base, "nf4")).items():
        expected = normal_float(plain.get_parameter(f"{name}.weight").detach())
        # The blocks' scales are in 8 bits themselves, which moves an entry by up to 1 %.
        torch.testing.assert_close(full_weight(layer), expected, rtol=0.02, atol=1e-6)


def test_int8_holds_127_steps_of_each_row(base: Path) -> None:
    plain = VisionLanguageModel.from_pretrained(base).language.hf
    for name, layer in layers(load(base, "int8")).items():
        weight = plain.get_parameter(f"{name}.weight").detach()
        step = weight.abs().amax(1, keepdim=True) / 127
        # Half a step, and what fp16 takes from a weight before: up to 127 / 2**11 of one.
        assert ((full_weight(layer) - weight).abs() <= 0.57 * step).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_values_depend_on_nothing_but_the_weights(base: Path, kind: str) -> None:
    """Neither on the dtype, which differs between training and evaluation, nor on a forward pass."""
    model, half = load(base, kind), load(base, kind, "bfloat16")
    before = {name: full_weight(layer) for name, layer in layers(model).items()}
    logits(model, tiny.batch(MIXED))  # in evaluation, without gradients
    for name, layer in layers(half).items():
        assert torch.equal(full_weight(layer), before[name])
        assert torch.equal(full_weight(layers(model)[name]), before[name])
    assert half.language.hf.get_input_embeddings().weight.dtype == torch.bfloat16


def test_nf4_computes_in_fp32(base: Path) -> None:
    model, batch = load(base, "nf4"), tiny.batch(MIXED)
    held = logits(model, batch)
    model.dequantize()
    assert not layers(model)
    torch.testing.assert_close(held, logits(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_int8_is_near_its_own_values(base: Path, kind: str) -> None:
    """LLM.int8() rounds activations too; trained layers see the same values in both."""
    model, batch = load(base, kind), tiny.batch(MIXED)
    held = logits(model, batch)
    model.dequantize()
    after = logits(model, batch)
    assert (held - after).abs().max() < 0.1 * after.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_says_how_it_is_held(base: Path, tmp_path: Path, kind: str) -> None:
    model = load(base, kind)
    attach_lora(model, "language")
    model.save_pretrained(tmp_path / "tuned")
    assert json.loads((tmp_path / "tuned/config.json").read_text())["language"]["quantize"] == kind
    assert not (tmp_path / "tuned" / "language").exists()  # nothing quantised is written
    again = VisionLanguageModel.from_pretrained(tmp_path / "tuned")
    assert again.options.language and again.options.language.quantize == kind
    assert same(model, again)


def test_hashes_tell_one_base_from_another(base: Path, tmp_path: Path) -> None:
    hashes = {model_hash(base)}
    for kind in KINDS:
        write_quantized(base, kind, tmp_path / kind)
        hashes.add(model_hash(tmp_path / kind))
        assert model_hash(tmp_path / kind) == model_hash(base, kind)
        assert start_hash(ModelOptions(base=str(base), quantize=kind)) == model_hash(base, kind)  # type: ignore[arg-type]
        assert changed_parts(tmp_path / kind, base) == ["language"]
        assert not same_weights(tmp_path / kind, base, "language")
        assert same(load(base, kind), VisionLanguageModel.from_pretrained(tmp_path / kind))
    assert len(hashes) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_lora_finds_and_counts_what_it_does_on_a_plain_base(base: Path, kind: str) -> None:
    plain, held, outline = load(base, None), load(base, kind), outline_of(ModelOptions(base=str(base)))
    cores = [model.core("language").requires_grad_(False) for model in (plain, held, outline)]
    frozen = [rows_of("language", core, "frozen", None) for core in cores]
    assert frozen[0] == frozen[1] == frozen[2]
    rows = [LoraOptions(lr=1e-3, rank=2).make().attach(model, "language") for model in (plain, held)]
    assert rows[0] == rows[1]


def test_quantised_weights_neither_train_nor_take_an_adapter_in(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="weights held in nf4 cannot train"):
        FullOptions(lr=1e-3).make().attach(load(base, "nf4"), "language")
    model = load(base, "nf4")
    attach_lora(model, "language")
    with pytest.raises(UserError, match="round it away"):
        model.merge_adapter("language")
    model.save_pretrained(tmp_path / "tuned")
    for quantize in (None, "int8"):
        with pytest.raises(UserError, match="mmtune export DIR DST --to merged"):
            load(tmp_path / "tuned", quantize)


def test_stored_quantised_weights_are_refused(base: Path, tmp_path: Path) -> None:
    load(base, "nf4").language.hf.save_pretrained(tmp_path / "stored")
    tiny.tokenizer().save_pretrained(tmp_path / "stored")
    with pytest.raises(UserError, match="stored quantised"):
        LanguageModel.load(str(tmp_path / "stored"), None, torch.float32)


FULL = {"tuner": "full", "lr": 1e-4}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"tune": {"language": FULL}}, "weights held in nf4 cannot train"),
        ({"train": {"engine": "zero3"}}, "zero3 splits every frozen weight"),
        ({"tune": {"language": LORA}, "train": {"engine": "fsdp2"}}, None),
        ({"stages": ["lora", "frozen"]}, "stages.0.tune.language.tuner.*the next stage starts"),
        ({"stages": ["frozen", "lora"]}, None),
        ({"tune": {"language": LORA}, "train": {"engine": "ddp"}}, None),
    ],
)
@pytest.mark.parametrize("where", ["run", "folder"])
def test_a_run_says_so_before_anything_is_loaded(
    world: Path, tmp_path: Path, changes: dict[str, Any], fault: str | None, where: str
) -> None:
    """Wherever it is said that the base is quantised."""
    base = {"base": str(world / "base"), "quantize": "nf4"}
    if where == "folder":
        write_quantized(world / "base", "nf4", tmp_path / "held")
        base = {"base": str(tmp_path / "held")}
    path = run_file(world, tmp_path, model=base, tune={"language": LORA})
    tree = yaml.safe_load(path.read_text())
    stages = changes.get("stages")
    if stages:
        block = {key: tree.pop(key) for key in ("data", "train")}
        del tree["tune"]
        tuners: dict[str, Any] = {"lora": LORA, "frozen": {"tuner": "frozen"}}
        tree["stages"] = [{**block, "tune": {"language": tuners[name]}} for name in stages]
    else:
        tree = {**tree, "tune": changes.get("tune", tree["tune"])}
        tree["train"] |= changes.get("train", {})
    path.write_text(yaml.safe_dump(tree))
    if fault is None:
        assert read_run(path).name
    else:
        with pytest.raises(UserError, match=f"(?s){fault}"):
            read_run(path)
