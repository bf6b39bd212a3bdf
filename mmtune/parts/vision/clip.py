"""CLIP towers of transformers (CLIPVisionModel, also inside a whole CLIPModel checkpoint)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPVisionConfig, CLIPVisionModel

from mmtune.core.errors import UserError
from mmtune.core.files import read_json, write_json
from mmtune.parts.loading import from_pretrained, load_config, new_config, own_weights, refusals
from mmtune.parts.vision.base import VisionTower, layers_up_to

# The normalisation of OpenAI's CLIP, used where a checkpoint brings no preprocessor_config.json.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


_CLIP = "Name the folder or hub name of a CLIP model or of its vision tower."


class ClipTower(VisionTower):
    """Patch features of a CLIP tower's hidden layer, without the CLS token."""

    has_cls = True
    unused = ("post_layernorm",)  # it serves the pooled CLS token only

    def __init__(self, hf: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.hf = hf
        self.width = hf.config.hidden_size
        self.image_size = hf.config.image_size
        self.patch = hf.config.patch_size
        self.tokens = (self.image_size // self.patch) ** 2
        self.mean = (mean[0], mean[1], mean[2])
        self.std = (std[0], std[1], std[2])

    @classmethod
    def load(cls, weights: str, layer: int, dtype: torch.dtype) -> ClipTower:
        config: Any = load_config(weights)
        config = config.vision_config if isinstance(config, CLIPConfig) else config
        if not isinstance(config, CLIPVisionConfig):
            raise UserError(
                f"this is a {config.model_type} model, not a CLIP tower", where=weights, mend=_CLIP
            )
        config.num_hidden_layers = layers_up_to(layer, config.num_hidden_layers, weights)
        hf = from_pretrained(CLIPVisionModel, weights, config=config, dtype=dtype)
        mean, std = MEAN, STD
        preprocessor = Path(weights) / "preprocessor_config.json"
        if preprocessor.is_file():
            said = read_json(preprocessor)
            mean, std = said.get("image_mean", mean), said.get("image_std", std)
        return cls(hf, tuple(mean), tuple(std))

    @classmethod
    def create(cls, config: dict[str, Any], layer: int) -> ClipTower:
        where = "model.vision.config"
        made = new_config(CLIPVisionConfig, config, where)
        made.num_hidden_layers = layers_up_to(layer, made.num_hidden_layers, where)
        with refusals(where):
            hf = CLIPVisionModel(made)
        return cls(hf, MEAN, STD)

    def save(self, folder: Path, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        self.hf.save_pretrained(folder, state_dict=own_weights(self.hf, tensors))
        preprocessor = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": self.image_size},
            "crop_size": {"height": self.image_size, "width": self.image_size},
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        write_json(folder / "preprocessor_config.json", preprocessor)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # Not post-normalised: transformers applies post_layernorm to the pooled CLS token only.
        return self.hf(self.normalise(images, self.hf.dtype)).last_hidden_state[:, 1:]
