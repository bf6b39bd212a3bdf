"""Tiny random towers of every family, each with what its own library makes of the same pictures.

A family joins by a row in FAMILIES; test_towers.py then holds it to all that is asked of a tower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from mmtune.core.files import write_json
from mmtune.parts.vision.base import VisionTower

LAYERS = 3
# Of the library: (weights, layer, normalised pictures [N, 3, S, S]) -> tokens [N, prefix + patches, width].
Library = Callable[[str, int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Family:
    """name: of the row; `tower` of the table. save: writes a checkpoint and returns what `weights` says.
    prefix, own, grid: what the tower has to declare. own is the side of its pictures; at `other` the
    positions are interpolated. mixing: the ends of the names of the layers through which patches see each
    other.
    """

    name: str
    tower: str
    save: Callable[[Path], str]
    tokens: Library
    prefix: int
    own: int
    grid: int
    other: int = 40
    mixing: tuple[str, ...] = ("out_proj", "o_proj")
    options: dict[str, Any] = field(default_factory=dict)


_COMMON: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "patch_size": 8,
}
_DINO: dict[str, Any] = {**_COMMON, "image_size": 24, "layerscale_value": 0.7}
_DINOV2 = {name: value for name, value in _DINO.items() if name != "intermediate_size"}


def saved_hf(model: type, config: Any) -> Callable[[Path], str]:
    """A checkpoint of transformers with wide random weights: no two positions or channels are alike."""

    def save(folder: Path) -> str:
        torch.manual_seed(0)
        made: Any = model(config)
        spread(made)
        made.save_pretrained(folder)
        return str(folder)

    return save


def hf_tokens(model: Any, layers: str, **options: Any) -> Library:
    """What a hook on the layer sees, while transformers' own class runs from pixels to its end."""

    def tokens(weights: str, layer: int, pixels: torch.Tensor) -> torch.Tensor:
        whole = model.from_pretrained(weights).eval()
        seen: list[Any] = []
        block = whole.get_submodule(layers)[layer]
        block.register_forward_hook(lambda module, given, output: seen.append(output))
        with torch.no_grad():
            whole(**_inputs(whole, pixels), **options)
        return seen[0][0] if isinstance(seen[0], tuple) else seen[0]

    return tokens


def _inputs(model: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    if not isinstance(model, Siglip2VisionModel):
        return {"pixel_values": pixels}
    patch: Any = model.config.patch_size
    rows = [torch.from_numpy(convert_image_to_patches(each.numpy(), patch)) for each in pixels]
    count = pixels.shape[-1] // patch
    return {
        "pixel_values": torch.stack(rows),
        "pixel_attention_mask": torch.ones(len(rows), count**2, dtype=torch.long),
        "spatial_shapes": torch.tensor([[count, count]] * len(rows)),
    }


def saved_timm(architecture: str, **args: Any) -> Callable[[Path], str]:
    """A checkpoint of timm, written by timm itself, with wide random weights."""
    small = {"embed_dim": 24, "depth": LAYERS, "num_heads": 2, "img_size": 24, "patch_size": 8}

    def save(folder: Path) -> str:
        torch.manual_seed(0)
        model: Any = timm.create_model(architecture, **{**small, "num_classes": 7, **args})
        spread(model)
        save_for_hf(model, str(folder), safe_serialization=True)
        return str(folder)

    return save


def timm_tokens(weights: str, layer: int, pixels: torch.Tensor) -> torch.Tensor:
    """What timm's forward_intermediates gives, of the whole model, as timm makes it for this size."""
    model: Any = timm.create_model(f"local-dir:{weights}", pretrained=True, img_size=pixels.shape[-1])
    options = {
        "output_fmt": "NLC",
        "intermediates_only": True,
        "return_prefix_tokens": model.num_prefix_tokens,
    }
    with torch.no_grad():
        found = model.eval().forward_intermediates(pixels, indices=[LAYERS + layer], **options)[0]
    return torch.cat(found[::-1], 1) if isinstance(found, tuple) else found


OPEN_CLIP: dict[str, Any] = {
    "width": 24,
    "layers": LAYERS,
    "head_width": 12,
    "mlp_ratio": 2.0,
    "patch_size": 8,
    "image_size": 24,
}
_TEXT = CLIPTextCfg(width=16, heads=2, layers=1, vocab_size=20, context_length=5)


def saved_open_clip(quick_gelu: bool = False, **changes: Any) -> Callable[[Path], str]:
    """open_clip's hub format, with wide random weights."""
    model = {"embed_dim": 8, "quick_gelu": quick_gelu, "vision_cfg": {**OPEN_CLIP, **changes}}

    def save(folder: Path) -> str:
        torch.manual_seed(0)
        clip = CLIP(8, CLIPVisionCfg(**{**OPEN_CLIP, **changes}), _TEXT, quick_gelu)
        spread(clip)
        tensors = {name: tensor.contiguous() for name, tensor in clip.state_dict().items()}
        save_file(tensors, folder / "open_clip_model.safetensors")
        write_json(folder / "open_clip_config.json", {"model_cfg": model})
        return str(folder)

    return save


def open_clip_tokens(quick_gelu: bool = False, **changes: Any) -> Library:
    """What open_clip's forward_intermediates gives, of the whole tower, loaded by open_clip for this size."""

    def tokens(weights: str, layer: int, pixels: torch.Tensor) -> torch.Tensor:
        vision = CLIPVisionCfg(**{**OPEN_CLIP, **changes, "image_size": pixels.shape[-1]})
        clip = CLIP(8, vision, _TEXT, quick_gelu).eval()
        open_clip.load_checkpoint(clip, f"{weights}/open_clip_model.safetensors")
        visual: Any = clip.visual
        with torch.no_grad():
            found = visual.forward_intermediates(
                pixels, indices=[LAYERS + layer], output_fmt="NLC", output_extra_tokens=True
            )
        return torch.cat([found["image_intermediates_prefix"][0], found["image_intermediates"][0]], 1)

    return tokens


def spread(model: nn.Module) -> None:
    """So that no two positions or channels are alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)


def timm_family(name: str, prefix: int, save: Callable[[Path], str]) -> Family:
    return Family(name, "timm", save, timm_tokens, prefix, own=24, grid=3, mixing=("attn.proj",))


FAMILIES = [
    Family(
        "clip",
        "clip",
        saved_hf(CLIPVisionModel, CLIPVisionConfig(**_COMMON, image_size=24)),
        hf_tokens(CLIPVisionModel, "encoder.layers", interpolate_pos_encoding=True),
        prefix=1,
        own=24,
        grid=3,
    ),
    Family(
        "siglip",  # 30 pixels have 3 patches of 8, as so400m has 27 of 14 in 384
        "siglip",
        saved_hf(SiglipVisionModel, SiglipVisionConfig(**_COMMON, image_size=30)),
        hf_tokens(SiglipVisionModel, "encoder.layers", interpolate_pos_encoding=True),
        prefix=0,
        own=30,
        grid=3,
    ),
    Family(
        "siglip2",  # its positions are made fewer, not more: only then does its antialiasing show
        "siglip2",
        saved_hf(Siglip2VisionModel, Siglip2VisionConfig(**_COMMON, num_patches=25)),
        hf_tokens(Siglip2VisionModel, "encoder.layers"),
        prefix=0,
        own=40,
        grid=5,
        other=24,
    ),
    Family(
        "dinov2",
        "dinov2",
        saved_hf(Dinov2Model, Dinov2Config(**_DINOV2, mlp_ratio=2)),
        hf_tokens(Dinov2Model, "encoder.layer"),
        prefix=1,
        own=24,
        grid=3,
    ),
    Family(
        "dinov2, registers, SwiGLU",
        "dinov2",
        saved_hf(
            Dinov2WithRegistersModel,
            Dinov2WithRegistersConfig(**_DINOV2, mlp_ratio=2, num_register_tokens=4, use_swiglu_ffn=True),
        ),
        hf_tokens(Dinov2WithRegistersModel, "encoder.layer"),
        prefix=5,
        own=24,
        grid=3,
    ),
    Family(
        "dinov3",
        "dinov3",
        saved_hf(DINOv3ViTModel, DINOv3ViTConfig(**_DINO)),
        hf_tokens(DINOv3ViTModel, "model.layer"),
        prefix=1,
        own=24,
        grid=3,
    ),
    Family(
        "dinov3, registers, gated",
        "dinov3",
        saved_hf(DINOv3ViTModel, DINOv3ViTConfig(**_DINO, num_register_tokens=4, use_gated_mlp=True)),
        hf_tokens(DINOv3ViTModel, "model.layer"),
        prefix=5,
        own=24,
        grid=3,
    ),
    Family("open_clip", "open_clip", saved_open_clip(), open_clip_tokens(), prefix=1, own=24, grid=3),
    Family(
        "open_clip, QuickGELU",
        "open_clip",
        saved_open_clip(True, ls_init_value=0.7, no_ln_pre=True),
        open_clip_tokens(True, ls_init_value=0.7, no_ln_pre=True),
        prefix=1,
        own=24,
        grid=3,
    ),
    timm_family("timm ViT", 1, saved_timm("vit_tiny_patch16_224")),
    timm_family("timm SigLIP", 0, saved_timm("vit_base_patch16_siglip_224")),
    timm_family(
        "timm DINOv2, any size", 5, saved_timm("vit_small_patch14_reg4_dinov2", dynamic_img_size=True)
    ),
    timm_family("timm EVA-02", 1, saved_timm("eva02_tiny_patch14_224")),
    timm_family("timm PE", 1, saved_timm("vit_pe_core_tiny_patch16_384")),
    timm_family("timm DINOv3", 5, saved_timm("vit_small_patch16_dinov3_qkvb")),
    timm_family("timm BEiT", 1, saved_timm("beit_base_patch16_224")),
]


def pictures(count: int, side: int, seed: int = 0) -> torch.Tensor:
    """uint8 noise [count, 3, side, side]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def normalised(tower: VisionTower, images: torch.Tensor) -> torch.Tensor:
    """By hand, in fp64."""
    mean, std = (torch.tensor(values).double().view(1, 3, 1, 1) for values in (tower.mean, tower.std))
    return ((images.double() / 255 - mean) / std).float()
