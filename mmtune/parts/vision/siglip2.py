"""SigLIP 2 towers of any resolution (NaFlex, Siglip2VisionModel); those of one are `tower: siglip`.

NaFlex takes patches in rows and how many rows and columns they had; here these are a square. Its positions
are a grid of 16 x 16 (config.num_patches), and a picture has as many patches where no image_size is given.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from transformers import Siglip2VisionModel

from mmtune.core.errors import UserError
from mmtune.parts.vision.hf import TransformersTower
from mmtune.parts.vision.pixels import Pixels
from mmtune.parts.vision.siglip import HALF


class Siglip2Tower(TransformersTower):
    """Patch features of a NaFlex tower's hidden layer, from square pictures. It has no CLS token."""

    has_cls = False
    unused = ("post_layernorm",)
    models = (Siglip2VisionModel,)
    wholes = ("siglip2",)
    published = Pixels(HALF, HALF, "bilinear", own_fit=None)  # its own transform keeps a picture's ratio
    processor = "Siglip2ImageProcessor"
    switched_off = (("vision_use_head", False),)

    def hidden(self, pixels: torch.Tensor) -> torch.Tensor:
        embedded = self.hf.embeddings(in_rows(pixels, self.patch), _square(self.image_size // self.patch))
        return self.hf.encoder(inputs_embeds=embedded).last_hidden_state

    def preprocessor(self) -> dict[str, Any]:
        said = super().preprocessor()
        kept = {name: said[name] for name in ("image_processor_type", "resample", "image_mean", "image_std")}
        return {**kept, "patch_size": self.patch, "max_num_patches": self.tokens}

    def side(self) -> int:
        count = self.hf.config.num_patches
        if isqrt(count) ** 2 != count:
            raise UserError(f"num_patches {count} is no square grid of positions", where="config.json")
        return isqrt(count) * self.patch

    def interpolated(self, side: int) -> torch.Tensor:
        count, embeddings = side // self.patch, self.hf.embeddings
        grid = embeddings.position_embedding.weight.unflatten(0, (embeddings.position_embedding_size, -1))
        self.hf.config.num_patches = count**2
        return embeddings.resize_positional_embeddings(grid, _square(count), count**2)


def in_rows(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """[N, 3, S, S] -> [N, patches, patch x patch x 3]: row by row, and each pixel's colours side by side."""
    return (
        pixels.unfold(2, patch, patch)
        .unfold(3, patch, patch)
        .permute(0, 2, 3, 4, 5, 1)
        .flatten(3)
        .flatten(1, 2)
    )


def _square(count: int) -> torch.Tensor:
    return torch.tensor([[count, count]], device="cpu")  # transformers reads the numbers themselves
