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

import mmtune.parts.vision.stored as stored
from mmtune.core.errors import UserError
from mmtune.parts.attention import attention_for
from mmtune.parts.outline import count
from mmtune.parts.shapes import tower_of_config
from mmtune.parts.spec import VisionOptions
from mmtune.parts.vision.timm import CONFIG, FILES, TimmTower
from tests.parts.towers import LAYERS, pictures, saved_timm

FP32 = torch.float32
OTHER = 40
SMALL: dict[str, Any] = {"embed_dim": 24, "depth": LAYERS, "num_heads": 2, "patch_size": 8}
SHAPES = [(50, 31), (31, 50), (24, 24), (9, 40), (200, 131)]


# How each is saved, and what then stands in its pretrained_cfg.
KINDS: dict[str, tuple[Callable[[Path], str], dict[str, Any]]] = {
    "ViT": (saved_timm("vit_tiny_patch16_224"), {"crop_pct": 0.9}),
    "no CLS": (saved_timm("vit_tiny_patch16_224", class_token=False, global_pool="avg"), {"crop_pct": 0.95}),
    "SigLIP": (saved_timm("vit_base_patch16_siglip_224"), {"crop_mode": "squash", "crop_pct": 1.0}),
    "CLIP": (saved_timm("vit_base_patch16_clip_224"), {"interpolation": "bilinear", "crop_pct": 1.0}),
    "DINOv2": (saved_timm("vit_small_patch14_reg4_dinov2", dynamic_img_size=True), {"crop_pct": 0.875}),
    "AIMv2": (saved_timm("aimv2_large_patch14_224"), {"crop_mode": "squash", "crop_pct": 0.9}),
    "EVA-02": (saved_timm("eva02_tiny_patch14_224"), {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}),
    "DINOv3": (saved_timm("vit_small_patch16_dinov3_qkvb"), {"interpolation": "lanczos"}),
    "BEiT": (saved_timm("beit_base_patch16_224"), {}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("timm")
    for name, (save, transform) in KINDS.items():
        save(folder / name)
        config = json.loads((folder / name / CONFIG).read_text())
        config["pretrained_cfg"] |= transform
        (folder / name / CONFIG).write_text(json.dumps(config))
    return {name: str(folder / name) for name in KINDS}


@torch.no_grad()
def features(tower: TimmTower) -> torch.Tensor:
    return tower.eval()(pictures(2, tower.image_size))


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_timm(kind: str, checkpoints: dict[str, str]) -> None:
    """With `fit: own`, which is timm's transform for evaluation."""
    tower = TimmTower.load(checkpoints[kind], -2, FP32)
    model = timm.create_model(f"local-dir:{checkpoints[kind]}")
    said = timm.data.resolve_model_data_config(model)  # of which a flexible model keeps its published size
    theirs: Any = timm.data.create_transform(**{**said, "input_size": (3, 24, 24)})
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
    assert torch.equal(features(again), features(tower))
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
    config = {"architecture": "vit_tiny_patch16_224", "class_token": False, "img_size": 24, **SMALL}
    tower = TimmTower.create(config, -2)
    assert (tower.tokens, tower.prefix, len(tower.layers())) == (9, 0, LAYERS - 1)
    assert (TimmTower.create(config, -2, OTHER).tokens, tower.own_fit) == (25, "crop")
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


def test_attention_is_torchs_own_kernel_where_nothing_is_said(checkpoints: dict[str, str]) -> None:
    tower = TimmTower.load(checkpoints["EVA-02"], -2, FP32)
    assert attention_for(tower, "auto", FP32) == "sdpa"
    tower.attend_by("eager")
    eager = features(tower)
    tower.attend_by("sdpa")
    assert not torch.equal(features(tower), eager)  # another order of sums
    torch.testing.assert_close(features(tower), eager, rtol=1e-5, atol=1e-5)


def test_the_outline_holds_no_values(checkpoints: dict[str, str]) -> None:
    for kind in ("DINOv3", "BEiT"):
        with torch.device("meta"):
            outline = TimmTower.load(checkpoints[kind], -2, FP32, OTHER)
        assert {parameter.device.type for parameter in outline.parameters()} == {"meta"}
        real = TimmTower.load(checkpoints[kind], -2, FP32, OTHER).state_dict()
        assert {n: t.shape for n, t in outline.state_dict().items()} == {n: t.shape for n, t in real.items()}


# By the model cards of huggingface.co/timm, in millions; what is left out of them here, in numbers.
PUBLISHED = {
    # 428.2: the pooling by attention, 4 C^2 + 2 C M with their biases, its query and norm; the final norm
    "timm/vit_so400m_patch14_siglip_384.webli": (
        428.2,
        729,
        4 * 1152**2 + 4 * 1152 + 2 * 1152 * 4304 + 4304 + 1152 + 1152 + 2 * 1152 + 2 * 1152,
    ),
    "timm/vit_large_patch14_dinov2.lvd142m": (304.4, 1369, 2 * 1024),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_towers_from_their_names_alone(name: str) -> None:
    millions, tokens, left_out = PUBLISHED[name]
    with torch.device("meta"):
        tower = tower_of_config(VisionOptions("timm", name, layer=-1))
    assert tower.tokens == tokens
    assert round((count(tower) + left_out) / 1e6, 1) == millions
    with pytest.raises(UserError, match="neither a folder nor a model whose config is known"):
        tower_of_config(VisionOptions("timm", f"{name}x"))


def test_it_says_so_where_timm_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmtune.parts.spec.find_spec", lambda name: None)
    faults: list[tuple[str, ...]] = []
    VisionOptions("timm", "somewhere").check(lambda *fault: faults.append(fault))
    assert faults == [("tower", "timm is not installed", "pip install 'mmtune[timm]'")]


def test_its_own_size_need_be_no_multiple_of_the_patch() -> None:
    """384 pixels are 27 patches of 14 and a rest, in so400m."""
    config = {"architecture": "vit_tiny_patch16_224", **SMALL, "img_size": 30}
    own, asked = (TimmTower.create(config, -1, side) for side in (None, 30))
    assert (own.image_size, own.tokens) == (asked.image_size, asked.tokens) == (30, 9)
    with pytest.raises(UserError, match="image_size 31 is no multiple of the patch"):
        TimmTower.create(config, -1, 31)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (
            {"pretrained_cfg": {"mean": ["a", "b", "c"], "std": [0, 1, 1]}},
            "(?s)mean is not three.*std has to be above",
        ),
        ({"pretrained_cfg": {"crop_pct": -1}}, "crop_pct -1 is not a number above zero"),
        ({"pretrained_cfg": None}, "model_args and pretrained_cfg hold fields"),
        ({"model_args": [1]}, "model_args and pretrained_cfg hold fields"),
        (
            {"model_args": {"checkpoint_path": "x", "pretrained": True}},
            "checkpoint_path, pretrained: not an arg",
        ),
        ({"model_args": {**SMALL, "img_size": 4}}, "a picture has no tokens"),
        ({"model_args": {**SMALL, "depth": 0}}, "a tower without layers"),
    ],
)
def test_a_config_that_makes_no_sense(changes: dict[str, Any], what: str) -> None:
    config = {"architecture": "vit_tiny_patch16_224", "model_args": SMALL, "pretrained_cfg": {}}
    with pytest.raises(UserError, match=what):
        TimmTower.create({**config, **changes}, -1)


def test_a_name_without_a_tag_is_that_of_timms_default(
    checkpoints: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        return checkpoints["ViT"]

    monkeypatch.setattr(stored, "snapshot_download", download)
    for name in ("vit_base_patch16_224", "timm/vit_base_patch16_224"):
        TimmTower.load(name, -1, FP32)
        assert TimmTower.known_fields(name)
    assert asked == ["timm/vit_base_patch16_224.augreg2_in21k_ft_in1k"] * 2


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (
            "vit_base_patch16_clip_quickgelu_224.openai",
            "lie on the hub as timm/vit_base_patch16_clip_224.openai",
        ),
        ("vit_huge_patch14_gap_224.in1k_ijepa", "not on the hub"),
    ],
)
def test_a_name_whose_weights_cannot_be_fetched_by_it(name: str, what: str) -> None:
    for do in (lambda: TimmTower.known_fields(name), lambda: TimmTower.load(name, -1, FP32)):
        with pytest.raises(UserError, match=what):
            do()
