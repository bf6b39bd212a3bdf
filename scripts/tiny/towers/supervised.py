"""A ViT of timm that learns from labels: which things and letters are in a picture, not where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from pictures import CONTENTS, MEAN, PATCH, SIDE, STD, WIDTH, Pictures, descend, normalised
from timm.models import save_for_hf
from torch.nn.functional import binary_cross_entropy_with_logits

STEPS = 2_000
ARCHITECTURE = {
    "img_size": SIDE,
    "patch_size": PATCH,
    "embed_dim": WIDTH,
    "depth": 3,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "class_token": False,
    "global_pool": "avg",
    "num_classes": len(CONTENTS) - 1,
}


def new() -> Any:
    return timm.create_model("vit_tiny_patch16_224", **ARCHITECTURE)


def train(model: Any, pictures: Pictures, steps: int) -> float:
    present = torch.zeros(len(pictures), len(CONTENTS)).scatter_(1, pictures.contents, 1.0)[:, 1:]

    def loss(batch: torch.Tensor) -> torch.Tensor:
        logits = model(normalised(pictures.pixels[batch]))
        return binary_cross_entropy_with_logits(logits, present[batch])

    return descend(loss, model.parameters(), len(pictures), steps)


def features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """[N, 16, width] of the last block."""
    seen = normalised(pixels)
    (last,) = model.forward_intermediates(seen, indices=1, output_fmt="NLC", intermediates_only=True)
    return last


def save(model: Any, folder: Path) -> None:
    transform = {"mean": [MEAN] * 3, "std": [STD] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    model.pretrained_cfg = {**model.pretrained_cfg, **transform, "input_size": [3, SIDE, SIDE], "tag": "tiny"}
    save_for_hf(model.half(), str(folder), model_args=ARCHITECTURE, safe_serialization=True)
