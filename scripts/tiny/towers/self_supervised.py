"""A DINOv2 of transformers that learns from pictures alone: to know a cell again when it is seen anew.

Each picture is seen twice, moved by a pixel, tinted and sprinkled with noise; the second time the cells of
all pictures are shuffled, so that neither its place nor its neighbours tell a cell. Each token of one view is
to be found among all those of the other. Source: SimCLR (Chen et al., ICML 2020), here on each token as in
DenseCL (Wang et al., CVPR 2021).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pictures import MEAN, PATCH, SIDE, STD, WIDTH, Pictures, descend, normalised
from torch import nn
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

STEPS = 2_000
TEMPERATURE = 0.1


def new() -> Any:
    return Dinov2Model(
        Dinov2Config(
            hidden_size=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            mlp_ratio=2,
            image_size=SIDE,
            patch_size=PATCH,
        )
    )


def train(model: Any, pictures: Pictures, steps: int) -> float:
    head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def tokens(pixels: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        view = joined(cut(seen_anew(pixels))[order])
        states = model(normalised(view), output_hidden_states=True).hidden_states[-1][:, 1:]
        return nn.functional.normalize(head(states).flatten(0, 1), dim=1)

    def loss(batch: torch.Tensor) -> torch.Tensor:
        pixels = pictures.pixels[batch].float()
        plain = torch.arange(len(cut(pixels)))
        order = plain[torch.randperm(len(plain))]
        alike = tokens(pixels, order) @ tokens(pixels, plain).T / TEMPERATURE
        found, back = (
            nn.functional.cross_entropy(*pair) for pair in ((alike, order), (alike.T, order.argsort()))
        )
        return (found + back) / 2

    return descend(loss, [*model.parameters(), *head.parameters()], len(pictures), steps, batch_size=32)


def cut(pixels: torch.Tensor) -> torch.Tensor:
    """[N, 3, 64, 64] -> the cells [N * 16, 768]."""
    return nn.functional.unfold(pixels, PATCH, stride=PATCH).mT.flatten(0, 1)


def joined(cells: torch.Tensor) -> torch.Tensor:
    """The way back."""
    by_picture = cells.unflatten(0, (-1, (SIDE // PATCH) ** 2)).mT
    return nn.functional.fold(by_picture, SIDE, PATCH, stride=PATCH)


def seen_anew(pixels: torch.Tensor) -> torch.Tensor:
    """The same pictures moved by a pixel, tinted, with noise."""
    down, right = torch.randint(-1, 2, (2,)).tolist()
    tint = 12 * torch.randn(len(pixels), 3, 1, 1)
    return pixels.roll((down, right), (2, 3)) + tint + 8 * torch.randn_like(pixels)


def features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """[N, 16, width] of the last block, without the CLS token and before the last norm."""
    return model(normalised(pixels), output_hidden_states=True).hidden_states[-1][:, 1:]


def save(model: Any, folder: Path) -> None:
    model.half().save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    transform = {"size": {"shortest_edge": SIDE}, "crop_size": square, "resample": 3}
    BitImageProcessor(**transform, image_mean=[MEAN] * 3, image_std=[STD] * 3).save_pretrained(folder)
