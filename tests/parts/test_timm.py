"""The timm tower against timm itself, and its way into files and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import nn

import mmtune.parts.vision.stored as stored
from mmtune.core.errors import UserError
from mmtune.parts.model import VisionLanguageModel, assemble
from mmtune.parts.spec import ConnectorOptions, LanguageOptions, ModelOptions, VisionOptions
from mmtune.parts.vision.timm import CONFIG, FILES, TimmTower
from mmtune.training.check import outline_of
from mmtune.tuning.full import FullOptions
from mmtune.tuning.lora import LoraOptions
from tests.tiny_models import PATCH, SIZE, batch, save_language

FP32 = torch.float32
LAYERS, OTHER = 3, 32
SMALL: dict[str, Any] = {"embed_dim": 24, "depth": LAYERS, "num_heads": 2, "patch_size": PATCH}
SHAPES = [(50, 31), (31, 50), (24, 24), (9, 40), (200, 131)]


def saved(architecture: str, transform: dict[str, Any] | None = None, **args: Any) -> Callable[[Path], str]:
    """A small model of an architecture, saved by timm itself. transform: into its pretrained_cfg."""

    def save(folder: Path) -> str:
        torch.manual_seed(0)
        model = timm.create_model(architecture, **{**SMALL, "img_size": SIZE, "num_classes": 7, **args})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        save_for_hf(model, str(folder), safe_serialization=True)
        config = json.loads((folder / CONFIG).read_text())
        config["pretrained_cfg"] |= transform or {}
        (folder / CONFIG).write_text(json.dumps(config))
        return str(folder)

    return save


# Architecture, tokens before the patches, and how it is saved.
KINDS: dict[str, tuple[int, Callable[[Path], str]]] = {
    "ViT": (1, saved("vit_tiny_patch16_224")),
    "no CLS": (0, saved("vit_tiny_patch16_224", class_token=False, global_pool="avg")),
    "SigLIP": (0, saved("vit_base_patch16_siglip_224", {"crop_mode": "squash", "crop_pct": 1.0})),
    "CLIP": (1, saved("vit_base_patch16_clip_224", {"interpolation": "bilinear"})),
    "DINOv2": (5, saved("vit_small_patch14_reg4_dinov2", dynamic_img_size=True)),
    "DeiT III": (1, saved("deit3_small_patch16_224")),
    "AIMv2": (0, saved("aimv2_large_patch14_224")),
    "EVA-02": (1, saved("eva02_tiny_patch14_224")),
    "PE": (1, saved("vit_pe_core_tiny_patch16_384")),
    "DINOv3": (5, saved("vit_small_patch16_dinov3_qkvb")),
    "BEiT": (1, saved("beit_base_patch16_224")),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("timm")
    return {name: save(folder / name) for name, (_, save) in KINDS.items()}


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_language(tmp_path_factory.mktemp("language"))


def pictures(side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def features(tower: nn.Module, side: int = SIZE) -> torch.Tensor:
    return tower.eval()(pictures(side))


@torch.no_grad()
def expected_features(folder: str, layer: int, side: int = SIZE) -> torch.Tensor:
    """By timm's own forward_intermediates, of the whole model, as timm itself makes it for that side."""
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=side).eval()
    said = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(said[name]).double().view(1, 3, 1, 1) for name in ("mean", "std"))
    pixels = ((pictures(side).double() / 255 - mean) / std).float()
    index = LAYERS + layer
    return model.forward_intermediates(pixels, indices=[index], output_fmt="NLC", intermediates_only=True)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_timm(kind: str, checkpoints: dict[str, str]) -> None:
    for layer, side in ((-1, SIZE), (-2, SIZE), (-LAYERS, SIZE), (-2, OTHER)):
        tower = TimmTower.load(checkpoints[kind], layer, FP32, None if side == SIZE else side)
        expected = expected_features(checkpoints[kind], layer, side)
        found = features(tower, side)
        assert found.shape == expected.shape == (2, (side // PATCH) ** 2, 24)
        assert (tower.tokens, tower.prefix) == (found.shape[1], KINDS[kind][0])
        assert tower.has_cls == (tower.prefix > 0)
        scale = expected.abs().max()
        torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_timm(kind: str, checkpoints: dict[str, str]) -> None:
    """With `fit: own`, which is timm's transform for evaluation."""
    tower = TimmTower.load(checkpoints[kind], -2, FP32)
    model = timm.create_model(f"local-dir:{checkpoints[kind]}")
    said = timm.data.resolve_model_data_config(model)  # of which a flexible model keeps its published size
    theirs: Any = timm.data.create_transform(**{**said, "input_size": (3, SIZE, SIZE)})
    for shape in SHAPES:
        drawn = np.random.default_rng(0).integers(0, 256, (*shape[::-1], 3), np.uint8)
        found = torch.from_numpy(tower.transform("own")(Image.fromarray(drawn)))[None]
        normalised = tower.normalise(found, FP32)[0]
        torch.testing.assert_close(normalised, theirs(Image.fromarray(drawn)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "BEiT"])
def test_timm_opens_what_is_saved(kind: str, checkpoints: dict[str, str], tmp_path: Path) -> None:
    """Whole, with the blocks that were used and no norm after them, for pictures of the tower's size."""
    tower = TimmTower.load(checkpoints[kind], -2, FP32, OTHER)
    tower.save(tmp_path)
    model: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    own = tower.hf.state_dict()
    assert {name: tuple(t.shape) for name, t in own.items()} == {
        name: tuple(t.shape) for name, t in model.state_dict().items()
    }
    assert all(torch.equal(own[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(model.eval().forward_features(torch.zeros(1, 3, OTHER, OTHER)), blank(tower))
    again = TimmTower.load(str(tmp_path), -1, FP32)
    assert torch.equal(features(again, OTHER), features(tower, OTHER))
    assert again.transform("own") == tower.transform("own")


def blank(tower: TimmTower) -> torch.Tensor:
    return tower.hf.eval()(torch.zeros(1, 3, tower.image_size, tower.image_size))


def test_of_beit_timm_misses_the_final_norm(checkpoints: dict[str, str], tmp_path: Path) -> None:
    tower = TimmTower.load(checkpoints["BEiT"], -2, FP32)
    tower.save(tmp_path)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "norm.weight", "norm.bias"\. '):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(features(TimmTower.load(str(tmp_path), -1, FP32)), features(tower))


def test_the_two_kinds_of_weight_files(checkpoints: dict[str, str], tmp_path: Path) -> None:
    """In half precision; the safetensors file is preferred, and the .bin then never opened."""
    source = Path(checkpoints["DINOv2"])
    tensors = {name: tensor.half() for name, tensor in load_file(source / FILES[0]).items()}
    (tmp_path / CONFIG).write_bytes((source / CONFIG).read_bytes())
    torch.save(tensors, tmp_path / FILES[1])
    pickled = TimmTower.load(str(tmp_path), -2, FP32)
    save_file(tensors, tmp_path / FILES[0])
    (tmp_path / FILES[1]).write_bytes(b"not even a pickle")
    safe = TimmTower.load(str(tmp_path), -2, FP32)
    assert torch.equal(features(pickled), features(safe))
    assert {parameter.dtype for parameter in safe.parameters()} == {FP32}
    (tmp_path / FILES[0]).unlink()
    with pytest.raises(UserError, match=f"{FILES[1]}: the weights cannot be read"):
        TimmTower.load(str(tmp_path), -2, FP32)
    torch.save({"cls_token": Path("a class of its own")}, tmp_path / FILES[1])
    with pytest.raises(UserError, match="cannot be read: Weights only load failed"):
        TimmTower.load(str(tmp_path), -2, FP32)
    (tmp_path / FILES[1]).unlink()
    with pytest.raises(UserError, match=f"neither {FILES[0]} nor {FILES[1]}"):
        TimmTower.load(str(tmp_path), -2, FP32)


def test_a_name_of_the_hub(checkpoints: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The config and the safetensors file alone are fetched."""
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return checkpoints["SigLIP"]

    monkeypatch.setattr(stored, "snapshot_download", download)
    tower = TimmTower.load("timm/vit_base_patch16_siglip_384.webli", -2, FP32)
    assert asked == [("timm/vit_base_patch16_siglip_384.webli", [CONFIG, FILES[0]])]
    assert torch.equal(features(tower), features(TimmTower.load(checkpoints["SigLIP"], -2, FP32)))


def test_a_name_that_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"nor to be had from the hub.*\n.*a hub name such as timm/vit_"):
        TimmTower.load("vit_base_patch16_224.augreg_in1k", -2, FP32)


def test_a_config_as_timm_wrote_it_of_old(checkpoints: dict[str, str], tmp_path: Path) -> None:
    """One level, with no arguments beside the architecture."""
    args = {
        "architecture": "test_vit",
        "num_classes": 0,
        "input_size": [3, 160, 160],
        "mean": [0.1, 0.2, 0.3],
    }
    (tmp_path / CONFIG).write_text(json.dumps({**args, "fixed_input_size": True, "crop_pct": 0.8}))
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / FILES[0])
    tower = TimmTower.load(str(tmp_path), -1, FP32)
    assert (tower.image_size, tower.mean, tower.crop_pct) == (160, (0.1, 0.2, 0.3), 0.8)


def test_created_from_a_config(tmp_path: Path) -> None:
    config = {"architecture": "vit_tiny_patch16_224", "class_token": False, "img_size": SIZE, **SMALL}
    tower = TimmTower.create(config, -2)
    assert (tower.tokens, tower.prefix, len(tower.layers())) == (4, 0, LAYERS - 1)
    assert (TimmTower.create(config, -2, OTHER).tokens, tower.own_fit) == (16, "crop")
    tower.save(tmp_path)
    assert torch.equal(features(TimmTower.load(str(tmp_path), -1, FP32)), features(tower))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "it names no architecture of timm"),
        (
            {"architecture": "vit_tiny_patch16_225"},
            "timm knows no architecture 'vit_tiny_patch16_225'\n.*_224",
        ),
        (
            {"architecture": "convnext_tiny"},
            "convnext_tiny is one of timm's convnext models, not one of timm's",
        ),
        ({"architecture": "swin_tiny_patch4_window7_224"}, "one of timm's swin_transformer models"),
        ({"architecture": "naflexvit_base_patch16_gap"}, "one of timm's naflexvit models"),
        ({"architecture": "vit_tiny_r_s16_p8_224"}, "one of timm's vision_transformer_hybrid models"),
        (
            {"architecture": "deit_tiny_distilled_patch16_224"},
            "refused by timm: AssertionError: The distilled",
        ),
        ({"architecture": "vit_base_patch16_rope_mixed_224"}, "whose blocks differ from each other"),
        ({"architecture": "test_vit", "in_chans": 1}, "for pictures of 1 channels"),
        (
            {"architecture": "test_vit", "img_size": [160, 128]},
            r"expected the side of a square .* \(160, 128\)",
        ),
        ({"architecture": "test_vit", "dpeth": 3}, "refused by timm: TypeError: .*'dpeth'"),
        (
            {"architecture": "test_vit", "num_classes": 9, "drop_rate": 0.1},
            "drop_rate, num_classes: of no effect",
        ),
        (
            {"architecture": "test_vit", "input_size": [3, 160, 160], "interpolation": "box"},
            "interpolation 'box'",
        ),
    ],
)
def test_odd_kinds_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"model\.vision\.config: .*{message}"), torch.device("meta"):
        TimmTower.create(config, -1)


def test_a_missing_weight_and_one_of_another_shape(checkpoints: dict[str, str], tmp_path: Path) -> None:
    config = json.loads((Path(checkpoints["ViT"]) / CONFIG).read_text())
    weights = load_file(Path(checkpoints["ViT"]) / FILES[0])
    del (
        weights["blocks.1.attn.qkv.weight"],
        weights[f"blocks.{LAYERS - 1}.mlp.fc1.bias"],
        weights["norm.bias"],
    )
    save_file(weights, tmp_path / FILES[0])
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"1 weights are missing: blocks\.1\.attn\.qkv\.weight"):
        TimmTower.load(str(tmp_path), -2, FP32)  # what lies above the layer is not missed
    config["model_args"]["img_size"] = OTHER
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match="1 weights are missing"):
        TimmTower.load(str(tmp_path), -2, FP32)
    with pytest.raises(UserError, match="of another shape than the config says: pos_embed"):
        TimmTower.load(str(tmp_path), -LAYERS, FP32)


def test_a_size_of_no_whole_patches(checkpoints: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"image_size 30 is no multiple of the patch, 8 pixels\n.*24 or 32"):
        TimmTower.load(checkpoints["ViT"], -2, FP32, 30)
    whole = TimmTower.create({"architecture": "test_vit", "img_size": 30, "patch_size": 8}, -1)
    assert (whole.tokens, whole.image_size) == (9, 30)  # as SigLIP's 384 pixels have 27 patches of 14


# ---- In a whole model ----------------------------------------------------------------------------------


def options(weights: str, language: str, image_size: int | None = None) -> ModelOptions:
    return ModelOptions(
        vision=VisionOptions("timm", weights, image_size=image_size),
        connector=ConnectorOptions("linear"),
        language=LanguageOptions(language),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_trains_and_is_restored(
    kind: str, checkpoints: dict[str, str], language: str, tmp_path: Path
) -> None:
    """With the same gradients where blocks are run again in the backward pass."""
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        model = assemble(options(checkpoints[kind], language))
        model.requires_grad_(False)
        FullOptions(lr=1e-3).make().attach(model, "vision")
        model.vision.checkpoint_activations(again)
        loss = model.train()(batch([1, 2]))
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.vision.named_parameters()})
    for name, gradient in gradients[0].items():
        repeated = gradients[1][name]
        assert gradient is not None and repeated is not None and torch.equal(repeated, gradient), name
    before = features(model.vision)
    torch.optim.SGD(model.vision.parameters(), lr=1e-2).step()
    after = features(model.vision)
    assert not torch.equal(after, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(features(VisionLanguageModel.from_pretrained(tmp_path).vision), after)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_reaches_every_linear_layer(
    kind: str, checkpoints: dict[str, str], language: str, tmp_path: Path
) -> None:
    """Queries, keys and values too, whose bias EVA and BEiT hold apart; merging gives the adapted tower."""
    torch.manual_seed(0)
    model = assemble(options(checkpoints[kind], language))
    model.requires_grad_(False)
    tuner = LoraOptions(lr=1e-3, rank=2, alpha=4).make()
    tuner.attach(model, "vision")
    linear = {name for name, module in model.vision.hf.named_modules() if type(module).__name__ == "Linear"}
    assert {name.removesuffix(".base_layer") for name in linear if "lora_" not in name} == {*tuner.layers}
    pairs = {name: tuner.pair(name) for name in tuner.layers}
    for _, b in pairs.values():
        torch.nn.init.normal_(b, std=0.1)
    loss = model.train()(batch([1, 2]))
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    assert [n for n, pair in pairs.items() if any(t.grad is None or not t.grad.any() for t in pair)] == []
    model.save_pretrained(tmp_path)
    merged = VisionLanguageModel.from_pretrained(tmp_path, merge=True)
    torch.testing.assert_close(features(merged.vision), features(model.vision), rtol=1e-4, atol=1e-4)


def test_another_size_is_restored_with_the_model(
    checkpoints: dict[str, str], language: str, tmp_path: Path
) -> None:
    """Of a tower that stayed as it was, and of one that trained and lies with the model."""
    for trains in (False, True):
        model = assemble(options(checkpoints["EVA-02"], language, OTHER))
        if trains:
            FullOptions(lr=1e-3).make().attach(model, "vision")
        model.save_pretrained(tmp_path)
        restored = VisionLanguageModel.from_pretrained(tmp_path)
        assert restored.image_tokens == (OTHER // PATCH) ** 2
        assert torch.equal(features(restored.vision, OTHER), features(model.vision, OTHER))


def test_the_outline_holds_no_values(checkpoints: dict[str, str], language: str) -> None:
    outline = outline_of(options(checkpoints["DINOv3"], language, OTHER))
    assert {parameter.device.type for parameter in outline.vision.parameters()} == {"meta"}
    real = TimmTower.load(checkpoints["DINOv3"], -2, FP32, OTHER).state_dict()
    assert {n: t.shape for n, t in outline.vision.state_dict().items()} == {
        n: t.shape for n, t in real.items()
    }


def test_eager_and_bfloat16(checkpoints: dict[str, str]) -> None:
    for kind in KINDS:
        tower = TimmTower.load(checkpoints[kind], -2, FP32)
        exact = features(tower)
        tower.attend_by("eager")
        torch.testing.assert_close(features(tower), exact, rtol=1e-4, atol=1e-4)
        assert not torch.equal(features(tower), exact)  # another order of sums
        rounded = features(TimmTower.load(checkpoints[kind], -2, torch.bfloat16))
        assert rounded.dtype == torch.bfloat16
        assert (rounded.float() - exact).norm() < 0.03 * exact.norm()


def test_it_says_so_where_timm_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmtune.parts.spec.find_spec", lambda name: None)
    faults: list[tuple[str, ...]] = []
    VisionOptions("timm", "somewhere").check(lambda *fault: faults.append(fault))
    assert faults == [("tower", "timm is not installed", "pip install 'mmtune[timm]'")]
