"""What towers of transformers have in common: the model, held as `hf`, ends at the layer that is used."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Self

import torch

from mmtune.core.errors import UserError
from mmtune.core.files import write_json
from mmtune.parts.loading import from_pretrained, load_config, new_config, own_weights, refusals
from mmtune.parts.spec import MODEL_TYPES
from mmtune.parts.vision.base import (
    VisionTower,
    layers_up_to,
    require_tokens,
    require_whole_patches,
    side_of,
)
from mmtune.parts.vision.pixels import FILE, Pixels, read_pixels, said_of


class TransformersTower(VisionTower):
    """A vision model of transformers.

    A family says which `models` it takes (the first is made of a config without a model_type), in which
    `wholes` they also come (model_types with a vision_config), the transform of its `published` checkpoints,
    transformers' image `processor`, the name of its `positions` among the embeddings, and in `switched_off`
    the fields of a config that the features are to be without.
    """

    models: tuple[Any, ...]
    wholes: tuple[str, ...] = ()
    published: Pixels
    processor: str
    positions: str = "position_embedding.weight"
    switched_off: tuple[tuple[str, Any], ...] = ()

    def __init__(self, hf: Any, pixels: Pixels) -> None:
        super().__init__()
        self.hf = hf
        self.width = hf.config.hidden_size
        self.patch = side_of(hf.config.patch_size, "patch_size", "config.json")
        self.prefix = int(self.has_cls) + getattr(hf.config, "num_register_tokens", 0)
        self.image_size = self.side()
        self.tokens = require_tokens(
            (self.image_size // self.patch) ** 2, self.image_size, self.patch, "config.json"
        )
        self._show(pixels)

    @classmethod
    def load(cls, weights: str, layer: int, dtype: torch.dtype, image_size: int | None = None) -> Self:
        config: Any = load_config(weights)
        if config.model_type in cls.wholes:
            config = config.vision_config
        model = cls._model(config.model_type, weights)
        cls._cut(config, layer, weights)
        cls._outline(model, config, weights)
        hf = from_pretrained(model, weights, config=config, dtype=dtype)
        tower = cls(hf, read_pixels(weights, cls.published))
        return tower.resized(image_size, weights)

    @classmethod
    def fields(cls, config: dict[str, Any], where: str) -> dict[str, Any]:
        if config.get("model_type") in cls.wholes:
            config = config.get("vision_config") or {}
        kind = cls._model(config.get("model_type"), where).config_class
        default = kind()  # files bring along notes of older versions and of other models
        kept = {name: value for name, value in config.items() if hasattr(default, name)}
        return {**kept, "model_type": kind.model_type}

    @classmethod
    def create(cls, config: dict[str, Any], layer: int, image_size: int | None = None) -> Self:
        where = "model.vision.config"
        fields = dict(config)
        model = cls._model(fields.pop("model_type", None), where)
        made = new_config(model.config_class, fields, where)
        cls._cut(made, layer, where)
        cls._outline(model, made, where)
        return cls(model(made), cls.published).resized(image_size, where)

    def take_transform(self, folder: str) -> None:
        self._show(read_pixels(folder, self.published))

    def save(self, folder: Path, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        self.hf.save_pretrained(folder, state_dict=own_weights(self.hf, tensors))
        write_json(folder / FILE, self.preprocessor())

    def preprocessor(self) -> dict[str, Any]:
        """The content of preprocessor_config.json."""
        said = said_of(self.transform("own" if self.own_fit else "crop"))
        if self.own_fit is None:
            said["do_center_crop"] = False
        return {"image_processor_type": self.processor, **said}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.hidden(self.normalise(images, self.hf.dtype))[:, self.prefix :]

    def hidden(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the last block gives, prefix included: no final norm, no pooling."""
        return self.hf.encoder(inputs_embeds=self.hf.embeddings(pixels)).last_hidden_state

    def side(self) -> int:
        """The side in pixels of the pictures that its positions are for."""
        return side_of(self.hf.config.image_size, "image_size", "config.json")

    def interpolated(self, side: int) -> torch.Tensor | None:
        """The positions for pictures of another side as transformers makes them; None where there are none.
        The config is from now on for that side.
        """
        self.hf.config.image_size = side
        blank = torch.empty(1, (side // self.patch) ** 2 + int(self.has_cls), self.width)
        return self.hf.embeddings.interpolate_pos_encoding(blank, side, side)

    def _show(self, pixels: Pixels) -> None:
        self.mean, self.std, self.resample, self.own_fit, self.crop_pct = pixels

    @torch.no_grad()
    def resized(self, side: int | None, where: str) -> Self:
        """The tower for pictures of another side, saved from now on as one for those. Raises UserError for a
        side that is not made of whole patches.
        """
        if side in (None, self.image_size):
            return self
        require_whole_patches(side, self.patch, where)
        positions = self.interpolated(side)
        if positions is not None:
            old = self.hf.embeddings
            made = type(old)(self.hf.config).to(self.hf.dtype)
            shape = made.get_parameter(self.positions).shape
            made.load_state_dict(old.state_dict() | {self.positions: positions.reshape(shape)})
            self.hf.embeddings = made
        self.image_size, self.tokens = side, (side // self.patch) ** 2
        return self

    @classmethod
    def _cut(cls, config: Any, layer: int, where: str) -> None:
        config.num_hidden_layers = layers_up_to(layer, config.num_hidden_layers, where)
        if hasattr(config, "stage_names"):  # by which backbones name their layers
            config.stage_names = config.stage_names[: config.num_hidden_layers + 1]
            config.set_output_features_output_indices(out_features=None, out_indices=None)
        for name, value in cls.switched_off:
            setattr(config, name, value)

    @classmethod
    def _outline(cls, model: Any, config: Any, where: str) -> None:
        """Raises UserError for a config that makes no tower, before there are weights."""
        with warnings.catch_warnings(), torch.device("meta"), refusals(where):
            warnings.filterwarnings("ignore", message=".*is a no-op")
            if getattr(config, "num_channels", 3) != 3:
                what = f"for pictures of {config.num_channels} channels, not of three colours"
                raise UserError(what, where=where, mend="Choose another checkpoint.")
            cls(model(deepcopy(config)), cls.published)

    @classmethod
    def _model(cls, model_type: str | None, where: str) -> Any:
        taken = {model.config_class.model_type: model for model in cls.models}
        if model_type is None:
            return cls.models[0]
        if model_type not in taken:
            known = MODEL_TYPES.get(model_type)
            raise UserError(
                f"this is a {model_type} model, not a {' or '.join([*cls.wholes, *taken])}",
                where=where,
                mend=f"Say tower: {known}." if known else "Name the folder or hub name of such a model.",
            )
        return taken[model_type]
