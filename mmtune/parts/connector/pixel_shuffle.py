"""Fewer tokens by space-to-depth, then an MLP, as in InternVL (Chen et al. 2024)."""

from __future__ import annotations

import torch
from torch import nn

from mmtune.core.errors import UserError
from mmtune.parts.connector.base import WHERE, Connector, at_least_one, square_side


class PixelShuffleConnector(Connector):
    """Each block of `scale` x `scale` neighbouring features becomes one of scale^2 times the width, row by
    row; a norm, a linear layer, GELU and a second one follow, as in InternVL.
    """

    kind = "pixel_shuffle"

    def __init__(self, vision_width: int, language_width: int, scale: int = 2) -> None:
        super().__init__(vision_width, language_width, scale=scale)
        at_least_one(scale=scale)
        self.scale = scale
        self.norm = nn.LayerNorm(vision_width * scale**2)
        self.linear_1 = nn.Linear(vision_width * scale**2, language_width)
        self.linear_2 = nn.Linear(language_width, language_width)

    def tokens(self, features: int) -> int:
        side = square_side(features, self.kind)
        if side % self.scale:
            raise UserError(
                f"a scale of {self.scale} does not divide the tower's grid of {side} x {side} features",
                where=f"{WHERE}.options.scale",
                mend="Give a scale that does, or the tower another image_size.",
            )
        return (side // self.scale) ** 2

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        side = square_side(features.shape[1], self.kind) // self.scale
        # Row of blocks, row in the block, column of blocks, column in the block, width.
        blocks = features.unflatten(1, (side, self.scale, side, self.scale))
        joined = blocks.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
        return self.linear_2(nn.functional.gelu(self.linear_1(self.norm(joined))))
