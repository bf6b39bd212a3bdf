"""What is asked of every tower, family by family, against the family's own library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import DINOv3ConvNextConfig

from mmtune.core.errors import UserError
from mmtune.core.files import read_json
from mmtune.parts.known import config_of
from mmtune.parts.model import VisionLanguageModel, assemble
from mmtune.parts.outline import outline_of
from mmtune.parts.shapes import tower_of_config
from mmtune.parts.spec import TOWERS, ConnectorOptions, LanguageOptions, ModelOptions, VisionOptions
from mmtune.parts.vision.base import VisionTower
from mmtune.training.rehearsal import Shape, rehearse
from mmtune.tuning.frozen import FrozenOptions
from mmtune.tuning.full import FullOptions
from mmtune.tuning.lora import LoraOptions
from tests import tiny_models as tiny
from tests.parts.towers import FAMILIES, LAYERS, Family, normalised, pictures

FP32 = torch.float32
SHOWN: list[tuple[str, int, int, str, float]] = []


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def weights(family: Family, tmp_path_factory: pytest.TempPathFactory) -> str:
    return family.save(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module", autouse=True)
def shown() -> Iterator[None]:
    """The parity table, under pytest -s."""
    yield
    print(f"\n{'tower':<28}{'side':>5}{'layer':>6}{'patches':>9}  largest difference to the library")
    for name, side, layer, patches, difference in SHOWN:
        print(f"{name:<28}{side:>5}{layer:>6}{patches:>9}  {difference:.1e}")


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save_language(tmp_path_factory.mktemp("language"))


def load(
    family: Family, weights: str, layer: int = -2, side: int | None = None, **changes: Any
) -> VisionTower:
    return TOWERS.load(family.tower).load(weights, layer, changes.get("dtype", FP32), side).eval()


@torch.no_grad()
def features(tower: VisionTower, seed: int = 0) -> torch.Tensor:
    return tower(pictures(2, tower.image_size, seed)).float()


@pytest.mark.parametrize("layer", [-1, -2, -LAYERS])
@pytest.mark.parametrize("size", ["own", "other"])
def test_patch_tokens_are_those_of_the_library(family: Family, weights: str, layer: int, size: str) -> None:
    side = getattr(family, size)
    tower = load(family, weights, layer, None if size == "own" else side)
    grid = family.grid if size == "own" else side // tower.patch
    assert (tower.prefix, tower.image_size, tower.tokens) == (family.prefix, side, grid**2)
    assert tower.has_cls == (family.prefix > 0)
    assert (
        len([1 for module in tower.layers() if "mlp" in dict(module.named_children())]) == LAYERS + 1 + layer
    )
    images = pictures(2, side)
    with torch.no_grad():
        found = tower(images)
    expected = family.tokens(weights, layer, normalised(tower, images))
    assert expected.shape[1] == family.prefix + tower.tokens
    expected = expected[:, family.prefix :]
    assert found.shape == expected.shape == (2, tower.tokens, tower.width)
    difference = float((found - expected).abs().max())
    SHOWN.append((family.name, side, layer, f"{grid} x {grid}", difference))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_no_patch_is_dropped_and_no_prefix_kept(family: Family, weights: str) -> None:
    """Where patches don't see each other, another patch k changes feature k and no other."""
    tower = load(family, weights)
    for name, module in tower.named_modules():
        if name.endswith(family.mixing):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    images = pictures(1, tower.image_size)
    grid, patch = family.grid, tower.patch
    with torch.no_grad():
        before = tower(images)
        for k in range(grid**2):
            top, left = k // grid * patch, k % grid * patch
            changed = images.clone()
            changed[:, :, top : top + patch, left : left + patch] ^= 255
            moved = (tower(changed) - before).abs().amax((0, 2)) > 0
            assert moved.nonzero().flatten().tolist() == [k]


def test_saved_and_loaded_at_either_size(family: Family, weights: str, tmp_path: Path) -> None:
    """What is saved ends at the layer that was used, and is for pictures of the size that was used."""
    for side in (family.own, family.other):
        tower = load(family, weights, -2, side)
        tower.save(tmp_path / str(side))
        again = load(family, str(tmp_path / str(side)), -1)
        for name in (
            "width",
            "tokens",
            "image_size",
            "patch",
            "prefix",
            "mean",
            "std",
            "resample",
            "own_fit",
        ):
            assert getattr(again, name) == getattr(tower, name), name
        if tower.own_fit:
            assert again.transform("own").length == tower.transform("own").length
        assert torch.equal(features(again), features(tower))
        assert not list((tmp_path / str(side)).glob("*.bin"))


def test_a_size_of_no_whole_patches_is_refused(family: Family, weights: str) -> None:
    with pytest.raises(UserError, match=r"image_size 43 is no multiple of the patch, 8 pixels\n.* 40 or 48"):
        load(family, weights, -2, 43)


def test_a_gradient_reaches_every_parameter_that_is_used(family: Family, weights: str) -> None:
    """So that DDP need not look for those without one, also where each layer runs twice."""
    tower = load(family, weights, -2, family.other).train()
    gradients = []
    for checkpointing in (False, True):
        tower.checkpoint_activations(checkpointing)
        tower.zero_grad()
        tower(pictures(2, tower.image_size)).square().mean().backward()
        core = getattr(tower, "hf", tower)
        used = {n: p for n, p in core.named_parameters() if not n.startswith(tower.unused or ("-",))}
        assert [name for name, parameter in used.items() if parameter.grad is None] == []
        unused = [p for n, p in core.named_parameters() if n not in used]
        assert all(p.grad is None for p in unused)
        gradients.append({name: p.grad.clone() for name, p in used.items() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tuner", [FullOptions(0.1), LoraOptions(0.1, rank=2, alpha=4)], ids=["full", "lora"])
def test_a_tuned_tower_comes_back_at_its_size(
    family: Family, weights: str, language: str, tmp_path: Path, tuner: Any
) -> None:
    options = ModelOptions(
        vision=VisionOptions(family.tower, weights, image_size=family.other),
        connector=ConnectorOptions("linear"),
        language=LanguageOptions(language),
    )
    model = assemble(options).eval()
    before = features(model.vision)
    model.requires_grad_(False)
    tuner.make().attach(model, "vision")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):  # the B of a LoRA is zero before the first step
        optimizer.zero_grad()
        model.vision(pictures(2, family.other)).square().mean().backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
    after = features(model.vision)
    assert (after - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    said = read_json(tmp_path / "config.json")["vision"]
    assert said.get("image_size") == (None if tuner.tuner == "full" else family.other)
    again = VisionLanguageModel.from_pretrained(tmp_path)
    assert again.transform == model.transform and again.image_tokens == model.image_tokens
    torch.testing.assert_close(features(again.vision), after, rtol=1e-5, atol=1e-5)


def test_what_training_takes_is_worked_out_without_values(
    family: Family, weights: str, language: str
) -> None:
    """`mmtune check` rehearses a step on an outline: no tower may look into a tensor."""
    options = ModelOptions(
        vision=VisionOptions(family.tower, weights, image_size=family.other),
        connector=ConnectorOptions("linear"),
        language=LanguageOptions(language),
    )
    with torch.device("meta"):
        outline = outline_of(options)
        for part, tuner in (("vision", FullOptions(0.1)), ("connector", FullOptions(0.1))):
            tuner.make().attach(outline, part)
        FrozenOptions().make().attach(outline, "language")
    passes = rehearse(outline, Shape(samples=1, tokens=60, pictures=2, supervised=3), False, True)
    assert passes.peak > 0


def test_every_attention_gives_the_same_and_training_mode_too(family: Family, weights: str) -> None:
    """In training mode DINOv3 of transformers moves its positions at random."""
    tower = load(family, weights)
    expected = features(tower)
    for attention in ("eager", "sdpa"):
        tower.attend_by(attention)
        torch.testing.assert_close(features(tower), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features(tower.train()), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16(family: Family, weights: str) -> None:
    exact = features(load(family, weights))
    for side in (family.own, family.other):
        tower = load(family, weights, -2, side, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in tower.parameters()} == {torch.bfloat16}
        with torch.no_grad():
            assert tower(pictures(2, side)).dtype == torch.bfloat16
    rounded = features(load(family, weights, dtype=torch.bfloat16))
    assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_a_tower_of_another_family_is_named(family: Family, weights: str) -> None:
    for named in {"clip", "siglip", "siglip2", "dinov2", "dinov3", "timm"} - {family.tower}:
        said = rf"this is a .* model, not a .*{named}.*\n.*tower: {family.tower}\."
        if family.tower == "open_clip":  # which has no config.json
            said = "no such file" if named == "timm" else "cannot be loaded"
        with pytest.raises(UserError, match=said):
            TOWERS.load(named).load(weights, -2, FP32)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"patch_size": 0}, "refused by transformers: ZeroDivisionError"),
        ({"patch_size": None}, "refused by transformers|its config makes no sense"),
        ({"image_size": [24, 24]}, "refused by transformers"),
        ({"hidden_act": "foo"}, "refused by transformers: KeyError: 'foo'"),
        ({"num_attention_heads": 5}, "its config makes no sense: .* not a multiple of"),
        ({"num_hidden_layers": "3"}, "its config makes no sense: .*num_hidden_layers"),
        ({"num_hidden_layers": 0}, "a tower without layers"),
        ({"num_channels": 4}, "for pictures of 4 channels"),
        ({"image_size": 4}, "image_size 4 is smaller than a patch, 8 pixels"),
        (None, "its config makes no sense"),
    ],
)
def test_a_config_that_makes_no_tower(tmp_path: Path, changes: dict[str, Any] | None, what: str) -> None:
    FAMILIES[0].save(tmp_path)
    config = changes and read_json(tmp_path / "config.json") | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=what) as refused:
        TOWERS.load("clip").load(str(tmp_path), -1, FP32)
    assert "UserError" not in str(refused.value)


@pytest.mark.parametrize("named", ["clip", "siglip", "siglip2", "dinov2", "dinov3", "timm", "open_clip"])
def test_a_picture_has_a_token_at_least(named: str) -> None:
    configs: dict[str, dict[str, Any]] = {
        "siglip2": {"num_patches": 10},
        "timm": {"architecture": "vit_tiny_patch16_224", "img_size": 4, "patch_size": 8, "depth": 1},
        "open_clip": {"width": 64, "layers": 1, "image_size": 4, "patch_size": 8},
    }
    small = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 8,
        "image_size": 4,
    }
    what = "is no square grid" if named == "siglip2" else "a picture has no tokens"
    with pytest.raises(UserError, match=what):
        TOWERS.load(named).create(configs.get(named, small), -1)


@pytest.mark.parametrize("damage", ["cut", "pointer", "missing shard", "index"])
def test_files_that_are_not_whole(tmp_path: Path, damage: str) -> None:
    """With values and without: the outline reads no more than heads and directories."""
    FAMILIES[0].save(tmp_path)
    whole = tmp_path / "model.safetensors"
    torch.save(load_file(whole), tmp_path / "pytorch_model.bin")
    whole.unlink()
    file = tmp_path / "pytorch_model.bin"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-500])
    elif damage == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1")
    else:
        (tmp_path / "pytorch_model-1.bin").write_bytes(file.read_bytes())
        file.unlink()
        shards = {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}
        said = json.dumps(shards if damage == "missing shard" else {"weight_map": None})
        (tmp_path / "pytorch_model.bin.index.json").write_text(said)
    what = {"missing shard": "no such file, which the index names", "index": "it names no file of weights"}
    for device in ("cpu", "meta"):
        with pytest.raises(UserError, match=what.get(damage, "not a whole .bin file")), torch.device(device):
            TOWERS.load("clip").load(str(tmp_path), -1, FP32)


def test_an_outline_says_what_the_files_say_of_the_transform(
    family: Family, weights: str, tmp_path: Path
) -> None:
    """And so does the rehearsal of `fit: own`."""
    shutil.copytree(weights, tmp_path, dirs_exist_ok=True)
    said: dict[str, Any] = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    if family.tower in ("timm", "open_clip"):
        file, name = ("config.json", "pretrained_cfg"), ("open_clip_config.json", "preprocess_cfg")
        config, key = file if family.tower == "timm" else name
        stated = read_json(tmp_path / config)
        stated[key] = stated.get(key, {}) | said
    else:
        config = "preprocessor_config.json"
        stated = {f"image_{key}": values for key, values in said.items()} | {
            "size": {"height": 9, "width": 9}
        }
    (tmp_path / config).write_text(json.dumps(stated))
    with torch.device("meta"):
        outline = tower_of_config(VisionOptions(family.tower, str(tmp_path)))
    tower = load(family, str(tmp_path))
    assert outline.transform("pad").mean == (0.1, 0.2, 0.3)
    assert outline.transform("own") == tower.transform("own")


def test_a_frozen_tower_drops_nothing_while_the_rest_trains(language: str) -> None:
    config = {"architecture": "vit_tiny_patch16_224", "img_size": 24, "patch_size": 8, "depth": 2}
    options = ModelOptions(
        vision=VisionOptions("timm", config={**config, "drop_path_rate": 0.9}, layer=-1),
        connector=ConnectorOptions("linear"),
        language=LanguageOptions(language),
    )
    model = assemble(options).train()
    assert model.vision.training
    FrozenOptions().make().attach(model, "vision")
    model.train()
    assert model.connector.training and model.language.training and model.training
    assert not model.vision.training
    assert torch.equal(features(model.vision), features(model.vision))


def test_dinov3s_convnext_is_refused(tmp_path: Path) -> None:
    DINOv3ConvNextConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="this is a dinov3_convnext model, not a dinov3_vit"):
        TOWERS.load("dinov3").load(str(tmp_path), -2, FP32)


@pytest.mark.parametrize("kind", ["Siglip", "Siglip2"])
def test_the_tower_inside_a_whole_siglip(tmp_path: Path, kind: str) -> None:
    own: dict[str, Any] = {"num_patches": 9} if kind == "Siglip2" else {"image_size": 24}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, **own, "num_hidden_layers": 2, "patch_size": 8}
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision, text_config={**small, "vocab_size": 9}
    )
    whole = getattr(transformers, f"{kind}Model")(config)
    whole.save_pretrained(tmp_path)
    tower = TOWERS.load(kind.lower()).load(str(tmp_path), -1, FP32)
    kept = whole.vision_model.state_dict()
    assert tower.hf.state_dict().keys() == {name for name in kept if not name.startswith("head.")}
    assert all(torch.equal(tensor, kept[name]) for name, tensor in tower.hf.state_dict().items())


# Tower and image_size, patches and prefix: 384 // 14 = 27, 518 / 14 = 37, 336 / 14 = 24.
REAL = {
    "openai/clip-vit-large-patch14-336": ("clip", None, 576, 1),
    "google/siglip-so400m-patch14-384": ("siglip", None, 729, 0),
    "google/siglip2-so400m-patch14-384": ("siglip", None, 729, 0),
    "google/siglip2-so400m-patch16-naflex": ("siglip2", 384, 576, 0),
    "facebook/dinov2-large": ("dinov2", 336, 576, 1),
    "facebook/dinov2-with-registers-large": ("dinov2", None, 1369, 5),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": ("open_clip", None, 256, 1),
}


@pytest.mark.parametrize("name", REAL)
def test_real_towers_from_their_configs_alone(name: str) -> None:
    kind, side, tokens, prefix = REAL[name]
    tower = TOWERS.load(kind)
    fields = tower.fields(config_of(name, tower.config_file), name)
    with torch.device("meta"):
        made = tower.create(fields, -2, side)
        features = made(torch.zeros(1, 3, made.image_size, made.image_size, dtype=torch.uint8))
    assert (made.tokens, made.prefix) == (tokens, prefix)
    assert features.shape == (1, tokens, made.width)
