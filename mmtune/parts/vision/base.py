"""The contract of a vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmtune.core.errors import UserError
from mmtune.parts.loading import recompute_activations, split_layers


class VisionTower(nn.Module):
    """Pictures in, patch features out.

    A tower declares `width` (of a feature), `tokens` (per picture, without CLS and registers),
    `image_size`, `patch`, `has_cls`, and the `mean` and `std` its pictures are normalised with; `unused`
    are prefixes of the names of parameters that its features don't depend on. Layers above the one that
    is used are neither loaded nor run. A tower of transformers holds its model as `hf`; `layers`,
    `checkpoint_activations` and `attend_by` are for those.
    """

    hf: Any

    width: int
    tokens: int
    image_size: int
    patch: int
    has_cls: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    unused: tuple[str, ...] = ()

    @classmethod
    def load(cls, weights: str, layer: int, dtype: torch.dtype) -> VisionTower:
        """From a folder or hub name, up to `layer`. Raises UserError where a weight is missing."""
        raise NotImplementedError

    @classmethod
    def create(cls, config: dict[str, Any], layer: int) -> VisionTower:
        """With random weights, from the fields of the family's own config. Raises UserError for others."""
        raise NotImplementedError

    def save(self, folder: Path, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Writes the family's own format, safetensors only. tensors: in place of the tower's own."""
        raise NotImplementedError

    def layers(self) -> list[nn.Module]:
        """The blocks: what an engine that splits weights gathers at a time."""
        return split_layers(self.hf)

    def checkpoint_activations(self, on: bool = True) -> None:
        """From now on a block keeps its input alone and runs again in the backward pass; or no longer."""
        recompute_activations(self.hf, on)

    def attend_by(self, implementation: str) -> None:
        """Chooses how attention is computed: `sdpa` or `eager`."""
        self.hf.set_attn_implementation(implementation)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features [N, tokens, width] of uint8 pictures [N, 3, image_size, image_size]."""
        raise NotImplementedError

    def normalise(self, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """uint8 pictures [N, 3, S, S] -> what the tower's first layer expects, of the same shape."""
        mean = torch.tensor(self.mean, device=images.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, 3, 1, 1)
        return ((images.float() / 255 - mean) / std).to(dtype)


def layers_up_to(layer: int, count: int, where: str) -> int:
    """How many of a tower's `count` layers are used where `layer`, -1 for the last, is the one whose output
    is taken. Raises UserError where there is none.
    """
    used = count + 1 + layer
    if layer >= 0 or used < 1:
        raise UserError(
            f"layer {layer} of a tower with {count} layers",
            where=where,
            mend=f"Name one from -{count} to -1.",
        )
    return used
