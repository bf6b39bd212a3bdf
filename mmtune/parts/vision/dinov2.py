"""DINOv2 towers of transformers, with registers and without (Dinov2Model, Dinov2WithRegistersModel)."""

from __future__ import annotations

import torch
from transformers import Dinov2Model, Dinov2WithRegistersModel

from mmtune.parts.vision.hf import TransformersTower
from mmtune.parts.vision.pixels import Pixels

# ImageNet's.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Dinov2Tower(TransformersTower):
    """Patch features of a DINOv2 tower's hidden layer, without CLS and registers.

    Its own size is that of its positions, 518 pixels for the published ones, whose image processor makes
    pictures of 224: `image_size: 224` does as that.
    """

    has_cls = True
    unused = ("embeddings.mask_token", "layernorm")
    models = (Dinov2Model, Dinov2WithRegistersModel)
    published = Pixels(MEAN, STD, crop_pct=224 / 256)
    processor = "BitImageProcessor"
    positions = "position_embeddings"

    def hidden(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.hf.encoder(self.hf.embeddings(pixels)).last_hidden_state
