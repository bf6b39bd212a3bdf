"""DINOv3's vision transformers (DINOv3ViTModel); its ConvNeXts are no such models, and are refused."""

from __future__ import annotations

import torch
from transformers import DINOv3ViTModel

from mmtune.parts.vision.dinov2 import MEAN, STD
from mmtune.parts.vision.hf import TransformersTower
from mmtune.parts.vision.pixels import Pixels


class Dinov3Tower(TransformersTower):
    """Patch features of a DINOv3 tower's hidden layer, without CLS and registers.

    Positions are rotations of queries and keys, worked out for pictures of any side.
    """

    has_cls = True
    unused = ("embeddings.mask_token", "norm")
    models = (DINOv3ViTModel,)
    published = Pixels(MEAN, STD, "bilinear", "squash")
    processor = "DINOv3ViTImageProcessor"
    # transformers shifts and stretches the positions at random while a model trains.
    switched_off = tuple((f"pos_embed_{change}", None) for change in ("shift", "jitter", "rescale"))

    def hidden(self, pixels: torch.Tensor) -> torch.Tensor:
        hf = self.hf
        return hf.model(
            hf.embeddings(pixels), position_embeddings=hf.rope_embeddings(pixels)
        ).last_hidden_state

    def interpolated(self, side: int) -> None:
        self.hf.config.image_size = side
