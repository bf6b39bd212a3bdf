"""SigLIP towers of transformers (SiglipVisionModel), the SigLIP 2 of one resolution among them.

Checkpoints are whole SiglipModels as a rule; google/siglip2-so400m-patch14-384 is one too. A side that is no
multiple of the patch loses what is over: so400m has 27 x 27 patches of 14 pixels in its 384.
"""

from __future__ import annotations

from transformers import SiglipVisionModel

from mmtune.parts.vision.hf import TransformersTower
from mmtune.parts.vision.pixels import Pixels

HALF = (0.5, 0.5, 0.5)


class SiglipTower(TransformersTower):
    """Patch features of a SigLIP tower's hidden layer. It has no CLS token: it pools by attention."""

    has_cls = False
    unused = ("post_layernorm",)
    models = (SiglipVisionModel,)
    wholes = ("siglip",)
    published = Pixels(HALF, HALF, own_fit="squash")
    processor = "SiglipImageProcessor"
    switched_off = (("vision_use_head", False),)  # the pooling
