"""The open_clip tower against open_clip itself and, with the same weights, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

import mmtune.parts.vision.stored as stored
from mmtune.core.errors import UserError
from mmtune.parts.fingerprint import model_hash
from mmtune.parts.model import VisionLanguageModel, assemble
from mmtune.parts.outline import count
from mmtune.parts.shapes import tower_of_config
from mmtune.parts.spec import ConnectorOptions, LanguageOptions, ModelOptions, VisionOptions
from mmtune.parts.vision.clip import MEAN, STD
from mmtune.parts.vision.open_clip import CONFIG, PICKLED, WEIGHTS, OpenClipTower
from mmtune.training.check import outline_of
from mmtune.tuning.base import Tuner
from mmtune.tuning.full import FullOptions
from mmtune.tuning.lora import LoraOptions
from tests.tiny_models import IMAGE_TOKENS, PATCH, SIZE, batch, pictures, save_language

FP32 = torch.float32
VISION: dict[str, Any] = {
    "width": 24,
    "layers": 4,
    "head_width": 12,
    "mlp_ratio": 2.0,
    "patch_size": PATCH,
    "image_size": SIZE,
}
TEXT = {"width": 16, "heads": 2, "layers": 1, "vocab_size": 20, "context_length": 5}


def whole(quick_gelu: bool = False, seed: int = 0, **changes: Any) -> CLIP:
    """A CLIP of open_clip with random weights, biases and norms included, as far apart as they come."""
    torch.manual_seed(seed)
    made = CLIP(8, CLIPVisionCfg(**{**VISION, **changes}), CLIPTextCfg(**TEXT), quick_gelu).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def save(folder: Path, model: CLIP, pickled: bool = False, preprocess: Any = None, **changes: Any) -> str:
    """open_clip's hub format."""
    folder.mkdir(parents=True, exist_ok=True)
    quick_gelu = isinstance(model.visual.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)
    config = {
        "model_cfg": {
            "embed_dim": 8,
            "quick_gelu": quick_gelu,
            "vision_cfg": {**VISION, **changes},
            "text_cfg": TEXT,
        },
        "preprocess_cfg": {"mean": MEAN, "std": STD} if preprocess is None else preprocess,
    }
    (folder / CONFIG).write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if pickled:
        torch.save(tensors, folder / PICKLED)
    else:
        save_file(tensors, folder / WEIGHTS)
    return str(folder)


def normalised(mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> torch.Tensor:
    pixels = pictures(3).double() / 255
    return torch.stack([(pixels[:, c] - mean[c]) / std[c] for c in range(3)], dim=1).float()


@torch.no_grad()
def expected_features(model: CLIP, layer: int, pixels: torch.Tensor | None = None) -> torch.Tensor:
    """By open_clip's own forward_intermediates, of the whole tower."""
    index = len(model.visual.transformer.resblocks) + layer
    given = normalised() if pixels is None else pixels
    found = model.visual.forward_intermediates(given, indices=[index], output_fmt="NLC")
    return found["image_intermediates"][0]


@torch.no_grad()
def features(tower: OpenClipTower) -> torch.Tensor:
    return tower(pictures(3))


def as_transformers(model: CLIP, quick_gelu: bool) -> CLIPVisionModel:
    """The same weights in transformers' tower, tensor by tensor."""
    config = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
        hidden_act="quick_gelu" if quick_gelu else "gelu",
    )
    made = CLIPVisionModel(config).eval()
    own = model.visual.state_dict()
    names = {
        "embeddings.class_embedding": own["class_embedding"],
        "embeddings.patch_embedding.weight": own["conv1.weight"],
        "embeddings.position_embedding.weight": own["positional_embedding"],
        "pre_layrnorm.weight": own["ln_pre.weight"],
        "pre_layrnorm.bias": own["ln_pre.bias"],
        "post_layernorm.weight": own["ln_post.weight"],
        "post_layernorm.bias": own["ln_post.bias"],
    }
    for i in range(4):
        theirs, ours = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for kind in ("weight", "bias"):
            packed = own[f"{theirs}.attn.in_proj_{kind}"].chunk(3)
            for which, tensor in zip("qkv", packed, strict=True):
                names[f"{ours}.self_attn.{which}_proj.{kind}"] = tensor
            names[f"{ours}.self_attn.out_proj.{kind}"] = own[f"{theirs}.attn.out_proj.{kind}"]
            names[f"{ours}.layer_norm1.{kind}"] = own[f"{theirs}.ln_1.{kind}"]
            names[f"{ours}.layer_norm2.{kind}"] = own[f"{theirs}.ln_2.{kind}"]
            names[f"{ours}.mlp.fc1.{kind}"] = own[f"{theirs}.mlp.c_fc.{kind}"]
            names[f"{ours}.mlp.fc2.{kind}"] = own[f"{theirs}.mlp.c_proj.{kind}"]
    made.load_state_dict(names)
    return made


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("layer", [-1, -2, -4])
def test_features_are_those_of_transformers_and_open_clip(
    tmp_path: Path, layer: int, quick_gelu: bool
) -> None:
    model = whole(quick_gelu)
    tower = OpenClipTower.load(save(tmp_path, model), layer, FP32).eval()
    found = features(tower)
    assert found.shape == (3, IMAGE_TOKENS, 24) == (3, tower.tokens, tower.width)
    with torch.no_grad():
        other = as_transformers(model, quick_gelu)(normalised(), output_hidden_states=True)
    torch.testing.assert_close(found, other.hidden_states[layer][:, 1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, expected_features(model, layer), rtol=1e-5, atol=1e-5)


def test_layers_and_activations_differ() -> None:
    """Otherwise the test above could not tell them apart."""
    model = whole()
    assert (expected_features(model, -2) - expected_features(model, -1)).abs().max() > 0.1
    assert (expected_features(model, -2) - expected_features(whole(True), -2)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},  # CLIPA
        {"ls_init_value": 1e-4},
        {"pos_embed_type": "sin_cos_2d"},
        {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},  # CoCa
        {"norm_kwargs": {"eps": 1e-2}, "act_kwargs": {"approximate": "tanh"}},
        {"patch_dropout": 0.5},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_kinds_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    """While training too: patch dropout would lose tokens."""
    model = whole(**changes)
    tower = OpenClipTower.load(save(tmp_path, model, **changes), -2, FP32).train()
    torch.testing.assert_close(features(tower), expected_features(model, -2), rtol=1e-5, atol=1e-5)
    tower.save(tmp_path / "saved")
    again = OpenClipTower.load(str(tmp_path / "saved"), -1, FP32)
    assert torch.equal(features(again), features(tower))


def test_sines_and_cosines_are_nothing_to_train() -> None:
    tower = OpenClipTower.create({**VISION, "pos_embed_type": "sin_cos_2d"}, -2)
    assert "visual.positional_embedding" in tower.state_dict()
    assert "visual.positional_embedding" not in dict(tower.named_parameters())


def test_layers_above_and_the_text_tower_are_not_held(tmp_path: Path) -> None:
    tower = OpenClipTower.load(save(tmp_path, whole()), -2, FP32)
    names = [name.split("visual.")[1] for name in tower.state_dict()]
    assert {name.split(".")[2] for name in names if "resblocks" in name} == {"0", "1", "2"}
    assert not [name for name in names if name.startswith(("ln_post", "proj", "text"))]


@pytest.mark.parametrize("layer", [-5, -9])
def test_a_layer_below_the_first_is_refused(tmp_path: Path, layer: int) -> None:
    with pytest.raises(UserError, match="4 layers"):
        OpenClipTower.load(save(tmp_path, whole()), layer, FP32)


def test_the_two_kinds_of_weight_files(tmp_path: Path) -> None:
    """Half precision in the file; safetensors is preferred, the .bin is never unpickled beside it."""
    model = whole().half()
    safe = OpenClipTower.load(save(tmp_path / "safe", model), -2, FP32)
    pickled = OpenClipTower.load(save(tmp_path / "bin", model, pickled=True), -2, FP32)
    assert torch.equal(features(safe), features(pickled))
    assert {tensor.dtype for tensor in safe.state_dict().values()} == {FP32}
    (tmp_path / f"safe/{PICKLED}").write_bytes(b"not even a pickle")
    OpenClipTower.load(str(tmp_path / "safe"), -2, FP32)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, whole(), pickled=True)
    torch.save({"visual.conv1.weight": Path("a class of its own")}, tmp_path / PICKLED)
    with pytest.raises(UserError, match="cannot be read: Weights only load failed"):
        OpenClipTower.load(folder, -2, FP32)


def test_a_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The safetensors file alone is fetched where there is one, else the .bin."""
    source = Path(save(tmp_path / "hub", whole(), pickled=True))
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(source)

    monkeypatch.setattr(stored, "snapshot_download", download)
    OpenClipTower.load("laion/tiny", -2, FP32)
    assert asked == [("laion/tiny", [CONFIG, WEIGHTS]), ("laion/tiny", [CONFIG, PICKLED])]
    asked.clear()
    save(source, whole())
    OpenClipTower.load("laion/tiny", -2, FP32)
    assert asked == [("laion/tiny", [CONFIG, WEIGHTS])]
    asked.clear()
    OpenClipTower.load("ViT-H-14/laion2b_s32b_b79k", -2, FP32)
    assert asked == [("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", [CONFIG, WEIGHTS])]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-H-14/laion2b", r"no weights 'laion2b' of ViT-H-14\n.*laion2b_s32b_b79k.*ViT-H-14/TAG"),
        ("ViT-L-14-336", r"no weights '' of ViT-L-14-336\n"),
        ("RN50/openai", r"it is a ResNet, not one of open_clip's plain"),
        (
            "ViT-SO400M-14-SigLIP-384/webli",
            r"it is timm's vit_so400m_patch14_siglip_384, not .*\n.*`tower: timm`, with weights: "
            r"timm/vit_so400m_patch14_siglip_384\.webli",
        ),
        ("convnext_base/laion400m_s13b_b51k", r"it is timm's convnext_base, not .*\n.*Choose a plain one"),
    ],
)
def test_names_of_open_clip_that_are_refused_before_the_download(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        OpenClipTower.load(name, -2, FP32)


@pytest.mark.parametrize("name", ["hf-hub:laion/tiny", "no/where"])
def test_names_that_lead_nowhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"nor to be had from the hub.*\n.*a hub name such as laion"):
        OpenClipTower.load(name, -2, FP32)


def checkpoint(folder: Path, model: CLIP) -> str:
    """What open_clip_train saves after an epoch, when it ran under DDP."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    steps = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    file = folder / "epoch_32.pt"
    torch.save({"epoch": 32, "name": "run", "state_dict": state, "optimizer": steps}, file)
    return str(file)


def json_config(folder: Path, **changes: Any) -> str:
    config = {"embed_dim": 8, "vision_cfg": {**VISION, **changes}, "text_cfg": TEXT, "quick_gelu": True}
    (folder / "mine.json").write_text(json.dumps(config))
    return str(folder / "mine.json")


def test_a_checkpoint_of_its_training(tmp_path: Path) -> None:
    """Of a model by its fields or by a JSON file like open_clip's; its transform is that of CLIP."""
    model = whole(quick_gelu=True)
    weights = checkpoint(tmp_path, model)
    for config in ({"model": json_config(tmp_path)}, {**VISION, "quick_gelu": True}):
        tower = OpenClipTower.load(weights, -2, FP32, config=config)
        torch.testing.assert_close(features(tower), expected_features(model, -2), rtol=1e-5, atol=1e-5)
        assert (tower.mean, tower.std) == (MEAN, STD)
    config = {
        "model": json_config(tmp_path, pool_type="avg", no_ln_pre=True)
    }  # as a file may say for training
    assert not hasattr(OpenClipTower.create(config, -1).visual.ln_pre, "weight")


def test_a_name_of_open_clip_from_scratch() -> None:
    with torch.device("meta"):
        tower = OpenClipTower.create({"model": "ViT-H-14"}, -2, 336)
    assert (tower.width, tower.tokens, len(tower.layers())) == (1280, 576, 31)


@pytest.mark.parametrize(
    ("weights", "config", "message"),
    [
        ("epoch_32.pt", None, r"which doesn't say of which model\n.*config: \{model: NAME\}"),
        ("epoch_32.pt", {"model": "ViT-B-17"}, r"open_clip knows no model 'ViT-B-17'\n.*ViT-B-16"),
        ("epoch_32.pt", {"model": "none.json"}, "none.json: no such file"),
        ("epoch_32.pt", {"model": "epoch_32.json"}, "it holds no vision_cfg"),
        ("epoch_32.pt", {"model": "ViT-B-16", "width": 9}, "beside 'model' stand width"),
        ("epoch_32.pt", {"model": "RN50"}, "it is a ResNet"),
        ("epoch_32.pt", {"model": "ViT-B-16"}, "weights are missing"),
        (
            ".",
            {"model": "ViT-B-16"},
            r"config belongs to a file of weights, and this is none\n.*Leave it out",
        ),
        ("epoch_33.pt", {"model": "ViT-B-16"}, "epoch_33.pt: no such file"),
        ("epoch_33.pt", None, "epoch_33.pt: no such file"),
        ("laion/tiny", {"model": "ViT-B-16"}, "config belongs to a file of weights, and this is none"),
        ("broken.pt", {**VISION}, "broken.pt: the weights cannot be read"),
    ],
)
def test_checkpoints_and_configs_that_mean_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, config: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint(Path(), whole())
    Path("epoch_32.json").write_text("{}")
    Path("broken.pt").write_bytes(b"half a file")
    with pytest.raises(UserError, match=message):
        OpenClipTower.load(weights, -2, FP32, config=config)


def test_what_is_known_without_weights() -> None:
    """By open_clip's name and by the hub's; counted as open_clip's docs/model_profile.csv has it, but for the
    final norm and the projection to the space shared with texts.
    """
    for name in ("ViT-H-14/laion2b_s32b_b79k", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
        with torch.device("meta"):
            tower = tower_of_config(VisionOptions("open_clip", name, layer=-1))
        left_out = 2 * 1280 + 1280 * 1024
        assert round((count(tower) + left_out) / 1e6, 2) == 632.08
    with torch.device("meta"):  # with a pooler, which is of no effect
        assert tower_of_config(VisionOptions("open_clip", "coca_ViT-L-14/laion2b_s13b_b90k")).tokens == 256
    with pytest.raises(UserError, match="neither a folder nor a model whose config is known"):
        tower_of_config(VisionOptions("open_clip", "laion/nothing"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"timm_model_name": "vit_base_patch16_siglip_224"}, "timm's vit_base_patch16_siglip_224, not"),
        ({"layers": [3, 4, 6, 3]}, "a ResNet, not"),
        ({"qk_norm": True}, r"a transformer with blocks of its own \(qk_norm\)"),
        ({"image_size": [16, 32]}, "image_size: expected the side of a square"),
        ({"layers": "4"}, "layers: expected a whole number"),
        ({"widht": 24}, r"unknown field 'widht'\n.*'width'"),
        ({"width": "24"}, "refused by open_clip"),
        ({"head_width": 64}, "refused by open_clip"),
    ],
)
def test_odd_kinds_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"{CONFIG}: (it is )?{message}"):
        OpenClipTower.load(save(tmp_path, whole(), **fields), -2, FP32)
    with pytest.raises(UserError, match=rf"model\.vision\.config: (it is )?{message}"):
        OpenClipTower.create({**VISION, **fields}, -2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_dropout": 0.5, "pool_type": "avg"}, "patch_dropout, pool_type: of no effect"),
        ({"quick_gelu": "yes"}, "quick_gelu: expected true or false"),
    ],
)
def test_fields_that_could_not_be_meant(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OpenClipTower.create({**VISION, **fields}, -2)


def test_broken_folders(tmp_path: Path) -> None:
    folder = Path(save(tmp_path, whole()))
    weights = load_file(folder / WEIGHTS)
    del weights["visual.transformer.resblocks.1.attn.in_proj_weight"]
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"1 weights are missing: .*resblocks\.1\.attn\.in_proj"):
        OpenClipTower.load(str(folder), -2, FP32)
    save(folder, whole(), image_size=32)
    with pytest.raises(UserError, match=r"of another shape than the config says: visual\.positional"):
        OpenClipTower.load(str(folder), -2, FP32)
    (folder / WEIGHTS).write_bytes(b"half a file")
    with pytest.raises(UserError, match="the weights cannot be read"):
        OpenClipTower.load(str(folder), -2, FP32)
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"neither {WEIGHTS} nor {PICKLED}"):
        OpenClipTower.load(str(folder), -2, FP32)
    (folder / CONFIG).write_text("{}")
    with pytest.raises(UserError, match="no model_cfg"):
        OpenClipTower.load(str(folder), -2, FP32)
    (folder / CONFIG).unlink()
    with pytest.raises(UserError, match="no such file"):
        OpenClipTower.load(str(folder), -2, FP32)


def test_the_way_pictures_are_prepared(tmp_path: Path) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    model = whole()
    tower = OpenClipTower.load(save(tmp_path, model, preprocess={"mean": mean, "std": std}), -2, FP32)
    expected = expected_features(model, -2, normalised(mean, std))
    torch.testing.assert_close(features(tower), expected, rtol=1e-5, atol=1e-5)
    tower.save(tmp_path / "saved")
    again = OpenClipTower.load(str(tmp_path / "saved"), -1, FP32)
    assert (again.mean, again.std) == (mean, std)
    plain = OpenClipTower.load(save(tmp_path, model, preprocess={}), -2, FP32)
    assert (plain.mean, plain.std) == (MEAN, STD)
    said = {"interpolation": "bilinear", "resize_mode": "squash"}
    squashing = OpenClipTower.load(save(tmp_path, model, preprocess=said), -2, FP32)
    squashing.save(tmp_path / "saved")
    for each in (squashing, OpenClipTower.load(str(tmp_path / "saved"), -1, FP32)):
        assert (each.resample, each.own_fit, each.crop_pct) == ("bilinear", "squash", 1.0)
    with pytest.raises(UserError, match="unknown interpolation 'box'"):
        OpenClipTower.load(save(tmp_path, model, preprocess={"interpolation": "box"}), -2, FP32)
    with pytest.raises(UserError, match=r"(?s)mean is not three numbers.*std has to be above zero"):
        OpenClipTower.load(save(tmp_path, model, preprocess={"mean": 0.5, "std": [0, 1, 1]}), -2, FP32)
    with pytest.raises(UserError, match="preprocess_cfg holds fields"):
        OpenClipTower.load(save(tmp_path, model, preprocess="a"), -2, FP32)


@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_are_those_of_open_clip(tmp_path: Path, resize_mode: str, interpolation: str) -> None:
    """With `fit: own`, which is its transform for evaluation; `longest` leaves black bars, which is none."""
    said = {"resize_mode": resize_mode, "interpolation": interpolation}
    tower = OpenClipTower.load(save(tmp_path, whole(), preprocess=said), -2, FP32)
    if resize_mode == "longest":
        with pytest.raises(UserError, match="own transform makes no squares"):
            tower.transform("own")
        return
    theirs = image_transform_v2(PreprocessCfg(size=SIZE, **said), is_train=False)
    for shape in [(50, 31), (31, 50), (24, 24), (9, 40), (200, 131)]:
        drawn = np.random.default_rng(0).integers(0, 256, (*shape[::-1], 3), np.uint8)
        found = torch.from_numpy(tower.transform("own")(Image.fromarray(drawn)))[None]
        expected: Any = theirs(Image.fromarray(drawn))
        torch.testing.assert_close(tower.normalise(found, FP32)[0], expected, rtol=1e-5, atol=1e-5)


def test_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    """And open_clip's own tower takes what is saved: only what the features don't need is missing."""
    tower = OpenClipTower.load(save(tmp_path, whole(quick_gelu=True)), -2, FP32)
    tower.save(tmp_path / "saved")
    again = OpenClipTower.load(str(tmp_path / "saved"), -1, FP32)
    before, after = tower.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(features(tower), features(again))
    said = json.loads((tmp_path / "saved" / CONFIG).read_text())["model_cfg"]
    theirs = CLIP(8, CLIPVisionCfg(**said["vision_cfg"]), CLIPTextCfg(**TEXT), said["quick_gelu"]).visual
    stored = load_file(tmp_path / "saved" / WEIGHTS)
    missing, unexpected = theirs.load_state_dict(
        {name.removeprefix("visual."): tensor for name, tensor in stored.items()}, strict=False
    )
    assert (sorted(missing), unexpected) == (["ln_post.bias", "ln_post.weight", "proj"], [])


def test_created_from_a_config(tmp_path: Path) -> None:
    tower = OpenClipTower.create({**VISION, "quick_gelu": True}, -2)
    tower.save(tmp_path)
    assert torch.equal(features(OpenClipTower.load(str(tmp_path), -1, FP32)), features(tower))


def test_eager_and_sdpa_agree(tmp_path: Path) -> None:
    tower = OpenClipTower.load(save(tmp_path, whole()), -2, FP32)
    sdpa = features(tower)
    tower.attend_by("eager")
    eager = features(tower)
    torch.testing.assert_close(eager, sdpa, rtol=1e-5, atol=1e-5)
    assert not torch.equal(eager, sdpa)  # another order of sums: it was another implementation


def test_bfloat16(tmp_path: Path) -> None:
    tower = OpenClipTower.load(save(tmp_path, whole()), -2, torch.bfloat16)
    assert features(tower).dtype == torch.bfloat16


# ---- In a whole model ----------------------------------------------------------------------------------


def options(folder: Path) -> ModelOptions:
    return ModelOptions(
        vision=VisionOptions("open_clip", save(folder / "tower", whole())),
        connector=ConnectorOptions("mlp2x_gelu"),
        language=LanguageOptions(save_language(folder / "lm")),
    )


def test_a_model_folder_names_the_checkpoint_and_holds_its_config(tmp_path: Path) -> None:
    """The JSON file is no longer needed, and another checkpoint makes it another model."""
    made = options(tmp_path)
    weights = checkpoint(tmp_path / "logs", whole(quick_gelu=True))
    made.vision = VisionOptions("open_clip", weights, {"model": json_config(tmp_path)})
    assert not faults_of(made.vision)
    model = assemble(made)
    model.save_pretrained(tmp_path / "saved")
    assert outline_of(made).image_tokens == IMAGE_TOKENS
    (tmp_path / "mine.json").unlink()
    before = model_hash(tmp_path / "saved")
    restored = VisionLanguageModel.from_pretrained(tmp_path / "saved")
    expected = features(model.vision)  # type: ignore[arg-type]
    assert torch.equal(features(restored.vision), expected)  # type: ignore[arg-type]
    FullOptions(lr=1e-3).make().attach(restored, "vision")
    restored.save_pretrained(tmp_path / "trained")
    again = VisionLanguageModel.from_pretrained(tmp_path / "trained")
    assert torch.equal(features(again.vision), expected)  # type: ignore[arg-type]
    checkpoint(tmp_path / "logs", whole(quick_gelu=True, seed=1))
    assert model_hash(tmp_path / "saved") != before


def faults_of(options: VisionOptions) -> list[tuple[str, ...]]:
    faults: list[tuple[str, ...]] = []
    options.check(lambda *fault: faults.append(fault))
    return faults


def trained(model: VisionLanguageModel, tuner: Tuner) -> dict[str, torch.Tensor]:
    """One step of SGD on what the tuner chose in the tower; returns the gradients by name."""
    tuner.attach(model, "vision")
    for part in (model.connector, model.language):
        part.requires_grad_(False)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = model.train()(batch([1, 2]))
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    torch.optim.SGD(parameters.values(), lr=1e-3).step()
    assert all(p.grad is not None for p in parameters.values())
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


def test_every_weight_of_the_tower_can_train(tmp_path: Path) -> None:
    """With the same gradients where blocks are run again in the backward pass."""
    torch.manual_seed(0)
    model = assemble(options(tmp_path))
    gradients = trained(model, FullOptions(lr=1e-3).make())
    assert gradients.keys() == {f"vision.{name}" for name in model.vision.state_dict()}
    torch.manual_seed(0)
    again = assemble(options(tmp_path))
    again.vision.checkpoint_activations()
    repeated = trained(again, FullOptions(lr=1e-3).make())
    assert all(torch.equal(repeated[name], gradient) for name, gradient in gradients.items())

    model.eval().save_pretrained(tmp_path / "saved")
    restored = VisionLanguageModel.from_pretrained(tmp_path / "saved")
    own = model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in restored.state_dict().items())


def test_a_lora_reaches_queries_keys_and_values(tmp_path: Path) -> None:
    """The adapted model is the one with W + (alpha / r) B A in its place, saved, loaded and merged."""
    model = assemble(options(tmp_path))
    tuner = LoraOptions(lr=1e-3, rank=2, alpha=4).make()
    tuner.attach(model, "vision")
    kinds = {name.removeprefix("visual.transformer.resblocks.").partition(".")[2] for name in tuner.layers}
    assert kinds == {"attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"}
    for name in tuner.layers:
        torch.nn.init.normal_(tuner.pair(name)[1], std=0.1)
    model.eval().save_pretrained(tmp_path / "saved")
    adapted = features(model.vision)  # type: ignore[arg-type]

    expected = whole()
    with torch.no_grad():
        for name in tuner.layers:
            a, b = tuner.pair(name)
            packed = name.endswith("in_proj")
            weight = expected.get_parameter(f"{name}_weight" if packed else f"{name}.weight")
            weight.add_(2 * b @ a)
    torch.testing.assert_close(adapted, expected_features(expected, -2), rtol=1e-4, atol=1e-4)
    restored = VisionLanguageModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(features(restored.vision), adapted)  # type: ignore[arg-type]
    merged = VisionLanguageModel.from_pretrained(tmp_path / "saved", merge=True)
    torch.testing.assert_close(features(merged.vision), adapted, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("pickled", [False, True])
def test_the_outline_reads_no_weights(tmp_path: Path, pickled: bool) -> None:
    chosen = options(tmp_path)
    if pickled:
        (tmp_path / "tower" / WEIGHTS).unlink()
        save(tmp_path / "tower", whole(), pickled=True)
    outline = outline_of(chosen)
    assert {p.device.type for p in outline.parameters()} == {"meta"}
    made = assemble(chosen)
    assert [(n, p.shape) for n, p in outline.named_parameters()] == [
        (n, p.shape) for n, p in made.named_parameters()
    ]
    (tmp_path / "tower" / (PICKLED if pickled else WEIGHTS)).write_bytes(b"half a file")
    with pytest.raises(UserError, match="the weights cannot be read"):
        outline_of(chosen)


def test_a_pickled_tower_counts_in_the_models_hash(tmp_path: Path) -> None:
    model = assemble(options(tmp_path))
    (tmp_path / "tower" / WEIGHTS).unlink()
    save(tmp_path / "tower", whole(), pickled=True)
    model.save_pretrained(tmp_path / "saved")
    before = model_hash(tmp_path / "saved")
    save(tmp_path / "tower", whole(seed=1), pickled=True)
    assert model_hash(tmp_path / "saved") != before


def test_it_says_so_where_open_clip_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmtune.parts.spec.find_spec", lambda name: None)
    faults: list[tuple[str, ...]] = []
    VisionOptions("open_clip", "somewhere").check(lambda *fault: faults.append(fault))
    assert faults == [("tower", "open_clip is not installed", "pip install 'mmtune[open_clip]'")]
