"""CLIP towers of transformers (CLIPVisionModel, also inside a whole CLIPModel checkpoint)."""

from __future__ import annotations

import torch
from transformers import CLIPVisionModel

from mmtune.parts.vision.hf import TransformersTower
from mmtune.parts.vision.pixels import Pixels

# The normalisation of OpenAI's CLIP, used where a checkpoint brings no preprocessor_config.json.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class ClipTower(TransformersTower):
    """Patch features of a CLIP tower's hidden layer, without the CLS token."""

    has_cls = True
    unused = ("post_layernorm",)  # it serves the pooled CLS token only
    models = (CLIPVisionModel,)
    wholes = ("clip",)
    published = Pixels(MEAN, STD)
    processor = "CLIPImageProcessor"

    def hidden(self, pixels: torch.Tensor) -> torch.Tensor:
        # Not post-normalised: transformers applies post_layernorm to the pooled CLS token only.
        return self.hf(pixels).last_hidden_state
