"""Outlines from configs alone: their counts are transformers' own and the published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from mmtune.core.errors import UserError
from mmtune.parts.known import config_of
from mmtune.parts.model import assemble
from mmtune.parts.outline import count, outline_of, outline_of_configs, unused_layers
from mmtune.parts.spec import PARTS, ConnectorOptions, LanguageOptions, ModelOptions, VisionOptions
from tests import tiny_models

# Of llava-hf/llava-1.5-7b-hf, by its safetensors files: 686 tensors, 14,126,854,144 bytes in 16 bits.
LLAVA_7B = 7_063_427_072
# Llama 2's counts, which Vicuna v1.5 shares; of the others the safetensors metadata on the hub.
LANGUAGE = {
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "lmsys/vicuna-7b-v1.5": 6_738_415_616,
    "lmsys/vicuna-13b-v1.5": 13_015_864_320,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
}


def outline(base: str) -> dict[str, int]:
    """Parameters by part, and those that are not loaded."""
    options = ModelOptions(base=base)
    model = outline_of_configs(options)
    assert all(parameter.is_meta for parameter in model.parameters())
    return {part: count(model.part(part)) for part in PARTS} | {"unused": unused_layers(options, model)}


def theirs(config: dict[str, Any]) -> dict[str, int]:
    """The same of transformers' own class."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig.from_dict(config)).model
        vision: Any = model.vision_tower
        language = AutoModelForCausalLM.from_config(LlavaConfig.from_dict(config).text_config)
    above = count(vision.encoder.layers[-1]) if config["vision_feature_layer"] == -2 else 0
    return {
        "vision": count(vision) - above,
        "connector": count(model.multi_modal_projector),
        "language": count(language),
        "unused": above,
    }


@pytest.mark.parametrize("name", ["llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf"])
def test_counts_are_those_of_transformers(name: str) -> None:
    assert outline(name) == theirs(config_of(name))


def test_counts_are_the_published_ones() -> None:
    assert sum(outline("llava-hf/llava-1.5-7b-hf").values()) == LLAVA_7B
    tower = VisionOptions("clip", "openai/clip-vit-large-patch14-336", layer=-1)
    for name, published in LANGUAGE.items():
        options = ModelOptions(None, tower, ConnectorOptions("linear"), LanguageOptions(name))
        model = outline_of_configs(options)
        assert count(model.language) == published
        assert count(model.vision) == 303_507_456  # the whole tower
        assert unused_layers(options, model) == 0


# Published: of facebook/dinov2-large the safetensors metadata; the others as independent projects count them.
@pytest.mark.parametrize(
    ("name", "tower", "published", "tokens"),
    [
        ("google/siglip-so400m-patch14-384", "siglip", 428_225_600, 729),
        ("google/siglip2-so400m-patch14-384", "siglip", 428_225_600, 729),
        ("google/siglip2-so400m-patch16-naflex", "siglip2", 427_888_064, 256),
        ("facebook/dinov2-large", "dinov2", 304_368_640, 1369),
        ("facebook/dinov2-with-registers-large", "dinov2", 304_372_736, 1369),
    ],
)
def test_towers_are_the_published_ones(name: str, tower: str, published: int, tokens: int) -> None:
    config = config_of(name)
    with torch.device("meta"):
        theirs = AutoModel.from_config(AutoConfig.for_model(**config))
    assert count(theirs) == published
    tiny = LanguageOptions("TinyLlama/TinyLlama-1.1B-Chat-v1.0")
    options = ModelOptions(None, VisionOptions(tower, name, layer=-1), ConnectorOptions("linear"), tiny)
    model = outline_of_configs(options)
    assert (
        model.image_tokens == tokens
        and count(model.vision.layers()[0]) * len(model.vision.layers()) < published
    )


def test_the_largest_tower_of_open_clip_is_the_published_one() -> None:
    """632.08 M by open_clip's docs/model_profile.csv, with the final norm and the projection."""
    pytest.importorskip("open_clip")
    tower = VisionOptions("open_clip", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", layer=-1)
    tiny = LanguageOptions("TinyLlama/TinyLlama-1.1B-Chat-v1.0")
    model = outline_of_configs(ModelOptions(None, tower, ConnectorOptions("linear"), tiny))
    assert count(model.vision) + 2 * 1280 + 1280 * 1024 == 632_076_800
    assert model.image_tokens == 256


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_llavas_own_layout_differs_by_the_padded_vocabulary(size: str) -> None:
    own, converted = outline(f"liuhaotian/llava-v1.5-{size}"), outline(f"llava-hf/llava-1.5-{size}-hf")
    width = config_of(f"liuhaotian/llava-v1.5-{size}")["hidden_size"]
    assert converted.pop("language") - own.pop("language") == 2 * 64 * width
    assert own == converted


def test_a_folder_with_nothing_but_a_config(tmp_path: Path) -> None:
    vision = CLIPVisionConfig(**tiny_models.VISION)
    text = LlamaConfig(**tiny_models.FAMILIES["llama"])
    made = LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-2)
    made.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert outline(str(tmp_path)) == theirs(saved)
    assert LlavaForConditionalGeneration(made)  # and it is one


def test_parts_are_found_by_name_or_in_folders(tmp_path: Path) -> None:
    CLIPConfig(vision_config=tiny_models.VISION).save_pretrained(tmp_path / "clip")  # a whole CLIP
    AutoConfig.for_model("qwen2", **tiny_models.FAMILIES["qwen2"]).save_pretrained(tmp_path / "lm")
    options = ModelOptions(
        vision=VisionOptions("clip", str(tmp_path / "clip"), layer=-2),
        connector=ConnectorOptions("mlp2x_gelu"),
        language=LanguageOptions(str(tmp_path / "lm")),
    )
    model = outline_of_configs(options)
    real = assemble(tiny_models.parts(tmp_path / "real", "qwen2"))
    shapes = [{name: t.shape for name, t in m.state_dict().items()} for m in (model, real)]
    assert shapes[0] == shapes[1]
    assert model.image_tokens == real.image_tokens


def test_a_tower_of_open_clip(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    vision = {"image_size": 16, "layers": 4, "width": 24, "head_width": 12, "patch_size": 8, "mlp_ratio": 2.0}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": vision}}))
    options = ModelOptions(
        vision=VisionOptions("open_clip", str(tmp_path), layer=-2),
        connector=ConnectorOptions("linear"),
        language=LanguageOptions("TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
    )
    model = outline_of_configs(options)
    assert (model.image_tokens, len(model.vision.layers())) == (4, 3)
    assert unused_layers(options, model) == count(model.vision.layers()[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_are_those_of_loading(world: Path, dtype: Any) -> None:
    options = ModelOptions(base=str(world / "base"), dtype=dtype)
    real = assemble(options)
    for model in (outline_of(options), outline_of_configs(options)):
        found = [
            {name: (t.shape, t.dtype) for name, t in (*m.named_parameters(), *m.named_buffers())}
            for m in (model, real)
        ]
        assert found[0] == found[1]


def test_a_part_in_the_place_of_the_bases(world: Path) -> None:
    options = ModelOptions(
        base="llava-hf/llava-1.5-7b-hf", language=LanguageOptions("TinyLlama/TinyLlama-1.1B-Chat-v1.0")
    )
    model = outline_of_configs(options)
    assert count(model.language) == LANGUAGE["TinyLlama/TinyLlama-1.1B-Chat-v1.0"]
    assert count(model.connector) == 1024 * 2048 + 2048 + 2048 * 2048 + 2048


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"model_type": "bert"}, "not the config of a vision-language model"),
        (
            {
                "model_type": "llava",
                "vision_config": {"model_type": "siglip_vision_model"},
                "text_config": {},
            },
            "its tower is a siglip_vision_model",
        ),
        (
            {"model_type": "llava", "mm_vision_tower": "x", "mm_projector_type": "mlp9x"},
            "no connector for mm_projector_type",
        ),
        (
            {"model_type": "llava", "vision_config": {}, "text_config": {}, "vision_feature_layer": [-2, -5]},
            "joins the features of layers",
        ),
        (
            {"model_type": "llava", "vision_config": {}, "text_config": {"model_type": "zz"}},
            "no model_type 'zz'",
        ),
    ],
)
def test_a_config_that_cannot_be_read_is_a_fault(tmp_path: Path, config: dict[str, Any], what: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=what):
        outline_of_configs(ModelOptions(base=str(tmp_path)))


@pytest.mark.parametrize(
    ("base", "fields", "what"),
    [
        ("liuhaotian/llava-v1.5-7b", {"image_aspect_ratio": "anyres"}, "cuts a picture into several"),
        ("liuhaotian/llava-v1.5-7b", {"mm_vision_select_feature": "cls_patch"}, "keeps the CLS token"),
        ("liuhaotian/llava-v1.5-7b", {"model_type": "llava_mistral"}, "no Llama or Vicuna"),
        ("llava-hf/llava-1.5-7b-hf", {"vision_feature_select_strategy": "full"}, "keeps the CLS token"),
        ("llava-hf/llava-1.5-7b-hf", {"vision_feature_layer": 25}, "layer 0 of a tower with 24 layers"),
    ],
)
def test_what_import_refuses_has_no_outline(tmp_path: Path, base: str, fields: Any, what: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**config_of(base), **fields}))
    with pytest.raises(UserError, match=what):
        outline_of_configs(ModelOptions(base=str(tmp_path)))


def test_a_layer_counted_from_below(tmp_path: Path) -> None:
    name = "llava-hf/llava-1.5-7b-hf"
    (tmp_path / "config.json").write_text(json.dumps({**config_of(name), "vision_feature_layer": 23}))
    assert outline(str(tmp_path)) == outline(name)
